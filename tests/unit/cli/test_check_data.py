"""The command that verifies whole datasets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_dwm.data import validation
from tests.programs import run_program
from tests.unit.data.made_data import write_dataset

NUMBERS = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "99"]  # and one token that ends documents


def check(*arguments: str) -> tuple[int, str, str]:
    """Run the command; returns its exit code, output and errors."""
    result = run_program("tools/check_data.py", *arguments)
    return result.returncode, result.stdout, result.stderr


def test_the_last_line_says_what_was_verified(tmp_path: Path) -> None:
    a = write_dataset(tmp_path, "a", [[1, 2, 3], [], [99] * 1000])
    b = write_dataset(tmp_path, "b", [[4] * 500], dtype=np.int32)
    code, output, errors = check("--data-path", "1", a, "2.5", b, *NUMBERS)
    assert (code, errors) == (0, "")
    assert output == "2 datasets are whole: 4 documents, 1,503 tokens, each in the vocabulary of 100\n"
    code, output, _ = check("--data-path", a)
    assert code == 0
    assert output == (
        "1 dataset is whole: 3 documents, 1,003 tokens, not compared with a vocabulary (no tokenizer was given)\n"
    )


def test_one_token_among_many_is_found_where_a_run_reads_only_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = np.arange(validation.VOCABULARY_PIECES * 64) % 100
    tokens[1000] = 100
    prefix = write_dataset(tmp_path, "a", [tokens.tolist()])
    monkeypatch.setattr(validation, "VOCABULARY_SAMPLE", validation.VOCABULARY_PIECES)
    validation.check_dataset("a", prefix, 100, sample=validation.VOCABULARY_SAMPLE)
    code, output, errors = check("--data-path", prefix, *NUMBERS)
    assert (code, output) == (2, "")
    assert errors.startswith(
        f"error: --data-path {prefix}: token 100 at place 1000 is outside the tokenizer's vocabulary"
    )
    assert errors.count("\n") == 1


def test_every_damaged_dataset_is_named(tmp_path: Path) -> None:
    good, short, missing = (write_dataset(tmp_path, name, [[1] * 50] * 3) for name in ("good", "short", "missing"))
    Path(short + ".bin").write_bytes(b"12")
    Path(missing + ".idx").unlink()
    code, output, errors = check("--data-path", short, good, missing)
    assert (code, output) == (2, "")
    first, second, last = errors.splitlines()
    assert first.startswith(f"error: --data-path {short}: {short}.bin has 2 bytes where its index says 300")
    assert second.startswith(f"error: --data-path {missing}: {missing}.idx does not exist")
    assert last == "error: --data-path: 2 of 3 datasets have faults; preprocess them again"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data-path is missing; give the prefix of a dataset"),
        (["--data-path", "1", "a", "b"], "--data-path 1 a b: weights and prefixes must alternate"),
        (["--data-path", "a" * 5000], "--data-path aaa"),
        (["--data-path", "a", "--vocab-size", "0"], "--vocab-size 0: must be at least 1"),
        (["--no-such-flag"], "unknown flag --no-such-flag"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str) -> None:
    code, output, errors = check(*arguments)
    assert (code, output) == (2, "")
    assert errors.startswith(f"error: {message}") and errors.count("\n") == 1 and len(errors) < 1100
