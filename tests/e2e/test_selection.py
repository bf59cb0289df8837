"""Selection of rows: each method and budget against a sort of all rows in memory."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from collections import Counter
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_dwm.analysis import top_rows
from megatron_dwm.analysis.selection_table import RowTableWriter
from megatron_dwm.analysis.top_rows import ROW, Group, TopRows
from megatron_dwm.cli import preprocess, select
from tests.programs import Finished, Fork, call_main


def made_rows() -> list[dict[str, Any]]:
    """Rows with many equal scores, of three sources of different sizes."""
    generator = np.random.default_rng(5)
    return [
        {
            "id": number,
            "text": "w " * int(generator.integers(1, 9)),
            "score": float(generator.integers(-6, 7)) / 4,
            "perplexity": float(generator.uniform(1, 9)),
            "tokens": int(generator.integers(0, 9)),
            "source": str(generator.choice(["web", "books", "code"], p=[0.6, 0.3, 0.1])),
        }
        for number in range(200)
    ]


ROWS = made_rows()


def best(rows: list[dict], budget: int, key: str = "score", cost: str | None = None, sign: int = -1) -> list[dict]:
    """The brute-force reference: sort all rows, and take from the top while the budget lasts; in the rows' order."""
    kept, spent = [], 0
    for row in sorted(rows, key=lambda row: (sign * row[key], row["id"])):
        spent += row[cost] if cost else 1
        if spent > budget:
            break
        kept.append(row)
    return sorted(kept, key=lambda row: row["id"])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


run = partial(call_main, select.main)


def selected(source: Path, *words: object) -> list[dict]:
    output = source.parent / "out.jsonl"
    assert run("--input", source, "--output", output, *words) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def manifest(output: Path) -> dict[str, Any]:
    return json.loads(Path(f"{output}.manifest.json").read_text())


