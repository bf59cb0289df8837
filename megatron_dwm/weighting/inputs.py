"""The inputs of a run's weighter and the stages of a run, checked before any process waits for another."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.data.hf_tokenizers import vocabulary_fingerprint
from megatron_dwm.data.sample_text import sample_text
from megatron_dwm.weighting.stage_schedule import StageSchedule, bilevel_stages, frozen_stages
from megatron_dwm.weighting.weighter_folder import SampleTokens, WeighterFolder, read_weighter_folder
from megatron_dwm.weighting.weighter_init import check_init_from_lm
from megatron_dwm.weighting.weighter_stages import weighter_stages

DOCUMENT_JOINT = "\n\n"
"""Text between two documents of a sample, for classifiers that read a sample's text."""


@dataclass(frozen=True)
class WeighterInputs:
    """The inputs of a run's weighter, checked before any process waits for another."""

    samples: SampleTokens
    """The format of the samples."""
    folder: WeighterFolder | None = None
    """The classifier that ``--dwm-load`` or ``--dwm-init-from`` names, if it names a folder; the first of several."""
    digest: str | None = None
    """Digests of all weighters that are read from folders."""


def run_stages(settings: WeightingConfig, train_iters: int, weighter_resumed_at: int | None = None) -> StageSchedule:
    """Return the stages of a run; those of a resumed run cover its whole length by its current flags.

    Args:
        settings: the weighting's flags.
        train_iters: iterations of the run.
        weighter_resumed_at: the iteration from which a run continues with a trained weighter, if it does.

    Raises:
        UserError: the stages do not fit into the run.
    """
    if not settings.needs_target:
        return frozen_stages(settings, train_iters)
    return bilevel_stages(settings, train_iters, weighter_resumed_at)


def sample_tokens(seq_length: int, tokenizer: Any, flags: TokenizerConfig) -> SampleTokens:
    """Return the format of a run's samples.

    Args:
        seq_length: tokens of a sample.
        tokenizer: megatron-core's tokenizer.
        flags: the flags that it was built from.
    """
    return SampleTokens(
        seq_length,
        int(tokenizer.vocab_size),
        int(tokenizer.eod),
        vocabulary_fingerprint(tokenizer, flags),
        partial(sample_text, tokenizer=tokenizer, separator=DOCUMENT_JOINT),
    )


def read_weighter_inputs(
    settings: WeightingConfig, model: ModelConfig, samples: SampleTokens, train_iters: int, seed: int
) -> WeighterInputs:
    """Open and check the weighter's folder.

    Args:
        settings: the weighting's flags, which name it.
        model: the language model's flags, for a weighter of its shape.
        samples: the format of the samples that the weighter reads.
        train_iters: iterations of the run.
        seed: seed of weights that a folder lacks.

    Raises:
        UserError: the folder does not fit.
    """
    if settings.dwm_load is not None:
        flag = "--dwm-load"
        weighters = weighter_stages(flag, settings.dwm_load, train_iters)
        # Check all of them, so that none fails in the middle of the run.
        digests = [read_weighter_folder(flag, w.folder, samples, seed).digest for w in weighters[1:]]
        folder = read_weighter_folder(flag, weighters[0].folder, samples, seed)
        return WeighterInputs(samples, folder, "".join([folder.digest, *digests]))
    if settings.dwm_init_from == "lm":
        check_init_from_lm(model, settings)
    if settings.dwm_init_from in ("lm", "random"):
        return WeighterInputs(samples)
    folder = read_weighter_folder("--dwm-init-from", settings.dwm_init_from, samples, seed)
    return WeighterInputs(samples, folder, digest=folder.digest)
