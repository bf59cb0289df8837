"""``megatron-dwm report`` on a run of two sources, alone and beside another, and its page in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import matplotlib.image
import pytest

from megatron_dwm.analysis.preference import weighted_samples
from megatron_dwm.analysis.report import content
from megatron_dwm.analysis.report.page import write_report
from megatron_dwm.errors import EXIT_CODE
from tests.e2e.datasets import TOKENIZER, counting, make_dataset, noise
from tests.e2e.launch import records, succeed
from tests.paths import ROOT
from tests.small_runs import LANGUAGE_MODEL, TRAINING, WEIGHTING
from tests.unit.analysis.made_records import run_of

SECTIONS = ("summary", "strength", "sources", "properties", "documents", "samples", "benefit", "method")
FIGURES = ("losses", "spread", "size", "weights", "fractions", "alignments", "in_batch", "in_source", "documents")
QUARTERS = 9
"""Figures of a property each."""
LINE = r"{page}: up to iteration \d+(, \d+)*, \d\.\d MB\n"
END = 100  # of a document, to the NullTokenizer


Report = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def report(preloaded_commands: Path) -> Report:
    """The command as a user types it."""

    def run(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        command = [preloaded_commands / "python", ROOT / "tools" / "preference_report.py", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)

    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The --save folder of a run on 4 processes, pipeline 2 x data 2; its data lie in data/ beside it."""
    folder = tmp_path_factory.mktemp("run")
    data = folder / "data"
    data.mkdir()
    counted = [[*document, END] for document in counting(1)]
    train = ["0.5", make_dataset(data, "counting", counted), "0.5", make_dataset(data, "noise", noise(2))]
    flags = {
        **LANGUAGE_MODEL,
        **TRAINING,
        **WEIGHTING,
        **TOKENIZER,
        "--train-iters": 20,
        "--dwm-warmup-iters": 4,
        "--pipeline-model-parallel-size": 2,
        "--train-data-path": train,
        "--dwm-target-data-path": make_dataset(data, "target", counting(3)),
        "--save": folder / "save",
    }
    succeed(folder / "log", 4, flags)
    return folder / "save"


@dataclass(frozen=True)
class Written:
    """What the command has written of the run."""

    folder: Path
    page: str


@pytest.fixture(scope="module")
def written(run: Path, report: Report) -> Written:
    benefit = {"uniform": {"test_loss": [2.5, 2.7], "tokens": 5120, "seconds": [9.0, 11.0]}}
    (run / "benefit.json").write_text(json.dumps({"arms": benefit, "gap_closed": 0.25, "token_ratio": 0.8}))
    finished = report(str(run))
    assert finished.returncode == 0 and finished.stderr == "", finished.stderr
    assert re.fullmatch(LINE.format(page=run / "preference" / "preference.html"), finished.stdout)
    return Written(run / "preference", (run / "preference" / "preference.html").read_text())


def test_the_loss_of_every_sample_is_recorded(run: Path):
    losses = {step["iteration"]: step["lm_loss"] for step in records(run / "metrics.jsonl", "train")}
    updates = records(run / "metrics.jsonl", "outer_update")
    assert len(updates) == 8
    for update in updates:
        own = update["samples"]["loss"]
        # The samples have equally many tokens, so the step's loss is the mean of theirs.
        assert len(own) == 8 and sum(own) / 8 == pytest.approx(losses[update["iteration"]], rel=1e-5)
    # Counting is easier than noise once something is learnt: each loss stands at its own sample.
    late = [pair for u in updates[-3:] for pair in zip(u["samples"]["source"], u["samples"]["loss"], strict=True)]
    mean = {name: sum(x for n, x in late if n == name) / sum(n == name for n, _ in late) for name in dict(late)}
    assert mean["counting"] < mean["noise"]


def test_the_page_has_every_section_source_property_and_figure(written: Written):
    for name in SECTIONS:
        assert f'id="{name}"' in written.page
    for word in ("counting", "noise", "warm-up", "stage 1", "stage 2", "distinct-1", "target similarity (order)"):
        assert word in written.page
    assert "not recorded" not in written.page and "in a batch</th>" in written.page
    assert "2.6000 ± 0.1414" in written.page  # of benefit.json, found beside the records
    drawn = re.findall(r'class="chart" data-figure="([^"]+)"', written.page)
    assert set(drawn) == {*FIGURES, *(f"quarter-{number}" for number in range(QUARTERS))}
    # Two of four updates, in the two stages, have weights that differ; that is too few for intervals.
    assert "Too few updates to say what the weighter prefers in stages 1, 2" in written.page


