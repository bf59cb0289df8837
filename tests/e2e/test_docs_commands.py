"""Every command in the documentation: run as it is printed, at a smaller size, or known with the reason why it is not.

A block is known by its page, the heading above it, its language, and its place among such blocks. What is run uses the
words of the page; only the values in ``SMALLER`` are replaced.
"""

from __future__ import annotations

import ast
import gzip
import json
import os
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from megatron_dwm.analysis.records import read_run
from megatron_dwm.cli.pretrain import main as pretrain
from megatron_dwm.cli.run_flags import read_run_flags
from tests.paths import ROOT

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "tests/README.md", *(ROOT / "docs").glob("*.md"))
)

SMALLER = {
    "--vocab-size": ("8192", "400"),
    "--num-layers": ("4", "2"),
    "--hidden-size": ("256", "32"),
    "--seq-length": ("128", "32"),
    "--max-position-embeddings": ("128", "32"),
    "--micro-batch-size": ("16", "4"),
    "--global-batch-size": ("128", "8"),
    "--train-iters": ("1000", "12"),
    "--lr-warmup-iters": ("50", "2"),
    "--eval-interval": ("100", "6"),
    "--eval-iters": ("4", "1"),
    "--save-interval": ("200", "6"),
    "--workers": ("4", "1"),
}
"""Values as the pages have them, and as the tests run them."""

