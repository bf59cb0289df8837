"""Pages: what they say and draw, and that nothing of the data runs in them."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from megatron_dwm.analysis.preference import weighted_samples
from megatron_dwm.analysis.records import RunRecords
from megatron_dwm.analysis.report.comparison import run_names
from megatron_dwm.analysis.report.content import Example, Report, read_benefit
from megatron_dwm.analysis.report.documents import TrackedDocument, WeightHistory
from megatron_dwm.analysis.report.findings import key_facts
from megatron_dwm.analysis.report.page import render_report, tint, write_comparison, write_report
from megatron_dwm.analysis.report.palette import DARK
from megatron_dwm.errors import UserError
from tests.unit.analysis.made_records import run_of, update


def drawn(page: str) -> dict[str, Any]:
    """Return the figures of a page by name."""
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(data)["figures"]


def named(figure: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the lines of a figure that have a name."""
    return {trace["name"]: trace for trace in figure["data"] if trace.get("name")}


def report_of(run: RunRecords, **content: Any) -> Report:
    samples = weighted_samples(run.updates)
    return Report("run", run, samples, samples, **content)


def test_a_cell_is_tinted_by_how_far_its_value_is_from_the_middle():
    assert "--more) 60%" in tint(2.0) and "--less) 30%" in tint(0.5) and tint(None) == ""
    assert "--more) 60%" in tint(50.0)


def test_text_of_others_is_escaped_and_the_page_names_its_facts(tmp_path: Path):
    hostile, other = "<b>&\"'$x^{", "_b \udc80"
    text = "</pre></script><script>alert(1)</script><img src=x onerror=alert(1)>"
    run = run_of(
        [update(4, 1, [0.5, 1.5], [1.0, 3.0], source=[hostile, other])],
        stage=1,
        share_by_source={hostile: 0.6, other: 0.4},
        weight_by_source={hostile: 1.2, other: 0.8},
        effective_sample_size=0.9,
    )
    example = Example(hostile, iteration=4, index=40, weight=0.5, alignment=-1.0, loss=2.0, text=text)
    history = WeightHistory([2, 4], [TrackedDocument(hostile, 40, text, [1.0, 2.0])], 8)
    samples = weighted_samples(run.updates)
    report = Report(text, run, samples, samples, {1: ([example], [example])}, history, notes=[text])
    facts = {fact.title: fact.value for fact in key_facts(report)}
    assert (facts["counts most"], facts["counts least"]) == (hostile, other)
    assert facts["effective sample size"] == "90 %"
    page = write_report(report, tmp_path).read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["preference.html"]
    assert page.count("&lt;script&gt;") == 6 and "&lt;b&gt;&amp;&#34;&#39;$x^{" in page
    assert "<img src=x" not in page and hostile not in page and page.count("<script") == 3
    # plotly reads tags and entities in a name; it shows this one as it is.
    assert [html.unescape(name) for name in named(drawn(page)["weights"])] == [hostile, "_b ?"]


def test_the_policy_lets_the_pages_own_scripts_run_and_no_others(tmp_path: Path):
    page = write_report(report_of(run_of([])), tmp_path).read_text()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == "'none'" and "connect-src" not in directives
    (own,) = re.findall(r"<script>(.*?)</script>", page, re.S)
    (packed,) = re.findall(r'<script type="text/plain" id="plotly">(.*?)</script>', page, re.S)
    library = gzip.decompress(base64.b64decode(packed)).decode()
    assert library == get_plotlyjs()
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (own, library)]
    assert directives["script-src"] == " ".join(f"'sha256-{digest}'" for digest in digests)
    assert len(page) < 2_500_000


@pytest.mark.parametrize("step", [{}, {"stage": 0, "share_by_source": {"a": 1.0}}])
def test_a_run_without_weights_has_a_page_too(step: dict):
    page = render_report(report_of(run_of([], **step)))
    assert "No step of this run was weighted" in page and "no weights of single samples" in page


def test_a_run_by_rule_has_no_alignments_and_no_weighter_that_is_not_told():
    """An oracle is told; and of one source nothing counts most."""
    report = report_of(run_of([], stage=1, share_by_source={"a": 1.0}, weight_by_source={"a": 1.0}))
    page = render_report(report)
    assert "never told" not in page and "alignments" not in drawn(page) and "Mean alignment" not in page
    assert key_facts(report) == []


def made_run(updates: int) -> RunRecords:
    weights = {"weight_by_source": {"a": 1.2, "b": 0.8}, "share_by_source": {"a": 0.6, "b": 0.4}}
    generator = np.random.default_rng(0)
    made = [
        update(i, 1, [0.8, 1.2, 1.3, 0.7], generator.normal(size=4).tolist(), loss=[1.0, 2.0, 3.0, 4.0])
        for i in range(1, updates + 1)
    ]
    return run_of(made, steps=40, stage=1, effective_sample_size=0.9, **weights)


def test_few_updates_are_said_in_words_and_many_are_drawn_with_intervals():
    few, many = drawn(render_report(report_of(made_run(4)))), drawn(render_report(report_of(made_run(9))))
    for name in ("alignments", "in_batch", "quarter-0"):
        assert "too few updates" in few[name]["layout"]["annotations"][0]["text"]
        assert "annotations" not in many[name]["layout"]
    # Running means of five updates begin at the fifth: there is no zigzag of two or three.
    assert named(few["alignments"])["a"]["x"] == [] and named(many["alignments"])["a"]["x"] == [5, 6, 7, 8, 9]
    marks = named(many["in_batch"])["stage 1"]
    assert len(marks["x"]) == 2 and marks["customdata"][1][3] == "9 updates"
    assert all(width >= 0 for width in marks["error_x"]["array"]) and "95 % interval" in marks["hovertemplate"]
    assert "n = %{customdata[2]} samples" in named(many["quarter-0"])["stage 1"]["hovertemplate"]


