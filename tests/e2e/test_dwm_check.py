"""--dwm-check on whole runs: says how it went, changes no bit of the run, and ends one whose alignments are wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_dwm.cli import pretrain as pretrain_command
from megatron_dwm.weighting.bilevel import sample_products
from tests.e2e.launch import pretrain, records, succeed
from tests.e2e.test_uniform_weights import LAYOUTS, assert_same_checkpoints
from tests.small_runs import DATA, LANGUAGE_MODEL, TRAINING, WEIGHTING

FLAGS = {**LANGUAGE_MODEL, **TRAINING, **DATA, **WEIGHTING}
LINE = re.compile(
    r" > --dwm-check: hypergradient \S+ by finite differences \S+, relative error \S+ \(bound 0\.01\)(.*)\n"
)
UNKNOWN = "without Adam's preconditioner"


def learnt(folder: Path) -> tuple[list[Any], list[Any]]:
    """What the run's steps and outer updates were."""
    steps = [(r["lm_loss"], r["grad_norm"]) for r in records(folder / "metrics.jsonl", "train")]
    updates = [
        (r["samples"], r["target_loss"], r["weighter_hash"]) for r in records(folder / "metrics.jsonl", "outer_update")
    ]
    return steps, updates


@pytest.mark.parametrize("layout", ["one process", "TP2 x PP2"])
def test_a_checked_run_is_the_unchecked_one_bit_for_bit(layout: str, tmp_path: Path):
    processes, parallel = LAYOUTS[layout]
    for name, check in (("plain", False), ("checked", True)):
        flags = {**FLAGS, **parallel, "--save": tmp_path / name, "--dwm-check": check}
        finished = succeed(tmp_path / f"{name}-log", processes, flags)
        lines = LINE.findall("".join(finished.output))
        assert len(lines) == check and all(UNKNOWN in line for line in lines)
    steps, updates = learnt(tmp_path / "plain")
    assert len(steps) == 10 and len(updates) == 4
    assert learnt(tmp_path / "checked") == (steps, updates)
    assert_same_checkpoints(tmp_path / "plain" / "iter_0000010", tmp_path / "checked" / "iter_0000010")


def test_a_resumed_run_is_checked_with_its_optimizers_state_and_goes_on_as_without(tmp_path: Path):
    whole, parts = {**FLAGS, "--save": tmp_path / "whole"}, {**FLAGS, "--save": tmp_path / "parts"}
    succeed(tmp_path / "log1", 1, whole)
    succeed(tmp_path / "log2", 1, {**parts, "--exit-interval": 5})
    finished = succeed(tmp_path / "log3", 1, {**parts, "--load": tmp_path / "parts", "--dwm-check": True})
    (rest,) = LINE.findall(finished.output[0])
    assert UNKNOWN not in rest
    assert learnt(tmp_path / "parts") == learnt(tmp_path / "whole")
    assert_same_checkpoints(tmp_path / "whole" / "iter_0000010", tmp_path / "parts" / "iter_0000010")


def count_twice() -> None:
    """The command with alignments that count twice what two tensor-parallel ranks have in common."""
    sample_products._is_replicated = lambda name, module: False
    pretrain_command.main()


def test_wrong_alignments_end_the_run_before_it_writes_anything(tmp_path: Path):
    flags = {**FLAGS, "--tensor-model-parallel-size": 2, "--save": tmp_path / "save", "--dwm-check": True}
    finished = pretrain(tmp_path / "log", 2, flags, main=count_twice)
    assert finished.codes == [2, 2], finished.text
    message = "".join(finished.errors)
    assert message.startswith("error: --dwm-check: hypergradient") and message.count("\n") == 1, finished.text
    assert not (tmp_path / "save").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"--dwm-mode": "off"}, "--dwm-mode bilevel, not off"),
        ({"--dwm-mode": "frozen", "--dwm-load": "somewhere"}, "--dwm-mode bilevel, not frozen"),
        ({"--bf16": True}, "--dwm-check with --bf16"),
        ({"--fp16": True}, "--dwm-check with --fp16"),
        ({"--global-batch-size": 1, "--micro-batch-size": 1}, "--global-batch-size of 2 or more"),
    ],
)
def test_where_there_is_nothing_to_check_it_is_refused_in_one_line(changes: dict, named: str, tmp_path: Path):
    finished = pretrain(tmp_path / "log", 1, {**FLAGS, "--dwm-check": True, **changes})
    assert finished.codes == [2], finished.text
    assert finished.errors[0].startswith("error: --dwm-check") and named in finished.errors[0], finished.text
    assert finished.errors[0].count("\n") == 1