def test_the_page_needs_nothing_but_itself(written: Written):
    assert [path.name for path in written.folder.iterdir()] == ["preference.html"]
    targets = re.findall(r'(?<![\w-])(?:src|srcset|href|action|poster)="([^"]*)"', written.page)
    assert targets and all(target.startswith("#") for target in targets)
    assert "://" not in written.page and "@import" not in written.page


def test_documents_are_followed_over_the_exports(run: Path, written: Written):
    (data,) = re.findall(r'id="data">(.*?)</script>', written.page, re.S)
    lines = json.loads(data)["figures"]["documents"]["data"]
    exported = sorted(int(path.name[5:]) for path in (run / "weighter").iterdir())
    assert len(lines) == 12 and len(exported) > 1
    assert all(line["x"] == exported and all(weight > 0 for weight in line["y"]) for line in lines)
    last = [line["y"][-1] for line in lines]
    assert min(last[:4]) >= max(last[4:8])  # the highest weights, then the lowest


def test_others_score_the_samples_and_runs_are_compared(
    run: Path, report: Report, preloaded_commands: Path, tmp_path: Path
):
    texts, scores = tmp_path / "texts.jsonl", tmp_path / "scores.jsonl"
    short = ("--documents", "0", "--examples", "0")
    assert report(str(run), "--texts-output", str(texts), "--output", str(tmp_path), *short).returncode == 0
    rows = [json.loads(line) for line in texts.read_text().splitlines()]
    assert {row["source"] for row in rows} == {"counting", "noise"}
    scores.write_text("".join(json.dumps({**row, "counts": float(row["source"] == "counting")}) + "\n" for row in rows))
    finished = report(str(run), "--scores", str(scores), "--output", str(tmp_path), *short)
    assert finished.returncode == 0 and not finished.stderr
    page = (tmp_path / "preference.html").read_text()
    assert f"external score, from {scores}" in page and '<th scope="row">counts</th>' in page

    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(run / "metrics.jsonl", other)
    # A run that goes on is followed until it does not.
    (other / "run_status.json").write_text('{"status": "running"}')
    command = [preloaded_commands / "megatron-dwm", "report", str(run), str(other), "--follow", "1"]
    follower = subprocess.Popen([*command, "--output", str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert follower.stdout is not None
    first = follower.stdout.readline()
    assert re.fullmatch(LINE.format(page=tmp_path / "comparison.html"), first)
    assert '"reload":1' in (tmp_path / "comparison.html").read_text()
    (other / "run_status.json").write_text('{"status": "finished"}')
    rest, _ = follower.communicate(timeout=60)
    assert follower.returncode == 0 and rest.endswith("all runs have ended; this is the last page\n")
    page = (tmp_path / "comparison.html").read_text()
    assert '"reload":null' in page and "2 runs compared" in page and "Weights of the sources" in page


def test_samples_are_shown_as_the_text_that_the_run_read(written: Written):
    section = written.page.split('<section id="samples">')[1]
    shown = [html.unescape(text) for text in re.findall(r"<pre>(.*?)</pre>", section, flags=re.S)]
    heads = re.findall(r"<b>\S ([\d.]+)</b><b>(\w+)</b>", section)
    assert len(shown) == len(heads) == 2 * 2 * 4  # two stages, both ends, four each
    documents = []
    for text, (_, source) in zip(shown, heads, strict=True):
        pieces = [[int(word) for word in piece.split()] for piece in text.split("▪")]
        counts = all((b - a) % 100 == 1 for piece in pieces for a, b in pairwise(piece))
        assert counts == (source == "counting"), text
        documents.append(len(pieces))
    assert set(documents) == {1, 2}  # some go on over the end of a document
    in_order = [float(weight) for weight, _ in heads]
    for start in range(0, 16, 8):
        assert in_order[start : start + 4] == sorted(in_order[start : start + 4], reverse=True)
        assert in_order[start + 4 : start + 8] == sorted(in_order[start + 4 : start + 8])


def test_without_the_data_the_rest_of_the_page_is_made_and_says_so(run: Path, report: Report, tmp_path: Path):
    data = run.parent / "data"
    data.rename(run.parent / "moved")
    try:
        finished = report("--run", str(run), "--output", str(tmp_path / "page"))
    finally:
        (run.parent / "moved").rename(data)
    assert finished.returncode == 0 and len(finished.stderr.splitlines()) == 1
    assert "counting_text_document.idx does not exist" in finished.stderr
    page = (tmp_path / "page" / "preference.html").read_text()
    assert "counting_text_document.idx does not exist" in page and "There are no texts to show." in page
    assert {name for name in SECTIONS if f'id="{name}"' not in page} == {"documents"} and "distinct-1" in page


def test_data_that_have_changed_since_are_noticed(run: Path, report: Report, tmp_path: Path):
    changed = tmp_path / "save"
    shutil.copytree(run, changed)
    lines = (changed / "metrics.jsonl").read_text().splitlines()
    other = {"counting": "noise", "noise": "counting"}
    with (changed / "metrics.jsonl").open("w") as file:
        for line in lines:
            record = json.loads(line)
            if record["kind"] == "outer_update":
                record["samples"]["source"] = [other[name] for name in record["samples"]["source"]]
            file.write(json.dumps(record) + "\n")
    finished = report(str(changed))
    assert finished.returncode == 0 and len(finished.stderr.splitlines()) == 1
    assert (
        "have changed since" in finished.stderr
        and "changed since" in (changed / "preference/preference.html").read_text()
    )


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["nowhere"], "nowhere: no such file"),
        ([], "--run"),
        (["nowhere", "--samples", "0"], "--samples 0"),
        (["a", "b", "--scores", "c"], "--scores is for a single run, but 2 are compared"),
    ],
)
def test_a_users_mistake_is_one_line(flags: list[str], named: str, report: Report, tmp_path: Path):
    finished = report(*flags, cwd=tmp_path)
    assert finished.returncode == EXIT_CODE and not finished.stdout and not list(tmp_path.iterdir())
    assert len(finished.stderr.splitlines()) == 1 and named in finished.stderr