NOT_RUN = {
    "README.md: Two commands: bash": "tests/e2e/test_quickstart.py runs the first; the second runs this test",
    "README.md: On a cluster: bash": "needs a cluster with GPUs; tests/e2e/test_slurm.py submits the script to a SLURM",
    "docs/cluster.md: SLURM: bash": "needs a cluster; tests/e2e/test_slurm.py submits the script to a SLURM",
    "docs/cluster.md: SLURM: bash 2": "the same; its variables become flags, which are read below",
    "docs/transfer.md: Longer samples than it was made for: text": "what a run says",
    "docs/transfer.md: To a larger model, from the beginning to a table: bash": "takes an hour; results below it",
    "docs/cluster.md: SLURM: bash 3": "tests/unit/plan/test_plan.py runs its siblings",
    "docs/transfer.md: With numpy alone: python": "unit/weighting/ngram/test_model.py calls the function",
    "docs/own-data.md: At corpus size: python": "unit/corpora/test_preprocess_jobs.py runs it",
    "docs/hugging-face.md: Import: bash": "needs a published model; tests/distributed/test_hf_import.py imports such",
    "docs/hugging-face.md: Export: bash": "tests/distributed/test_hf_import.py and e2e/test_transfer.py run both",
    "docs/hugging-face.md: Publish: python": "needs the Hub",
    "docs/embedding.md: A plain PyTorch loop: python": "distributed/test_embedded.py runs the example it is from",
    "docs/embedding.md: Hugging Face Trainer: python": "the same",
    "docs/embedding.md: megatron-core: python": "the same",
    "docs/embedding.md: Alignments alone: python": "distributed/test_embedded.py runs it",
    "docs/evaluation.md: On this machine: bash": "tests/e2e/test_evaluate.py evaluates such checkpoints",
    "docs/transfer.md: Score documents: bash 2": "needs a SLURM cluster; tests/e2e/test_slurm.py submits such a job",
    "docs/transfer.md: URLs: bash": "needs S3; e2e/test_scoring.py and test_selection.py read and write URLs",
    "docs/transfer.md: Score documents: python": "needs Ray and S3; the same pipeline is run by two other executors",
    "docs/evaluation.md: Tasks of the harness: bash": "needs the Hugging Face Hub",
    "docs/evaluation.md: During training: bash": "tests/e2e/test_evaluate.py trains with these flags",
    "docs/cluster.md: Without SLURM: bash": "needs 4 machines with 8 GPUs each; its flags are read below",
    "docs/cluster.md: Without SLURM: bash 2": "the same; unit/runtime/test_environment.py has mpirun",
    "docs/reliability.md: Reliability: bash": "takes an hour; tests/unit/benchmarks/test_chaos.py tests its parts",
    "docs/reliability.md: Outcome: bash": "takes an hour; tests/unit/benchmarks/test_chaos.py tests its parts",
    "docs/reliability.md: Outcome: bash 2": "takes an hour; tests/unit/benchmarks/test_chaos.py tests its parts",
    "docs/reliability.md: A long run: bash": "takes 24 minutes; its flags are those of tests/small_runs.py",
    "docs/reliability.md: Fuzzing: bash": "takes minutes; the suite runs the same tests with fewer inputs",
    "docs/results.md: How to measure it: bash": "takes hours; tests/e2e/test_benefit.py and test_overhead.py run both",
    "docs/results.md: Cost: bash": "takes an hour; tests/e2e/test_overhead.py runs it at a smaller size",
    "docs/report.md: During a run: text": "e2e/test_preference_report.py follows a run until it ends",
    "docs/gpu.md: On a GPU: bash": "needs a GPU; tests/e2e/test_gpu_benchmark.py runs it at a smaller size",
    "docs/gpu.md: Memory and precision: bash": "needs two GPUs and Transformer Engine",
    "docs/megatron-comparison.md: How it was compared with Megatron-LM: bash": "needs a checkout of Megatron-LM",
    "CONTRIBUTING.md: Set up: bash": "tests/run.sh begins with the first line; a hook would change this repository",
    "CONTRIBUTING.md: Run the tests: bash": "runs this test",
    "CONTRIBUTING.md: Documentation: bash": "tests/docs.sh runs it",
    "tests/README.md: Tests: bash": "runs this test",
    "docs/architecture.md: Layers: mermaid": "a drawing; tests/unit/test_readme.py compares it with the imports",
    "docs/architecture.md: One iteration: mermaid": "a drawing",
}
RUN = [
    "README.md: Your own data in five commands: bash",
    "docs/own-data.md: Tokenizer and datasets: bash",
    "docs/own-data.md: The flags in parts: bash",
    "docs/own-data.md: Check the gradients once: bash",
    "docs/own-data.md: Train: bash",
    "docs/own-data.md: Look at the run: bash",
    "docs/own-data.md: Export the models: bash",
    "docs/transfer.md: In another run, frozen: bash",
    "docs/transfer.md: In another run, trained further: bash",
    "docs/transfer.md: With transformers: python",
    "docs/transfer.md: Score documents: bash",
    "docs/transfer.md: Select documents: bash",
    "docs/transfer.md: The learned shares as a blend: bash",
    "docs/report.md: Reading the report: bash",
    "docs/report.md: Several runs on one page: bash",
    "docs/report.md: Scores from other programs: bash",
    "docs/tuning.md: 1. Is there anything to gain?: bash",
    "docs/scaling.md: Three sizes: bash",
    "docs/extending.md: A new weighting in one file: python",
    "docs/extending.md: A new weighting in one file: bash",
]
"""Blocks that the tests below run."""
UPDATES = 11
"""Outer updates of such runs: one an iteration, but for the first, whose learning rate is zero."""
PARTS = "docs/own-data.md: The flags in parts: bash"


def blocks(page: str) -> dict[str, str]:
    """Return the fenced blocks of a page by name."""
    found: dict[str, str] = {}
    heading = ""
    for match in re.finditer(
        r"^#+ ([^\n]+)$|^```(\w+)\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL
    ):
        if match[1] is not None:
            heading = match[1]
            continue
        name = f"{page}: {heading}: {match[2]}"
        number = sum(key == name or key.startswith(f"{name} ") for key in found) + 1
        found[name if number == 1 else f"{name} {number}"] = match[3]
    return found


def block(name: str) -> str:
    """Return one block."""
    return blocks(name.partition(": ")[0])[name]


