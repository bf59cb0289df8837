"""The learnt shares of sources: means, intervals, stages, and the line that is printed."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from megatron_dwm.cli import blend
from megatron_dwm.data.blend import parse_blend


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
    assert lines[-1].endswith("--dwm-rule source-weights --dwm-rule-sources good other --dwm-rule-weights 1.2 0.8")
    low, high = map(float, re.search(r"\((\S+) to (\S+)\)", line).groups())
    assert 0.55 < low < float(paths[1][1]) < high < 0.65


def test_few_iterations_have_no_interval(tmp_path: Path, capsys):
    blend.main(["--run", str(write_run(tmp_path, 10))])
    assert "too few iterations" in capsys.readouterr().out


def write_steps(folder: Path, *shares: dict[str, float]) -> Path:
    """A run whose sources all have weight 1 where they have a share."""
    steps = [
        {
            "kind": "train",
            "iteration": number,
            "lm_loss": 1.0,
            "stage": 1,
            "share_by_source": share,
            "weight_by_source": {name: 1.0 for name, value in share.items() if value},
        }
        for number, share in enumerate(shares, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    return folder


def test_prefixes_are_those_of_the_sources_names_in_any_order(tmp_path: Path, capsys):
    """Older records list the sources in the order in which they first had a sample, and some had none."""
    run = write_steps(tmp_path, {"b": 1.0}, {"a": 0.5, "b": 0.5})
    blend.main([str(run), "--data-path", "data/a_text_document", "data/b_text_document", "data/c_text_document"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("--data-path"))
    assert line == "--data-path 0.75 data/b_text_document 0.25 data/a_text_document"


def test_the_lines_are_flags_that_a_shell_and_the_program_take(tmp_path: Path, capsys):
    """Names with spaces and the like are quoted; tiny shares are no zeros, and shares of zero are left out."""
    run = write_steps(tmp_path, {"a b": 1e-9, "$(date)'": 1 - 1e-9, "none": 0.0})
    blend.main([str(run)])
    out = capsys.readouterr().out
    (line,) = {line for line in out.splitlines() if line.startswith("--data-path")}
    prefixes, weights = parse_blend("--data-path", shlex.split(line)[1:])
    assert prefixes == ["a b", "$(date)'"] and weights == pytest.approx([1e-9, 1])
    assert "#   none: 0, left out" in out
    rule = shlex.split(out.splitlines()[-1])
    assert rule[rule.index("--dwm-rule-sources") + 1 :] == ["a b", "$(date)'", "--dwm-rule-weights", "1", "1"]


def test_a_source_of_weight_0_is_no_source_of_weight_1(tmp_path: Path, capsys):
    """The rule gives weight 1 to sources that it does not name."""
    step = {"kind": "train", "iteration": 1, "lm_loss": 1.0, "stage": 1, "share_by_source": {"a": 1.0, "b": 0.0}}
    step |= {"fraction_by_source": {"a": 0.5, "b": 0.5}, "weight_by_source": {"a": 2.0, "b": 0.0}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    blend.main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "#   b: 0, to be left out of the data, since other weights are 1"
    assert lines[-1].endswith("--dwm-rule-sources a --dwm-rule-weights 2")


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
