"""``--tp-comm-overlap``: what it needs, and what Transformer Engine is called with.

That it runs, ``tests/gpu/`` shows where there are GPUs.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dwm.config.parallel import ParallelConfig
from megatron_dwm.errors import UserError
from megatron_dwm.model.tp_comm_overlap import buffer_arguments, check_tp_comm_overlap, read_overlap_settings
from tests.small_runs import GPT, IN_PROCESS, parse_flags
from tests.unit.model.configs import build_config

TP2 = {"--tensor-model-parallel-size": 2, "--sequence-parallel": True}
OVERLAP = {**GPT, **IN_PROCESS, **TP2, "--dwm-mode": "off", "--tp-comm-overlap": True}


class Modes(Enum):
    """As Transformer Engine's."""

    NONE = "none"
    FP8 = "fp8"


@pytest.mark.parametrize(
    ("parallel", "impl", "said"),
    [
        ({}, "torch", "--tp-comm-overlap is for Transformer Engine's layers, and the layers are torch"),
        ({"sequence_parallel": False}, "transformer_engine", "needs --sequence-parallel"),
        ({"tensor_model_parallel_size": 1}, "transformer_engine", "--tensor-model-parallel-size 2 or more"),
    ],
)
def test_what_cannot_overlap_is_refused(parallel: dict[str, Any], impl: str, said: str):
    flags = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "tp_comm_overlap": True, **parallel}
    with pytest.raises(UserError, match=said):
        check_tp_comm_overlap(ParallelConfig(**flags), impl)


def test_the_buffers_have_the_shape_of_a_microbatch_as_in_megatron_lm(tmp_path: Path):
    settings = tmp_path / "overlap.yaml"
    settings.write_text("qkv_fprop:\n  method: ring_exchange\n")
    config = parse_flags({**OVERLAP, "--tp-comm-overlap-cfg": settings, "--context-parallel-size": 2}, 4)
    core = build_config(torch.device("cuda"), transformer_impl="torch")
    found = buffer_arguments(config.model, config.parallel, core, 2, Modes)
    assert found == {
        "shape": [12 * 2 // 2, 16],
        "tp_size": 2,
        "ub_cfgs": {"qkv_fprop": {"method": "ring_exchange"}},
        "bootstrap_backend": "nccl",
        "quantization_modes": [Modes.NONE],
    }
    older = buffer_arguments(config.model, config.parallel, core, 2, None)
    assert older["use_fp8"] is False and "quantization_modes" not in older
    core.fp8, core.first_last_layers_bf16, core.num_layers_at_start_in_bf16 = "hybrid", True, 1
    found = buffer_arguments(config.model, config.parallel, core, 2, Modes)
    assert found["quantization_modes"] == [Modes.FP8, Modes.NONE]


PLANTED = "qkv_fprop: !!python/object/apply:os.system ['touch planted']\n"


def test_settings_that_are_none_are_refused(tmp_path: Path):
    file = tmp_path / "overlap.yaml"
    for text, said in (("[1", "cannot be read"), ("words", "it does not map names"), (PLANTED, "cannot be read")):
        file.write_text(text)
        with pytest.raises(UserError, match=f"--tp-comm-overlap-cfg .*{said}"):
            read_overlap_settings(str(file))
    with pytest.raises(UserError, match="cannot be read"):
        read_overlap_settings(str(tmp_path / "missing"))


def test_an_outer_update_needs_microbatches_of_one_sample():
    mock = {key: value for key, value in OVERLAP.items() if key != "--dwm-mode"}
    with pytest.raises(UserError, match="--tp-comm-overlap with --micro-batch-size 2: its buffers have the shape"):
        parse_flags({**mock, "--dwm-mode": "bilevel"}, 2)
    assert parse_flags({**mock, "--dwm-mode": "bilevel", "--micro-batch-size": 1}, 2).parallel.tp_comm_overlap
