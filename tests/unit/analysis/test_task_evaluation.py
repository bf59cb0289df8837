"""Items of the local tasks, and the figures that are made of the harness's samples."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from megatron_dwm.analysis.evaluation_report import CheckpointResults, difference, figure, table
from megatron_dwm.analysis.local_tasks import (
    FEWSHOT_ITEMS,
    Item,
    Passages,
    cloze_items,
    continuation_items,
    definition_items,
    local_task,
    title_items,
)
from megatron_dwm.analysis.task_evaluation import MetricEstimate, TaskResult, likelihoods
from megatron_dwm.corpora.corpus import Document
from megatron_dwm.errors import UserError

TEXT = """Of Ships
========

The harbor was quiet that night, and no ship had come in for a week. The old keeper lit his lamp. He slept.

beam: the widest part of a ship, measured from side to side
  * keel -- the long piece along the bottom of a ship
http://example.org/a-page-that-is-not-a-definition-of-anything

What is a mast good for? "It carries the sails, and the sails carry the ship," said the keeper to the boy."""


def passages(*texts: str) -> Passages:
    return Passages("a test", [Document(text, str(number)) for number, text in enumerate(texts)])


def test_items_of_a_text():
    text = passages(TEXT)
    first = "The harbor was quiet that night, and no ship had come in for a week."
    assert list(title_items(text)) == [Item("Of Ships", first, 0)]
    assert list(continuation_items(text)) == [
        Item(first, "The old keeper lit his lamp.", 0),
        Item(
            "What is a mast good for?",
            '"It carries the sails, and the sails carry the ship," said the keeper to the boy.',
            0,
        ),
    ]
    assert [item.answer for item in cloze_items(text)] == ["slept", "boy"]
    assert [(item.query, item.answer[:10]) for item in definition_items(text)] == [
        ("beam", "the widest"),
        ("keel", "the long p"),
    ]


def rows_of(task: dict[str, Any], part: str) -> list[dict[str, Any]]:
    return list(task["custom_dataset"]()[part])


def test_wrong_answers_are_right_ones_of_other_documents():
    text = passages(*(f"word {n}: what the word number {n} means to all of us here" for n in range(30)))
    task = local_task("local-definition", text, limit=10, seed=1)
    rows = rows_of(task, "test")
    assert len(rows) == 10 and len(rows_of(task, "fewshot")) == FEWSHOT_ITEMS
    assert not {row["query"] for row in rows} & {row["query"] for row in rows_of(task, "fewshot")}
    for row in rows:
        right = row["query"].split()[1]
        assert len(set(row["choices"])) == 4
        assert [f"number {right} " in choice for choice in row["choices"]].index(True) == row["right"]
    assert len({row["right"] for row in rows}) > 1
    assert rows_of(local_task("local-definition", text, limit=10, seed=1), "test") == rows
    assert rows_of(local_task("local-definition", text, limit=10, seed=2), "test") != rows


def sample(target: Any, *log_likelihoods: float) -> dict[str, Any]:
    return {"target": target, "filtered_resps": [(value, False) for value in log_likelihoods]}


def test_likelihoods_of_an_item():
    assert likelihoods(sample("word", -2.5)) == {"answer_nll": 2.5}
    found = likelihoods(sample(1, -1000.0, -1001.0))
    assert found["answer_nll"] == 1001.0
    assert found["choice_nll"] == pytest.approx(math.log(1 + math.e))
    assert likelihoods(sample("1", -1000.0, -1001.0)) == found
    assert likelihoods(sample([0, 1], -1.0, -2.0)) == {}
    assert likelihoods({"target": "text", "filtered_resps": ["generated"]}) == {}


def test_items_with_the_same_answer_are_no_choice():
    text = passages(*(f"word {n}: what every one of these words means to us" for n in range(30)))
    with pytest.raises(UserError, match="local-definition: a test has too few definitions that differ in their answer"):
        local_task("local-definition", text, limit=10, seed=1)


def results(name: str, iteration: int | None, accuracy: float) -> CheckpointResults:
    metrics = {"acc": MetricEstimate(accuracy, math.nan), "choice_nll": MetricEstimate(1.0, 0.1)}
    return CheckpointResults(name, name, iteration, [TaskResult("task", 0, 1, metrics, {"choice_nll": {0: 1.0}}, 4)])


def test_the_plot_is_over_iterations_only_if_a_run_has_several():
    checkpoints = [results("run", 200, 0.6), results("folder", None, 0.7), results("run", 100, 0.5)]
    accuracy, nats = figure(checkpoints).axes
    assert accuracy.get_xlabel() == "iteration"
    lines = {str(line.get_label()): line for line in accuracy.get_lines()}
    assert list(lines["folder"].get_ydata()) == [0.7, 0.7] and list(lines["chance"].get_ydata()) == [0.25, 0.25]
    (bars,) = accuracy.containers
    assert list(bars[0].get_xdata()) == [100, 200] and list(bars[0].get_ydata()) == [0.5, 0.6]

    accuracy, nats = figure(checkpoints[:2]).axes
    assert [label.get_text() for label in accuracy.get_yticklabels()] == ["run", "folder"]
    far = [replace(each, name=f"/a/b/{each.name}", run=f"/a/b/{each.run}") for each in checkpoints[:2]]
    labels = [label.get_text() for label in figure(far).axes[0].get_yticklabels()]
    assert labels == ["run", "folder"]  # without the folders that both are in
    assert list(accuracy.containers[0][0].get_xdata()) == [0.6, 0.7]
    assert (accuracy.get_xlabel(), nats.get_xlabel()) == ("accuracy", "nats per choice")
    assert list(nats.get_lines()[-1].get_xdata()) == [math.log(4)] * 2


def test_one_item_has_no_standard_error():
    assert "(+0.000)" in table([results("first", None, 0.5), results("second", None, 0.5)])


def test_the_difference_is_of_the_same_items():
    """What is common to both cancels: of 1, 5, 9 and 2, 6.5, 9.5 the differences are 1, 1.5, 0.5."""
    first = TaskResult("task", 0, 4, {}, {"answer_nll": {0: 1.0, 1: 5.0, 2: 9.0, 3: 100.0}})
    other = TaskResult("task", 0, 3, {}, {"answer_nll": {0: 2.0, 1: 6.5, 2: 9.5}})
    assert difference(other, first, "answer_nll") == MetricEstimate(1.0, pytest.approx(0.5 / math.sqrt(3)))  # type: ignore[arg-type]
    assert difference(other, first, "choice_nll") is None
    assert math.isnan(MetricEstimate.of([1.0]).stderr)
