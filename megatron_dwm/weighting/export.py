"""Exports of the weighter during a run.

An exported weighter is a folder that ``AutoModelForSequenceClassification.from_pretrained`` loads: config.json,
model.safetensors, the tokenizer, and ``dwm_manifest.json``, which describes the run that it comes from.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from megatron_dwm.atomic_write import atomic_folder
from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.data.blend import DataPaths
from megatron_dwm.data.tokenizer_folder import load_tokenizer_folder
from megatron_dwm.errors import UserError, write_failure_reason
from megatron_dwm.safe_unpickling import short_reason
from megatron_dwm.weighting.export_manifest import write_manifest
from megatron_dwm.weighting.weighter import Weighter, is_finite

logger = logging.getLogger(__name__)


class WeighterExporter(Protocol):
    """Writes the weighter where a run keeps its exports."""

    def export(self, weighter: Weighter, iteration: int, stage: int) -> None:
        """Export the weighter after ``iteration``; every rank calls it."""


class NoExport:
    """The exporter of a run without ``--save``."""

    def export(self, weighter: Weighter, iteration: int, stage: int) -> None:
        """Write nothing."""


class FolderExporter:
    """Writes ``<save>/weighter/iter_XXXXXXX/``, each iteration once."""

    def __init__(self, root: Path, save_tokenizer: Callable[[Path], Any], run_facts: Mapping[str, Any]) -> None:
        """
        Args:
            root: holds the exports.
            save_tokenizer: writes the weighter's tokenizer to a folder.
            run_facts: the manifest's part about the run (:func:`run_facts`).
        """
        self.root, self.save_tokenizer, self.run_facts = root, save_tokenizer, run_facts
        self._last: tuple[int, str] | None = None

    def export(self, weighter: Weighter, iteration: int, stage: int) -> None:
        """Write the export on the first rank, unless it exists; a weighter that is not finite is not exported.

        Raises:
            UserError: the folder cannot be written.
        """
        if dist.get_rank() == 0:
            digest = weighter.hash()
            folder = self.root / f"iter_{iteration:07d}"
            if not is_finite(weighter.model):
                logger.warning(f"the weighter of iteration {iteration} is not finite and is not exported to {folder}")
            elif self._last != (iteration, digest):
                manifest = self._manifest(weighter, iteration, stage, digest)
                with _reported_failure(self.root.parent, iteration):
                    export_weighter(weighter.model, self.save_tokenizer, folder, manifest)
                logger.info(f" > exported the weighter to {folder}")
                self._last = (iteration, digest)
        dist.barrier()

    def _manifest(self, weighter: Weighter, iteration: int, stage: int, digest: str) -> dict[str, Any]:
        return weighter_facts(iteration, stage, weighter.num_parameters, digest) | dict(self.run_facts)


@contextlib.contextmanager
def _reported_failure(save: Path, iteration: int) -> Iterator[None]:
    """Turn failures of writing into a UserError.

    Raises:
        UserError: the block failed.
    """
    from safetensors import SafetensorError

    try:
        yield
        return
    except OSError as error:
        reason = error.strerror or str(error)
    except SafetensorError as error:
        reason = short_reason(error)
    except Exception as error:
        unwritten = write_failure_reason(error)
        if unwritten is None:
            raise
        reason = unwritten
    raise UserError(
        f"--save {save}: the weighter of iteration {iteration} cannot be written ({reason}); make room or give another "
        "folder"
    )


def export_weighter(
    model: Any,
    save_tokenizer: Callable[[Path], Any],
    folder: Path,
    manifest: Mapping[str, Any],
    *,
    effect: str | None = None,
    check: Callable[[Path], object] = lambda temporary: None,
) -> None:
    """Write a weighter's classifier, tokenizer, manifest and model card to a temporary folder, then rename it.

    Args:
        save_tokenizer: writes the tokenizer to a folder that holds the classifier already.
        effect: the measured gain of the weighter, for the card.
        check: called with the complete folder before it is renamed; raises if the folder is wrong.
    """
    from transformers.utils.logging import disable_progress_bar

    from megatron_dwm.weighting.export_card import weighter_card

    disable_progress_bar()  # a progress bar would break the lines of the log
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        save_tokenizer(temporary)
        write_manifest(temporary, manifest)
        # Not in the manifest, because the card is meant to be edited before publication.
        card = weighter_card(manifest, model, load_tokenizer_folder(temporary), name=folder.name, effect=effect)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        check(temporary)


def weighter_facts(iteration: int, stage: int, num_parameters: int, digest: str) -> dict[str, Any]:
    """Return the part of a manifest about the weighter itself.

    Args:
        digest: digest of its parameters.
    """
    return {
        "iteration": iteration,
        "stage": stage,
        "weighter_parameters": num_parameters,
        "weighter_sha256": digest,
    }


def run_facts(
    settings: WeightingConfig,
    model: ModelConfig,
    train_iters: int,
    global_batch_size: int,
    paths: DataPaths,
    tokenizer_fingerprint: str,
    *,
    adds_special_tokens: bool,
) -> dict[str, Any]:
    """Return the part of a manifest about the run that the weighter comes from.

    Args:
        tokenizer_fingerprint: fingerprint of the weighter's tokenizer.
        adds_special_tokens: whether the weighter was trained on texts with its tokenizer's special tokens.
    """
    return {
        "mode": settings.dwm_mode,
        "initialised_from": settings.dwm_load or settings.dwm_init_from,
        "temperature": settings.dwm_temperature,
        "kl_weight": settings.dwm_kl_weight,
        "source_offsets": settings.dwm_source_offsets,
        "train_iters": train_iters,
        "num_stages": settings.dwm_num_stages,
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "special_tokens": adds_special_tokens,
        "data": {
            flag: {"prefixes": prefixes, "weights": weights} for flag, (prefixes, weights) in paths.blends().items()
        },
        "sources": paths.train_sources,
        "language_model": {
            "num_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "num_attention_heads": model.num_attention_heads,
            "num_query_groups": model.query_groups,
            "ffn_hidden_size": model.ffn,
            "seq_length": model.seq_length,
        },
        "global_batch_size": global_batch_size,
    }