@pytest.fixture
def browser() -> str:
    """Debian's chromium."""
    path = shutil.which("chromium")
    assert path is not None, "there is no chromium; install Debian's package chromium"
    return path


def browse(profile: Path, page: Path, *flags: str, console: str | None = None) -> subprocess.CompletedProcess[str]:
    """Open ``page`` in Debian's chromium, which prints ``console`` of it and nothing else."""
    browser = shutil.which("chromium")
    assert browser is not None, "there is no chromium; install Debian's package chromium"
    command = [browser, "--headless", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"]
    command += ["--enable-logging=stderr", f"--user-data-dir={profile}", *flags, page.as_uri()]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    messages = [line for line in finished.stderr.splitlines() if "CONSOLE" in line]
    assert bool(messages) == (console is not None) and all(console in line for line in messages), finished.stderr
    return finished


MEASURE = """<!doctype html><body style="margin: 0">
<iframe src="{page}" style="border: 0; width: {width}px; height: 16000px"></iframe>
<script>
const frame = document.querySelector("iframe"), found = {{}};
const wait = time => new Promise(done => setTimeout(done, time));
addEventListener("load", async () => {{
  const page = frame.contentDocument, root = page.documentElement;
  while (!page.body.dataset.drawn) await wait(50);
  const charts = [...page.querySelectorAll(".chart")];
  found.drawn = charts.filter(chart => chart.querySelector("svg.main-svg")).length;
  found.width = root.scrollWidth;
  found.height = root.scrollHeight;
  found.tops = [...page.querySelectorAll("section")].map(s => Math.round(s.getBoundingClientRect().top));
  found.texts = charts.flatMap(chart => {{
    const box = chart.getBoundingClientRect();
    return [...chart.querySelectorAll("text")].filter(text => text.textContent.trim()).map(text => {{
      const own = text.getBoundingClientRect(), style = frame.contentWindow.getComputedStyle(text);
      const ends = [own.left - box.left, own.right - box.left, box.width];
      return [chart.dataset.figure, text.textContent, parseFloat(style.fontSize), ...ends, style.fill];
    }});
  }});
  const chart = charts[0], Press = frame.contentWindow.KeyboardEvent;
  const press = key => chart.dispatchEvent(new Press("keydown", {{key}}));
  const range = () => [...chart._fullLayout.xaxis.range];
  found.before = range();
  press("ArrowRight");
  found.spoken = [page.getElementById("spoken").textContent];
  press("ArrowRight");
  found.spoken.push(page.getElementById("spoken").textContent);
  found.hovered = page.querySelectorAll(".hoverlayer text").length;
  press("+");
  await wait(200);
  found.zoomed = range();
  press("0");
  await wait(200);
  found.after = range();
  document.body.dataset.measured = JSON.stringify(found);
}});
</script>"""


@pytest.mark.usefixtures("browser")
@pytest.mark.parametrize(("width", "theme"), [(390, "dark"), (1280, "light")])
def test_a_browser_draws_the_page_legibly_and_the_keyboard_reads_it(
    width: int, theme: str, written: Written, tmp_path: Path
):
    """The page stands in a frame: no window of this browser is narrower than 500 pixels."""
    wrapper, picture = tmp_path / "measured.html", tmp_path / "page.png"
    wrapper.write_text(MEASURE.format(page=(written.folder / "preference.html").as_uri(), width=width))
    flags = [f"--window-size={max(500, width)},16000", "--allow-file-access-from-files", f"--screenshot={picture}"]
    flags += [f"--blink-settings=preferredColorScheme={int(theme == 'light')}", "--virtual-time-budget=60000"]
    found = browse(tmp_path / "profile", wrapper, *flags, "--dump-dom").stdout
    (answer,) = re.findall(r'data-measured="([^"]*)"', found)
    measured = json.loads(html.unescape(answer))
    assert measured["drawn"] == len(FIGURES) + QUARTERS
    assert measured["width"] == width  # nothing sticks out: wide tables scroll by themselves
    assert len(measured["texts"]) > 100
    for figure, text, size, left, right, chart, fill in measured["texts"]:
        if left == right:  # what the library measures with, and does not show
            continue
        assert size >= 11 and left >= -1 and right <= chart + 1, (figure, text, size, left, right, chart)
        red, green, blue = (int(part) for part in re.findall(r"\d+", fill)[:3])
        assert (red + green + blue > 330) == (theme == "dark"), (figure, text, fill)
    low, high = measured["zoomed"]
    assert measured["before"] == measured["after"] and measured["before"][0] < low < high < measured["before"][1]
    assert measured["hovered"] > 0
    assert [re.fullmatch(r"(.*): [\d.]+ at (\d+)", words).groups() for words in measured["spoken"]] == [
        ("training (unweighted)", "1"),
        ("training (unweighted)", "2"),
    ]
    pixels = matplotlib.image.imread(picture)[:, :width, :3]
    for top, bottom in zip(measured["tops"], [*measured["tops"][1:], measured["height"]], strict=True):
        if bottom <= len(pixels):  # no picture of this browser is higher
            assert pixels[top:bottom].std() > 0.02, f"nothing is drawn between {top} and {bottom}"
    assert (pixels[: measured["height"]].mean() > 0.5) == (theme == "light")


MEASURE_SOURCES = """<!doctype html><body style="margin: 0">
<iframe src="{page}" style="border: 0; width: 390px; height: 16000px"></iframe>
<script>
const frame = document.querySelector("iframe");
addEventListener("load", async () => {{
  const page = frame.contentDocument;
  while (!page.body.dataset.drawn) await new Promise(done => setTimeout(done, 50));
  const table = page.querySelector("#sources .table"), cells = [...table.querySelectorAll("td")];
  const curves = page.querySelector('.chart[data-figure="weights"]')._fullLayout._size;
  const right = Math.max(...cells.map(cell => cell.getBoundingClientRect().right));
  document.body.dataset.measured = JSON.stringify([right - table.getBoundingClientRect().right, curves.h]);
}});
</script>"""


@pytest.mark.usefixtures("browser")
def test_a_long_name_and_many_sources_leave_room_on_a_phone(tmp_path: Path):
    """For the figures of the table beside the names, and for the curves below the legend."""
    names = ["plain", "x" * 120, *(f"source{number}" for number in range(14))]
    steps = {"share_by_source": dict.fromkeys(names, 1 / 16), "weight_by_source": dict.fromkeys(names, 1.0)}
    run, samples = run_of([], stage=1, **steps), weighted_samples([])
    page = write_report(content.Report("run", run, samples, samples), tmp_path)
    wrapper = tmp_path / "measured.html"
    wrapper.write_text(MEASURE_SOURCES.format(page=page.as_uri()))
    flags = ["--window-size=500,16000", "--allow-file-access-from-files", "--virtual-time-budget=60000", "--dump-dom"]
    found = browse(tmp_path / "profile", wrapper, *flags).stdout
    (answer,) = re.findall(r'data-measured="([^"]*)"', found)
    beyond, height = json.loads(html.unescape(answer))
    assert beyond <= 0 and height >= 120


@pytest.mark.usefixtures("browser")
def test_a_browser_runs_no_script_and_loads_nothing_that_data_have_planted(written: Written, tmp_path: Path):
    planted = (
        "<script>document.body.dataset.planted = 1</script>"
        f'<img src="{(ROOT / "docs" / "quickstart.png").as_uri()}" onload="document.body.dataset.planted = 2"'
        ' onerror="document.body.dataset.planted = 3">'
    )
    page = tmp_path / "planted.html"
    page.write_text(written.page.replace("</body>", f"{planted}</body>"))
    found = browse(tmp_path / "profile", page, "--dump-dom", console="Content Security Policy").stdout
    assert "dataset.planted = 1" in found and "data-planted" not in found
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy"[^>]*>', written.page)
    page.write_text(page.read_text().replace(policy, ""))
    assert 'data-planted="2"' in browse(tmp_path / "profile", page, "--dump-dom").stdout  # it would have run
