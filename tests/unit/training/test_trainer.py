"""The end of a run that fails."""

from __future__ import annotations

import os
import signal
from types import FrameType, SimpleNamespace
from typing import Any, cast

import pytest

from megatron_dwm.training.trainer import Trainer


def test_a_second_worker_that_ends_does_not_interrupt_the_clean_up(request: pytest.FixtureRequest):
    """torch's handler raises an error for each data loader's process that is killed."""
    calls: list[str] = []

    def raise_error(number: int, frame: FrameType | None) -> None:
        raise RuntimeError("DataLoader worker is killed")

    def train() -> None:
        os.kill(os.getpid(), signal.SIGCHLD)

    def abandon() -> None:
        os.kill(os.getpid(), signal.SIGCHLD)
        calls.append("abandon")

    previous = signal.signal(signal.SIGCHLD, raise_error)
    request.addfinalizer(lambda: signal.signal(signal.SIGCHLD, previous))
    trainer = SimpleNamespace(
        stop_request=SimpleNamespace(listen=lambda: None),
        config=SimpleNamespace(checkpoint=SimpleNamespace(save=None)),
        train_state=SimpleNamespace(iteration=0),
        checkpoints=SimpleNamespace(abandon=abandon),
        dataloaders=SimpleNamespace(close=lambda: calls.append("close")),
        _train=train,
    )
    with pytest.raises(RuntimeError, match="DataLoader worker is killed"):
        Trainer.train(cast(Any, trainer))
    assert calls == ["abandon", "close"]
