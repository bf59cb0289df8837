"""The flags that name datasets, and how a dataset is divided into splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_dwm.config.data import DataConfig
from megatron_dwm.data.blend import DataPaths, data_paths, parse_blend, short_names, split_slices
from megatron_dwm.errors import UserError


@pytest.mark.parametrize(
    ("words", "blend"),
    [
        (["a"], (["a"], None)),
        (["a", "b", "c"], (["a", "b", "c"], None)),
        (["0.3", "a", "0.7", "b"], (["a", "b"], [0.3, 0.7])),
        (["2", "a"], (["a"], [2.0])),
    ],
)
def test_a_blend_is_prefixes_or_weights_and_prefixes(words: Any, blend: Any) -> None:
    assert parse_blend("--data-path", words) == blend


@pytest.mark.parametrize("words", [["0.3", "a", "0.7"], ["0.3", "a", "b"], ["a", "0.5", "b", "0.5"]])
def test_a_blend_that_does_not_alternate_is_refused(words: list[str]) -> None:
    with pytest.raises(UserError, match=r"--data-path .* must alternate"):
        parse_blend("--data-path", words)


@pytest.mark.parametrize("weight", ["0", "-0.5", "nan", "inf"])
def test_a_weight_that_is_not_a_positive_number_is_refused(weight: str) -> None:
    with pytest.raises(UserError, match=rf"--data-path: the weight {weight} is not a positive number"):
        parse_blend("--data-path", ["1", "a", weight, "b"])


def test_sources_are_named_by_their_files_unless_these_are_the_same() -> None:
    assert short_names(["/x/prose_text_document", "/x/code_text_document"]) == ["prose", "code"]
    assert short_names(["/x/prose.train_text_document", "/x/code.train_text_document"]) == ["prose", "code"]
    assert short_names(["/x/prose.train_text_document", "/x/prose.old_text_document"]) == ["prose.train", "prose.old"]
    assert short_names(["/x/a_text_document", "/y/a_text_document"]) == ["/x/a_text_document", "/y/a_text_document"]
    assert short_names(["a", "b", "a", "a"]) == ["a", "b", "a (2)", "a (3)"]  # each is a source of its own


def test_flags_without_a_path_name_no_blend() -> None:
    assert data_paths(DataConfig(mock_data=True, train_data_path=[]), None).blends() == {}


def test_paths_are_read_from_files(tmp_path: Path) -> None:
    shared = tmp_path / "blend.txt"
    shared.write_text("0.5 a\n0.5 b\n")
    assert data_paths(DataConfig(data_args_path=str(shared)), ["t"]) == DataPaths(
        shared=(["a", "b"], [0.5, 0.5]), per_split=(None, None, None), target=(["t"], None), split="969, 30, 1"
    )
    per_split = tmp_path / "blend.json"
    per_split.write_text(json.dumps({"train": ["a"], "valid": ["1", "b", 2, "c"]}))
    paths = data_paths(DataConfig(per_split_data_args_path=str(per_split)), None)
    assert paths.per_split == ((["a"], None), (["b", "c"], [1.0, 2.0]), None)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"not json", "not a JSON object"),
        (b"[1, 2]", "it is not an object"),
        (b'{"train": "abc"}', "'train' is not a list of weights and prefixes"),
        (b'{"train": ["a", ["b"]]}', "'train' is not a list of weights and prefixes"),
        (b'{"train": ["a"], "validation": ["b"]}', "it has the unknown key 'validation'"),
        (b'{"train": ["a"], "": 1}', "it has the unknown key ''"),
        (b'{"train": [%s]}' % (b"9" * 5000), "Exceeds the limit"),
        (b"[" * 100_000, "recursion"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_damaged_file_of_paths_is_named(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "blend.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"--per-split-data-args-path {path}: .*{reason}"):
        data_paths(DataConfig(per_split_data_args_path=str(path)), None)


@pytest.mark.parametrize("name", ["nothing", "folder", "binary"])
def test_an_unreadable_file_of_paths_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=rf"--data-args-path {tmp_path / name}: cannot be read"):
        data_paths(DataConfig(data_args_path=str(tmp_path / name)), None)


def test_a_file_of_paths_without_training_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "valid.json").write_text('{"valid": ["a"]}')
    for flag, name in (("data_args_path", "empty"), ("per_split_data_args_path", "valid.json")):
        with pytest.raises(UserError, match=rf"--\S+-args-path {tmp_path / name}: names no training data"):
            data_paths(DataConfig(**{flag: str(tmp_path / name)}), None)


def test_evaluation_data_alone_is_refused() -> None:
    with pytest.raises(UserError, match="--train-data-path is missing"):
        data_paths(DataConfig(valid_data_path=["a"]), None)


@pytest.mark.parametrize("split", ["969, 30, 1", "100,0,0", "0.9,0.1", "1", ".5/.5", "98 1 1", "'99,1,0'"])
def test_a_split_is_up_to_three_numbers(split: str) -> None:
    assert data_paths(DataConfig(data_path=["a"], split=split), None).split == split


@pytest.mark.parametrize("split", ["", "abc", "1,1,1,1", "0,0,0", "-1,2", "1,,2", "90%,10%", "'99,1,0"])
def test_a_split_that_is_none_is_refused(split: str) -> None:
    with pytest.raises(UserError, match=r"--split .*: not up to three numbers"):
        data_paths(DataConfig(data_path=["a"], split=split), None)


def test_parts_of_a_dataset_follow_each_other() -> None:
    assert split_slices("969, 30, 1", 1000) == [slice(0, 969), slice(969, 999), slice(999, 1000)]
    assert split_slices("1,0,1", 10) == [slice(0, 5), slice(0, 0), slice(5, 10)]


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"data_path": ["a"], "train_data_path": ["b"]},
        {"data_path": ["a"], "mock_data": True},
        {"per_split_data_args_path": "x", "valid_data_path": ["b"]},
    ],
)
def test_data_named_in_no_way_or_in_two_ways_is_refused(flags: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        DataConfig(**flags)


def test_validation_sets_are_the_datasets_of_the_validation_blend() -> None:
    sets: dict[str, Any] = {"multiple_validation_sets": True}
    assert data_paths(DataConfig(data_path=["x/a_text_document", "b"], **sets), None).valid_sources == ["a", "b"]
    separate = DataConfig(
        train_data_path=["a"], valid_data_path=["b", "c"], **sets, validation_set_names=["one", "two"]
    )
    assert data_paths(separate, None).valid_sources == ["one", "two"]
    assert data_paths(DataConfig(train_data_path=["a"]), None).valid_sources == []
    assert data_paths(DataConfig(mock_data=True, **sets), None).valid_sources == ["mock"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"full_validation": True}, "--valid-data-path has weights, but --full-validation reads each"),
        ({"multiple_validation_sets": True}, "has weights, but --multiple-validation-sets reads each"),
        ({"multiple_validation_sets": True, "validation_set_names": ["one"]}, "weights"),
    ],
)
def test_weights_of_validation_sets_are_refused(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        data_paths(DataConfig(train_data_path=["a"], valid_data_path=["1", "b", "2", "c"], **flags), None)


def test_each_validation_set_has_one_name() -> None:
    sets: dict[str, Any] = {"train_data_path": ["a"], "multiple_validation_sets": True}
    with pytest.raises(UserError, match="--validation-set-names one: give 2 names, one for each validation set"):
        data_paths(DataConfig(valid_data_path=["b", "c"], validation_set_names=["one"], **sets), None)
    with pytest.raises(UserError, match="one one: a name repeats"):
        DataConfig(valid_data_path=["b", "c"], validation_set_names=["one", "one"], **sets)
    with pytest.raises(UserError, match="no effect without --multiple-validation-sets"):
        DataConfig(train_data_path=["a"], validation_set_names=["one"])
