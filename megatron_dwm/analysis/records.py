"""Reading of a run's records: the JSON lines that pretrain_dwm.py writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from megatron_dwm.config.logging import RECORDS
from megatron_dwm.errors import UserError, shortened
from megatron_dwm.json_lines import parse_object

Record = dict[str, Any]


class StageSpan(NamedTuple):
    """The iterations of one stage; its end is the next one's start."""

    stage: int
    start: int
    end: int


class Curve(NamedTuple):
    """A figure over iterations."""

    iterations: list[int]
    values: list[float]


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

    @property
    def stage_spans(self) -> list[StageSpan]:
        """The stages in order, with their iterations; the warm-up is stage 0."""
        groups = groupby(self.steps, key=lambda step: int(step.get("stage", 0)))
        starts = [(stage, next(group)["iteration"]) for stage, group in groups]
        ends = [*(start for _, start in starts[1:]), self.steps[-1]["iteration"]]
        return [StageSpan(stage, start, end) for (stage, start), end in zip(starts, ends, strict=True)]

    @property
    def evaluation_curves(self) -> dict[str, Curve]:
        """The loss on each split that was evaluated, and on each source of one where the records have it."""
        curves: dict[str, Curve] = {}
        for record in self.evaluations:
            split, iteration = record["split"], record["iteration"]
            losses = {split: record["lm_loss"]}
            by_source = record.get("lm_loss_by_source", {})
            losses |= {f"{split}: {source}": loss for source, loss in by_source.items()}
            for name, loss in losses.items():
                if loss is not None:
                    curve = curves.setdefault(name, Curve([], []))
                    curve.iterations.append(iteration)
                    curve.values.append(loss)
        return dict(sorted(curves.items(), key=lambda item: ": " in item[0]))

    def until(self, iteration: int) -> RunRecords:
        """Return the records up to an iteration."""
        kept = ([r for r in of_kind if r["iteration"] <= iteration] for of_kind in vars(self).values())
        return RunRecords(*kept)

    def evaluated(self, split: str) -> list[Record]:
        """Return the evaluations on one split: ``valid`` or ``test``."""
        return [record for record in self.evaluations if record["split"] == split]

    def series(self, name: str, source: str) -> Curve:
        """Return a metric that steps record by source, such as ``weight_by_source``."""
        points = [(s["iteration"], s[name][source]) for s in self.steps if source in s.get(name, ())]
        return Curve([iteration for iteration, _ in points], [value for _, value in points])

    def step_series(self, name: str) -> Curve:
        """Return a metric that steps record, such as ``lm_loss``, where it is finite."""
        points = [(step["iteration"], step[name]) for step in self.steps if step.get(name) is not None]
        return Curve([iteration for iteration, _ in points], [value for _, value in points])


class NoRecordsError(UserError):
    """A run has made no training step, or not yet."""


def run_folder(path: Path) -> Path:
    """Return the folder of a run that is named by its folder or by its JSON-lines file."""
    return path if path.is_dir() else path.parent


def records_file(path: Path) -> Path:
    """Return the JSON-lines file of a run that is named by its folder or by that file."""
    return path / RECORDS if path.is_dir() else path


def read_run(path: Path) -> RunRecords:
    """Read a run's folder, or its JSON-lines file.

    Raises:
        NoRecordsError: there are no records.
        UserError: a line is not one.
    """
    file = records_file(path)
    if not file.is_file():
        raise NoRecordsError(f"{file}: no such file; give a run's --save folder or its --metrics-jsonl file")
    by_kind: dict[str, list[Record]] = {kind: [] for kind in _FIELDS}
    for record in _records(file):
        by_kind.get(record["kind"], []).append(record)  # other kinds are not used here
    run = RunRecords(by_kind["train"], by_kind["outer_update"], by_kind["evaluation"])
    if not run.steps:
        raise NoRecordsError(f"{file}: contains no training step; give a run that has made one")
    return run


def _records(file: Path) -> Iterator[Record]:
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith("\n"):
                    return  # a run that is in progress is writing it
                yield _parse(line, f"{file}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); give a run's JSON lines") from None


def _parse(line: str, place: str) -> Record:
    """Return the record of a line.

    Raises:
        UserError: it is not a record, or the record lacks a field of its kind.
    """
    try:
        record = parse_object(line)
    except ValueError as error:
        raise UserError(f"{place}: not a record ({shortened(error)}); give a run's JSON lines") from None
    for key, is_valid in (_COMMON | _FIELDS.get(str(record.get("kind")), {})).items():
        name = key.removesuffix("?")
        if name not in record:
            if name == key:
                raise UserError(f"{place}: the record lacks {name!r}; give the JSON lines of pretrain_dwm.py")
        elif not is_valid(record[name]):
            raise UserError(f"{place}: {name!r} cannot be {shortened(record[name])}; the file is damaged")
    return record


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    """Return whether a value is a number, or null, which stands for one that is not finite."""
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are_numbers_by_name(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(number, (int, float)) for number in value.values())


def _are_losses_by_name(value: object) -> bool:
    return isinstance(value, Mapping) and all(_is_number(number) for number in value.values())


def _are_samples(value: object) -> bool:
    """Return whether a value is a table of samples: columns of equal length."""
    if not isinstance(value, Mapping) or not value.keys() >= _COLUMNS.keys():
        return False
    columns = [column for name, column in value.items() if name in _COLUMNS or name == "loss"]
    if not all(isinstance(column, list) and len(column) == len(value["index"]) > 0 for column in columns):
        return False
    kinds = _COLUMNS | ({"loss": _is_number} if "loss" in value else {})
    return all(is_valid(item) for name, is_valid in kinds.items() for item in value[name])


_COLUMNS: dict[str, Callable[[object], bool]] = {
    "index": _is_int,
    "source": _is_text,
    "weight": _is_number,
    "alignment": _is_number,
}
_COMMON: dict[str, Callable[[object], bool]] = {"kind": _is_text, "iteration": _is_int}
_FIELDS: dict[str, dict[str, Callable[[object], bool]]] = {
    "train": {
        "lm_loss": _is_number,
        "seconds?": _is_number,
        "flops?": _is_number,
        "consumed_samples?": _is_int,
        "stage?": _is_int,
        "share_by_source?": _are_numbers_by_name,
        "fraction_by_source?": _are_numbers_by_name,
        "weight_by_source?": _are_numbers_by_name,
        "effective_sample_size?": _is_number,
    },
    "outer_update": {
        "stage": _is_int,
        "target_loss": _is_number,
        "alignment_by_source?": _are_numbers_by_name,
        "samples": _are_samples,
    },
    "evaluation": {"split": _is_text, "lm_loss": _is_number, "lm_loss_by_source?": _are_losses_by_name},
}
"""The fields that are read, by kind of record; one whose name ends in a question mark may be missing."""
