"""Index caches: used when they are whole, built again with a warning when they are not."""

from __future__ import annotations

import json
import logging
import os
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from megatron.core import parallel_state as mpu

from megatron_dwm.config.data import DataConfig
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.data import gpt_dataset as gpt_dataset  # here so that the forks of the tests inherit it
from megatron_dwm.data.blend import data_paths
from megatron_dwm.data.datasets import Datasets, SplitSizes, build_datasets
from megatron_dwm.data.index_cache import VerifiedCache, data_stamp
from megatron_dwm.data.tokenizers import build_tokenizer
from megatron_dwm.errors import UserError
from megatron_dwm.runtime.process_groups import current_parallel_state
from tests.distributed.harness import run_distributed
from tests.unit.data.made_data import write_dataset
from tests.unit.obstacles import OBSTACLES

SEQUENCE = 8
TOKENIZER = build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=1000))
SIZES = SplitSizes(train=30, valid=0, test=0)


class Messages(logging.Handler):
    """The messages that were logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def build(words: list[str], cache: Path | None, threads: int = 1) -> Datasets:
    """Build the datasets in the process group of the present rank."""
    mpu.initialize_model_parallel()
    data = DataConfig(
        train_data_path=words,
        data_cache_path=str(cache) if cache is not None else None,
        num_dataset_builder_threads=threads,
    )
    state = current_parallel_state()
    return build_datasets(
        data, data_paths(data, None), SIZES, TOKENIZER, state, sequence=SEQUENCE, seed=1, target_batch_size=None
    )


def read(words: list[str], cache: Path | None, world_size: int = 1) -> tuple[list[list[int]], list[str]]:
    """The samples of the training set on the last rank, and what was logged on the first."""

    def on_rank() -> tuple[list[list[int]], list[str]]:
        messages = Messages()
        logging.getLogger("megatron_dwm").addHandler(messages)
        train = build(words, cache).train
        assert train is not None
        return [train[index]["tokens"].tolist() for index in range(SIZES.train)], messages.texts

    results = run_distributed(on_rank, world_size)
    return results[-1][0], results[0][1]


class Planted:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.trace),)


def flip(content: bytes) -> bytes:
    """One bit of the last number."""
    return content[:-1] + bytes([content[-1] ^ 1])


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[:-4],
    "cut in the header": lambda content: content[:50],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "zeroed numbers": lambda content: content[:128] + bytes(len(content) - 128),
    "one bit": flip,
    "longer": lambda content: content + b"\0",
}
ARRAYS: dict[str, tuple[str, ...]] = {"plain": ("document_index", "sample_index", "shuffle_index")}
ARRAYS["blend"] = (*ARRAYS["plain"], "dataset_index", "dataset_sample_index")


@pytest.fixture
def words(tmp_path: Path) -> dict[str, list[str]]:
    """A dataset, and a blend of two."""
    rng = np.random.default_rng(0)
    documents = [[rng.integers(1000, size=20).tolist() for _ in range(10)] for _ in range(2)]
    a, b = (write_dataset(tmp_path, name, texts) for name, texts in zip("ab", documents, strict=True))
    return {"plain": [a], "blend": ["1", a, "2", b]}


def one_file(cache: Path, array: str) -> Path:
    return sorted(cache.glob(f"*-{array}.npy"))[0]


class Numbers(VerifiedCache):
    """A dataset of one array that is kept in the way of megatron-core's datasets."""

    array_names = ("numbers",)

    def __init__(self, cache: Path) -> None:
        self.config = SimpleNamespace(path_to_cache=str(cache))
        self.unique_description_hash = "hash"
        self.path = cache / "hash-Numbers-train-numbers.npy"
        self.builds = 0
        self.numbers: list[int] = self.with_verified_cache(cache, "train", self._load_or_build)

    def _load_or_build(self) -> list[int]:
        path = Path(self.config.path_to_cache) / self.path.name
        if not path.exists():
            self.builds += 1
            np.save(path, np.arange(1000, dtype=np.int32))
        numbers: list[int] = np.load(path, allow_pickle=True, mmap_mode="r").tolist()
        return numbers


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_array_is_built_again_and_said(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = Numbers(tmp_path)
    assert (first.builds, caplog.messages) == (1, [])
    whole = first.path.read_bytes()
    first.path.write_bytes(DAMAGES[damage](whole))
    second = Numbers(tmp_path)
    assert second.builds == 1 and second.numbers == first.numbers and first.path.read_bytes() == whole
    (message,) = caplog.messages
    assert message.startswith(f"index cache {tmp_path}/hash-Numbers-train-*: ")
    assert message.endswith("; it is built again") and "\n" not in message and len(message) < 400
    assert Numbers(tmp_path).builds == 0 and len(caplog.messages) == 1


@pytest.mark.parametrize(
    "content", [None, b"", b"[" * 100_000, b"{}", b"[]", b"null", b"\xff", b'{"hash-Numbers-train-numbers.npy": 3}']
)
def test_an_array_without_a_valid_checksum_is_built_again(
    content: bytes | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a run leaves it that was killed while it wrote the cache."""
    Numbers(tmp_path)
    checksums = tmp_path / "hash-Numbers-train-checksums.json"
    checksums.unlink()
    if content is not None:
        checksums.write_bytes(content)
    assert Numbers(tmp_path).builds == 1 and len(caplog.messages) == 1
    assert Numbers(tmp_path).builds == 0


@pytest.mark.parametrize("kind", OBSTACLES)
@pytest.mark.parametrize("name", ["numbers.npy", "checksums.json"])
def test_what_is_no_file_of_the_cache_is_replaced_or_named(name: str, kind: str, tmp_path: Path) -> None:
    Numbers(tmp_path)
    path = tmp_path / f"hash-Numbers-train-{name}"
    path.unlink()
    OBSTACLES[kind](path)
    if "folder" in kind and "link" not in kind:
        with pytest.raises(IsADirectoryError) as raised:
            Numbers(tmp_path)
        assert raised.value.filename2 == str(path)
    else:
        assert Numbers(tmp_path).builds == 1
        assert Numbers(tmp_path).builds == 0


@pytest.mark.parametrize("with_checksum", [False, True])
def test_a_pickle_in_the_place_of_an_array_is_not_run(with_checksum: bool, tmp_path: Path) -> None:
    path, trace = Numbers(tmp_path / "cache").path, tmp_path / "trace"
    path.write_bytes(pickle.dumps(Planted(trace)))
    if with_checksum:
        listed = {path.name: [path.stat().st_size, zlib.crc32(path.read_bytes())]}
        (tmp_path / "cache" / "hash-Numbers-train-checksums.json").write_text(json.dumps(listed))
    assert Numbers(tmp_path / "cache").builds == 1
    assert not trace.exists()


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        Numbers(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ARRAYS)
def test_a_damaged_array_of_megatron_core_is_built_again(
    kind: str, words: dict[str, list[str]], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    samples, messages = read(words[kind], cache)
    assert messages == []
    for array in ARRAYS[kind]:
        path = one_file(cache, array)
        whole = path.read_bytes()
        path.write_bytes(flip(whole))
        again, messages = read(words[kind], cache)
        assert again == samples and path.read_bytes() == whole
        assert len(messages) == 1 and f"{path.name} is damaged; it is built again" in messages[0]
    assert not list(cache.glob(".*"))


@pytest.mark.parametrize("kind", ARRAYS)
def test_a_whole_cache_is_used_as_it_is(kind: str, words: dict[str, list[str]], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    samples, _ = read(words[kind], cache, world_size=2)
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert read(words[kind], cache, world_size=2) == (samples, [])
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == before


@pytest.mark.parametrize("kind", ARRAYS)
def test_a_cache_that_cannot_be_written_ends_every_rank_alike(
    kind: str, words: dict[str, list[str]], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()

    def on_rank() -> str:
        with pytest.raises(UserError) as raised:
            build(words[kind], tmp_path / "file" / "cache")
        return str(raised.value)

    messages = run_distributed(on_rank, 2)
    assert len(set(messages)) == 1
    assert messages[0].startswith(f"--data-cache-path {tmp_path}/file/cache: the index cache cannot be written or read")


def test_threads_build_the_same(words: dict[str, list[str]], tmp_path: Path) -> None:
    def on_rank() -> list[list[int]]:
        train = build(words["blend"], tmp_path / "threads", threads=3).train
        return [train[index]["tokens"].tolist() for index in range(SIZES.train)] if train is not None else []

    (samples,) = run_distributed(on_rank, 1)
    assert (samples, []) == read(words["blend"], tmp_path / "cache")


def test_without_a_folder_the_cache_is_beside_the_data(words: dict[str, list[str]]) -> None:
    samples, messages = read(words["plain"], None)
    cache = Path(words["plain"][0]) / "cache" / "StampedGPTDataset_indices"
    assert messages == [] and len(list(cache.glob("*.npy"))) == 3
    path = one_file(cache, "shuffle_index")
    path.write_bytes(flip(path.read_bytes()))
    again, messages = read(words["plain"], None)
    assert again == samples and len(messages) == 1


def test_the_stamp_follows_the_data(tmp_path: Path) -> None:
    first = data_stamp([write_dataset(tmp_path, "a", [[1] * 9, [2] * 5])])
    assert first == data_stamp([str(tmp_path / "a")])
    assert first != data_stamp([write_dataset(tmp_path, "a", [[1] * 5, [2] * 9])])