def test_lines_whose_colors_repeat_differ_in_their_dashes():
    names = [f"source{number}" for number in range(12)]
    weights = dict.fromkeys(names, 1.0)
    updates = [update(i, 1, [1.0] * 12, list(range(12)), source=names) for i in range(1, 7)]
    run = run_of(updates, stage=1, share_by_source={name: 1 / 12 for name in names}, weight_by_source=weights)
    run.evaluations.extend(evaluated({2: 2.0, 4: 1.0}, lm_loss_by_source=weights))
    figures = drawn(render_report(report_of(run)))
    for name in ("weights", "alignments", "losses"):
        lines = named(figures[name]).values()
        styles = {(line["line"]["color"], line["line"].get("dash", "solid"), line["mode"]) for line in lines}
        assert len(styles) == len(lines) >= 12
    areas = named(figures["fractions"]).values()
    assert len({(area["fillcolor"], area["fillpattern"]["shape"]) for area in areas}) == 12


def test_every_color_has_one_for_dark_pages():
    figures = drawn(render_report(report_of(made_run(9))))
    colors = set(re.findall(r'"(#[0-9a-f]{6})"', json.dumps(figures)))
    for parts in re.findall(r"rgba\((\d+),(\d+),(\d+),0\.\d+\)", json.dumps(figures)):
        colors.add("#" + "".join(f"{int(part):02x}" for part in parts))
    assert len(colors) > 6 and colors <= set(DARK)
    assert len(set(DARK.values())) == len(DARK)


def evaluated(losses: dict[int, float], **fields: Any) -> list[dict[str, Any]]:
    return [{"kind": "evaluation", "iteration": i, "split": "valid", "lm_loss": x, **fields} for i, x in losses.items()]


def test_runs_are_compared_by_loss_source_weight_and_cost(tmp_path: Path):
    plain = run_of([], steps=40, seconds=1.0, consumed_samples=80)
    uniform = RunRecords(plain.steps, [], evaluated({20: 2.5, 40: 2.0}, lm_loss_by_source={"<prose>": 1.5}))
    weighted = made_run(9)
    for step in weighted.steps:
        step |= {"seconds": 1.5, "consumed_samples": 2 * step["iteration"]}
    learnt = RunRecords(
        weighted.steps, weighted.updates, evaluated({20: 2.0, 40: 1.5}, lm_loss_by_source={"<prose>": 1.25})
    )
    for run, loss in ((uniform, 2.25), (learnt, 1.875)):  # evaluated once: in the table, and no curve
        run.evaluations.append({"kind": "evaluation", "iteration": 40, "split": "test", "lm_loss": loss})
    page = write_comparison({"uniform": uniform, "learnt <1>": learnt}, tmp_path, ["They differ."]).read_text()
    figures = drawn(page)
    assert "2.2500" in page and "1.8750" in page and "loss-1" not in figures
    curves = [list(named(figures[f"loss-{number}"]).values()) for number in (0, 2)]
    assert [[trace["y"] for trace in lines] for lines in curves] == [[[2.5, 2.0], [2.0, 1.5]], [[1.5] * 2, [1.25] * 2]]
    assert (
        "valid: &lt;prose&gt;" in page and "learnt &lt;1&gt;" in page and "<1>" not in page and "They differ." in page
    )
    assert list(named(figures["weight-0"])) == ["learnt &lt;1&gt;"]  # uniform weights have no line
    assert named(figures["time"])["uniform"]["x"] == [20, 40]
    assert (
        "\N{MINUS SIGN}0.5000" in page
        and "+50 %" in page
        and "50 % of its tokens" in page
        and "75 % of its time" in page
    )
    colors = {
        named(figures[name])["learnt &lt;1&gt;"]["line"]["color"] for name in ("loss-0", "weight-0", "size", "time")
    }
    assert len(colors) == 1


def test_runs_are_named_by_what_tells_their_folders_apart(tmp_path: Path):
    paths = [tmp_path / name / "checkpoints" for name in ("uniform", "learnt/a")]
    for path in paths:
        path.mkdir(parents=True)
    assert run_names(paths) == ["uniform", "learnt/a"] and run_names([paths[0]] * 2) == [
        "checkpoints (1)",
        "checkpoints (2)",
    ]


BENEFIT = {
    "arms": {"uniform": {"test_loss": [2.5, 2.7], "tokens": 1000, "seconds": [9, 11]}},
    "gap_closed": 0.25,
    "token_ratio": 0.8,
    "time_ratio": None,
}


def test_the_benefit_table_holds_means_and_deviations(tmp_path: Path):
    file = tmp_path / "benefit.json"
    file.write_text(json.dumps(BENEFIT))
    page = render_report(report_of(run_of([]), benefit=read_benefit(file)))
    assert "2.6000 ± 0.1414" in page and "1,000" in page and ">10</td>" in page
    assert "closes 25&nbsp;% of the gap" in page and "0.80 times as many tokens" in page and "The time for" not in page


@pytest.mark.parametrize(
    "content", ["", "[]", '{"arms": {"x": {"test_loss": [], "seconds": [1], "tokens": 1}}}', '{"a": 1}']
)
def test_a_file_that_is_no_benefit_is_refused(content: str, tmp_path: Path):
    file = tmp_path / "benefit.json"
    file.write_text(content)
    with pytest.raises(UserError, match=r"--benefit .*benefit\.json"):
        read_benefit(file)
    with pytest.raises(UserError, match="cannot be read"):
        read_benefit(tmp_path / "nothing.json")
