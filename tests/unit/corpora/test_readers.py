"""Documents are the same from every format, and a file that is damaged or of another format is named."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.corpora.parts import file_parts, records_of
from megatron_dwm.corpora.preprocess import PreprocessConfig, preprocess
from megatron_dwm.corpora.readers import Reader, Record, input_files
from megatron_dwm.errors import UserError
from tests.paths import ROOT

DOCUMENTS: list[dict[str, Any]] = [{"text": f"{number} {number + 1}", "id": number} for number in range(3000)]
LINES = "".join(json.dumps(document) + "\n" for document in DOCUMENTS).encode()


def zstd(content: bytes) -> bytes:
    return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))


def parquet(documents: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(documents), sink, row_group_size=700)
    return bytes(sink.getvalue().to_pybytes())


SKIPPED = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"size"
"""A frame without content, as pzstd writes before every other one."""
FORMATS: dict[str, Callable[[], bytes]] = {
    "a.jsonl": lambda: LINES,
    "a.txt": lambda: LINES,
    "a.jsonl.gz": lambda: gzip.compress(LINES),
    "a.jsonl.GZ": lambda: gzip.compress(LINES[:999]) + gzip.compress(LINES[999:]),
    "a.jsonl.zst": lambda: zstd(LINES),
    "a.JSONL.Zst": lambda: zstd(LINES[:999]) + zstd(LINES[999:]),
    "pzstd.jsonl.zst": lambda: b"".join(SKIPPED + zstd(part) for part in (LINES[:999], LINES[999:])),
    "compressed": lambda: zstd(LINES),
    "a.parquet": lambda: parquet(DOCUMENTS),
}


def read(path: Path) -> list[Record]:
    return list(Reader(input_files([str(path)]), ["text"]))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(FORMATS[name]())
    records = read(path)
    texts = [
        (json.loads(record.content) if isinstance(record.content, str) else record.content)["text"]
        for record in records
    ]
    assert texts == [document["text"] for document in DOCUMENTS]
    assert [record.number for record in records] == list(range(1, 3001))
    assert records[4].place == f"{path}, {'row' if name == 'a.parquet' else 'line'} 5"


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_makes_the_same_dataset(name: str, tmp_path: Path) -> None:
    tokenizer = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=10_000)
    made = []
    for number, (other, workers) in enumerate((("a.jsonl", 1), (name, 2))):
        (tmp_path / f"in{number}").mkdir()
        (tmp_path / f"in{number}" / other).write_bytes(FORMATS[other]())
        prefix = tmp_path / f"out{number}" / "made"
        given = [str(tmp_path / f"in{number}" / other)]
        preprocess(PreprocessConfig(input=given, output_prefix=str(prefix), workers=workers), tokenizer)
        made.append({path.name: path.read_bytes() for path in prefix.parent.iterdir()})
    assert made[0] == made[1] and len(made[0]) == 2


@pytest.mark.parametrize("name", FORMATS)
def test_position_runs_up_to_the_size_of_all_files(name: str, tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}{name}").write_bytes(FORMATS[name]())
    reader = Reader(input_files([str(tmp_path / f"*{name}")]), ["text"])
    positions = [reader.position for _ in reader]
    assert positions == sorted(positions) and reader.position == reader.size == 2 * len(FORMATS[name]())


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd])
def test_a_byte_order_mark_and_blank_lines_are_no_documents(pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "a"
    content = b'\xef\xbb\xbf{"text": "1"}\r\n\r\n{"text": "2"}\n \t\n\n'
    path.write_bytes(pack(content))
    expected = ['{"text": "1"}\n', '{"text": "2"}\n']
    assert [(record.number, record.content) for record in read(path)] == list(zip((1, 3), expected, strict=True))
    if pack is bytes:  # the same in parts of any size
        for size in range(1, len(content)):
            parts = file_parts([str(path)], size)
            assert [record.content for part in parts for record in records_of(part)] == expected


def cut(content: bytes) -> bytes:
    return content[:-10]


def one_byte(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


def zeros(content: bytes) -> bytes:
    return content[:100] + bytes(len(content) - 100)


def with_checksums() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(DOCUMENTS), sink, compression="none", write_page_checksum=True
    )
    return bytes(sink.getvalue().to_pybytes())


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("a.jsonl.gz", one_byte),  # the other two have no checksum here
        *((name, damage) for name in ("a.jsonl.gz", "a.jsonl.zst", "a.parquet") for damage in (cut, zeros)),
    ],
)
def test_a_damaged_file_is_named(name: str, damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(damage(FORMATS[name]()))
    with pytest.raises(UserError, match=rf"--input {path}: unreadable after record \d+ \(.+\); check the file$"):
        read(path)


def test_checksums_of_a_parquet_file_are_verified(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    content = with_checksums()
    path.write_bytes(content)
    assert len(read(path)) == len(DOCUMENTS)
    place = content.index(b"2500 2501")
    path.write_bytes(content[:place] + b"9" + content[place + 1 :])
    with pytest.raises(UserError, match=r"unreadable after record \d+ \(.*checksum"):
        read(path)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (bz2.compress(LINES), "bzip2"),
        (lzma.compress(LINES), "xz"),
        (b"PK\x03\x04rest", "zip"),
        (b"ARROW1\0\0", "Arrow IPC"),
        (b"Obj\x01rest", "Avro"),
        (b"\x89HDF\r\n", "HDF5"),
        (b"SQLite format 3\0", "SQLite"),
        ("\ufeff{}".encode("utf-16-le"), "UTF-16"),
    ],
)
def test_a_format_that_is_not_read_is_named(content: bytes, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"--input {path}: {kind} files are not supported; give JSON lines"):
        read(path)


@pytest.mark.parametrize(("name", "kind"), [("a.csv", "CSV"), ("a.TSV", "TSV"), ("a.txt", "plain text")])
def test_a_text_that_is_not_read_is_named_unless_it_holds_json_lines(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"text,source\n")
    with pytest.raises(UserError, match=rf"--input {path}: {kind} files are not supported; give JSON lines"):
        read(path)
    path.write_bytes(b"\n" + LINES)
    assert len(read(path)) == len(DOCUMENTS)


@pytest.mark.parametrize(("name", "kind"), [("a.jsonl.gz", "gzip"), ("a.zst", "zstd"), ("a.parquet", "parquet")])
def test_a_file_that_is_not_what_its_name_says_is_refused(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(LINES)
    with pytest.raises(UserError, match=rf"--input {path}: its name says {kind}, but its content is not {kind}"):
        read(path)


def test_a_column_that_a_table_does_not_have_is_named_with_those_it_has(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet([{"body": "1", "id": 2}]))
    with pytest.raises(UserError, match=rf"--input {path}: no column 'text', it has body, id; give another"):
        read(path)


def test_rows_of_any_type_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    values = [None, "1", "é", "", "2"]
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        array = pyarrow.array(values, pyarrow.string()).cast(kind)
        pyarrow.parquet.write_table(pyarrow.table({"text": array}), path)
        assert [record.content for record in read(path)] == [{"text": value} for value in values]


def test_a_folder_is_all_files_of_known_names_below_it(tmp_path: Path) -> None:
    for name in (
        "b.jsonl",
        "a.json.GZ",
        "sub/c.parquet",
        "sub/deep/d.ndjson.zst",
        "README.md",
        ".hidden.jsonl",
        "b.jsonl.manifest.json",
        "x.gz",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    names = ["a.json.GZ", "b.jsonl", "sub/c.parquet", "sub/deep/d.ndjson.zst"]
    assert input_files([str(tmp_path)]) == [str(tmp_path / name) for name in names]
    twice = [str(tmp_path / "b.jsonl"), str(tmp_path / "sub")]
    assert input_files(twice) == [str(tmp_path / name) for name in ["b.jsonl", *names[2:]]]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--input .*empty: the folder holds no file named \*.jsonl"):
        input_files([str(tmp_path / "empty")])
    with pytest.raises(UserError, match=r"--input .*none: no such file"):
        input_files([str(tmp_path / "b.jsonl"), str(tmp_path / "none")])


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst"])
def test_a_pipe_is_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    (tmp_path / name).write_bytes(FORMATS[name]())
    with subprocess.Popen(["dd", f"if={tmp_path / name}", f"of={path}", "status=none"]):
        assert len(list(Reader(input_files([str(path)]), ["text"]))) == 3000


def test_without_pyarrow_the_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "pyarrow.py").write_text("raise ImportError")
    read = [str(tmp_path / name) for name in ("a.jsonl", "a.jsonl.gz")]
    refused = [str(tmp_path / name) for name in ("a.parquet", "a.jsonl.zst")]
    for path in map(Path, (*read, *refused)):
        path.write_bytes(FORMATS[path.name]())
    program = f"""
from megatron_dwm.corpora.readers import Reader
from megatron_dwm.errors import UserError
print(len(list(Reader({read}, ["text"]))))
for path in {refused}:
    try:
        list(Reader([path], ["text"]))
    except UserError as error:
        print(error)
"""
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    needs = 'reading it needs pyarrow; pip install "megatron-dwm[data]"'
    assert result.stdout.splitlines() == ["6000", *(f"--input {path}: {needs}" for path in refused)], result.stderr
