"""The flags that name data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dwm.config.data import DataConfig
from megatron_dwm.data.datasets import DataPaths, data_paths, parse_blend, short_names
from megatron_dwm.errors import UserError


@pytest.mark.parametrize(
    ("words", "blend"),
    [
        (None, None),
        ([], None),
        (["a"], (["a"], None)),
        (["a", "b", "c"], (["a", "b", "c"], None)),
        (["0.3", "a", "0.7", "b"], (["a", "b"], [0.3, 0.7])),
        (["2", "a"], (["a"], [2.0])),
    ],
)
def test_a_blend_is_prefixes_or_weights_and_prefixes(words, blend):
    assert parse_blend("--data-path", words) == blend


@pytest.mark.parametrize("words", [["0.3", "a", "0.7"], ["0.3", "a", "b"], ["a", "0.5", "b", "0.5"]])
def test_a_blend_that_does_not_alternate_is_refused(words: list[str]):
    with pytest.raises(UserError, match=r"--data-path .* must alternate"):
        parse_blend("--data-path", words)


def test_sources_are_named_by_their_files_unless_these_are_the_same():
    assert short_names(["/x/prose_text_document", "/x/code_text_document"]) == ["prose", "code"]
    assert short_names(["/x/a_text_document", "/y/a_text_document"]) == ["/x/a_text_document", "/y/a_text_document"]


def test_paths_are_read_from_files(tmp_path: Path):
    shared = tmp_path / "blend.txt"
    shared.write_text("0.5 a\n0.5 b\n")
    assert data_paths(DataConfig(data_args_path=str(shared)), ["t"]) == DataPaths(
        shared=(["a", "b"], [0.5, 0.5]), per_split=(None, None, None), target=(["t"], None), split="969, 30, 1"
    )
    per_split = tmp_path / "blend.json"
    per_split.write_text(json.dumps({"train": ["a"], "valid": ["1", "b", "2", "c"]}))
    paths = data_paths(DataConfig(per_split_data_args_path=str(per_split)), None)
    assert paths.per_split == ((["a"], None), (["b", "c"], [1.0, 2.0]), None)


@pytest.mark.parametrize("content", ["not json", "[1, 2]"])
def test_a_damaged_file_of_paths_is_named(content: str, tmp_path: Path):
    path = tmp_path / "blend.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"--per-split-data-args-path .*blend\.json"):
        data_paths(DataConfig(per_split_data_args_path=str(path)), None)
    with pytest.raises(UserError, match="--data-args-path /nothing/there"):
        data_paths(DataConfig(data_args_path="/nothing/there"), None)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"data_path": ["a"], "train_data_path": ["b"]},
        {"data_path": ["a"], "mock_data": True},
        {"per_split_data_args_path": "x", "valid_data_path": ["b"]},
    ],
)
def test_data_named_in_no_way_or_in_two_ways_is_refused(flags: dict):
    with pytest.raises(UserError):
        DataConfig(**flags)
