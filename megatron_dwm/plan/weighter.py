"""Memory and traffic of a run's weighter, whose model is built without allocating memory.

Shape legend: N samples of the global batch, c of them on this rank, s sequence length, B buckets of an n-gram weighter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_dwm.config.run import RunConfig
from megatron_dwm.plan.meter import Meter, Traffic
from megatron_dwm.plan.simulated_rank import fake_tensors
from megatron_dwm.weighting.bilevel.ridge import CHUNK_TOKENS, are_features_kept
from megatron_dwm.weighting.weighter import Weighter
from megatron_dwm.weighting.weighter_folder import WeighterFolder
from megatron_dwm.weighting.weighter_init import lm_shaped_model, random_weighter_model
from megatron_dwm.weighting.windows import position_limit

RIDGE_BYTES_PER_NGRAM = 8
"""What the regression of a linear weighter holds for each n-gram of the replay: bucket and value."""
RIDGE_CHUNK_BYTES_PER_NGRAM = 40
"""Additional bytes for each n-gram that is being found or multiplied."""
RIDGE_VECTORS = 8
"""Vectors of B numbers in float64 that it holds."""


@dataclass(frozen=True)
class WeighterPlan:
    """The weighter of a run, on one rank."""

    kind: str
    parameters: int
    active_parameters: int
    """Parameters without the input embedding."""
    is_linear: bool
    held: int
    """Bytes that it always holds: parameters, optimizer's state, replay, and the replay's features if they are kept."""
    learning: int
    """Additional bytes during an outer update."""
    traffic: Traffic
    """Traffic of one outer update for the weighter."""


def plan_weighter(config: RunConfig, folder: WeighterFolder | None, vocab_size: int, eod: int) -> WeighterPlan:
    """Build the weighter of the flags, or take the one of the folder that they name, and return its plan."""
    from transformers.initialization import no_init_weights

    settings = config.weighting
    with fake_tensors(), no_init_weights():
        model = _model(config, folder, vocab_size, eod)
        weighter = Weighter(model, settings, torch.device("cpu"))
    is_trained = settings.needs_target
    size, lengths = 4 * weighter.num_parameters, getattr(model.config, "ngram_lengths", [])
    samples = -(-config.sizes.global_batch_size // config.world_size)
    # A linear weighter learns in closed form, and AdamW never makes its state.
    held = size if weighter.is_linear or not is_trained else 3 * size
    held += settings.dwm_replay * samples * 4 * config.model.seq_length if is_trained else 0
    learning, traffic = 0, Traffic()
    if is_trained and weighter.is_linear:
        tokens = settings.dwm_replay * samples * config.model.seq_length
        chunk = RIDGE_CHUNK_BYTES_PER_NGRAM * min(tokens, CHUNK_TOKENS)
        learning = (RIDGE_BYTES_PER_NGRAM * tokens + chunk) * len(lengths)
        learning += 4 * tokens
        learning += RIDGE_VECTORS * 8 * weighter.num_parameters
        if are_features_kept(tokens) and (folder is None or folder.reader is None):
            held += RIDGE_BYTES_PER_NGRAM * tokens * len(lengths)
        # The right-hand side, the residual of the start, and the steps.
        products = settings.dwm_weighter_steps + 2
        traffic.add("all-reduce", float(products * 8 * weighter.num_parameters), config.world_size)
    elif is_trained:
        with fake_tensors():
            learning = 2 * size + _activations(weighter, samples, config.model.seq_length)
        traffic.add("all-reduce", float(settings.dwm_weighter_steps * size), config.world_size)
    return WeighterPlan(
        type(model).__name__,
        weighter.num_parameters,
        weighter.num_active_parameters,
        weighter.is_linear,
        held,
        learning,
        traffic,
    )


def _model(config: RunConfig, folder: WeighterFolder | None, vocab_size: int, eod: int) -> Any:
    settings, model, seed = config.weighting, config.model, config.training.seed
    if folder is not None:
        return folder.model
    if settings.dwm_init_from == "random":
        return random_weighter_model(settings, vocab_size, model.seq_length, eod, seed)
    return lm_shaped_model(model, settings, vocab_size, eod, seed)


def _activations(weighter: Weighter, samples: int, sequence: int) -> int:
    """Return the peak bytes that a step on ``samples`` holds for its backward pass."""
    window, meter = min(sequence, position_limit(weighter.model) or sequence), Meter()
    with meter:
        tokens = torch.zeros(samples * -(-sequence // window), window, dtype=torch.int64)
        scores = torch.cat(
            [weighter.model(input_ids=part, use_cache=False).logits for part in tokens.split(weighter.batch_size)]
        )
        scores.sum().backward()
    return meter.peak
