"""Data weighting in Hugging Face's Trainer: a callback, and the loss function that goes with it.

python examples/embed_trainer.py, or torchrun --nproc-per-node 2 examples/embed_trainer.py; needs accelerate.
"""

import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from embed_data import LENGTH, VOCABULARY, describe, mixed_batches, target_batches
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.weighting.bilevel.module_gradients import IGNORED_LABEL, token_losses_of, tokens_of
from megatron_dwm.weighting.embedded import EmbeddedWeighting, WeighterSize

SETTINGS = WeightingConfig(dwm_num_stages=1, dwm_update_interval=4, dwm_ngram_buckets=4096, dwm_ridge=1.0)


class WeightingCallback(TrainerCallback):
    """Callback that weights the samples of each step; its method ``loss`` is the Trainer's ``compute_loss_func``."""

    def __init__(self, targets: Iterator[Any], length: int, settings: WeightingConfig) -> None:
        self.targets, self.length, self.settings = targets, length, settings

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Make the weighter, now that there is an optimizer."""
        model, size = parts["model"], WeighterSize(parts["model"].config.vocab_size, self.length)
        self.weighting = EmbeddedWeighting.for_module(
            model, parts["optimizer"], self.targets, size, train_iters=state.max_steps, settings=self.settings,
            tokens_of=lambda batch: padded(tokens_of(batch), self.length),
        )  # fmt: skip
        model.register_forward_pre_hook(self.keep_inputs, with_kwargs=True)

    def keep_inputs(self, model: Any, args: Any, inputs: dict[str, Any]) -> None:
        """Keep what the Trainer passes to the model, but not to the loss."""
        self.inputs = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Begin a step."""
        self.microbatches: list[dict[str, torch.Tensor]] = []
        self.weighting.before_step()

    def loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
        """Return the weighted loss of a microbatch, whose weights are relative to those of all processes' samples."""
        losses, weights = token_losses_of(outputs["logits"], labels), torch.ones(len(labels), device=labels.device)
        if torch.is_grad_enabled():  # not in an evaluation
            self.weights = weights = self.weighting.weigh(self.inputs)
            self.microbatches.append({**self.inputs, "labels": labels})
        return (weights[:, None] * losses).sum() / num_items_in_batch

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Make the outer update if it is due, with the step's microbatches padded to one length."""
        length = max(batch["labels"].shape[1] for batch in self.microbatches)
        values = {"labels": IGNORED_LABEL}
        self.weighting.after_step({
            name: torch.cat([padded(batch[name], length, values.get(name, 0)) for batch in self.microbatches])
            for name in self.microbatches[0]
        })  # fmt: skip


def padded(rows: torch.Tensor, length: int, value: int = 0) -> torch.Tensor:
    """Return rows [n, s] padded to a length [n, length]."""
    return torch.nn.functional.pad(rows, (0, length - rows.shape[1]), value=value)


def train(steps: int, settings: WeightingConfig | None) -> tuple[Trainer, WeightingCallback | None]:
    """Train, with weighting if there are settings."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    rows = torch.cat([batch for batch, _ in zip(mixed_batches(16, seed=1), range(steps), strict=False)])
    arguments = TrainingArguments(
        tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=16, learning_rate=1e-2, logging_steps=1,
        report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
    )  # fmt: skip
    callback = None if settings is None else WeightingCallback(target_batches(16, seed=2), LENGTH, settings)
    trainer = Trainer(
        GPT2LMHeadModel(config), arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[callback] if callback else [], compute_loss_func=callback.loss if callback else None,
    )  # fmt: skip
    trainer.train()
    return trainer, callback


if __name__ == "__main__":
    _, callback = train(40, SETTINGS)
    print(describe(callback.weights))
