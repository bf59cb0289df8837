"""Pretrain with weights that are not learnt for what they do: the controls of ``benchmarks/benefit.py``.

    python benchmarks/controls.py --control oracle --sources prose <flags of pretrain_dwm.py>

The run is that of ``pretrain_dwm.py`` with the same flags; only where a batch's weights come from is different.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.distributed as dist

from megatron_dwm.config.run import parse_run
from megatron_dwm.data.batch import Batch
from megatron_dwm.errors import UserError, run_cli
from megatron_dwm.runtime.device import environment_rank, select_device
from megatron_dwm.runtime.startup_sync import StartupSync
from megatron_dwm.training.setup import build_trainer, read_inputs
from megatron_dwm.weighting.data_weighting import DataWeighting, SampleWeights
from megatron_dwm.weighting.weights import standardized, weights_from_scores

CONTROLS = ("random", "loss", "oracle", "shuffled")


class Control:
    """A weighting whose weights follow a rule; all else is the weighting it stands in for."""

    def __init__(self, weighting: DataWeighting, trainer: Any, options: argparse.Namespace, seed: int) -> None:
        self.weighting, self.trainer, self.options = weighting, trainer, options
        self.generator = torch.Generator().manual_seed(seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.weighting, name)

    def weigh(self, iteration: int, batch: Batch) -> SampleWeights | None:
        """The weights that the rule gives; uniform wherever the weighting's are uniform by schedule."""
        learnt = self.weighting.weigh(iteration, batch)
        if learnt is None:
            return None
        scores = getattr(self, f"_{self.options.control}")(batch, learnt.scores)
        relative = weights_from_scores(scores, 1.0)
        sample_gather = self.weighting.sample_gather
        return SampleWeights(scores, relative, sample_gather.select_replica(relative).to(batch.tokens.device))

    def _shuffled(self, batch: Batch, scores: torch.Tensor) -> torch.Tensor:
        """The learnt scores, each given to another sample."""
        order = torch.randperm(len(scores), generator=self.generator)
        return scores[order] / self.weighting.config.dwm_temperature

    def _random(self, batch: Batch, scores: torch.Tensor) -> torch.Tensor:
        return self.options.strength * torch.randn(len(scores), generator=self.generator)

    def _loss(self, batch: Batch, scores: torch.Tensor) -> torch.Tensor:
        """Samples with a high loss count for more: the language model's losses before the step, standardized."""
        engine, micro = self.trainer.engine, self.trainer.config.training.micro_batch
        with torch.no_grad(), engine.deterministic():
            losses = engine.run(batch, micro, forward_only=True)
        means = engine.broadcast_losses(losses, len(batch)).mean
        return self.options.strength * standardized(self.weighting.sample_gather.gather_from_replicas(means).cpu())

    def _oracle(self, batch: Batch, scores: torch.Tensor) -> torch.Tensor:
        """Only samples of the sources that are like the target count."""
        wanted = [number for number, name in enumerate(self.weighting.sources) if name in self.options.sources]
        source = self.weighting.sample_gather.gather_from_replicas(batch.source).cpu()
        like = torch.isin(source, torch.tensor(wanted))
        return torch.where(like, 0.0, float("-inf")) if bool(like.any()) else torch.zeros(len(source))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, add_help=False)
    parser.add_argument("--control", choices=CONTROLS, required=True)
    parser.add_argument("--strength", type=float, default=1.0, help="standard deviation of random and loss scores")
    parser.add_argument("--sources", nargs="+", default=[], help="the oracle's sources")
    options, argv = parser.parse_known_args()

    rank, local_rank, world_size = environment_rank()
    startup_sync = StartupSync(rank, world_size)
    with startup_sync.phase("flags"):
        config = parse_run(argv, world_size, speaks=rank == 0)
        device = select_device(local_rank)
    with startup_sync.phase("inputs"):
        inputs = read_inputs(config, reads_data=rank == 0)
        if options.control == "oracle" and not set(options.sources) & set(inputs.paths.train_sources):
            raise UserError(f"--sources {options.sources}: none of {inputs.paths.train_sources}; name some of these")
    trainer = build_trainer(config, inputs, device, startup_sync)
    if trainer.weighting is None:
        raise UserError("--dwm-mode off has no weights to control; leave it out")
    trainer.weighting = Control(trainer.weighting, trainer, options, config.training.seed)  # type: ignore[assignment]
    trainer.train()
    dist.destroy_process_group()


if __name__ == "__main__":
    run_cli(main)
