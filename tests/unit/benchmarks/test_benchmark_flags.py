"""A run's flags take the place of a benchmark's defaults, and a measured run writes nothing."""

from __future__ import annotations

from pathlib import Path

from megatron_dwm.benchmarks.benchmark_flags import override
from megatron_dwm.benchmarks.overhead_flags import parse_overhead


def test_a_flag_that_is_given_replaces_its_default_with_all_values():
    defaults = ["--swiglu", "--betas", "0.9", "0.95", "--lr", "-1", "--seed", "3"]
    given = ["--lr=2", "--betas", "0.8", "0.9", "--bf16"]
    assert override(defaults, given) == ["--swiglu", "--seed", "3", *given]
    assert override(defaults, []) == defaults


def test_a_measured_run_saves_and_records_nothing(tmp_path: Path):
    written = ["--save", "--tensorboard-dir", "--metrics-jsonl", "--wandb-project", "--wandb-exp-name"]
    _, config = parse_overhead([word for name in written for word in (name, str(tmp_path / name))], 1)
    assert config.checkpoint.save is config.logging.tensorboard_dir is config.logging.wandb_project is None
    assert config.logging.records_file(config.checkpoint.save) is None
