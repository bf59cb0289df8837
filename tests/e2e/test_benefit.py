"""benchmarks/benefit.py as a user types it, on a mixture of their own."""

from __future__ import annotations

import json
import random
import shlex
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from tests.paths import ROOT

SMALL = shlex.split(
    "--num-layers 2 --hidden-size 16 --ffn-hidden-size 32 --num-attention-heads 2 --seq-length 16 "
    "--max-position-embeddings 16 --global-batch-size 16 --micro-batch-size 8 --lr-warmup-iters 2 --eval-interval 6 "
    "--eval-iters 1 --dwm-warmup-iters 2 --dwm-update-interval 2"
)
WORDS = shlex.split("the weight of a sample tells how much it counts in the batch and is learnt from a target set")


def write_texts(folder: Path, name: str, seed: int, *, garbled: bool = False) -> Path:
    """Documents of random words, or of the same letters in random order."""
    generator = random.Random(seed)
    path = folder / f"{name}.jsonl"
    with path.open("w") as file:
        for _ in range(60):
            text = " ".join(generator.choices(WORDS, k=80))
            if garbled:
                text = "".join(generator.sample(text, len(text)))
            file.write(json.dumps({"text": text}) + "\n")
    return path


Benefit = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def benefit(preloaded_commands: Path) -> Benefit:
    """The command; takes its arguments."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        argv = [preloaded_commands / "python", "benchmarks/benefit.py", *map(str, arguments)]
        return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)

    return run


ARMS = ["uniform", "bilevel", "frozen", "source-weights", "oracle", "target-only"]
"""The other rules are tested in test_rules.py, here and in tests/distributed."""


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    folder = tmp_path_factory.mktemp("texts")
    sources = [write_texts(folder, "good", 1), write_texts(folder, "bad", 2, garbled=True)]
    target, test = write_texts(folder, "target", 3), write_texts(folder, "test", 4)
    return ["--data", *sources, "--mix", 0.3, 0.7, "--like", "good", "--target", target, "--test", test]


def test_all_arms_on_a_mixture_of_ones_own(benefit: Benefit, mixture: list[object], tmp_path: Path):
    output, file = tmp_path / "out", tmp_path / "benefit.json"
    command = ["--output", output, "--json", file, "--seeds", 1, "--iterations", 12, "--vocab-size", 300, *mixture]
    command += ["--arms", *ARMS]
    finished = benefit(*command, *SMALL)
    assert finished.returncode == 0, finished.stderr
    result = json.loads(file.read_text())
    arms = result["arms"]
    assert list(arms) == ARMS
    assert all(len(arm["test_loss"]) == len(arm["seconds"]) == 1 for arm in arms.values())
    assert {arm["tokens"] for arm in arms.values()} == {12 * 16 * 16}
    losses = [arm["test_loss"][0] for arm in arms.values()]
    assert len(set(losses)) == len(losses), "two arms trained alike"
    uniform, bilevel, oracle = (arms[name]["test_loss"][0] for name in ("uniform", "bilevel", "oracle"))
    assert result["gap_closed"] == pytest.approx((uniform - bilevel) / (uniform - oracle))
    assert all(name in finished.stdout for name in arms)
    assert (output / "benefit.png").stat().st_size > 10_000

    again = benefit(*command, *SMALL)
    assert again.returncode == 0 and json.loads(file.read_text()) == result, "finished runs were made again"
    swept = benefit(*command, *SMALL, "--sweep", "--arms", "uniform")
    assert swept.returncode == 0, swept.stderr
    by_rate = json.loads(file.read_text())["arms"]["uniform"]
    assert list(by_rate) == ["0.5", "1", "2"]
    assert by_rate["1"]["test_loss"] == arms["uniform"]["test_loss"], "a finished run was made again"
    assert len({found["test_loss"][0] for found in by_rate.values()}) == 3
    changed = benefit(*command, *SMALL, "--lr", "1e-3")
    assert changed.returncode == 2 and "was made with other flags" in changed.stderr
    texts = dict(pairwise(map(str, mixture)))
    other = benefit(*command, *SMALL, "--target", texts["--test"])
    assert other.returncode == 2 and "holds data of another mixture" in other.stderr


def test_a_ladder_freezes_the_smallest_models_weighter_at_every_size(
    benefit: Benefit, mixture: list[object], tmp_path: Path
):
    command = ["--output", tmp_path, "--seeds", 1, "--iterations", 12, "--vocab-size", 300, *mixture, "--ladder"]
    finished = benefit(*command, *SMALL, "--arms", "frozen")
    assert finished.returncode == 0, finished.stderr
    made = {path.parent.name: shlex.split(path.read_text()) for path in tmp_path.glob("runs/*/command.txt")}
    sizes = {
        name: [size for flag, size in pairwise(words) if flag == "--hidden-size"][-1] for name, words in made.items()
    }
    assert sizes == {
        "bilevel-1000-width-x0.5": "8",
        "frozen-1-width-x0.5": "8",
        "frozen-1": "16",
        "frozen-1-width-x2": "32",
    }
    weighter = str(tmp_path / "runs/bilevel-1000-width-x0.5/weighter")
    assert all(any(word.startswith(weighter) for word in made[name]) for name in sizes if name.startswith("frozen"))
    assert list(json.loads((tmp_path / "benefit.json").read_text())) == ["0.5", "1", "2"]
    assert finished.stdout.count("hidden size x") == 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--sweep", "--ladder"], "give one of them"),
        (["--data", "none.jsonl"], "--target"),
        (["--data", "none.jsonl", "--target", "t", "--test", "t"], "none.jsonl"),
        (["--seeds", "0"], "--seeds 0"),
        (["--like", "prose"], "--like goes with --data"),
        (["--data", __file__, "--target", __file__, "--test", __file__, "--like", "good"], "--like good: no file"),
        (["--data", __file__, "--corpus", "documentation"], "--corpus is for the built-in mixtures"),
        (["--data", __file__, "--clean"], "--clean is for the built-in mixtures"),
    ],
)
def test_a_mistake_is_one_line(benefit: Benefit, arguments: list[str], expected: str, tmp_path: Path):
    finished = benefit("--output", tmp_path, *arguments)
    assert finished.returncode == 2
    assert len(finished.stderr.splitlines()) == 1 and expected in finished.stderr


def test_documentation_that_is_not_installed_is_named(
    benefit: Benefit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "status").touch()  # a machine on which dpkg has installed nothing
    monkeypatch.setenv("DPKG_ADMINDIR", str(tmp_path))
    finished = benefit("--output", tmp_path / "out", "--corpus", "documentation")
    assert finished.returncode == 2 and len(finished.stderr.splitlines()) == 1
    assert "debian:libreoffice-help-de: not installed; apt-get install libreoffice-help-de" in finished.stderr
