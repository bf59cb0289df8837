"""Data weighting in a plain PyTorch loop: the lines with `weighting` are all that it takes.

python examples/embed_torch.py
"""

import torch
from embed_data import VOCABULARY, describe, mixed_batches, target_batches

from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.weighting.bilevel.module_gradients import next_token_losses
from megatron_dwm.weighting.embedded import EmbeddedWeighting, WeighterSize

SETTINGS = WeightingConfig(dwm_num_stages=1, dwm_update_interval=4, dwm_ngram_buckets=4096, dwm_ridge=1.0)


class TinyModel(torch.nn.Module):
    """A language model of one convolution: any module that returns logits will do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, 32)
        self.mixing = torch.nn.Conv1d(32, 32, 2)
        self.output = torch.nn.Linear(32, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits [n, s, V] of tokens [n, s]."""
        hidden = torch.nn.functional.pad(self.embedding(tokens).transpose(1, 2), (1, 0))
        return self.output(torch.tanh(self.mixing(hidden)).transpose(1, 2))


def train(steps: int = 40, settings: WeightingConfig | None = SETTINGS) -> tuple[list[float], torch.Tensor]:
    """Train, with weighting if there are settings; return the losses and the last step's weights."""
    torch.manual_seed(0)
    model = TinyModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches, targets = mixed_batches(16, seed=1), target_batches(16, seed=2)
    weighting = None
    if settings is not None:
        size = WeighterSize(VOCABULARY)
        weighting = EmbeddedWeighting.for_module(model, optimizer, targets, size, train_iters=steps, settings=settings)
    losses, weights = [], torch.ones(16)
    for _ in range(steps):
        batch = next(batches)
        if weighting is not None:
            weighting.before_step()
            weights = weighting.weigh(batch)
        loss = (weights * next_token_losses(model, batch)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if weighting is not None:
            weighting.after_step(batch)
        losses.append(loss.item())
    return losses, weights


if __name__ == "__main__":
    _, weights = train()
    print(describe(weights))
