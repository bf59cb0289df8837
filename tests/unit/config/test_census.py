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
    "checkpoints": "--ckpt-format",
    "communication and schedules": """
        --num-distributed-optimizer-instances
        --overlap-param-gather-with-optimizer-step --tp-comm-overlap""",
    "sharded parameters": "--use-megatron-fsdp --use-torch-fsdp2",
    "other data": "--fim-data",
    "other models": """
        --kv-lora-rank --multi-latent-attention --q-lora-rank --qk-head-dim --qk-pos-emb-head-dim --v-head-dim""",
    "other programs": "--export-kd-cfg --export-kd-teacher-load --export-te-mcore-model",
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