def smaller(commands: str) -> str:
    """Return the commands with the sizes of ``SMALLER``."""
    for flag, (printed, small) in SMALLER.items():
        commands = re.sub(rf"(?<![\w-]){flag} {printed}(?!\w)", f"{flag} {small}", commands)
    return commands


def test_every_block_is_run_or_has_a_reason():
    names = {name for page in PAGES for name in blocks(page) if not name.endswith(": toctree")}
    assert names == {*RUN, *NOT_RUN}
    assert not set(RUN) & set(NOT_RUN)


def test_every_replaced_size_is_in_the_pages():
    printed = "\n".join(block(name) for name in RUN)
    for flag, (value, _) in SMALLER.items():
        assert f"{flag} {value}" in printed, flag


@dataclass(frozen=True)
class Workplace:
    """A folder as a newcomer has it: the repository's programs, and data of their own."""

    folder: Path
    commands: Path
    """The folder of ``python``, ``megatron-dwm`` and ``torchrun``."""

    def run(self, name: str) -> str:
        """Run a block of commands, and return what it printed; the pages' common flags are set before it."""
        parts = "" if name.startswith("README.md") else smaller(block(PARTS))
        script = f"set -euo pipefail\n{parts}\n{smaller(block(name))}"
        environment = {
            **os.environ,
            "PATH": f"{self.commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        done = subprocess.run(["bash", "-c", script], cwd=self.folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{name}\n{done.stdout}\n{done.stderr}"
        return done.stdout


SYLLABLES = [f"{start}{vowel}" for start in "bdfgk" for vowel in ("a", "e", "ou")]
WORDS = [f"{syllable}{end}" for syllable in SYLLABLES for end in ("n", "rt", "sha", "llo")]


def write_texts(path: Path, seed: int, documents: int, *, is_ordered: bool) -> None:
    """Write documents of made-up words: each is the one before or its successor, or is drawn from all."""
    generator = random.Random(seed)
    with path.open("w") as file:
        for _ in range(documents):
            place, words = generator.randrange(len(WORDS)), []
            for _ in range(generator.randrange(60, 120)):
                place = (place + generator.randrange(2)) % len(WORDS) if is_ordered else generator.randrange(len(WORDS))
                words.append(WORDS[place])
            file.write(json.dumps({"text": " ".join(words)}) + "\n")


@pytest.fixture(scope="module")
def workplace(preloaded_commands: Path, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A folder in which the README's five commands have been run."""
    folder = tmp_path_factory.mktemp("workplace")
    for program in ("tools", "pretrain_dwm.py"):
        (folder / program).symlink_to(ROOT / program)
    write_texts(folder / "good.jsonl", seed=1, documents=200, is_ordered=True)
    write_texts(folder / "other.jsonl", seed=2, documents=200, is_ordered=False)
    write_texts(folder / "target.jsonl", seed=3, documents=60, is_ordered=True)
    (folder / "train.jsonl").write_text((folder / "good.jsonl").read_text() + (folder / "other.jsonl").read_text())
    place = Workplace(folder, preloaded_commands)
    place.run("README.md: Your own data in five commands: bash")
    return place


@pytest.fixture(scope="module")
def own_data(workplace: Workplace) -> Workplace:
    """A folder in which the commands of own-data.md have been run; the README's run was moved aside."""
    (workplace.folder / "runs/mine").rename(workplace.folder / "runs/readme")
    for heading in ("Tokenizer and datasets", "Check the gradients once", "Train"):
        workplace.run(f"docs/own-data.md: {heading}: bash")
    return workplace


def test_five_commands_make_a_language_model_and_a_weighter(workplace: Workplace):
    readme = workplace.folder / "runs/readme"
    run = readme if readme.is_dir() else workplace.folder / "runs/mine"
    records = read_run(run)
    assert len(records.steps) == 12 and len(records.updates) == UPDATES
    assert AutoModelForCausalLM.from_pretrained(run / "language_model").config.hidden_size == 32
    weighter = AutoModelForSequenceClassification.from_pretrained(run / "weighter/iter_0000012")
    assert weighter.config.num_labels == 1


def test_the_page_on_own_data_ends_with_models_and_pictures(own_data: Workplace):
    run = own_data.folder / "runs/mine"
    assert read_run(run).sources == ["good", "other"]
    own_data.run("docs/own-data.md: Look at the run: bash")
    assert (run / "run.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "preference/preference.html").is_file()
    (run / "preference/preference.html").unlink()
    own_data.run("docs/report.md: Reading the report: bash")
    assert "good" in (run / "preference/preference.html").read_text()
    own_data.run("docs/report.md: Scores from other programs: bash")
    assert '<th scope="row">rater</th>' in (run / "preference/preference.html").read_text()
    # From another folder, paths of the run's command, which are relative, still lead to its data.
    elsewhere = ["--output", own_data.folder / "runs/elsewhere"]
    command = [own_data.commands / "python", ROOT / "tools/preference_report.py", run, *elsewhere]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    own_data.run("docs/own-data.md: Export the models: bash")
    assert AutoModelForCausalLM.from_pretrained(run / "language_model").config.hidden_size == 32


def test_a_weighter_is_taken_to_other_runs(own_data: Workplace):
    own_data.run("docs/transfer.md: In another run, frozen: bash")
    frozen = read_run(own_data.folder / "runs/frozen")
    assert len(frozen.steps) == 12 and not frozen.updates and "weight_by_source" in frozen.steps[0]
    own_data.run("docs/report.md: Several runs on one page: bash")
    assert "2 runs compared" in (own_data.folder / "runs/compared/comparison.html").read_text()
    own_data.run("docs/transfer.md: In another run, trained further: bash")
    assert len(read_run(own_data.folder / "runs/continued").updates) == UPDATES


def test_a_weighter_scores_texts_with_transformers(own_data: Workplace):
    program = own_data.folder / "score.py"
    program.write_text(block("docs/transfer.md: With transformers: python"))
    command = [own_data.commands / "python", program]
    done = subprocess.run(command, cwd=own_data.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scores = ast.literal_eval(done.stdout)
    assert len(scores) == 2 and all(isinstance(score, float) for score in scores.values())


def test_a_weighter_scores_files_and_a_run_becomes_a_blend(own_data: Workplace):
    own_data.run("docs/transfer.md: Score documents: bash")
    for number, name in enumerate(("good", "other")):
        lines = (own_data.folder / f"runs/scored/data/{number:05d}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        texts = [json.loads(line)["text"] for line in (own_data.folder / f"{name}.jsonl").read_text().splitlines()]
        assert [row["text"] for row in rows] == texts and all(isinstance(row["score"], float) for row in rows)
    own_data.run("docs/transfer.md: Select documents: bash")
    kept = {}
    for name in ("best", "mix", "like-target"):
        assert len(gzip.decompress((own_data.folder / f"runs/{name}.jsonl.gz").read_bytes()).splitlines()) == 132
        manifest = json.loads((own_data.folder / f"runs/{name}.jsonl.gz.manifest.json").read_text())
        kept[name] = {source: counts["documents_kept"] for source, counts in manifest["sources"].items()}
    assert kept["best"] == kept["mix"] and sum(kept["best"].values()) == 132
    # The target's texts are in order, as those of the first file are.
    assert next(iter(kept["like-target"].values())) > 120
    printed = own_data.run("docs/transfer.md: The learned shares as a blend: bash").splitlines()
    blends = [line.split() for line in printed if line.startswith("--data-path")]
    assert len(blends) >= 2 and all(words[2::2] == ["good_text_document", "other_text_document"] for words in blends)


def test_the_oracle_counts_only_the_named_source(own_data: Workplace):
    own_data.run("docs/tuning.md: 1. Is there anything to gain?: bash")
    oracle = read_run(own_data.folder / "runs/oracle")
    by_source = [step["weight_by_source"] for step in oracle.steps]
    assert all(weights.get("other", 0) == 0 for weights in by_source if "good" in weights)
    assert not any("weight_by_source" in step for step in read_run(own_data.folder / "runs/uniform").steps)


def test_a_weighting_in_one_file_trains(own_data: Workplace):
    program = block("docs/extending.md: A new weighting in one file: python")
    assert len(program.splitlines()) < 40
    (own_data.folder / "variety.py").write_text(program)
    own_data.run("docs/extending.md: A new weighting in one file: bash")
    steps = read_run(own_data.folder / "runs/variety").steps
    # In ordered texts a word is followed by itself half of the time, so a sample has fewer different tokens.
    assert len(steps) == 12 and all(step["effective_sample_size"] < 1 for step in steps)
    both = [step["weight_by_source"] for step in steps if len(step["weight_by_source"]) == 2]
    assert both and all(weights["other"] > weights["good"] for weights in both)


def test_the_flags_of_many_machines_are_a_configuration():
    command = block("docs/cluster.md: Without SLURM: bash").replace("\\\n", " ")
    flags = command.split("pretrain_dwm.py", 1)[1].split()
    config = read_run_flags(flags, world_size=32)
    assert (config.parallel.tp, config.parallel.pp, config.sizes.num_microbatches) == (1, 1, 4)


def test_the_plans_of_three_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As they are printed, but with fewer layers; the plans are made in this process, which has imported all."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    commands = block("docs/scaling.md: Three sizes: bash")
    for printed, few in (("16", "1"), ("32", "1"), ("80", "4")):
        commands = commands.replace(f"--num-layers {printed} ", f"--num-layers {few} ")
    script = f"python() {{ shift; printf '%s\n' \"$*\"; }}\n{commands}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        pretrain(line.split())
    plans = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    layouts = {name: [plan["layout"]["processes"], len(plan["memory"])] for name, plan in plans.items()}
    assert layouts == {"1b": [32, 1], "8b": [256, 1], "70b": [1024, 4]}
    assert all(len(plan["updates"]) == plan["train_iters"] / 100 for plan in plans.values())
    assert all(plan["overhead"]["operations"] == pytest.approx(0.01125, rel=1e-3) for plan in plans.values())


def test_the_variables_of_the_cluster_pages_are_the_scripts():
    names = ("pretrain_1b_dwm.sh", "slurm_pretrain.sh")
    script = "\n".join((ROOT / "examples" / name).read_text() for name in names)
    page = (ROOT / "docs/cluster.md").read_text()
    exported = re.findall(r"(\w+)=", "\n".join(re.findall(r"^export (.*)$", page, re.MULTILINE)))
    tabled = re.findall(r"`([A-Z][A-Z_]+)`", "\n".join(re.findall(r"^\| `.*?\|", page, re.MULTILINE)))
    assert len(exported) >= 7 and len(tabled) >= 10
    fields = {name for name in read_run_flags(MINIMAL, world_size=1).weighting.__dataclass_fields__}
    of_nccl = {name for name in tabled if name.startswith(("NCCL_", "GLOO_"))}
    for name in {*exported, *tabled} - {"DWM_SOME_FLAG"} - of_nccl:
        assert name.lower() in fields if name.startswith("DWM_") else re.search(rf"\b{name}\b", script), name


MINIMAL = ["--num-layers=2", "--hidden-size=8", "--num-attention-heads=2", "--seq-length=8", "--train-iters=2"]
MINIMAL += ["--max-position-embeddings=8", "--micro-batch-size=1", "--lr=1", "--mock-data", "--dwm-mode=off"]
MINIMAL += ["--tokenizer-type=NullTokenizer", "--vocab-size=8"]
"""Flags that make a configuration."""
