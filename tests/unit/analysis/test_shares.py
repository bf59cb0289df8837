"""The learnt shares of sources: means, intervals, stages, and the line that is printed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_dwm.cli import blend


def write_run(folder: Path, iterations: int, *, weighted: bool = True) -> Path:
    """A run whose source ``good`` has a share of 0.6 in stage 1 and of 0.8 in stage 2, with noise."""
    noise = np.random.default_rng(3).normal(0, 0.05, iterations)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(iterations):
            stage = 1 if step < iterations // 2 else 2
            good = 0.4 + 0.2 * stage + noise[step]
            record = {"kind": "train", "iteration": step + 1, "lm_loss": 1.0, "stage": stage}
            record["share_by_source"] = {"good": good, "other": 1 - good}
            if weighted:
                record["weight_by_source"] = {"good": 1.2, "other": 0.8}
            file.write(json.dumps(record) + "\n")
    return folder


def test_the_lines_are_the_shares_with_intervals(tmp_path: Path, capsys):
    blend.main([str(write_run(tmp_path, 200)), "--data-path", "a_text_document", "b_text_document"])
    lines = capsys.readouterr().out.splitlines()
    paths = [line.split() for line in lines if line.startswith("--data-path")]
    assert [words[2::2] for words in paths] == [["a_text_document", "b_text_document"]] * 3
    for words, expected in zip(paths, (0.7, 0.6, 0.8), strict=True):
        # The mean of 100 draws of standard deviation 0.05 is off by less than 0.02 (4 of its deviations).
        assert float(words[1]) == pytest.approx(expected, abs=0.02)
        assert float(words[1]) + float(words[3]) == pytest.approx(1, abs=2e-6)
    (line,) = [line for line in lines[lines.index("# stage 1, 100 iterations") :] if "good" in line][:1]
    assert lines[-1].endswith(
        "--dwm-rule source-weights --dwm-rule-sources good other --dwm-rule-weights 1.2000 0.8000"
    )
    low, high = map(float, re.search(r"\((\S+) to (\S+)\)", line).groups())
    assert 0.55 < low < float(paths[1][1]) < high < 0.65


def test_few_iterations_have_no_interval(tmp_path: Path, capsys):
    blend.main(["--run", str(write_run(tmp_path, 10))])
    assert "too few iterations" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("weighted", "flags", "words"),
    [(False, (), "recorded no weights"), (True, ("--data-path", "a"), "1 prefixes for 2 sources")],
)
def test_mistakes_are_one_line(tmp_path: Path, capsys, weighted: bool, flags: tuple[str, ...], words: str):
    run = write_run(tmp_path, 30, weighted=weighted)
    with pytest.raises(SystemExit) as end:
        blend.main([str(run), *flags])
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1
