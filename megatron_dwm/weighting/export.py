"""Exports of the weighter in the course of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_dwm.config.run import RunConfig
from megatron_dwm.data.blend import DataPaths
from megatron_dwm.runtime.process_groups import ParallelState
from megatron_dwm.runtime.record_writers import say
from megatron_dwm.weighting.data_weighting import DataWeighting
from megatron_dwm.weighting.weighter_init import export_weighter


class WeighterExporter:
    """Writes ``<save>/weighter/iter_XXXXXXX/`` at saves and at the ends of stages."""

    def __init__(
        self, config: RunConfig, parallel_state: ParallelState, paths: DataPaths, tokenizer: Any, fingerprint: str
    ) -> None:
        assert config.checkpoint.save is not None
        self.config, self.parallel_state, self.paths = config, parallel_state, paths
        self.tokenizer, self.fingerprint = tokenizer, fingerprint
        self.root = Path(config.checkpoint.save) / "weighter"
        self.last: tuple[int, str] | None = None

    def export(self, weighting: DataWeighting, iteration: int) -> None:
        """Export the weighter, if it is alive and this iteration's is not there yet; every rank calls it."""
        weighter = weighting.weighter
        if weighter is None:
            return
        if self.parallel_state.is_first_rank:
            digest = weighter.hash()
            if self.last != (iteration, digest):
                folder = self.root / f"iter_{iteration:07d}"
                export_weighter(
                    weighter.model,
                    self.tokenizer,
                    self.config.tokenizer,
                    folder,
                    self.manifest(weighting, iteration, digest),
                )
                say(f" > exported the weighter to {folder}")
                self.last = (iteration, digest)
        dist.barrier()

    def manifest(self, weighting: DataWeighting, iteration: int, digest: str) -> dict[str, Any]:
        """What the export says of itself."""
        assert weighting.weighter is not None
        model = self.config.model
        return {
            "iteration": iteration,
            "stage": weighting.stages.stage(iteration),
            "mode": self.config.weighting.dwm_mode,
            "initialised_from": self.config.weighting.dwm_load or self.config.weighting.dwm_init_from,
            "temperature": self.config.weighting.dwm_temperature,
            "kl_weight": self.config.weighting.dwm_kl_weight,
            "weighter_parameters": weighting.weighter.num_parameters,
            "weighter_sha256": digest,
            "tokenizer_fingerprint": self.fingerprint,
            "data": {
                flag: {"prefixes": prefixes, "weights": weights}
                for flag, (prefixes, weights) in self.paths.blends().items()
            },
            "sources": weighting.sources,
            "language_model": {
                "num_layers": model.layers,
                "hidden_size": model.hidden,
                "num_attention_heads": model.heads,
                "num_query_groups": model.query_groups,
                "ffn_hidden_size": model.ffn,
                "seq_length": model.sequence,
            },
            "global_batch_size": self.config.global_batch_size,
        }
