"""What can be wrong with data is found, and named, before a run starts."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_dwm.data import validation
from megatron_dwm.data.blend import LEGACY_SPLIT, Blend, DataPaths
from megatron_dwm.data.validation import check_data
from megatron_dwm.errors import UserError, run_cli
from tests.programs import Fork
from tests.unit.data.made_data import write_dataset as write
from tests.unit.data.test_index_file import DAMAGES

SEQUENCE = 32
VOCAB = 100
HEADER = 34  # bytes of an index before the lengths: 9 of magic, 8 version, 1 type, 8 sequences, 8 documents


def texts(seed: int, number: int = 10, length: int = 40) -> list[list[int]]:
    """Random documents, each of its own length."""
    rng = np.random.default_rng(seed)
    return [rng.integers(VOCAB, size=length + index).tolist() for index in range(number)]


def paths(
    train: Blend | str,
    valid: Blend | None = None,
    test: Blend | None = None,
    target: Blend | str | None = None,
) -> DataPaths:
    """Data named split by split."""
    train = ([train], None) if isinstance(train, str) else train
    target = ([target], None) if isinstance(target, str) else target
    return DataPaths(shared=None, per_split=(train, valid, test), target=target, split=None)


def shared(blend: Blend, split: str) -> DataPaths:
    return DataPaths(shared=blend, per_split=(None, None, None), target=None, split=split)


def check(data: DataPaths, vocab: int = VOCAB, has_evaluation: bool = True) -> None:
    check_data(data, SEQUENCE, vocab, has_evaluation=has_evaluation)


def test_good_data_passes(tmp_path: Path) -> None:
    train, other = write(tmp_path, "train", texts(0)), write(tmp_path, "other", texts(1))
    valid, target = write(tmp_path, "valid", texts(2)), write(tmp_path, "target", texts(3))
    check(paths(([train, other], None), ([valid], None), None, target))
    check(paths(([train, other], [0.3, 0.7]), None, ([valid], None), ([target], [1.0])))
    check(shared(([train], None), LEGACY_SPLIT))
    check(DataPaths(None, (None, None, None), None, None))  # made-up data


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_a_file_that_is_missing_is_named(suffix: str, tmp_path: Path) -> None:
    prefix = write(tmp_path, "train", texts(0))
    Path(prefix + suffix).unlink()
    with pytest.raises(UserError, match=rf"--train-data-path {prefix}: {prefix}{suffix} does not exist"):
        check(paths(prefix))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_named(damage: str, tmp_path: Path) -> None:
    prefix = write(tmp_path, "train", texts(0))
    index = Path(prefix + ".idx")
    index.write_bytes(DAMAGES[damage](index.read_bytes()))
    with pytest.raises(
        UserError, match=rf"--train-data-path {prefix}: {index} is not a valid index \(.+\); preprocess"
    ):
        check(paths(prefix))


def test_a_damaged_index_prints_one_line_and_no_traceback(tmp_path: Path) -> None:
    prefix = write(tmp_path, "train", texts(0))
    Path(prefix + ".idx").write_bytes(b"something else altogether, and longer than a header is")
    result = Fork(lambda: run_cli(lambda: check(paths(prefix)))).finish()
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: --train-data-path {prefix}: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize("change", [-800, -100, -1, 1, 100])
def test_data_of_another_size_than_its_index_says_is_named_with_both_sizes(change: int, tmp_path: Path) -> None:
    """Cut short, or the data of another preprocessing beside this index."""
    prefix = write(tmp_path, "train", texts(0))
    file = Path(prefix + ".bin")
    whole = file.read_bytes()
    file.write_bytes(whole[:change] if change < 0 else whole + bytes(change))
    with pytest.raises(UserError, match=rf"{file} has {len(whole) + change} bytes where its index says {len(whole)},"):
        check(paths(prefix))


@pytest.mark.parametrize("documents", [[], [[]], [[], []]])
def test_data_without_a_token_is_refused(documents: list[list[int]], tmp_path: Path) -> None:
    prefix = write(tmp_path, "train", documents)
    with pytest.raises(UserError, match=rf"--train-data-path {prefix}: the dataset has no tokens"):
        check(paths(prefix))


def test_empty_documents_between_others_are_no_fault(tmp_path: Path) -> None:
    check(paths(write(tmp_path, "train", [[], *texts(0), [], *texts(1), []])))


@pytest.mark.parametrize(("place", "token"), [(0, 100), (199, 100), (100, 65535)])
def test_a_token_outside_the_vocabulary_is_named(place: int, token: int, tmp_path: Path) -> None:
    tokens = [index % VOCAB for index in range(200)]
    tokens[place] = token
    prefix = write(tmp_path, "train", [tokens])
    with pytest.raises(
        UserError, match=rf"--train-data-path {prefix}: token {token} at place {place} is outside .* vocabulary of 100;"
    ):
        check(paths(prefix))
    check(paths(prefix), vocab=token + 1)


def test_a_negative_token_is_named(tmp_path: Path) -> None:
    prefix = write(tmp_path, "train", [[1, 2, -3] * 20], dtype=np.int32)
    with pytest.raises(UserError, match=r"token -3 at place 2 is outside"):
        check(paths(prefix))


@pytest.mark.parametrize("place", [0, 499, 5000, 9999])
def test_of_large_data_pieces_from_first_to_last_are_read(
    place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "VOCABULARY_SAMPLE", 64 * 50)
    tokens = np.arange(10_000) % VOCAB
    tokens[max(0, place - 60) : place + 60] = 200  # longer than the gaps between the pieces
    prefix = write(tmp_path, "train", [tokens.tolist()])
    with pytest.raises(UserError, match=r"token 200 at place \d+ is outside"):
        check(paths(prefix))


@pytest.mark.parametrize("split", [LEGACY_SPLIT, "1,1,1", "99, 1"])
def test_a_part_that_no_document_falls_into_is_no_fault(split: str, tmp_path: Path) -> None:
    check(shared(([write(tmp_path, "train", texts(0, number=2, length=99))], None), split))


@pytest.mark.parametrize(
    ("weights", "lengths", "least"),
    [([0.5, 0.5], (40, 0), 1), (None, (40, 0), 33), (None, (40, 32), 33)],
)
def test_a_part_that_one_dataset_of_a_blend_gives_nothing_to_is_refused(
    weights: list[float] | None, lengths: tuple[int, int], least: int, tmp_path: Path
) -> None:
    """The tenth document of a dataset, of these lengths, is its validation part; without it there is none."""
    prefixes = []
    for number, length in enumerate(lengths):
        documents = [[number] * 50] * 9 + [[number] * length] if length else [[number] * 50]
        prefixes.append(write(tmp_path, f"data{number}", documents))
    with pytest.raises(
        UserError,
        match=rf"--data-path {prefixes[1]}: the validation part of --split 9,1,0 has {lengths[1]} tokens, "
        rf"fewer than the {least} ",
    ):
        check(shared((prefixes, weights), "9,1,0"))


@pytest.mark.parametrize("weights", [[0.5, 0.5], None])
def test_parts_that_a_run_without_evaluation_does_not_read_may_be_empty(
    weights: list[float] | None, tmp_path: Path
) -> None:
    """The large dataset has a validation part, the small one has none."""
    large, small = write(tmp_path, "large", [[1] * 50] * 10), write(tmp_path, "small", [[2] * 50])
    blend = ([large, small], weights)
    with pytest.raises(UserError, match=rf"{small}: the validation part of --split 9,1,0 has 0 tokens"):
        check(shared(blend, "9,1,0"))
    check(shared(blend, "9,1,0"), has_evaluation=False)
    empty = write(tmp_path, "empty", [[3]])
    with pytest.raises(UserError, match=rf"--valid-data-path {empty}: has 1 tokens"):
        check(paths(large, ([large, empty], None)))
    check(paths(large, ([large, empty], None)), has_evaluation=False)


def test_a_dataset_of_an_unweighted_blend_must_fill_a_sample(tmp_path: Path) -> None:
    train, short = write(tmp_path, "train", texts(0)), write(tmp_path, "short", [[1] * 32])
    with pytest.raises(UserError, match=rf"--valid-data-path {short}: has 32 tokens, fewer than the 33"):
        check(paths(train, ([train, short], None)))
    check(paths(train, ([train, short], [1.0, 2.0])))
    check(paths(train, ([short], None)))  # read several times


@pytest.mark.parametrize("weights", [None, [1.0]])
def test_a_target_set_of_less_than_a_sample_is_refused(weights: list[float] | None, tmp_path: Path) -> None:
    train, target = write(tmp_path, "train", texts(0)), write(tmp_path, "target", [[1] * 20, [2] * 12])
    with pytest.raises(UserError, match=rf"--dwm-target-data-path {target}: 32 tokens are less than one sample of 33;"):
        check(paths(train, target=([target], weights)))


@pytest.mark.parametrize("flag", ["--train-data-path", "--valid-data-path", "--test-data-path"])
@pytest.mark.parametrize("spelling", ["same", "around", "link"])
def test_a_target_set_that_is_trained_or_evaluated_on_is_refused(flag: str, spelling: str, tmp_path: Path) -> None:
    train, target = write(tmp_path, "train", texts(0)), write(tmp_path, "target", texts(1))
    (tmp_path / "link").symlink_to(tmp_path)
    again = {"same": target, "around": f"{tmp_path}/link/link/target", "link": f"{tmp_path}/link/target"}[spelling]
    valid = ([again], None) if flag == "--valid-data-path" else None
    test = ([again], None) if flag == "--test-data-path" else None
    blend = ([train, again], [0.5, 0.5]) if flag == "--train-data-path" else ([train], None)
    with pytest.raises(UserError, match=rf"--dwm-target-data-path {again} is also named by {flag};"):
        check(paths(blend, valid, test, target))


@pytest.mark.parametrize("flag", ["--train-data-path", "--valid-data-path", "--test-data-path"])
def test_target_documents_in_other_data_are_counted(flag: str, tmp_path: Path) -> None:
    train, target = write(tmp_path, "train", texts(0)), write(tmp_path, "target", texts(1))
    leaking = write(tmp_path, "leaking", [*texts(2), *texts(1)[:3]], dtype=np.int32)  # of another type of number
    valid = ([leaking], None) if flag == "--valid-data-path" else None
    test = ([leaking], None) if flag == "--test-data-path" else None
    blend = ([train, leaking], None) if flag == "--train-data-path" else ([train], None)
    with pytest.raises(UserError, match=rf"{target}: 3 of its documents are also in {flag} {leaking};"):
        check(paths(blend, valid, test, target))


def test_target_documents_in_data_that_is_split_are_counted(tmp_path: Path) -> None:
    target, leaking = write(tmp_path, "target", texts(1)), write(tmp_path, "leaking", [*texts(2), texts(1)[9]])
    data = DataPaths(([leaking], None), (None, None, None), ([target], None), LEGACY_SPLIT)
    with pytest.raises(UserError, match=rf"{target}: 1 of its documents are also in --data-path {leaking};"):
        check(data)


def test_a_copy_of_the_target_set_is_found_by_its_content(tmp_path: Path) -> None:
    train, target = write(tmp_path, "train", texts(0)), write(tmp_path, "target", texts(1))
    for suffix in (".bin", ".idx"):
        shutil.copy(target + suffix, f"{tmp_path}/copy{suffix}")
    with pytest.raises(UserError, match=r"10 of its documents are also in --train-data-path .*copy;"):
        check(paths(([train, f"{tmp_path}/copy"], None), target=target))


def test_documents_that_only_resemble_the_target_set_pass(tmp_path: Path) -> None:
    """The same length, the same first tokens, or both but a few tokens long, as documents are by chance."""
    document = texts(1)[0]
    target = write(tmp_path, "target", [document, [5] * 31])
    train = write(tmp_path, "train", [document[:-1], [*document[:-1], (document[-1] + 1) % VOCAB], [5] * 31])
    check(paths(train, target=target))
