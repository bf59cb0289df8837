"""Sentences of the page: what they say of weights that follow the alignments, run against them, or are too few."""

from __future__ import annotations

import numpy as np

from megatron_dwm.analysis.preference import weighted_samples
from megatron_dwm.analysis.records import RunRecords
from megatron_dwm.analysis.report.content import Report
from megatron_dwm.analysis.report.findings import key_facts, warnings
from tests.unit.analysis.made_records import run_of, update


def made(updates: int, gap: float, weight_of_a: float) -> Report:
    """A report whose source b is more aligned than a by ``gap`` standard deviations of noise."""
    generator = np.random.default_rng(3)
    noise = [generator.normal([0.0, gap], size=(32, 2)) for _ in range(updates)]
    weights = [weight_of_a, 2.0 - weight_of_a] * 32
    made_updates = [update(i, 1, weights, noise[i - 1].ravel().tolist()) for i in range(1, updates + 1)]
    run: RunRecords = run_of(
        made_updates,
        stage=1,
        share_by_source={"a": weight_of_a / 2, "b": 1 - weight_of_a / 2},
        weight_by_source={"a": weight_of_a, "b": 2.0 - weight_of_a},
    )
    samples = weighted_samples(made_updates)
    return Report("run", run, samples, samples)


def test_weights_that_follow_the_alignments_are_not_spoken_of():
    report = made(updates=12, gap=2.0, weight_of_a=0.8)
    assert warnings(report) == []
    facts = {fact.title: fact for fact in key_facts(report)}
    assert facts["counts most"].value == "b" and facts["counts least"].value == "a"
    assert facts["agrees with alignment"].value.startswith("+0.") and "n = 12 updates" in str(facts)


def test_a_source_that_is_less_aligned_and_counts_more_is_named_with_an_interval():
    contradiction = warnings(made(updates=12, gap=2.0, weight_of_a=1.2))
    assert len(contradiction) == 2 and "run against the alignments" in contradiction[0]
    assert "a is less aligned with the target than b" in contradiction[1]
    assert "n = 12 updates" in contradiction[1] and "(1.20 against 0.80)" in contradiction[1]


def test_a_difference_within_noise_is_no_contradiction():
    (sentence,) = warnings(made(updates=12, gap=0.0, weight_of_a=1.2))
    assert "cannot be distinguished from 0" in sentence


def test_chance_contradicts_no_weights_though_many_pairs_of_sources_are_compared():
    """Twelve sources are 66 pairs: at 95 % for each, 1.6 of them would contradict in each of these reports."""
    names = [f"source{number}" for number in range(12)]
    weights = [0.5 + number / 11 for number in range(12)]
    steps = {name: weight / 12 for name, weight in zip(names, weights, strict=True)}
    found = []
    for seed in range(10):
        generator = np.random.default_rng(seed)
        updates = [
            update(i, 1, weights * 2, generator.normal(size=24).tolist(), source=names * 2) for i in range(1, 11)
        ]
        by_source = {"share_by_source": steps, "weight_by_source": dict(zip(names, weights, strict=True))}
        samples = weighted_samples(updates)
        found += [text for text in warnings(Report("run", run_of(updates, stage=1, **by_source), samples, samples))]
    assert not [text for text in found if "contradict" in text]


def test_too_few_updates_say_so_and_nothing_else():
    report = made(updates=3, gap=2.0, weight_of_a=1.2)
    (sentence,) = warnings(report)
    assert sentence.startswith("Too few updates to say what the weighter prefers in stage 1")
    facts = {fact.title: fact.value for fact in key_facts(report)}
    assert facts["agrees with alignment"] == "too few updates" and "goes most with" not in facts
