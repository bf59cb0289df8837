"""Whatever stands in a run's records, a run goes on with the whole ones, and a reader takes or refuses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import given, strategies

from megatron_dwm.analysis.plots import training_figure
from megatron_dwm.analysis.preference import stage_sources, weighted_samples
from megatron_dwm.analysis.records import read_run
from megatron_dwm.errors import UserError
from megatron_dwm.json_lines import parse_object
from megatron_dwm.runtime.record_writers import JsonLinesWriter
from tests.fuzzing import assert_short_line, damaged, fuzz_settings

BY_SOURCE = {"a": 0.75, "b": 1.25}


def records_of(iteration: int) -> list[dict[str, Any]]:
    return [
        {
            "kind": "train",
            "iteration": iteration,
            "consumed_samples": 2 * iteration,
            "seconds": 0.5,
            "lm_loss": 3.5,
            "stage": 1,
            "share_by_source": BY_SOURCE,
            "weight_by_source": BY_SOURCE,
            "effective_sample_size": 0.9,
        },
        {
            "kind": "outer_update",
            "iteration": iteration,
            "stage": 1,
            "target_loss": 3.25,
            "samples": {
                "index": [2 * iteration - 2, 2 * iteration - 1],
                "source": ["a", "b"],
                "weight": [0.75, 1.25],
                "alignment": [-1.5, 2.5],
                "loss": [3.0, 4.0],
            },
        },
        {"kind": "evaluation", "iteration": iteration, "split": "valid", "lm_loss": 3.0},
    ]


LINES = [json.dumps(record).encode() + b"\n" for iteration in (1, 2, 3) for record in records_of(iteration)]
numbers = strategies.one_of(strategies.none(), strategies.integers(), strategies.floats(), strategies.booleans())
values = strategies.one_of(numbers, strategies.text(max_size=5), strategies.lists(numbers, max_size=2), numbers)


@strategies.composite
def changed_records(draw: strategies.DrawFn) -> bytes:
    """A record in which one value, also one inside, is another."""
    record = draw(strategies.sampled_from(records_of(2)))
    place: Any = record
    while isinstance(place[key := draw(strategies.sampled_from(sorted(place)))], dict) and draw(strategies.booleans()):
        place = place[key]
    place[key] = draw(values)
    return json.dumps(record).encode() + b"\n"


contents = strategies.one_of(
    damaged(b"".join(LINES)),
    strategies.lists(strategies.one_of(strategies.sampled_from(LINES), changed_records()), max_size=6).map(b"".join),
    strategies.lists(strategies.sampled_from(LINES).flatmap(damaged), max_size=4).map(b"\n".join),
)


@fuzz_settings(60)
@given(content=contents, resumed_at=strategies.integers(1, 4))
def test_a_run_goes_on_with_the_records_that_are_whole(content: bytes, resumed_at: int, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("records") / "metrics.jsonl"
    path.write_bytes(content)
    JsonLinesWriter(path, resumed_at).close()
    kept = path.read_bytes()
    for line in kept.splitlines(keepends=True):
        assert line.endswith(b"\n") and line in content
        assert parse_object(line).get("iteration", 0) <= resumed_at
    whole = [line for line in LINES if line in content.splitlines(keepends=True)]
    assert all(line in kept for line in whole if json.loads(line)["iteration"] <= resumed_at)
    assert {file.name for file in path.parent.iterdir()} <= {"metrics.jsonl", "metrics.jsonl.damaged"}


@fuzz_settings(60)
@given(content=contents)
def test_records_are_read_and_summed_up_or_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    try:
        run = read_run(path)
    except UserError as error:
        assert str(path) in assert_short_line(error)
        return
    if run.updates:
        stage_sources(run.steps, weighted_samples(run.updates))
    training_figure(run)
