"""Plain, bare, frozen and bilevel training of the same model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron_dwm.benchmarks.overhead_flags import WARMUP_STEPS
from megatron_dwm.data.batch import Batch
from megatron_dwm.errors import UserError
from megatron_dwm.training.trainer import Trainer
from megatron_dwm.weighting.bilevel.weighting import BilevelWeighting
from megatron_dwm.weighting.export import NoExport
from megatron_dwm.weighting.frozen import FrozenParts, FrozenWeighting
from megatron_dwm.weighting.policy import SampleWeighting
from megatron_dwm.weighting.uniform import UniformWeighting
from megatron_dwm.weighting.warmup import WarmupWeighting
from megatron_dwm.weighting.weighter_stages import WeighterStage


class BareLoop:
    """Training with megatron-core's functions and nothing else."""

    def __init__(self, trainer: Trainer) -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.components, self.engine, self.batch_loader = trainer.components, trainer.engine, trainer.dataloaders.train
        self.config, self.forward_backward = trainer.config, get_forward_backward_func()

    def step(self) -> None:
        """Train on the next batch."""
        chunks, config = self.engine.chunks, self.config
        micro, sequence = config.training.micro_batch_size, config.model.seq_length
        for chunk in chunks:
            chunk.zero_grad_buffer()
        self.components.optimizer.zero_grad()
        micros = list(self.batch_loader.next_batch().microbatches(micro))
        iterators = [iter(micros) for _ in chunks]
        self.forward_backward(
            forward_step_func=self._forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(micros),
            seq_length=sequence,
            micro_batch_size=micro,
            forward_only=False,
        )
        updated, _, _ = self.components.optimizer.step()
        if updated:
            self.components.scheduler.step(increment=self.config.sizes.global_batch_size)

    def _forward_step(self, micros: Iterator[Batch], model: Any) -> tuple[Any, Any]:
        micro, end = next(micros), self.engine.document_end
        mask = micro.document_mask(end) if end is not None else None
        output = model(micro.tokens, micro.position_ids, mask, labels=micro.labels, loss_mask=micro.loss_mask)

        def loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            total = torch.sum(output.float().view(-1) * micro.loss_mask.view(-1))
            return total, micro.loss_mask.sum().to(torch.int), {"lm loss": total.detach()}

        return output, loss


class Modes:
    """The ways to train the same model: trainers that differ only in their weighting."""

    def __init__(self, trainer: Trainer) -> None:
        """Create the trainers, and train the first steps, which are not measured.

        Args:
            trainer: the trainer of a bilevel run that has made no step.
        """
        self.bare, self.plain = BareLoop(trainer), trainer.with_weighting(UniformWeighting())
        for _ in range(WARMUP_STEPS):
            self.plain.train_iteration(1)
        self.config = trainer.config
        self.weighting = started(trainer.weighting, self.config.train_iters)
        stages = self.weighting.stages
        self.interval = stages.update_interval
        self.updating = next(n for n in range(1, self.config.train_iters + 1) if stages.is_update(n))
        self.weighter, self.outer = self.weighting.weighter, self.weighting.outer_update
        self.lm_gradients = self.outer.lm_gradients
        self.bilevel = trainer.with_weighting(self.weighting)
        weight_metrics, options = self.weighting.weight_metrics, self.weighting.options
        # Scores are not cached, because the weighter learns between the steps.
        stage = WeighterStage("", self.config.train_iters, 1)
        parts = FrozenParts([stage], lambda stage: self.weighter, NoExport(), 0, lambda weighter: 0.0)
        self.frozen = trainer.with_weighting(FrozenWeighting(weight_metrics, options, parts, iteration=1))
        self.update()

    def update(self) -> None:
        """Run one iteration with an outer update.

        Raises:
            UserError: there was nothing to measure, because fp16 overflowed.
        """
        updates_before = self.weighting.num_updates
        self.bilevel.train_iteration(self.updating)
        if self.weighting.num_updates == updates_before:
            raise UserError("--fp16 overflowed, so that there was no outer update; lower --initial-loss-scale")

    def intervals(self, count: int) -> None:
        """Run ``count`` whole intervals of a bilevel run: the updating iteration is each one's last."""
        for _ in range(count):
            for _ in range(self.interval - 1):
                self.frozen.train_iteration(1)
            self.update()


def started(weighting: SampleWeighting, iteration: int) -> BilevelWeighting:
    """Return the bilevel weighting of a run, started even if its warm-up is not over.

    Raises:
        UserError: the run has another weighting.
    """
    weighting.before_step(iteration)
    current = weighting.current if isinstance(weighting, WarmupWeighting) else weighting
    if not isinstance(current, BilevelWeighting):
        raise UserError(f"{type(current).__name__} has no outer updates; measure a run of --dwm-mode bilevel")
    return current
