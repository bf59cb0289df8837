"""Records as runs write them, made by hand."""

from __future__ import annotations

from megatron_dwm.analysis.records import Record, RunRecords


def update(iteration: int, stage: int, weights: list[float], alignments: list[float], **columns: list) -> Record:
    """Return an outer update of samples of the sources a and b in turn."""
    first = 10 * iteration
    samples = {
        "index": list(range(first, first + len(weights))),
        "source": ["a", "b"] * (len(weights) // 2),
        "weight": weights,
        "alignment": alignments,
        **columns,
    }
    return {
        "kind": "outer_update",
        "iteration": iteration,
        "stage": stage,
        "target_loss": 2.0,
        "samples": samples,
    }


def run_of(updates: list[Record], steps: int = 5, **step: object) -> RunRecords:
    """Return a run whose loss falls by 0.1 each step."""
    made = [{"kind": "train", "iteration": i, "lm_loss": 3.0 - i / 10, **step} for i in range(1, steps + 1)]
    return RunRecords(steps=made, updates=updates, evaluations=[])
