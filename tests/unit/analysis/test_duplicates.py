"""Duplicates by datatrove's steps: one of each cluster stays, across chunks of rows too."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megatron_dwm.analysis import duplicates as module
from megatron_dwm.analysis.duplicates import duplicates


def sentences(seed: int, count: int = 200) -> list[str]:
    """Words of letters: MinHash takes all numbers for the same."""
    generator = random.Random(seed)
    return ["".join(generator.choices("abcdefgh", k=5)) for _ in range(count)]


def clusters() -> tuple[list[str], list[int]]:
    """Texts in random order, and the cluster of each: three with one word changed, two equal ones, 20 of one."""
    groups: list[list[str]] = []
    for seed in range(3):
        words = sentences(seed)
        changed = [*words[:30], "another", *words[31:]]
        groups.append([" ".join(words), " ".join(changed)])
    groups += [[" ".join(sentences(seed))] * 2 for seed in (3, 4)]
    groups += [[" ".join(sentences(seed))] for seed in range(5, 25)]
    texts = [(text, number) for number, group in enumerate(groups) for text in group]
    random.Random(1).shuffle(texts)
    return [text for text, _ in texts], [number for _, number in texts]


@pytest.mark.parametrize("chunk", [4, 1000])
def test_one_of_each_cluster_stays(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    texts, groups = clusters()
    equal = list(duplicates("exact", texts, tmp_path / "exact"))
    assert sum(equal) == 2
    assert len({text for text, is_duplicate in zip(texts, equal, strict=True) if not is_duplicate}) == len(set(texts))
    near = list(duplicates("near", texts, tmp_path / "near"))
    kept = [group for group, is_duplicate in zip(groups, near, strict=True) if not is_duplicate]
    assert sorted(kept) == sorted(set(groups))
    assert capfd.readouterr().err == ""


def test_texts_too_short_to_compare_are_kept(tmp_path: Path):
    assert list(duplicates("near", ["two words", "two words", ""], tmp_path / "near")) == [False] * 3
    assert list(duplicates("exact", [], tmp_path / "exact")) == []
