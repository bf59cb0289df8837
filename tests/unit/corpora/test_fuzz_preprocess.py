"""Whatever stands in a file of documents, preprocessing takes what is a document, or ends in one line."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, strategies

from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.corpora.preprocess import PreprocessConfig, preprocess
from megatron_dwm.corpora.readers import Reader, input_files
from megatron_dwm.data.index_file import IndexFile
from megatron_dwm.errors import UserError
from tests.fixtures.preprocess.inputs import write_inputs
from tests.fuzzing import damaged, fuzz_settings


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TokenizerConfig:
    """A tokenizer that has a token for every byte, so that any text has one."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_inputs(folder)
    return TokenizerConfig(tokenizer_type="GPTSentencePieceTokenizer", tokenizer_model=str(folder / "sp.model"))


texts = strategies.text(max_size=30)
values = strategies.recursive(
    strategies.one_of(strategies.none(), strategies.booleans(), strategies.integers(), strategies.floats(), texts),
    lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
documents = strategies.builds(
    lambda text, more, ascii: json.dumps({**more, "text": text}, ensure_ascii=ascii).encode(errors="surrogatepass"),
    strategies.one_of(texts, strategies.lists(texts, max_size=3), values),
    strategies.dictionaries(texts, values, max_size=2),
    strategies.booleans(),
)
lines = strategies.one_of(
    documents,
    documents.flatmap(damaged),
    values.map(lambda value: json.dumps(value).encode()),
    strategies.binary(max_size=40),
    strategies.sampled_from(
        [
            b'{"text": "half of a pair: \\ud800"}',
            b'{"text": "1", "id": ' + b"9" * 5000 + b"}",
            b'{"text": ' + b"9" * 5000 + b"}",
            b"[" * 100_000,
            b'{"text": "' + b"a" * 100_000 + b'"}',
            b'\xef\xbb\xbf{"text": "a"}',
            b'{"text": "a"}\r{"text": "b"}',
            b'{"text": NaN}',
            b"\0",
            b"",
        ]
    ),
)


@contextmanager
def integers_of_any_length() -> Iterator[None]:
    """Let Python read integers of any number of digits."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(before)


def is_document(line: str) -> bool:
    """Whether a line is an object with a text, or a list of texts, that has UTF-8."""
    try:
        line.encode()
        with integers_of_any_length():
            document = json.loads(line)
        text = document["text"]
        "".join(text).encode() if isinstance(text, list) else text.encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False
    return True


def assert_one_short_line(error: UserError, path: Path) -> None:
    message = str(error)
    assert message.startswith(f"--input {path}") and "\n" not in message and len(message) < len(str(path)) + 500


@fuzz_settings(60)
@given(content=strategies.lists(lines, max_size=5).map(b"\n".join), skips_malformed=strategies.booleans())
@example(content=b"", skips_malformed=True)
@example(content=b"\n\n", skips_malformed=False)
def test_documents_are_taken_and_the_rest_is_one_line(
    content: bytes, skips_malformed: bool, tokenizer: TokenizerConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    path, out = folder / "texts.jsonl", folder / "out"
    path.write_bytes(content)
    text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", errors="surrogateescape")
    expected = [is_document(line) for line in text]
    config = PreprocessConfig(input=[str(path)], output_prefix=str(out / "made"), skip_malformed=skips_malformed)
    try:
        preprocess(config, tokenizer)
    except UserError as error:
        assert_one_short_line(error, path)
        is_another_format = " are not supported; give JSON lines" in str(error) or "check the file" in str(error)
        assert is_another_format or not any(expected) or (not skips_malformed and not all(expected))
        assert not out.exists() or list(out.iterdir()) == []
    else:
        assert any(expected) and (skips_malformed or all(expected))
        assert sorted(made.name for made in out.iterdir()) == ["made_text_document.bin", "made_text_document.idx"]
        index = IndexFile.open(str(out / "made_text_document"))
        assert index.num_boundaries - 1 == sum(expected)
        assert index.check() == (out / "made_text_document.bin").stat().st_size


LINES = b"".join(b'{"text": "%d"}\n' % number for number in range(200))


def parquet() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": [str(number) for number in range(200)]}), sink)
    return bytes(sink.getvalue().to_pybytes())


FILES = {
    "a.jsonl.gz": gzip.compress(LINES),
    "a.jsonl.zst": bytes(pyarrow.compress(LINES, codec="zstd", asbytes=True)),
    "a.parquet": parquet(),
}


@pytest.mark.parametrize("name", FILES)
@fuzz_settings(40)
@given(data=strategies.data())
def test_a_damaged_file_is_read_or_refused_in_one_line(name: str, data: strategies.DataObject, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(data.draw(damaged(FILES[name])))
    try:
        for record in Reader(input_files([str(path)]), ["text"]):
            assert record.path == str(path)
    except UserError as error:
        assert_one_short_line(error, path)
    assert list(tmp_path.iterdir()) == [path]
