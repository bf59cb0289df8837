"""The weighter: a Hugging Face sequence classifier with one label, a full copy on every rank.

Shape legend: m samples, s sequence length.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist

from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.runtime.collectives import all_reduce_over_world, world_rank
from megatron_dwm.weighting.bit_hash import bit_hash
from megatron_dwm.weighting.ngram import MODEL_TYPE
from megatron_dwm.weighting.sample_reader import SampleReader
from megatron_dwm.weighting.windows import Window, pad_windows

CHUNK_TOKENS = 1 << 20
"""Tokens whose n-grams are processed at a time."""


class Weighter:
    """Scores samples, and learns from the gradient of an objective in the scores.

    The classifier stays in evaluation mode: scores must not depend on the rank that computes them.
    """

    def __init__(
        self,
        model: Any,
        config: WeightingConfig,
        device: torch.device,
        *,
        reader: SampleReader | None = None,
        tokenizer_fingerprint: str = "",
        tokenizer_digest: str = "",
        bf16: bool = False,
    ) -> None:
        """
        Args:
            model: a classifier with one label, the same on every rank.
            reader: converts samples to what it reads; None if it reads the sample's tokens.
            tokenizer_fingerprint: fingerprint of its tokenizer's vocabulary, if it is not the run's tokenizer.
            tokenizer_digest: digest of that tokenizer.
            bf16: compute in bf16 on a GPU (the parameters stay in fp32).
        """
        self.model, self.reader = model.float().to(device).eval(), reader
        self.tokenizer_fingerprint, self.tokenizer_digest = tokenizer_fingerprint, tokenizer_digest
        self._batch_size = config.dwm_score_batch_size
        self.clip_grad = config.dwm_clip_grad
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.dwm_lr, weight_decay=config.dwm_weight_decay
        )
        self._autocast = bf16 and device.type == "cuda"

    @property
    def device(self) -> torch.device:
        """The device of the classifier."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def num_parameters(self) -> int:
        """The number of the classifier's parameters."""
        return sum(param.numel() for param in self.model.parameters())

    @property
    def num_active_parameters(self) -> int:
        """The number of parameters without the input embedding, which needs no multiplications."""
        if hasattr(self.model, "operations_per_token"):
            return int(self.model.operations_per_token)
        embedding: torch.nn.Module = self.model.get_input_embeddings()
        return self.num_parameters - sum(param.numel() for param in embedding.parameters())

    @property
    def is_linear(self) -> bool:
        """Whether the classifier is fitted in closed form (:mod:`megatron_dwm.weighting.bilevel.ridge`)."""
        return bool(getattr(self.model, "is_linear", False))

    def load_state(self, state: dict[str, Any]) -> None:
        """Load the parameters and optimizer moments of :func:`weighter_state`; keep the learning rate and decay."""
        self.model.load_state_dict(state["weighter"])
        flags = [(group["lr"], group["weight_decay"]) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["weighter_optimizer"])
        for group, (lr, weight_decay) in zip(self.optimizer.param_groups, flags, strict=True):
            group["lr"], group["weight_decay"] = lr, weight_decay

    def score(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the scores [m] of tokens [m, s], float32."""
        with torch.no_grad():
            return self._score(tokens)

    def step(self, tokens: torch.Tensor, score_gradient: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """Take one gradient step; every rank passes its own samples and holds their activations.

        Args:
            tokens: this rank's samples [m, s].
            score_gradient: returns, for scores [m], the gradient of the objective with respect to them [m]; may be a
                collective call.

        Returns:
            norm of the gradient over all samples, before clipping.

        Raises:
            FloatingPointError: the gradient is not finite; on every rank, and before the step.
        """
        self.optimizer.zero_grad(set_to_none=False)
        scores = self._score(tokens)
        gradient_in_scores = score_gradient(scores.detach()).to(scores)
        if len(tokens):
            scores.backward(gradient_in_scores)
        gradients = []
        for param in self.model.parameters():
            if param.grad is None:  # this rank had no sample, or the parameter does not affect the score
                param.grad = torch.zeros_like(param)
            gradients.append(param.grad)
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        all_reduce_over_world(flat)
        for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))
        limit = self.clip_grad if self.clip_grad > 0 else float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the weighter's gradient has norm {norm}; lower --dwm-lr, or start a new one")
        self.optimizer.step()
        return norm

    def check_replicas(self) -> str:
        """Return a hash of the learned tensors' bits, after checking that it is the same on all ranks.

        Replicas that differ would give samples wrong weights, and nothing else would show it. They are therefore
        compared at every update. The hash is computed on the tensors' device.

        Raises:
            RuntimeError: a replica differs.
        """
        local_hash = bit_hash(learned_tensors(self.model).values())
        extremes = torch.stack([local_hash, ~local_hash])  # the least complement belongs to the largest
        all_reduce_over_world(extremes, dist.ReduceOp.MIN)
        found, least, most = torch.stack([local_hash, extremes[0], ~extremes[1]]).tolist()
        digest = "".join(f"{number % 2**64:016x}" for number in found)
        if least != most:
            raise RuntimeError(
                f"the weighter's replicas differ (rank {world_rank()} has {digest[:16]}); "
                "resume from the last checkpoint"
            )
        return digest

    def hash(self) -> str:
        """Return the sha256 of the learned tensors' bytes."""
        return model_digest(self.model)

    def features(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the features of tokens [m, s] for an n-gram classifier: buckets and values [m, f]."""
        if self.reader is None:
            found: tuple[torch.Tensor, torch.Tensor] = self.model.features(tokens)
            return found
        # It has no positions, and reads each sample in one window.
        windows = [window for windows in self.reader(tokens) for window in windows]
        found = self.model.features(*pad_windows(windows, self._pad, tokens.device))
        return found

    def samples_at_a_time(self, length: int) -> int:
        """Return how many samples or windows of this many tokens are scored at a time.

        N-grams need little memory, and a GPU would wait for the host to launch the kernels of many small parts.
        """
        if self._batch_size is not None:
            return self._batch_size
        reads_ngrams = self.model.config.model_type == MODEL_TYPE
        return max(32, CHUNK_TOKENS // max(length, 1)) if reads_ngrams else 32

    @property
    def _pad(self) -> int:
        return int(self.model.config.pad_token_id)

    def _score(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.reader is not None and len(tokens):
            return self._score_windows(self.reader(tokens), tokens.device)
        at_a_time = self.samples_at_a_time(tokens.shape[1])
        parts = [self._forward(part) for part in tokens.split(at_a_time) if len(part)]
        return torch.cat(parts) if parts else torch.zeros(0, device=tokens.device)

    def _score_windows(self, windows: list[list[Window]], device: torch.device) -> torch.Tensor:
        """Return each sample's mean score over its windows, in proportion to their tokens [m]."""
        placed = [(sample, window) for sample, of_sample in enumerate(windows) for window in of_sample]
        placed.sort(key=lambda item: len(item[1].ids))
        at_a_time = self.samples_at_a_time(len(placed[-1][1].ids))
        scores = [
            self._forward(*pad_windows([window for _, window in placed[start : start + at_a_time]], self._pad, device))
            for start in range(0, len(placed), at_a_time)
        ]
        samples = torch.tensor([sample for sample, _ in placed], device=device)
        sizes = torch.tensor([window.size for _, window in placed], dtype=torch.float32, device=device)
        totals = torch.zeros(len(windows), device=device)
        return totals.index_add(0, samples, torch.cat(scores) * sizes) / totals.index_add(0, samples, sizes)

    def _forward(self, tokens: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        mask = {} if attention_mask is None else {"attention_mask": attention_mask}
        with torch.autocast("cuda", torch.bfloat16) if self._autocast else nullcontext():
            logits: torch.Tensor = self.model(input_ids=tokens, use_cache=False, **mask).logits
        return logits.squeeze(-1).float()


def learned_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's parameters, each once, and the other tensors that are saved with it, by name."""
    every_name = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    others = {name: tensor for name, tensor in model.state_dict().items() if name not in every_name}
    return {**dict(model.named_parameters()), **others}


def is_finite(model: torch.nn.Module) -> bool:
    """Return whether all learned tensors of a model are finite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in learned_tensors(model).values())


def model_digest(model: torch.nn.Module) -> str:
    """Return the sha256 of a model's learned tensors, with their names."""
    digest = hashlib.sha256()
    for name, param in sorted(learned_tensors(model).items()):
        digest.update(name.encode())
        digest.update(param.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def scoring_digest(model: Any, tokenizer_digest: str) -> str:
    """Return a digest of all that the scores of a classifier depend on: parameters, configuration and tokenizer."""
    config = {name: value for name, value in model.config.to_dict().items() if not name.startswith("_")}
    facts = [model_digest(model), config, tokenizer_digest]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def weighter_state(weighter: Weighter) -> dict[str, Any]:
    """Return what a checkpoint keeps of a weighter: its configuration, tokenizer, parameters and optimizer."""
    return {
        "weighter_tokenizer": weighter.tokenizer_fingerprint,
        "weighter_tokenizer_digest": weighter.tokenizer_digest,
        "weighter_config": weighter.model.config.to_json_string(use_diff=False),
        "weighter": weighter.model.state_dict(),
        "weighter_optimizer": weighter.optimizer.state_dict(),
    }
