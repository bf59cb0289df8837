"""Memory and traffic of a run's weighter, whose model is built without allocating memory.

Shape legend: N samples of the global batch, c of them on this rank, s sequence length, B buckets of an n-gram weighter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.run_sizes import RunSizes
from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.plan.meter import Meter, Traffic
from megatron_dwm.plan.simulated_rank import fake_tensors
from megatron_dwm.weighting.bilevel.ridge import are_features_kept
from megatron_dwm.weighting.inputs import WeighterInputs
from megatron_dwm.weighting.weighter import CHUNK_TOKENS, Weighter
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


def plan_weighter(
    settings: WeightingConfig, model: ModelConfig, sizes: RunSizes, inputs: WeighterInputs
) -> WeighterPlan:
    """Build the weighter of the flags, or take the one of the folder that they name, and return its plan."""
    from transformers.initialization import no_init_weights

    with fake_tensors(), no_init_weights():
        weighter = Weighter(_weighter_model(settings, model, inputs), settings, torch.device("cpu"))
    is_trained, sequence = settings.needs_target, model.seq_length
    size, lengths = 4 * weighter.num_parameters, getattr(weighter.model.config, "ngram_lengths", [])
    samples = -(-sizes.global_batch_size // sizes.world_size)
    # A linear weighter learns in closed form, and AdamW never makes its state.
    held = size if weighter.is_linear or not is_trained else 3 * size
    held += settings.dwm_replay * samples * 4 * sequence if is_trained else 0
    learning, traffic = 0, Traffic()
    if is_trained and weighter.is_linear:
        tokens = settings.dwm_replay * samples * sequence
        chunk = RIDGE_CHUNK_BYTES_PER_NGRAM * min(tokens, CHUNK_TOKENS)
        learning = (RIDGE_BYTES_PER_NGRAM * tokens + chunk) * len(lengths)
        learning += 4 * tokens
        learning += RIDGE_VECTORS * 8 * weighter.num_parameters
        if are_features_kept(tokens) and (inputs.folder is None or inputs.folder.reader is None):
            held += RIDGE_BYTES_PER_NGRAM * tokens * len(lengths)
        # The right-hand side, the residual of the start, and the steps.
        products = settings.dwm_weighter_steps + 2
        traffic.add("all-reduce", float(products * 8 * weighter.num_parameters), sizes.world_size)
    elif is_trained:
        with fake_tensors():
            learning = 2 * size + _activations(weighter, samples, sequence)
        traffic.add("all-reduce", float(settings.dwm_weighter_steps * size), sizes.world_size)
    return WeighterPlan(
        type(weighter.model).__name__,
        weighter.num_parameters,
        weighter.num_active_parameters,
        weighter.is_linear,
        held,
        learning,
        traffic,
    )


def _weighter_model(settings: WeightingConfig, model: ModelConfig, inputs: WeighterInputs) -> Any:
    if inputs.folder is not None:
        return inputs.folder.model
    vocab_size, eod, seed = inputs.samples.vocab_size, inputs.samples.eod, 0  # no weights are drawn
    if settings.dwm_init_from == "random":
        return random_weighter_model(settings, vocab_size, model.seq_length, eod, seed)
    return lm_shaped_model(model, settings, vocab_size, eod, seed)


def _activations(weighter: Weighter, samples: int, sequence: int) -> int:
    """Return the peak bytes that a step on ``samples`` holds for its backward pass."""
    window, meter = min(sequence, position_limit(weighter.model) or sequence), Meter()
    with meter:
        tokens = torch.zeros(samples * -(-sequence // window), window, dtype=torch.int64)
        parts = tokens.split(weighter.samples_at_a_time(window))
        scores = torch.cat([weighter.model(input_ids=part, use_cache=False).logits for part in parts])
        scores.sum().backward()
    return meter.peak
