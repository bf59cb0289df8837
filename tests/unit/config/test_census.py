"""The flags of Megatron-LM's own functional tests of dense GPTs: which the parser refuses, and why.

``tests/fixtures/megatron/census.json`` (of core_v0.16.1, written by ``tests/fixtures/megatron/record_census.py``)
counts in how many of 122 configurations each value of a flag occurs. ``pytest -s`` shows the table.
"""

from __future__ import annotations

import json

import pytest

from tests.paths import FIXTURES
from tests.unit.config.census import CENSUS, refusal, refused, table

COUNTS: dict[str, dict[str, int]] = json.loads((FIXTURES / CENSUS).read_text())
CONFIGURATIONS = 122
NOT_IMPLEMENTED = {
    "timers and other records": "--log-timers-to-tensorboard --wandb-project",
    "checkpoints": """
        --auto-detect-ckpt-format --ckpt-assume-constant-structure --ckpt-format --dist-ckpt-strictness
        --use-persistent-ckpt-worker""",
    "injected errors": "--error-injection-rate",
    "checks of replicas": "--check-weight-hash-across-dp-replicas-interval",
    "batches that grow": "--rampup-batch-size",
    "uneven pipelines": """
        --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split
        --decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers""",
    "communication and schedules": """
        --defer-embedding-wgrad-compute --num-distributed-optimizer-instances
        --overlap-p2p-communication-warmup-flush --overlap-param-gather-with-optimizer-step --tp-comm-overlap""",
    "fp8 parameters": "--fp8-param-gather",
    "sharded parameters": "--use-megatron-fsdp --use-torch-fsdp2",
    "other data": "--fim-data --legacy-tokenizer",
    "other models": """
        --kv-lora-rank --multi-latent-attention --q-lora-rank --qk-head-dim --qk-pos-emb-head-dim --v-head-dim""",
    "other programs": "--export-kd-cfg --export-kd-teacher-load --export-te-mcore-model --test-mode",
    "values that their tests fill in": "--seed",
}
"""Flags that are refused, by what it would take to do what they say."""


def test_what_is_refused_is_known():
    expected = {name for names in NOT_IMPLEMENTED.values() for name in names.split()}
    print(f"Of {CONFIGURATIONS} configurations are refused:\n{table(COUNTS)}")
    assert refused(COUNTS).keys() == expected


def test_the_census_is_of_all_configurations():
    assert sum(COUNTS["--num-layers"].values()) == CONFIGURATIONS
    assert max(sum(values.values()) for values in COUNTS.values()) == CONFIGURATIONS


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("--num-layers", "12", None),
        ("--use-mcore-models", "", None),
        ("--context-parallel-size", "1", None),
        ("--context-parallel-size", "2", None),
        ("--expert-model-parallel-size", "2", "--expert-model-parallel-size is not supported"),
        ("--num-layers", "many", "invalid int value"),
        ("--no-such-flag", "", "unknown flag"),
    ],
)
def test_a_flag_is_judged_by_its_value(name: str, value: str, reason: str | None):
    found = refusal(name, value)
    assert found is None if reason is None else reason in str(found)
