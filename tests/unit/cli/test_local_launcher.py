"""What the launcher of ranks on this machine asks of torch's."""

from __future__ import annotations

import dataclasses

import pytest
from torch.distributed.launcher.api import LaunchConfig

from megatron_dwm.cli.local_launcher import supported_settings

SETTINGS = {"signals_to_handle": "SIGTERM", "shutdown_timeout": 600}


@dataclasses.dataclass
class EarlierLaunchConfig:
    """As in torch 2.11, which has no limit to set."""

    min_nodes: int
    signals_to_handle: str = "SIGTERM"


def test_what_an_earlier_torch_does_not_have_is_left_out_and_said(caplog: pytest.LogCaptureFixture):
    assert supported_settings(EarlierLaunchConfig, SETTINGS) == {"signals_to_handle": "SIGTERM"}
    (record,) = caplog.records
    assert "has no shutdown_timeout: after a signal" in record.message


def test_this_torch_has_all(caplog: pytest.LogCaptureFixture):
    assert supported_settings(LaunchConfig, SETTINGS) == SETTINGS
    assert not caplog.records
