"""A run that diverges ends with one line that names the iteration."""

from __future__ import annotations

import logging
from typing import Literal

import pytest
import torch
from megatron.core import rerun_state_machine
from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine

from megatron_dwm.config.training import TrainingConfig
from megatron_dwm.errors import UserError
from megatron_dwm.training import rerun
from megatron_dwm.training.rerun import StepValidation, reported_divergence
from tests.distributed.harness import run_distributed


def test_what_is_not_finite_is_one_line_and_other_errors_are_left_as_they_are():
    with pytest.raises(UserError, match=r"^iteration 3: an alignment is not finite$"), reported_divergence(3):
        raise FloatingPointError("an alignment is not finite")
    with pytest.raises(UserError, match=r"^iteration 3: .* lower --lr or --dwm-lr$"), reported_divergence(3):
        parameter = torch.nn.Parameter(torch.ones(2))
        parameter.grad = torch.ones(2)
        torch.optim.AdamW([parameter], lr=1e38).step()
    with pytest.raises(RuntimeError, match=r"^a kernel failed$"), reported_divergence(3):
        raise RuntimeError("a kernel failed")


def test_injected_errors_behave_as_asked_for():
    def injected() -> tuple[int, str]:
        StepValidation(
            TrainingConfig(
                micro_batch_size=1,
                train_iters=1,
                rerun_mode="validate_results",
                error_injection_rate=5,
                error_injection_type="persistent_error",
            )
        )
        injector = get_rerun_state_machine().error_injector
        return injector.error_injection_rate, injector.error_injection_type.value

    assert run_distributed(injected, 1) == [(5, "persistent_error")]


@pytest.mark.parametrize("mode", ["disabled", "validate_results"])
def test_megatron_cores_state_machine_does_not_report_at_each_step(mode: Literal["disabled", "validate_results"]):
    """Its checks of gradients would print that it is created; and it, at each change of its mode."""

    def check() -> list[str]:
        lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())
        for module in (rerun_state_machine, rerun):
            logger = logging.getLogger(module.__name__)
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
        validation = StepValidation(TrainingConfig(micro_batch_size=1, train_iters=1, rerun_mode=mode))
        for iteration in (1, 2, 3):
            for _ in validation.passes(iteration):
                get_rerun_state_machine().validate_result(1.0, lambda _: False, "no message")
        return lines

    once = [f"RerunStateMachine initialized in mode {RerunMode.VALIDATE_RESULTS}", "Result validation enabled"]
    assert run_distributed(check, 1) == [[] if mode == "disabled" else once]
