"""The plan of a run, as its command prints it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from megatron_dwm.cli.pretrain import main
from megatron_dwm.config.flags import split
from megatron_dwm.config.plan import PlanConfig
from megatron_dwm.config.run import parse_run
from megatron_dwm.errors import UserError
from megatron_dwm.plan.plan import with_known_layers
from tests.e2e.launch import pretrain
from tests.paths import ROOT
from tests.small_runs import DATA, LANGUAGE_MODEL, TRAINING, WEIGHTING, Flags, as_argv

RUN: Flags = {
    **LANGUAGE_MODEL,
    **TRAINING,
    **DATA,
    **WEIGHTING,
    "--num-layers": 4,
    "--dwm-init-from": "random",
    "--hidden-dropout": 0,
    "--attention-dropout": 0,
    "--tensor-model-parallel-size": 2,
    "--use-distributed-optimizer": True,
    "--micro-batch-size": 1,
    "--bf16": True,
}


def plan(folder: Path, argv: list[str]) -> str:
    """Run the command in a process of its own, which a plan changes, and return what it printed."""

    def in_folder() -> None:
        os.chdir(folder)
        main(argv)

    finished = pretrain(folder / "log", 1, {}, in_folder)
    assert finished.codes == [0], finished.text
    return finished.output[0]


def test_the_plan_of_a_run(tmp_path: Path):
    path, save = tmp_path / "plan.json", tmp_path / "run"
    # Layers that this machine cannot have are planned all the same.
    layers = {
        "--transformer-impl": "transformer_engine",
        "--attention-backend": "flash",
        "--fp8-format": "hybrid",
        "--fp8-recipe": "tensorwise",
        "--sequence-parallel": True,
        "--tp-comm-overlap": True,
    }
    flags = {
        **RUN,
        **layers,
        "--context-parallel-size": 2,
        "--save": save,
        "--save-interval": 5,
        "--log-progress": True,
    }
    printed = plan(tmp_path, [*as_argv(flags), "--plan", "--plan-world-size", "32", "--plan-json", str(path)])
    planned = json.loads(path.read_text())
    assert (
        planned["layout"]["data_parallel"] == 8 and "32 ranks = tensor 2 x pipeline 1 x context 2 x data 8" in printed
    )
    # Iterations 1 and 2 are the warm-up; two stages of 4 follow, with an update every 2.
    assert planned["updates"] == [4, 6, 8, 10]
    assert "outer updates    4: after iterations 4 to 10, every 2" in printed
    # 4 layers of 4 x 32 x 32 and 3 x 32 x 64 and 2 norms, a norm, and an embedding and an output layer of 256 rows.
    assert planned["model_parameters"] == 4 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32 + 2 * 256 * 32
    files = {file["path"].removeprefix(f"{save}/"): file["times"] for file in planned["files"]}
    # Exports are at the ends of the stages too, 6 and 10.
    assert (files["iter_XXXXXXX"], files["weighter/iter_XXXXXXX"], files["metrics.jsonl"]) == (2, 3, 1)
    assert files["progress.txt"] == 1
    (stage,) = planned["memory"]
    assert stage["peak"] > stage["plain"] > stage["weights"] + stage["gradients"] + stage["optimizer"] > 0
    assert "activations of --transformer-impl torch, in place of Transformer Engine's" in printed
    assert not save.exists()


@pytest.mark.parametrize(
    ("flags", "layers"),
    [
        ("--attention-backend fused --apply-layernorm-1p", ", in place of Transformer Engine's, which the flags need"),
        (
            "--tensor-model-parallel-size 2 --sequence-parallel --tp-comm-overlap",
            ", in place of Transformer Engine's, which the flags need",
        ),
        ("--fp8-format hybrid --fp8-recipe tensorwise", ", in place of Transformer Engine's, which the flags need"),
        ("", ""),
    ],
)
def test_flags_of_transformer_engines_layers_are_planned_also_if_the_script_leaves_layers_to_the_default(
    flags: str, layers: str
):
    """The default is Transformer Engine's on the machines of the run, even if this one has none."""
    config, named = with_known_layers(parse_run([*as_argv(RUN), *flags.split()], 2))
    assert named == f"--transformer-impl torch{layers}"
    assert (config.model.attention_backend, config.model.fp8) == ("auto", None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"--tensor-model-parallel-size": 3}, "is not divisible by --tensor-model-parallel-size 3"),
        ({"--dwm-num-stages": 100}, "leaves no iterations for --dwm-num-stages 100"),
        ({"--save": "/proc/run"}, "--save /proc/run: cannot be written"),
        ({"--metrics-jsonl": "/proc/run/records.jsonl"}, "--metrics-jsonl /proc/run: cannot be written"),
        ({"--recompute-granularity": "full", "--recompute-method": "uniform"}, "needs --recompute-num-layers"),
    ],
)
def test_what_would_fail_on_the_cluster_fails_in_the_plan(flags: Flags, message: str, tmp_path: Path):
    finished = pretrain(tmp_path, 1, {**RUN, **flags, "--plan": True, "--plan-world-size": 16})
    (error,) = finished.errors
    assert finished.codes == [2] and message in error and error.count("\n") == 1


