"""The script that users submit, on a real SLURM cluster: four tasks, TP and PP, weights that are learnt."""

from __future__ import annotations

import getpass
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from megatron_dwm.benchmarks.scoring import ScoringBenchmarkConfig, make_classifier
from megatron_dwm.cli import score, select
from megatron_dwm.runtime.rendezvous import free_port
from tests.e2e.datasets import make_dataset
from tests.e2e.slurm.cluster import Cluster, running_cluster
from tests.paths import ROOT
from tests.turns import turn

SCRIPT = ROOT / "examples" / "pretrain_1b_dwm.sh"
VOCAB_SIZE = 60

TINY = {
    "TOKENIZER_TYPE": "NullTokenizer",
    "VOCAB_SIZE": str(VOCAB_SIZE),
    "NUM_LAYERS": "2",
    "HIDDEN_SIZE": "32",
    "FFN_HIDDEN_SIZE": "64",
    "NUM_HEADS": "4",
    "NUM_QUERY_GROUPS": "2",
    "SEQ_LENGTH": "16",
    "PRECISION": "fp32",
    "MICRO_BATCH_SIZE": "1",
    "GLOBAL_BATCH_SIZE": "4",
    "TRAIN_ITERS": "6",
    "SPLIT": "90,10,0",
    "SAVE_INTERVAL": "3",
    "EVAL_INTERVAL": "6",
    "EVAL_ITERS": "1",
    "LOG_INTERVAL": "1",
    "DISTRIBUTED_BACKEND": "gloo",
    "DWM_WARMUP_ITERS": "2",
    "DWM_NUM_STAGES": "2",
    "DWM_UPDATE_INTERVAL": "1",
    "DWM_NUM_LAYERS": "1",
    "TP": "2",
    "PP": "2",
}
"""Variables of the script."""
OPTIONS = ["--nodes=1"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as started:
        yield started


def _make_dataset(folder: Path, name: str, seed: int) -> str:
    """Write ``name``'s random documents of token ids and return the prefix of the dataset made of them."""
    generator = random.Random(seed)
    documents = [[generator.randrange(VOCAB_SIZE) for _ in range(40)] for _ in range(64)]
    return make_dataset(folder, name, documents, VOCAB_SIZE)


def test_the_submitted_script_trains_stops_and_continues_from_its_checkpoint(
    cluster: Cluster, preloaded_commands: Path, tmp_path: Path
):
    save = tmp_path / "run"
    environment = {
        **TINY,
        "REPO_DIR": str(ROOT),
        "PYTHON": str(preloaded_commands / "python"),
        "MASTER_PORT": str(free_port()),
        "DATA_PATH": _make_dataset(tmp_path, "train", seed=0),
        "TARGET_DATA_PATH": _make_dataset(tmp_path, "target", seed=1),
        "SAVE": str(save),
    }

    def submit(*arguments: str, **settings: str) -> str:
        with turn(4):
            job = cluster.run_job(
                SCRIPT,
                *arguments,
                options=[*OPTIONS, "--ntasks-per-node=4"],
                folder=tmp_path,
                environment={**environment, **settings},
            )
        assert job.state == "COMPLETED", job.log + _log_of_nodes(save)
        return job.log

    log = submit("--exit-interval", "3")
    assert "4 ranks = tensor 2 x pipeline 2 x data 1" in log and (save / "plan.json").is_file(), log
    assert (save / "latest_checkpointed_iteration.txt").read_text().strip() == "3", log
    for path in (save / "logs").iterdir():
        path.unlink()

    log = submit(PREFLIGHT="0")
    assert "ranks = " not in log, log
    log = _log_of_nodes(save)
    assert " iteration        3/       6 |" not in log and " iteration        4/       6 |" in log, log
    assert (save / "latest_checkpointed_iteration.txt").read_text().strip() == "6", log
    assert (save / "iter_0000006" / "metadata.json").is_file(), log
    weighter = AutoModelForSequenceClassification.from_pretrained(save / "weighter" / "iter_0000006")
    assert weighter.config.num_labels == 1


def test_a_preempted_job_saves_requeues_itself_and_goes_on(cluster: Cluster, tmp_path: Path):
    save = tmp_path / "run"
    environment = {
        **TINY,
        "TRAIN_ITERS": "20",
        "SAVE_INTERVAL": "1000",
        "REPO_DIR": str(ROOT),
        "PYTHON": sys.executable,
        "MASTER_PORT": str(free_port()),
        "DATA_PATH": _make_dataset(tmp_path, "train", seed=0),
        "TARGET_DATA_PATH": _make_dataset(tmp_path, "target", seed=1),
        "SAVE": str(save),
        "TP": "2",
        "PP": "1",
        "PREFLIGHT": "0",
        "EXTRA_ARGS": "--split 100,0,0 --eval-iters 0",
    }
    urgent = tmp_path / "urgent.sh"
    urgent.write_text("#!/bin/sh\ntrue\n")
    with turn(2):
        options = [*OPTIONS, "--ntasks-per-node=2"]
        job = cluster.submit(SCRIPT, options=options, folder=tmp_path, environment=environment)
        metrics = save / "metrics.jsonl"
        while not metrics.is_file() or metrics.read_text().count('"train"') < 4:
            time.sleep(0.2)
        preempting = cluster.run_job(urgent, options=["--partition=urgent"], folder=tmp_path, environment={})
    finished = cluster.wait(job, tmp_path)  # most of this time the job waits for its credentials to expire
    log = finished.log + _log_of_nodes(save)
    assert preempting.state == "COMPLETED", log
    assert finished.state == "COMPLETED", log
    assert "exiting program after receiving SIGTERM." in log, log
    iterations = [int(number) for number in re.findall(r" iteration +(\d+)/", log)]
    assert iterations == list(range(1, 21)), log  # none is lost, and none is made twice
    assert json.loads((save / "run_status.json").read_text())["status"] == "finished"


def _log_of_nodes(save: Path) -> str:
    """Return what the ranks have printed, node by node."""
    return "".join(path.read_text() for path in sorted((save / "logs").glob("pretrain-1b-dwm-*.log")))


def test_documents_are_scored_and_selected_by_arrays_of_tasks(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """Tasks that are done are not submitted again; a wrong partition is one line."""
    monkeypatch.chdir(tmp_path)
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, cluster.environment[name])
    texts = [f"the number {number} of {number % 7} and no other" for number in range(30)]
    for part in range(2):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[part::2]]
        (tmp_path / f"part{part}.jsonl").write_text("".join(lines))
    make_classifier(ScoringBenchmarkConfig(num_layers=1, hidden_size=64), tmp_path / "weighter", texts)
    command = ["--weighter", "weighter", "--input", "part*.jsonl"]
    slurm = ["--slurm-memory-gb", "1", "--slurm-options", "comment=scores", "--workers", "2", "--slurm-partition"]
    with pytest.raises(SystemExit) as end:
        score.main([*command, "--output", "refused", *slurm, "nowhere"])
    assert end.value.code == 2 and "--slurm-partition nowhere: sbatch refuses the job" in capfd.readouterr().err

    def queued() -> str:
        return subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, check=True).stdout

    array = [*command, "--output", "array", *slurm, "main"]
    with turn(2):
        score.main(array)
        submitted = capfd.readouterr().out
        assert re.fullmatch(r"array/data: 2 tasks, submitted job \d+; its logs are in .*\n", submitted)
        done = tmp_path / "array" / "logs" / "completions"
        cluster.wait_for("end of the tasks", lambda: len(list(done.glob("*"))) == 2 and not queued())
    score.main(array)
    assert capfd.readouterr().out == "array/data: 2 tasks, all tasks are done\n"
    score.main([*command, "--output", "here"])
    for file in ("data/00000.jsonl", "data/00001.jsonl"):
        assert (tmp_path / "array" / file).read_text() == (tmp_path / "here" / file).read_text()

    choice = ["--input", "here/data", "--documents", "9", "--output"]
    later = ["--slurm-memory-gb", "1", "--slurm-options", "begin=now+1hour", "--slurm-partition", "main"]
    select.main([*choice, "later.jsonl", *later])
    capfd.readouterr()
    for other in (["--seed", "2"], ["--seed", "2", *later], later):
        with pytest.raises(SystemExit) as end:
            select.main([*choice, "later.jsonl", *other])
        assert end.value.code == 2
        found = re.search(r"error: --output later.jsonl: SLURM job (\d+) .*scancel ([\d ]+)\n", capfd.readouterr().err)
        assert found and found[1] in found[2].split()
    subprocess.run(["scancel", f"--user={getpass.getuser()}"], check=True)
    cluster.wait_for("end of the jobs", lambda: not queued())
    select.main([*choice, "later.jsonl"])
    assert capfd.readouterr().out.startswith("later.jsonl: kept 9 of 30 documents, ")

    with turn(2):
        select.main([*choice, "array.jsonl", *slurm, "main"])
        assert re.fullmatch(r"array.jsonl: submitted job \d+; .*\n", capfd.readouterr().out.splitlines(True)[-1])
        cluster.wait_for("end of the jobs", lambda: not queued())
    select.main([*choice, "array.jsonl", *slurm, "main"])
    assert capfd.readouterr().out.startswith("array.jsonl: kept 9 of 30 documents, ")
    select.main([*choice, "here.jsonl"])
    assert (tmp_path / "array.jsonl").read_text() == (tmp_path / "here.jsonl").read_text()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({}, "DATA_PATH"),
        ({"DATA_PATH": "train"}, "TARGET_DATA_PATH"),
        ({"DATA_PATH": "train", "DWM_MODE": "frozen"}, "DWM_LOAD"),
        ({"DATA_PATH": "train", "DWM_MODE": "off"}, "TOKENIZER_MODEL"),
        ({"DATA_PATH": "train", "DWM_MODE": "off", "TOKENIZER_TYPE": "NullTokenizer"}, "VOCAB_SIZE"),
    ],
)
def test_a_variable_that_is_missing_is_named_in_one_line(settings: dict[str, str], missing: str):
    environment = {"PATH": os.environ["PATH"], **settings}
    done = subprocess.run(["bash", str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {missing} is not set") and done.stderr.count("\n") == 1


def test_a_job_that_is_stopped_goes_back_into_the_queue_but_not_for_ever(tmp_path: Path):
    """Commands in place of SLURM's: what ``srun`` ends with, and leaves as the run's status, is the step's."""
    for name, text in {
        "srun": 'if [[ -n $STATUS ]]; then echo "$STATUS" >"$SAVE/run_status.json"; fi\nexit "$CODE"',
        "scontrol": 'case "$*" in requeue*) echo requeued ;; *"show job"*) echo "$JOB" ;; *) echo localhost ;; esac',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    fixed = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SAVE": str(tmp_path), "REPO_DIR": str(ROOT), **TINY}
    fixed |= {"DATA_PATH": "x", "DWM_MODE": "off", "PREFLIGHT": "0", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x"}
    fixed |= {"PYTHON": sys.executable}
    steps = [  # (status and iteration that the run leaves, code of srun, code of the script, whether it is requeued)
        (None, 75, 0, True),
        ("interrupted 4", 0, 0, True),
        (None, 143, 0, True),  # killed while it started
        ("interrupted 4", 0, 0, True),
        (None, 143, 2, False),  # the third time in a row without an iteration
        ("interrupted 9", 0, 0, True),
        ("running 12", 143, 143, False),  # killed
        (None, 2, 2, False),
        ("finished 20", 0, 0, False),
    ]
    fixed["JOB"] = "JobState=RUNNING Reason=None Dependency=(null)"
    for number, (status, code, expected, is_requeued) in enumerate(steps):
        kind, iteration = (status or " ").split(" ")
        record = json.dumps({"status": kind, "iteration": int(iteration), "reason": ""}) if status else ""
        environment = {**fixed, "CODE": str(code), "STATUS": record}
        done = subprocess.run(["bash", str(SCRIPT)], env=environment, capture_output=True, text=True)
        assert (done.returncode, "requeued" in done.stdout) == (expected, is_requeued), (number, done)
        is_hopeless = "no iteration was made since 4 in three starts" in done.stderr
        assert is_hopeless == (status is None and code != 2 and expected == 2), (number, done)

    for reason, is_requeued in (("None", False), ("TimeLimit", True)):  # by scancel, and while the run saves too slowly
        job = f"   JobState=COMPLETING Reason={reason} Dependency=(null)"
        environment = {**fixed, "CODE": "75", "STATUS": "", "JOB": job}
        done = subprocess.run(["bash", str(SCRIPT)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and ("requeued" in done.stdout) == is_requeued, done
