"""What a run has written of itself: the JSON lines of pretrain_dwm.py."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dwm.errors import UserError

Record = dict[str, Any]


@dataclass(frozen=True)
class RunRecords:
    """A run's records by kind, each in the order of its iterations."""

    steps: list[Record]
    """One for each training step."""
    updates: list[Record]
    """One for each outer update."""
    evaluations: list[Record]

    @property
    def sources(self) -> list[str]:
        """Names of the training data's sources, as they first appear."""
        return list(dict.fromkeys(name for step in self.steps for name in step.get("share_by_source", ())))

    def evaluated(self, split: str) -> list[Record]:
        return [record for record in self.evaluations if record["split"] == split]

    def series(self, name: str, source: str) -> tuple[list[int], list[float]]:
        """Iterations and values of a figure that steps hold by source, such as ``weight_by_source``."""
        points = [(s["iteration"], s[name][source]) for s in self.steps if source in s.get(name, ())]
        return [iteration for iteration, _ in points], [value for _, value in points]


def read_run(path: Path) -> RunRecords:
    """Read a run's folder, or its JSON-lines file.

    Raises:
        UserError: there are no records, or a line is not one.
    """
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file}: no such file; give a run's --save folder or its --metrics-jsonl file")
    records = list(_records(file))
    run = RunRecords(
        steps=[record for record in records if record["kind"] == "train"],
        updates=[record for record in records if record["kind"] == "outer_update"],
        evaluations=[record for record in records if record["kind"] == "evaluation"],
    )
    if not run.steps:
        raise UserError(f"{file}: holds no training step; wait for the run's first iteration")
    return run


def _records(file: Path) -> Iterable[Record]:
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            return  # a run that is under way is writing it
        try:
            record = json.loads(line)
            record["kind"], record["iteration"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(f"{file}, line {number}: not a record of pretrain_dwm.py; give its JSON lines") from None
        yield record
