"""Megatron-LM's functional tests of dense GPTs, and scripts of other teams: what is refused of them, and why.

A configuration is accepted if its flags are parsed and its layers and data can be planned, on machines with GPUs.

``tests/fixtures/megatron/census.json`` (of core_v0.16.1, written by ``record_census.py`` beside it) has the flags and
values of 122 configurations. ``census_of_teams.json`` has those of 77 scripts of other teams that pretrain dense GPTs
with ``pretrain_gpt.py``, six of a team at most, with placeholders for paths and names; docs/lab-notes.md says how they
were chosen. ``pytest -s`` shows the tables.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.unit.config.census import CENSUS_OF_TEAMS, obstacles, read_census, table

REFUSED = {
    "--use-megatron-fsdp": 3,
    "--use-torch-fsdp2": 2,
    "--export-kd-cfg": 1,
    "--fim-data": 1,
    "--multi-latent-attention": 1,
    "--overlap-param-gather-with-optimizer-step": 1,
}
"""Flags that are refused, in how many configurations; docs/megatron.md says why. Others that go with them are not."""


def test_all_but_nine_of_122_configurations_are_accepted(tmp_path: Path):
    file = tmp_path / "file"
    file.touch()
    configurations = read_census()
    found = [obstacles(flags, file) for flags in configurations]
    print(f"Of {len(configurations)} configurations {sum(not errors for errors in found)} are accepted. What is said:")
    print(table(found))
    assert len(found) == 122 and sum(not errors for errors in found) == 113
    first = Counter(name for errors in found for name in REFUSED if any(name in error for error in errors))
    assert first == REFUSED
    assert all(any(name in error for name in REFUSED for error in errors) for errors in found if errors)


REFUSED_BY_MEGATRON_LM_TOO = {
    "--mock-data excludes real data paths": 1,
    "--tokenizer-type GPT2BPETokenizer needs --merge-file": 1,
    "--wandb-project NAME needs --wandb-save-dir or --save": 1,
}
"""What is said of the scripts of teams that are refused, and how often."""


def test_scripts_of_teams_are_accepted_where_megatron_lm_does(tmp_path: Path):
    file = tmp_path / "file"
    file.touch()
    found = [obstacles(flags, file) for flags in read_census(CENSUS_OF_TEAMS)]
    print(f"Of {len(found)} scripts {sum(not errors for errors in found)} are accepted. What is said:")
    print(table(found))
    assert len(found) == 77 and sum(not errors for errors in found) == 74
    assert Counter(errors[-1].partition(";")[0] for errors in found if errors) == REFUSED_BY_MEGATRON_LM_TOO


def test_an_obstacle_is_found_behind_another(tmp_path: Path):
    flags, file = read_census()[0], tmp_path / "file"
    file.touch()
    spoilt = {**flags, "--log-interval": "many", "--no-such-flag": "", "--expert-model-parallel-size": "2"}
    assert obstacles(flags, file) == []
    found = " ".join(obstacles(spoilt, file))
    assert all(said in found for said in ("invalid int value", "unknown flag", "--expert-model-parallel-size is not"))