@pytest.fixture(params=[7, 1 << 16])
def block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Rows of a block: the table has many blocks, or one."""
    monkeypatch.setattr(top_rows, "_BLOCK", request.param)
    return request.param


def test_the_best_rows_are_those_of_a_sort(source: Path, block_size: int):
    for budget in (37, 200):
        assert selected(source, "--documents", budget) == best(ROWS, budget)
        found = selected(source, "--documents", budget, "--method", "perplexity")
        assert found == best(ROWS, budget, "perplexity", sign=1)
    for budget in (40, sum(row["tokens"] for row in ROWS)):
        assert selected(source, "--tokens", budget, "--token-key", "tokens") == best(ROWS, budget, cost="tokens")
    assert selected(source, "--fraction", 0.29, "--score-key", "tokens") == best(ROWS, 58, "tokens")
    found = selected(source, "--documents", 50, "--quota", "code=0.1", "books=0.25", "--source-key", "source")
    parts = [("code", 5), ("books", 12), ("web", 33)]  # 12.5 of books: the sums 5 and 17.5 are rounded down
    expected = [row for name, budget in parts for row in best([r for r in ROWS if r["source"] == name], budget)]
    assert found == sorted(expected, key=lambda row: row["id"])


def test_the_cutoff_is_exact_for_any_numbers(monkeypatch: pytest.MonkeyPatch):
    """Keys of all magnitudes and both signs, equal ones, two zeros, and neighbors that differ in their last bit."""
    monkeypatch.setattr(top_rows, "_BLOCK", 64)
    generator = np.random.default_rng(6)
    special = [0.0, -0.0, 5e-324, -5e-324, 1.0, np.nextafter(1, 2), np.nextafter(1, 0), 1.7e308, -1.7e308]
    keys = np.concatenate(
        [np.tile(special, 20), generator.normal(size=200) * 10.0 ** generator.integers(-300, 300, 200)]
    )
    generator.shuffle(keys)
    table = np.zeros(len(keys), ROW)
    table["key"], table["cost"] = keys, generator.integers(0, 1000, len(keys))
    rows = [{"id": n, "key": float(row["key"]), "cost": int(row["cost"])} for n, row in enumerate(table)]
    for budget in (0, 500, 20_000, 100_000, int(table["cost"].sum()) - 1, int(table["cost"].sum())):
        top = TopRows(table, [Group("all", np.ones(1, np.bool_), budget)])
        kept = np.flatnonzero(np.concatenate(list(top.masks()))).tolist()
        assert kept == [row["id"] for row in best(rows, budget, "key", "cost")]
        threshold = top.thresholds()["all"]
        if threshold is not None:
            assert {n for n, key in enumerate(keys) if key > threshold} <= set(kept)
            assert all(keys[n] >= threshold for n in kept)


def test_random_rows_follow_the_seed_and_the_quotas(source: Path, block_size: int):
    flags = ("--method", "random", "--documents", 60)
    first = selected(source, *flags)
    assert len(first) == 60 and first == selected(source, *flags)
    assert first != selected(source, *flags, "--seed", 2) and first != best(ROWS, 60)
    key = np.random.default_rng(1234).random(len(ROWS))
    keyed = [{**row, "key": key[row["id"]]} for row in ROWS]
    assert [row["id"] for row in first] == [row["id"] for row in best(keyed, 60, "key")]
    quotas = ("--quota", "code=0.2", "books=0.8", "--source-key", "source", "--documents", 50)
    mixed = selected(source, *quotas, "--method", "source-mix")
    assert Counter(row["source"] for row in mixed) == {"code": 10, "books": 40}
    assert mixed == selected(source, *quotas, "--method", "random")


def test_a_source_mix_keeps_the_shares_that_scores_keep(source: Path):
    flags = ("--documents", 70, "--source-key", "source")
    scored, mixed = selected(source, *flags), selected(source, *flags, "--method", "source-mix")
    assert scored != mixed
    assert Counter(row["source"] for row in scored) == Counter(row["source"] for row in mixed)


def test_a_temperature_draws_in_proportion(tmp_path: Path, source: Path):
    """Scores 0 and 1: at temperature 0.5 a single draw takes a row of score 1 with e² times the probability."""
    wanted, table = 0, np.zeros(2, ROW)
    group = Group("all", np.ones(1, np.bool_), 1)
    for seed in range(2000):
        table["key"], table["cost"] = [0.0, 1.0], 1
        top_rows.add_gumbel(table, 0.5, seed)
        (mask,) = TopRows(table, [group]).masks()
        wanted += bool(mask[1])
    expected = np.exp(2) / (1 + np.exp(2))
    # Four standard deviations of 2,000 draws.
    assert wanted / 2000 == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 2000) ** 0.5)
    assert selected(source, "--documents", 60, "--temperature", 1e-9, "--score-key", "perplexity") == best(
        ROWS, 60, "perplexity"
    )
    warm = selected(source, "--documents", 60, "--temperature", 1.0)
    assert len(warm) == 60 and warm != best(ROWS, 60)
    assert warm == selected(source, "--documents", 60, "--temperature", 1.0)


def test_lines_stay_as_they_are_and_the_manifest_says_what_was_kept(tmp_path: Path, capsys: Any):
    lines = [f'{{"score":  {n % 5}, "t": "é\\u00e9", "n": {10**30}}}\n'.encode() for n in range(20)]
    plain, table, output = tmp_path / "a.jsonl.gz", tmp_path / "b.parquet", tmp_path / "deep/out.jsonl.gz"
    plain.write_bytes(gzip.compress(b"".join(lines).removesuffix(b"\n")))
    pq.write_table(pa.Table.from_pylist([{"score": 4.5, "t": "ü"}, {"score": 0.5, "t": "x"}]), table)
    argv = ("--input", plain, table, "--output", output, "--documents", 6)
    assert run(*argv) == 0
    expected = [line for n, line in enumerate(lines) if n % 5 == 4] + ['{"score": 4.5, "t": "ü"}\n'.encode(), lines[3]]
    assert sorted(gzip.decompress(output.read_bytes()).splitlines(keepends=True)) == sorted(expected)
    found = manifest(output)
    assert (found["documents_kept"], found["documents_dropped"]) == (6, 16)
    assert found["thresholds"] == {"all sources": 3.0} and found["method"] == "score"
    assert found["flags"]["documents"] == 6 and found["flags"]["input"] == [str(plain), str(table)]
    assert found["sources"][str(plain)] == {"documents_kept": 5, "documents_dropped": 15}
    assert found["sources"][str(table)] == {"documents_kept": 1, "documents_dropped": 1}
    for entry in (*found["inputs"], found["output"]):
        content = Path(entry["path"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert "kept 6 of 22 documents" in capsys.readouterr().out
    before = output.read_bytes()
    assert run(*argv) == 0 and output.read_bytes() == before
    assert sorted(path.name for path in output.parent.iterdir()) == ["out.jsonl.gz", "out.jsonl.gz.manifest.json"]
    other = output.with_suffix(".zst")
    assert run(*argv, "--output", other) == 0
    assert pa.input_stream(other, compression="zstd").read() == gzip.decompress(before)
    assert manifest(other)["output"]["sha256"] == hashlib.sha256(other.read_bytes()).hexdigest()


def test_tokens_are_counted_by_a_tokenizer(source: Path, tmp_path: Path):
    words = Tokenizer(models.WordLevel({"?": 0, "w": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "tokenizer")
    counted = [{**row, "words": len(row["text"].split())} for row in ROWS]
    expected = [row["id"] for row in best(counted, 300, cost="words")]
    found = selected(source, "--tokens", 300, "--tokenizer", tmp_path / "tokenizer")
    assert [row["id"] for row in found] == expected
    kept = manifest(tmp_path / "out.jsonl")
    assert kept["tokens_kept"] == sum(len(row["text"].split()) for row in found)
    assert kept["tokens_kept"] + kept["tokens_dropped"] == sum(row["words"] for row in counted)


def test_dsir_is_that_of_its_package(source: Path, tmp_path: Path):
    """The package fits and weighs the same files itself."""
    from data_selection import HashedNgramDSIR

    generator = np.random.default_rng(8)
    rows = [{"id": n, "text": " ".join(generator.choice(list("abcdef"), 12))} for n in range(60)]
    wanted, raw = tmp_path / "wanted.jsonl", tmp_path / "raw.jsonl"
    raw.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted.write_text("".join(json.dumps({"text": f"a b c {n % 3}"}) + "\n" for n in range(20)))
    reference = HashedNgramDSIR([str(raw)], [str(wanted)], str(tmp_path / "cache"), num_proc=1)
    reference.fit_importance_estimator()
    reference.compute_importance_weights()
    weights = np.load(tmp_path / "cache/log_importance_weights/0.npy")
    expected = [n for n, _ in enumerate(rows) if n in np.argsort(-weights, kind="stable")[:20]]
    found = selected(raw, "--documents", 20, "--method", "dsir", "--target", wanted)
    assert [row["id"] for row in found] == expected
    # The best that is left out: all above it are kept.
    assert manifest(tmp_path / "out.jsonl")["thresholds"]["all sources"] == pytest.approx(np.sort(weights)[-21])


def outputs(output: Path) -> tuple[bytes, list[Path]]:
    """What is written, and what is left beside it."""
    found = gzip.decompress(output.read_bytes()) if output.suffix == ".gz" else output.read_bytes()
    return found, [path for path in output.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("words", "workers"),
    [
        (("--tokens", 99, "--token-key", "tokens", "--temperature", 0.7, "--source-key", "source"), 2),
        (("--documents", 5, "--duplicates", "near"), 1),
        (("--documents", 5, "--method", "dsir", "--target", "target.jsonl"), 1),
    ],
)
def test_several_tasks_and_processes_write_what_one_does(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[object, ...], workers: int
):
    """Of files behind URLs, to one behind a URL, too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "target.jsonl").write_text('{"text": "w w w w"}\n')
    (tmp_path / "more").mkdir()
    few = [{**row, "text": "v v v v v"} for row in ROWS[:9]]
    (tmp_path / "more/few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in few))
    assert run("--input", "rows.jsonl", "more", *words, "--output", "one.jsonl") == 0
    expected, left = outputs(tmp_path / "one.jsonl")
    assert expected and not left
    split = ("--output", "some.jsonl.gz", "--split-bytes", 6000, "--workers", workers)
    assert run("--input", "rows.jsonl", "more", *words, *split) == 0
    assert outputs(tmp_path / "some.jsonl.gz") == (expected, [])
    if workers == 1:
        return
    url = f"file://{tmp_path}"
    assert run("--input", f"{url}/rows.jsonl", f"{url}/more", *words, "--output", f"{url}/behind.jsonl") == 0
    assert outputs(tmp_path / "behind.jsonl") == (expected, [])
    one, behind = manifest(tmp_path / "one.jsonl"), manifest(tmp_path / "behind.jsonl")
    assert behind["output"]["sha256"] == one["output"]["sha256"] and behind["thresholds"] == one["thresholds"]


def test_a_selection_that_was_interrupted_goes_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The tables of finished tasks are not made again, unless the flags have changed."""
    words = ("--input", source, "--documents", 20, "--output", tmp_path / "out.jsonl", "--split-bytes", 6000)
    calls, write_numbers = list[int](), RowTableWriter.run

    def counted(step: RowTableWriter, data: Any, rank: int = 0, world_size: int = 1) -> None:
        calls.append(rank)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write_numbers(step, data, rank, world_size)

    monkeypatch.setattr(RowTableWriter, "run", counted)
    assert run(*words) == 130
    assert (tmp_path / ".out.jsonl.unfinished/numbers/00000").is_file() and not (tmp_path / "out.jsonl").exists()
    assert run(*words) == 0
    assert calls == [0, 1, *range(1, max(calls) + 1)] and max(calls) > 2
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == best(ROWS, 20)
    assert not (tmp_path / ".out.jsonl.unfinished").exists()
    calls[:] = [0]
    assert run(*words) == 130
    assert run(*words, "--seed", 2) == 0
    assert calls[2:] == list(range(max(calls) + 1))


def test_a_selection_that_ends_while_it_removes_its_unfinished_work_can_be_repeated(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    words = ("--input", source, "--documents", 20, "--output", tmp_path / "out.jsonl")

    def interrupted(folder: str, **options: Any) -> None:
        if (table := Path(folder) / "numbers/00000").exists():  # not before the work begins
            table.unlink()  # files go one by one, in any order
            monkeypatch.undo()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    assert run(*words) == 130
    assert run(*words) == 0
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == best(ROWS, 20)
    assert not (tmp_path / ".out.jsonl.unfinished").exists()


def test_another_selection_is_refused_while_one_is_at_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    words = ["--input", str(source), "--documents", "20", "--output", str(tmp_path / "out.jsonl")]
    others, write_numbers = list[Finished](), RowTableWriter.run

    def write_beside(step: RowTableWriter, data: Any, rank: int = 0, world_size: int = 1) -> None:
        others.append(Fork(lambda: select.main([*words, "--seed", "2"])).finish())
        write_numbers(step, data, rank, world_size)

    monkeypatch.setattr(RowTableWriter, "run", write_beside)
    assert run(*words) == 0
    assert [other.returncode for other in others] == [2]
    said = f"{tmp_path}/.out.jsonl.unfinished: another process is writing there; wait until it has finished"
    assert others[0].stderr == f"error: {said}\n"
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == best(ROWS, 20)


def test_dates_and_lists_of_a_table_are_written(tmp_path: Path):
    table, when = tmp_path / "b.parquet", datetime(2024, 2, 29, 1, 2, 3)
    pq.write_table(pa.Table.from_pylist([{"score": 4.5, "when": when, "day": when.date(), "tags": ["a", None]}]), table)
    assert run("--input", table, "--documents", 1, "--output", tmp_path / "out.jsonl") == 0
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert row == {"score": 4.5, "when": "2024-02-29T01:02:03", "day": "2024-02-29", "tags": ["a", None]}


def test_duplicates_go_first_and_a_dataset_is_written_of_the_rows_that_are_kept(source: Path, tmp_path: Path, capsys):
    distinct = len({row["text"] for row in ROWS})
    rows = selected(source, "--documents", distinct - 1, "--duplicates", "exact")
    assert len({row["text"] for row in rows}) == len(rows) == 7
    assert manifest(source.parent / "out.jsonl")["duplicates_dropped"] == len(ROWS) - distinct
    assert "after 192 duplicates" in capsys.readouterr().out
    usual = ("--input", source, "--documents", 7, "--duplicates", "exact")
    assert run(*usual, "--output", tmp_path / "more.jsonl", "--documents", distinct + 1) == 2
    assert "asks for 9 documents of all sources, which holds 8" in capsys.readouterr().err
    words = Tokenizer(models.WordLevel({"w": 0, "</s>": 1}, unk_token="w"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(tmp_path / "words")
    tokenizer = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tmp_path / "words")
    flags = (*usual, "--output-format", "indexed", "--output", tmp_path / "set")
    assert run(*flags, *tokenizer, "--append-eod") == 0
    preprocess.main(
        [
            str(word)
            for word in (
                "--input",
                source.parent / "out.jsonl",
                "--append-eod",
                *tokenizer,
                "--output-prefix",
                tmp_path / "expected",
            )
        ]
    )
    for suffix in (".bin", ".idx"):
        found, expected = (tmp_path / f"{name}_text_document{suffix}" for name in ("set", "expected"))
        assert found.read_bytes() == expected.read_bytes()
    assert set(manifest(tmp_path / "set")["output"]["files"]) == {"set_text_document.bin", "set_text_document.idx"}
    for wrong, message in [
        (flags, "--output-format indexed needs a tokenizer"),
        ((*usual, *tokenizer, "--output", tmp_path / "a.jsonl"), "--tokenizer-type is for --output-format indexed"),
        ((*usual, "--append-eod", "--output", tmp_path / "a.jsonl"), "--append-eod is for --output-format indexed"),
        ((*flags, *tokenizer, "--output", tmp_path / "set.jsonl"), "give the prefix of a dataset"),
    ]:
        assert run(*wrong) == 2
        assert message in capsys.readouterr().err
