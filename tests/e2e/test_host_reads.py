"""The host waits for the device no more often in a weighted step than in a plain one, and seldom in an update."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from megatron_dwm.benchmarks.modes import Modes
from megatron_dwm.benchmarks.overhead_flags import parse_overhead
from megatron_dwm.cli.build_trainer import build_trainer
from megatron_dwm.cli.launch import Process, run_program
from tests.e2e.launch import pretrain
from tests.host_reads import HostReads
from tests.small_runs import DATA, LANGUAGE_MODEL, TRAINING, WEIGHTING, Flags


def count(argv: Sequence[str] | None = None) -> None:
    """Write the reads of an iteration of each mode to the file of ``--json``."""

    def program(process: Process) -> None:
        (options, config), device = process.parse(partial(parse_overhead, argv))
        modes = Modes(build_trainer(config, device, process))
        actions = {
            "plain": partial(modes.plain.train_iteration, 1),
            "frozen": partial(modes.frozen.train_iteration, 1),
            "update": modes.update,
        }
        found = {}
        for name, action in actions.items():
            with HostReads() as reads:
                action()
            found[name] = dict(reads.places)
        if process.rank == 0 and options.json_file is not None:
            Path(options.json_file).write_text(json.dumps(found))

    run_program(program, argv)


@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        (1, {}),
        (2, {"--bf16": True, "--use-distributed-optimizer": True}),
    ],
    ids=["one process", "DP2, bf16"],
)
def test_reads_of_a_step_and_of_an_update(processes: int, changes: Flags, tmp_path: Path):
    run = {"--train-iters": 60, "--eval-iters": 0, "--log-interval": 1000, "--steps": 1, "--repeats": 1}
    weighting = {**WEIGHTING, "--dwm-init-from": "random", "--dwm-weighter-steps": 4}
    flags = {**LANGUAGE_MODEL, **TRAINING, **DATA, **weighting, **run, **changes, "--json": tmp_path / "reads"}
    finished = pretrain(tmp_path / "log", processes, flags, count)
    assert finished.codes == [0] * processes, finished.text
    plain, frozen, update = json.loads((tmp_path / "reads").read_text()).values()
    assert sum(plain.values()) > 0
    assert frozen == plain
    assert sum(update.values()) - sum(plain.values()) <= 10, {k: n for k, n in update.items() if n > plain.get(k, 0)}
