"""The linear datamodeling score, from made-up records."""

from __future__ import annotations

import numpy as np

from megatron_dwm.analysis.records import RunRecords
from megatron_dwm.benchmarks.lds import correlations, predictions, table
from megatron_dwm.weighting.rules import half_of_samples


def test_what_causes_the_losses_is_found_and_what_does_not_is_not():
    rng = np.random.default_rng(5)
    effect = rng.normal(size=(40, 16))
    updates = [
        {
            "samples": {
                "index": list(range(16 * step, 16 * step + 16)),
                "source": ["good" if value > 0 else "bad" for value in row],
                "alignment": (row + 3.0 * step).tolist(),  # what a whole batch has in common says nothing
                "score": rng.normal(size=16).tolist(),
                "loss": (-row).tolist(),
            }
        }
        for step, row in enumerate(effect)
    ]
    run = RunRecords([], updates, [])
    index = np.arange(effect.size)
    losses = [2 - 0.01 * effect.flatten()[half_of_samples(index, half)].sum() for half in range(1, 25)]
    scores = correlations(predictions(run, run, ["good"]), losses)
    # Batches have unequal parts in a half, so their means, which are taken out, leave some noise.
    assert scores["alignments"].correlation > 0.9 and scores["losses"].correlation < -0.9
    # The sign of a normal number correlates with it by 0.8; over 24 halves that may be 0.4.
    assert scores["source"].correlation > 0.4
    low, high = scores["random"].interval
    assert low < 0 < high and "24 halves" in table(scores, losses)
    assert "source" not in predictions(run, run, [])
