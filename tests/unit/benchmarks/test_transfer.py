"""The table of examples/transfer.sh: differences are taken seed by seed, and runs that are missing are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dwm.benchmarks import transfer

LOSSES = {
    "random-uniform": [3.0, 3.2],
    "random-frozen": [2.8, 3.0],
    "random-staged": [2.9, 3.1],
    "random-bilevel": [2.7, 2.9],
    "dsir-uniform": [2.5, 2.7],
    "dsir-frozen": [2.4, 2.6],
    "dsir-staged": [2.4, 2.6],
    "dsir-bilevel": [2.3, 2.5],
}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name, losses in LOSSES.items():
        for seed, loss in enumerate(losses, start=1):
            folder = tmp_path / "runs" / f"{name}-{seed}"
            folder.mkdir(parents=True)
            lines = [{"kind": "train", "iteration": 4, "lm_loss": loss}]
            lines += [
                {"kind": "evaluation", "iteration": iteration, "split": split, "lm_loss": loss + extra}
                for iteration, split, extra in ((2, "valid", 1.0), (4, "valid", 0.0), (4, "test", 0.0))
            ]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "runs"


def test_table_and_plot(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    argv = ["--runs", str(runs), "--seeds", "2", "--output", str(tmp_path / "out")]
    transfer.main(argv)
    lines = capsys.readouterr().out.splitlines()
    rows = {tuple(line.split()[:2]): line.split("  ") for line in lines[1:9]}
    assert rows["random", "uniform"][-1].strip() == "3.1000 ± 1.2710"
    assert [word.strip() for word in rows["random", "frozen"] if "±" in word][1] == "-0.2000 ± 0.0000"
    assert [word.strip() for word in rows["dsir", "staged"] if "±" in word] == [
        "2.5000 ± 1.2710",
        "-0.1000 ± 0.0000",
        "-0.6000 ± 0.0000",
    ]
    assert json.loads((tmp_path / "out.json").read_text())["dsir"]["frozen"]["test_loss"] == [2.4, 2.6]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    (runs / "dsir-frozen-2" / "metrics.jsonl").unlink()
    with pytest.raises(SystemExit) as end:
        transfer.main(argv)
    assert end.value.code == 2 and "dsir-frozen-2 has no test loss" in capsys.readouterr().err
