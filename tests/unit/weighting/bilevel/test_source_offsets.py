"""Offsets of scores by source: what they converge to, and what they do not depend on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.errors import UserError
from megatron_dwm.weighting.bilevel.source_offsets import DECAY, PRIOR_SAMPLES, SourceOffsets
from megatron_dwm.weighting.weights import best_scores

CONFIG = WeightingConfig(dwm_source_offsets=True, dwm_temperature=0.8, dwm_kl_weight=0.4)
SETTINGS = CONFIG.dwm_temperature, CONFIG.dwm_kl_weight, CONFIG.dwm_clip_alignment
SOURCES = ["books", "code", "web"]


def batches(count: int, samples: int = 256) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield sources and alignments of batches: books align well with the target, code badly, with much noise."""
    generator = torch.Generator().manual_seed(5)
    mean = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
    for _ in range(count):
        source = torch.randint(3, (samples,), generator=generator)
        yield source, mean[source] + 2 * torch.randn(samples, generator=generator, dtype=torch.float64)


def test_offsets_start_at_0_and_are_shrunk_means_of_the_best_scores_of_a_source():
    offsets = SourceOffsets(CONFIG, SOURCES)
    assert offsets.by_source() == {"books": 0.0, "code": 0.0, "web": 0.0}
    ((source, alignments),) = batches(1)
    offsets.learn(source, torch.zeros(len(source), dtype=torch.float64), alignments)
    best = best_scores(alignments, *SETTINGS)
    for number, found in enumerate(offsets.by_source().values()):
        of_source = best[source == number]
        assert found == pytest.approx(float(of_source.sum()) / (len(of_source) + PRIOR_SAMPLES), abs=1e-12)
    assert offsets.by_source()["books"] > 0.2 > -0.2 > offsets.by_source()["code"]


def test_what_the_tokens_already_say_is_not_added_again():
    """Scores that are right in the mean leave offsets near 0, and those without a spread all that a source says."""
    right, flat = SourceOffsets(CONFIG, SOURCES), SourceOffsets(CONFIG, SOURCES)
    for source, alignments in batches(30):
        best = best_scores(alignments, *SETTINGS)
        known = torch.stack([best[source == number].mean() for number in range(3)])[source]
        right.learn(source, known + right.of(source), alignments)
        flat.learn(source, 7 + flat.of(source), alignments)
    assert right.values.abs().max() < 1e-12
    assert flat.values[0] > 0.5 and flat.values[1] < -0.5


def test_offsets_are_of_the_tokens_scores_alone():
    """In a run, the scores of a batch contain the offsets of that time. What is learned from them does not."""
    offsets, sums = SourceOffsets(CONFIG, SOURCES), torch.zeros(2, 3, dtype=torch.float64)
    for source, alignments in batches(5):
        from_tokens = torch.sin(torch.arange(len(source), dtype=torch.float64))
        offsets.learn(source, from_tokens + offsets.of(source), alignments)
        errors = best_scores(alignments, *SETTINGS) - from_tokens + from_tokens.mean()
        of_source = [errors[source == number] for number in range(3)]
        counts = torch.tensor([len(values) for values in of_source])
        sums = DECAY * sums + torch.stack([torch.stack([values.sum() for values in of_source]), counts])
    torch.testing.assert_close(offsets.values, sums[0] / (sums[1] + PRIOR_SAMPLES), rtol=0, atol=1e-12)


def test_offsets_follow_the_weighters_errors():
    """Old errors count less: after twice as many batches without an error, little of them is left."""
    offsets = SourceOffsets(CONFIG, SOURCES)
    for source, alignments in batches(30):
        offsets.learn(source, offsets.of(source), alignments)
    before = offsets.values.abs().max()
    for source, alignments in batches(60):
        best = best_scores(alignments, *SETTINGS)
        known = torch.stack([best[source == number].mean() for number in range(3)])[source]
        offsets.learn(source, known + offsets.of(source), alignments)
    assert offsets.values.abs().max() < 0.1 * before


def test_without_a_learning_rate_nothing_is_learned():
    offsets = SourceOffsets(replace(CONFIG, dwm_lr=0.0), SOURCES)
    for source, alignments in batches(3):
        offsets.learn(source, offsets.of(source), alignments)
    assert not offsets.values.any()


def test_a_resumed_run_may_order_the_sources_differently_and_have_others():
    offsets = SourceOffsets(CONFIG, SOURCES)
    for source, alignments in batches(3):
        offsets.learn(source, offsets.of(source), alignments)
    resumed = SourceOffsets(CONFIG, ["new", "web", "books"])
    resumed.load_state_dict(offsets.state_dict())
    found = offsets.by_source()
    assert resumed.by_source() == {"new": 0.0, "web": found["web"], "books": found["books"]}


def test_a_single_source_is_refused():
    with pytest.raises(UserError, match="--dwm-source-offsets: the training data has one source, books"):
        SourceOffsets(CONFIG, ["books"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"dwm_mode": "off"}, "--dwm-source-offsets is for --dwm-mode bilevel, not off"),
        ({"dwm_mode": "frozen", "dwm_load": "weighter"}, "for --dwm-mode bilevel, not frozen"),
        ({"dwm_mode": "rule", "dwm_rule": "shuffled"}, "for --dwm-mode bilevel, not rule"),
        ({"dwm_kl_weight": 0.0, "dwm_arch": "modernbert"}, "--dwm-kl-weight 0: the sources' offsets"),
    ],
)
def test_flags_that_do_not_go_with_it_are_refused(flags: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        WeightingConfig(dwm_source_offsets=True, **flags)
