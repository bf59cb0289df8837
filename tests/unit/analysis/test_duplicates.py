"""Duplicates by datatrove's steps: one of each cluster stays, across chunks of rows and tasks too."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from datatrove.data import Document

from megatron_dwm.analysis import duplicates as duplicates_module
from megatron_dwm.analysis.duplicates import SignatureWriter, duplicates_of_task, find_steps


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


def duplicates(kind: duplicates_module.Kind, tasks: list[list[str]], folder: Path) -> list[bool]:
    """Run the steps as a selection's jobs do, over the texts of several tasks."""
    for rank, texts in enumerate(tasks):
        documents = (Document(text=text, id=str(number)) for number, text in enumerate(texts))
        SignatureWriter(kind, str(folder)).run(documents, rank, len(tasks))
    for step, count in find_steps(kind, str(folder)):
        for rank in range(count):
            step.run(None, rank, count)
    found = [duplicates_of_task(kind, str(folder), rank, len(texts)) for rank, texts in enumerate(tasks)]
    return [bool(is_duplicate) for of_task in found for is_duplicate in of_task]


@pytest.mark.parametrize("chunk", [4, 1000])
def test_one_of_each_cluster_stays(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """Across the chunks of a task, and across tasks, one of which has no texts."""
    monkeypatch.setattr(duplicates_module, "_CHUNK", chunk)
    texts, groups = clusters()
    tasks = [texts[:13], [], texts[13:]]
    equal = duplicates("exact", tasks, tmp_path / "exact")
    assert sum(equal) == 2
    assert len({text for text, is_duplicate in zip(texts, equal, strict=True) if not is_duplicate}) == len(set(texts))
    near = duplicates("near", tasks, tmp_path / "near")
    kept = [group for group, is_duplicate in zip(groups, near, strict=True) if not is_duplicate]
    assert sorted(kept) == sorted(set(groups))
    assert capfd.readouterr().err == ""


def test_texts_too_short_to_compare_are_kept(tmp_path: Path):
    assert duplicates("near", [["two words", "two words", ""]], tmp_path / "near") == [False] * 3
