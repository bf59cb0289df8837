"""Check that a run continues with another megatron-core's checkpoints on the curve of a run that never stopped.

    python -m tests.core_versions PYTHON OTHER_PYTHON

Each interpreter has its own version of megatron-core. Runs have two processes, with and without the distributed
optimizer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.paths import ROOT
from tests.small_runs import DATA, LANGUAGE_MODEL, TRAINING, WEIGHTING, as_argv

RUN: dict[str, Any] = {**LANGUAGE_MODEL, **TRAINING, **DATA, **WEIGHTING, "--train-iters": 12}
STOPS = 4, 8
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"--tensor-model-parallel-size": 2},
    "DP2, distributed optimizer": {"--use-distributed-optimizer": True},
}
TOLERANCE = 1e-6
"""Relative. The versions of torch are the same, and megatron-core's layers compute the same sums."""


def train(python: str, flags: dict[str, Any]) -> list[float]:
    """Run ``pretrain_dwm.py`` on two processes and return its losses by iteration."""
    command = [python, "-m", "megatron_dwm.cli.pretrain", "--nproc", "2", *as_argv(flags)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    records = map(json.loads, Path(flags["--metrics-jsonl"]).read_text().splitlines())
    return [record["lm_loss"] for record in records if record["kind"] == "train"]


def main() -> None:
    python, other = sys.argv[1:]
    for layout, parallel in LAYOUTS.items():
        with tempfile.TemporaryDirectory() as name:
            folder, flags = Path(name), {**RUN, **parallel}
            whole = train(python, {**flags, "--metrics-jsonl": folder / "whole.jsonl"})
            # Each version continues from what the other one has saved.
            found: list[float] = []
            for number, (version, stop) in enumerate([(python, STOPS[0]), (other, STOPS[1]), (python, None)]):
                part = {**flags, "--metrics-jsonl": folder / f"part{number}.jsonl"}
                part |= {"--load": folder / f"save{number - 1}"} if number else {}
                part |= {"--save": folder / f"save{number}", "--exit-interval": stop} if stop else {}
                found += train(version, part)
            assert len(found) == len(whole) == RUN["--train-iters"]
            worst = max(abs(a - b) / b for a, b in zip(found, whole, strict=True))
            assert worst <= TOLERANCE, f"{layout}: {worst}"
            print(
                f"{layout}: checkpoints of {python} and {other} continue with the other, largest difference {worst:.1e}"
            )


if __name__ == "__main__":
    main()
