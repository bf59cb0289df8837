"""A run's flags take the place of a benchmark's defaults."""

from __future__ import annotations

from megatron_dwm.benchmarks.benchmark_flags import override


def test_a_flag_that_is_given_replaces_its_default_with_all_values():
    defaults = ["--swiglu", "--betas", "0.9", "0.95", "--lr", "-1", "--seed", "3"]
    given = ["--lr=2", "--betas", "0.8", "0.9", "--bf16"]
    assert override(defaults, given) == ["--swiglu", "--seed", "3", *given]
    assert override(defaults, []) == defaults
