"""What benchmarks/chaos.py decides without a run: when it disturbs, how often, and what it holds to be different."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from megatron_dwm.benchmarks import chaos_comparison
from megatron_dwm.benchmarks.chaos import PLAN, ChaosConfig
from megatron_dwm.benchmarks.chaos_moments import KINDS, Moment, all_kinds, choose_moment, last_iteration
from megatron_dwm.benchmarks.chaos_report import Configuration, Disturbance, table
from megatron_dwm.errors import UserError

LOG = " [2026-01-01 10:00:00.000000] iteration {:8d}/      24 | consumed samples: 8 |\n"


def test_moments_lie_ahead_and_fall_into_what_they_are_aimed_at():
    rng = random.Random(1)
    for after in range(PLAN.iterations + 1):
        for _ in range(50):
            moment = choose_moment(rng, PLAN, after)
            assert (moment.iteration == 0) == (moment.aim == "start")
            assert moment.aim == "start" or after < moment.iteration <= PLAN.iterations
            assert moment.aim not in ("save", "export") or moment.iteration % 4 == 0
            assert moment.aim != "update" or (moment.iteration > 4 and moment.iteration % 2 == 0)
    assert choose_moment(random.Random(3), PLAN, 8) == choose_moment(random.Random(3), PLAN, 8)


def test_ten_disturbances_have_every_kind():
    kinds = all_kinds(random.Random(1))
    for _ in range(3):
        assert Counter(itertools.islice(kinds, 10)) == KINDS


def test_a_moment_comes_with_the_file_or_the_iteration_that_it_waits_for(tmp_path: Path):
    logs = ["", *("".join(LOG.format(n) for n in range(1, last + 1)) for last in (7, 8))]
    assert [last_iteration(log) for log in logs] == [0, 7, 8]

    def comes(aim: str) -> list[bool]:
        return [Moment(aim, 8, 0.0).has_come(tmp_path, log) for log in logs]  # type: ignore[arg-type]

    assert comes("start") == [True] * 3
    assert comes("any iteration") == [False, False, True]
    assert comes("update") == [False, True, True]
    assert comes("save") == comes("export") == [False] * 3
    (tmp_path / ".iter_0000008.partial").mkdir()
    assert comes("save") == [False, False, True] and comes("export") == [False] * 3
    (tmp_path / "weighter" / ".iter_0000008.0a1b2c3d.tmp123").mkdir(parents=True)
    assert comes("export") == [False, False, True]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"seconds": 9.0, "elapsed_seconds": 3.0}, []),
        ({"grad_norm": 2.0}, ["steps, iteration 2: grad_norm differs"]),
        ({"weighter_hash": "x"}, ["steps, iteration 2: weighter_hash differs"]),
    ],
)
def test_records_are_compared_but_for_times(change: dict, expected: list[str], tmp_path: Path):
    steps = [{"kind": "train", "iteration": n, "lm_loss": 1.0, "grad_norm": 1.0, "seconds": 1.0} for n in (1, 2)]
    for name, records in (("one", steps), ("other", [steps[0], steps[1] | change])):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    assert list(chaos_comparison._different_records(tmp_path / "one", tmp_path / "other")) == expected
    (tmp_path / "other").write_text(json.dumps(steps[0]) + "\n")
    found = list(chaos_comparison._different_records(tmp_path / "one", tmp_path / "other"))
    assert found == ["1 records of steps, not 2"]


def test_states_are_the_same_to_the_last_bit():
    state = {"a": [torch.tensor([1.0, 2.0]), 3], "b": {"c": "x"}}
    assert chaos_comparison._are_same(state, {"a": [torch.tensor([1.0, 2.0]), 3], "b": {"c": "x"}})
    assert not chaos_comparison._are_same(state, {"a": [torch.tensor([1.0, 2.0000002]), 3], "b": {"c": "x"}})
    assert not chaos_comparison._are_same(state, {"a": [torch.tensor([1.0, 2.0]), 3], "b": {}})


def test_exports_and_leftovers(tmp_path: Path):
    for name in ("one", "other"):
        (tmp_path / name / "iter_0000004").mkdir(parents=True)
        (tmp_path / name / "iter_0000004" / "model.safetensors").write_bytes(b"12")
    one, other = tmp_path / "one", tmp_path / "other"
    assert list(chaos_comparison._different_exports(one, other)) == []
    (other / "iter_0000004" / "model.safetensors").write_bytes(b"13")
    assert list(chaos_comparison._different_exports(one, other)) == ["export iter_0000004 differs"]
    (other / ".lock").touch()
    (other / ".iter_0000004.partial").mkdir()
    assert chaos_comparison._leftovers(other) == [other / ".iter_0000004.partial"]


def test_the_table_counts_by_kind_and_lists_faults():
    killed = [Disturbance("kill one", "save", 4, 1, 0.1, "start001", seconds=s) for s in (1.0, 2.5)]
    killed[1].faults.append("no other rank names rank 1")
    lines = table([Configuration("dp2", "sync", killed, 1, ["run0: steps differ"])]).splitlines()
    assert "dp2       sync   kill one           2        2.5 s       1" in lines
    assert lines[-3:] == [
        "2 disturbances, 2 faults",
        "run0: steps differ",
        "start001, kill one: no other rank names rank 1",
    ]


def test_a_folder_that_is_there_is_not_written_to(tmp_path: Path):
    with pytest.raises(UserError, match="--output"):
        ChaosConfig(output=str(tmp_path))
    with pytest.raises(UserError, match="--times 0"):
        ChaosConfig(times=0)
