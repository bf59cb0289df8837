"""Plain, bare, frozen and bi-level training of one and the same model."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from megatron_dwm.data.batch import Batch
from megatron_dwm.errors import UserError
from megatron_dwm.training.trainer import Trainer
from megatron_dwm.weighting.data_weighting import DataWeighting
from megatron_dwm.weighting.stage_schedule import frozen_stages

SETTLING_STEPS = 3  # first steps allocate, and Adam's preconditioner needs one


class BareLoop:
    """Training with megatron-core's own functions and nothing else."""

    def __init__(self, trainer: Trainer) -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.components, self.engine, self.batch_loader = trainer.components, trainer.engine, trainer.dataloaders.train
        self.config, self.forward_backward = trainer.config, get_forward_backward_func()

    def step(self) -> None:
        chunks, micro, sequence = self.engine.chunks, self.config.training.micro_batch, self.config.model.sequence
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
            self.components.scheduler.step(increment=self.config.global_batch_size)

    def _forward_step(self, micros: Iterator[Batch], model: Any) -> tuple[Any, Any]:
        micro, end = next(micros), self.engine.document_end
        mask = micro.document_mask(end) if end is not None else None
        output = model(micro.tokens, micro.position_ids, mask, labels=micro.labels, loss_mask=micro.loss_mask)

        def loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            total = torch.sum(output.float().view(-1) * micro.loss_mask.view(-1))
            return total, micro.loss_mask.sum().to(torch.int), {"lm loss": total.detach()}

        return output, loss


class Modes:
    """The ways to train one and the same model."""

    def __init__(self, trainer: Trainer) -> None:
        assert trainer.weighting is not None
        self.bilevel, self.weighting, self.bare = trainer, trainer.weighting, BareLoop(trainer)
        self.config, self.interval = trainer.config, trainer.weighting.stages.update_interval
        self.plain = self._with(None)
        for _ in range(SETTLING_STEPS):
            self.plain.iterate(1)
        if self.weighting.weighter is None:
            with trainer.engine.full_parameters():
                self.weighting.start()
        weighter, outer = self.weighting.weighter, self.weighting.outer
        assert weighter is not None and outer is not None
        self.weighter, self.outer = weighter, outer
        scoring = dataclasses.replace(self.weighting.config, dwm_warmup_iters=0)
        stages = frozen_stages(scoring, self.config.train_iters)
        sample_gather, sources = self.weighting.sample_gather, self.weighting.sources
        frozen = DataWeighting(scoring, stages, sample_gather, sources, lambda: weighter, None, None)
        frozen.start()
        self.frozen = self._with(frozen)
        iterations = range(1, self.config.train_iters + 1)
        self.updating = next(number for number in iterations if self.weighting.stages.updates(number))
        self.update()

    def update(self) -> None:
        """One iteration with an outer update.

        Raises:
            UserError: there was nothing to measure, because fp16 overflowed.
        """
        made = self.weighting.outer_updates
        self.bilevel.iterate(self.updating)
        if self.weighting.outer_updates == made:
            raise UserError("--fp16 overflowed, so that there was no outer update; lower --initial-loss-scale")

    def intervals(self, count: int) -> None:
        """``count`` whole intervals of a bi-level run: the updating iteration is each one's last."""
        for _ in range(count):
            for _ in range(self.interval - 1):
                self.frozen.iterate(1)
            self.update()

    def _with(self, weighting: DataWeighting | None) -> Trainer:
        """The same trainer with another weighting around it."""
        trainer = copy.copy(self.bilevel)
        trainer.weighting = weighting
        return trainer
