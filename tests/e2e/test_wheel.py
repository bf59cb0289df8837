"""The wheel, installed where the repository is not: its command trains, and so does torchrun with its module."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_dwm import __version__
from tests.e2e.launch import records
from tests.paths import ROOT
from tests.small_runs import DATA, LANGUAGE_MODEL, TRAINING, WEIGHTING, as_argv

PACKAGE = ROOT / "megatron_dwm"
FLAGS: dict[str, Any] = {
    **LANGUAGE_MODEL,
    **TRAINING,
    **DATA,
    **WEIGHTING,
    **{"--train-iters": 2, "--lr-warmup-iters": 0, "--dwm-warmup-iters": 0, "--dwm-update-interval": 1},
    "--dwm-num-stages": 1,
}


@dataclass(frozen=True)
class Installation:
    """An environment that holds the wheel, and the packages that it needs."""

    wheel: Path
    environment: Path
    folder: Path
    """Where commands are started; the repository is neither here nor on the path of Python."""

    def run(self, *command: object) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment."""
        program, *arguments = command
        argv = [str(self.environment / "bin" / str(program)), *map(str, arguments)]
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(argv, cwd=self.folder, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(PACKAGE, source / "megatron_dwm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder / "dist"), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = (folder / "dist").iterdir()

    environment = folder / "environment"
    venv.create(environment, with_pip=False)
    install = [*pip, "--python", str(environment / "bin" / "python"), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True)
    # What the wheel needs is taken from where the tests run: folders alone, so that an editable installation of the
    # repository, which is a .pth file in one of them, is not.
    (site_packages,) = environment.glob("lib/python*/site-packages")
    shared = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site_packages / "shared_packages.pth").write_text("\n".join(shared))
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    return Installation(wheel, environment, elsewhere)


def test_the_wheel_holds_all_of_the_package(installation: Installation):
    with zipfile.ZipFile(installation.wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("megatron_dwm/")}
        entry_points = archive.read(f"megatron_dwm-{__version__}.dist-info/entry_points.txt").decode()
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert packed == {str(path.relative_to(ROOT)) for path in files}
    assert {"megatron_dwm/py.typed", "megatron_dwm/analysis/report/preference.html.j2"} <= packed
    assert "megatron-dwm = megatron_dwm.cli.main:main" in entry_points


def test_the_installed_package_is_the_wheels(installation: Installation):
    found = installation.run("python", "-c", "import megatron_dwm; print(megatron_dwm.__file__)").stdout
    assert Path(found.strip()).is_relative_to(installation.environment)
    assert installation.run("megatron-dwm", "--version").stdout == f"megatron-dwm {__version__}\n"


def test_it_trains_by_its_command_and_by_torchrun_and_reports(installation: Installation):
    losses = {}
    for name, start in {
        "command": ("megatron-dwm", "pretrain"),
        "torchrun": ("python", "-m", "torch.distributed.run", "--nproc-per-node", 1, "-m", "megatron_dwm.cli.pretrain"),
    }.items():
        installation.run(*start, *as_argv({**FLAGS, "--save": name}))
        steps = records(installation.folder / name / "metrics.jsonl", "train")
        losses[name] = [step["lm_loss"] for step in steps]
    assert len(losses["command"]) == 2 and losses["command"] == losses["torchrun"]

    installation.run("megatron-dwm", "report", "command", "--output", "page")
    assert "How strongly it chooses" in (installation.folder / "page" / "preference.html").read_text()
    installation.run("megatron-dwm", "plot", "--run", "command")
    assert (installation.folder / "command" / "run.png").is_file()


def test_it_makes_datasets(installation: Installation):
    texts = installation.folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": "1 2 3 4"}) + "\n" for _ in range(5)))
    tokenizer = ("--tokenizer-type", "NullTokenizer", "--vocab-size", 10)
    done = installation.run("megatron-dwm", "preprocess", "--input", texts, "--output-prefix", "made", *tokenizer)
    assert done.stdout.splitlines()[-1] == "made_text_document: 5 documents, 20 tokens"
    assert (installation.folder / "made_text_document.bin").stat().st_size == 5 * 4 * 2  # tokens of two bytes