def test_flags_of_the_plan_are_taken_out_and_need_it():
    config, rest = split(["--lr", "1", "--plan", "--plan-world-size", "8", "--bf16"], PlanConfig)
    assert config == PlanConfig(plan=True, plan_world_size=8) and rest == ["--lr", "1", "--bf16"]
    for words in (["--plan-world-size", "8"], ["--plan-json", "plan.json"]):
        with pytest.raises(UserError, match="has no effect without --plan"):
            split(words, PlanConfig)
    with pytest.raises(UserError, match="--plan-world-size 0"):
        split(["--plan", "--plan-world-size", "0"], PlanConfig)


@pytest.mark.parametrize(("size", "layout"), [("370m", "8 ranks = tensor 1"), ("8b", "256 ranks = tensor 2")])
def test_the_scripts_for_slurm_plan_their_runs(size: str, layout: str, tmp_path: Path):
    """The flags that a script starts the program with are planned here; tests/e2e/test_slurm.py submits the third."""
    recorder = tmp_path / "python"
    recorder.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    recorder.chmod(0o755)
    settings = {"TOKENIZER_TYPE": "NullTokenizer", "VOCAB_SIZE": "31999", "NUM_LAYERS": "2", "PLAN_ONLY": "1"}
    data = {"DATA_PATH": "train", "TARGET_DATA_PATH": "target", "REPO_DIR": str(ROOT), "PYTHON": str(recorder)}
    script = ROOT / "examples" / f"pretrain_{size}_dwm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    started = subprocess.run(["bash", script], env={**os.environ, **settings, **data}, capture_output=True, text=True)
    program, *flags = started.stdout.splitlines()
    assert program == str(ROOT / "pretrain_dwm.py"), started.stderr
    assert layout in plan(tmp_path, flags)


def test_tasks_start_in_a_container_with_further_options(tmp_path: Path):
    """What a job asks srun for, by commands that stand in its place; an srun without pyxis is said so."""
    srun = "if [ $1 = --help ]; then echo $HELP; else printf '%s ' \"$@\"; echo; fi"
    for name, text in {"srun": srun, "scontrol": "echo node1; echo node2"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    container = {"CONTAINER_IMAGE": "image.sqsh", "CONTAINER_MOUNTS": "/data:/data", "SRUN_ARGS": "--mpi=none --label"}
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "32", "SLURM_JOB_NODELIST": "node[1-2]", "REPO_DIR": str(ROOT)}
    data = {"DATA_PATH": "train", "TARGET_DATA_PATH": "target", "TOKENIZER_MODEL": "tokenizer"}
    environment = {**os.environ, **container, **slurm, **data, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = ["bash", ROOT / "examples/pretrain_1b_dwm.sh"]
    without = {**environment, "HELP": "Usage: srun"}
    refused = subprocess.run(script, env=without, cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.startswith("error: CONTAINER_IMAGE=image.sqsh: srun has no")
    environment["HELP"] = "--container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH"
    done = subprocess.run(script, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    preflight, tasks, _, program, *_ = done.stdout.splitlines()
    common = (
        "--kill-on-bad-exit=1 --mpi=none --label --container-image=image.sqsh "
        f"--container-mounts={ROOT}:{ROOT},/data:/data,{tmp_path}:{tmp_path} --container-workdir={tmp_path} "
    )
    assert preflight.startswith(
        f"{common}--nodes=1 --ntasks=1 python {ROOT}/pretrain_dwm.py --plan --plan-world-size 32"
    )
    assert tasks.startswith(f"{common}--output=runs/pretrain_1b_dwm/logs/%x-%j-%N.log")
    assert f'"${{@:3}}" pretrain_dwm node1 10007 python {ROOT}/pretrain_dwm.py --tensor' in program
