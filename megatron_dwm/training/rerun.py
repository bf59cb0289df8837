"""Validation of suspicious results: megatron-core's rerun state machine runs the iteration again.

In Megatron-LM a result that is reproduced is checked once more from a checkpoint, on another GPU. Here the run ends
with the result of the first repetition.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core import rerun_state_machine
from megatron.core.rerun_state_machine import (
    RerunDiagnostic,
    RerunErrorInjector,
    RerunMode,
    RerunState,
    get_rerun_state_machine,
)
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_dwm.config.training import TrainingConfig
from megatron_dwm.errors import UserError
from megatron_dwm.model.attributes import temporary_attributes
from megatron_dwm.model.loss import SampleLosses

logger = logging.getLogger(__name__)


@contextmanager
def reported_divergence(iteration: int) -> Iterator[None]:
    """Turn the exceptions of a diverged iteration into a UserError that names the iteration.

    Raises:
        UserError: the loss, the gradient, an alignment or the weighter is not finite.
    """
    try:
        yield
        return
    except FloatingPointError as error:
        reason = str(error)
    except RuntimeError as error:
        if re.search("found (NaN|Inf) in local grad norm", str(error)) is not None:
            reason = "the gradient is not finite; lower --lr or look at the data of this step"
        elif "cannot be converted to type float without overflow" in str(error):  # raised by an optimizer
            reason = "its optimizer step overflows; lower --lr or --dwm-lr"
        else:
            raise
    raise UserError(f"iteration {iteration}: {reason}")


class StepValidation:
    """Implements ``--rerun-mode`` for training steps; does nothing if it is ``disabled``."""

    def __init__(self, flags: TrainingConfig) -> None:
        """Create megatron-core's state machine, of which a process has only one."""
        self.mode = RerunMode(flags.rerun_mode)
        self.is_active = self.mode != RerunMode.DISABLED
        # megatron-core's checks always need one. It would log that it is disabled: its mode is set only within steps.
        with temporary_attributes(logging.getLogger(rerun_state_machine.__name__), {"disabled": True}):
            if not self.is_active:
                get_rerun_state_machine()
                return
            injector = RerunErrorInjector(flags.error_injection_rate, RerunDiagnostic(flags.error_injection_type))
            rerun_state_machine.initialize_rerun_state_machine(
                state_save_func=lambda: get_cuda_rng_tracker().get_states(),
                state_restore_func=lambda states: get_cuda_rng_tracker().set_states(states),
                error_injector=injector,
            )
        logger.info(f"RerunStateMachine initialized in mode {self.mode}")
        # As in Megatron-LM the first step is not validated, because no checkpoint could be saved after it.
        get_rerun_state_machine().first_iteration_complete = True

    def passes(self, iteration: int) -> Iterator[None]:
        """Yield once for each time that the passes of a step must be run; collective if results are validated.

        Raises:
            UserError: on every rank, if a result is not finite.
        """
        if not self.is_active:
            yield
            return
        machine = get_rerun_state_machine()
        machine.current_iteration = iteration - 1
        # Outside of steps megatron-core's checks have nothing to run again. Its set_mode prints a line at each call.
        with temporary_attributes(machine, {"mode": self.mode}):
            while machine.should_run_forward_backward(None):
                yield
            _, has_failed, _ = machine.should_checkpoint_and_exit()
        if not has_failed:
            return
        if machine.state == RerunState.WILL_RERUN_FROM_CHECKPOINT:
            raise UserError(
                f"iteration {iteration}: loss or gradient is not finite, and the result was the same when the "
                "iteration was run again; lower --lr or look at the data of this step"
            )
        raise UserError(
            f"iteration {iteration}: loss or gradient was not finite, and the result was different when the iteration "
            "was run again; suspect the hardware, and continue from the last checkpoint on other GPUs"
        )

    def check(self, losses: SampleLosses | None) -> None:
        """Validate the losses of a pass, on the last pipeline stage."""
        if self.is_active and losses is not None:
            get_rerun_state_machine().validate_result(
                result=losses.total.sum(),
                rejection_func=lambda total: not bool(torch.isfinite(total)),
                message="the loss is not finite",
            )
