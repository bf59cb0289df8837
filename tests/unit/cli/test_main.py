"""``megatron-dwm``: the commands by name, and the scripts that are the same commands."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dwm import __version__
from megatron_dwm.cli import benchmark, main, plot
from megatron_dwm.cli.dispatch import Command, run_module
from megatron_dwm.errors import EXIT_CODE, INTERRUPTED
from megatron_dwm.extras import EXTRA_OF
from tests.paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

COMMANDS = {**main.COMMANDS, **benchmark.BENCHMARKS}
DOORS = {
    "tools/preprocess_data.py": "preprocess",
    "tools/merge_datasets.py": "merge-datasets",
    "tools/check_checkpoint.py": "check-checkpoint",
    "tools/check_data.py": "check-data",
    "tools/train_tokenizer.py": "train-tokenizer",
    "tools/build_corpus.py": "build-corpus",
    "tools/export_hf.py": "export-hf",
    "tools/export_weighter.py": "export-weighter",
    "tools/import_hf.py": "import-hf",
    "tools/preference_report.py": "report",
    "tools/plot_run.py": "plot",
    "tools/score_data.py": "score",
    "tools/select_data.py": "select",
    "benchmarks/benefit.py": "benefit",
    "benchmarks/overhead.py": "overhead",
    "benchmarks/word_order.py": "word-order",
    "benchmarks/lds.py": "lds",
    "benchmarks/transfer.py": "transfer",
    "benchmarks/scoring.py": "scoring",
    "benchmarks/chaos.py": "chaos",
    "pretrain_dwm.py": "pretrain",
}


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run the command in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["megatron-dwm", *words])
    try:
        main.main()
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    return 0


def test_ctrl_c_while_a_command_is_imported_prints_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    """Importing torch takes seconds."""
    (tmp_path / "interrupted_command.py").write_text("raise KeyboardInterrupt\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(main.COMMANDS, "plot", Command("interrupted_command", "is interrupted"))
    assert run(monkeypatch, "plot") == INTERRUPTED and capsys.readouterr() == ("", "")
    with pytest.raises(SystemExit) as end:
        run_module("interrupted_command")  # as a script does
    assert end.value.code == INTERRUPTED and capsys.readouterr() == ("", "")


def test_help_lists_every_command_on_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert run(monkeypatch, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in main.COMMANDS.items():
        (line,) = [line for line in lines if line.startswith(f"  {name} ")]
        assert line.split(maxsplit=1)[1] == command.summary and len(line) < 100


def test_help_and_version_import_nothing_that_takes_seconds():
    program = (
        "import sys\nfrom megatron_dwm.cli.main import main\n"
        "for word in ('--help', '--version'):\n    sys.argv = ['megatron-dwm', word]\n    main()\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'megatron'} & sys.modules.keys()))\n"
        "import megatron_dwm.cli.blend"  # whose library would warn of what a CPU lacks, before warnings are hidden
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-2:] == [f"megatron-dwm {__version__}", "[]"] and done.stderr == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "megatron-dwm needs a command; give one of pretrain, preprocess, "),
        (["preproces"], "megatron-dwm has no command preproces; is it preprocess?"),
        (["zzz"], "megatron-dwm has no command zzz; give one of pretrain, "),
        (
            ["benchmark"],
            "megatron-dwm benchmark needs a command; give one of benefit, overhead, word-order, lds, transfer, "
            "scoring, chaos, precision, gpu",
        ),
        (["plot", "--runs", "x"], "unknown flag --runs; is it --run?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert run(monkeypatch, *words) == EXIT_CODE
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"error: {message}") and printed.err.count("\n") == 1


def test_a_commands_help_names_it_as_the_user_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert run(monkeypatch, "plot", "--help") == 0
    assert capsys.readouterr().out.startswith("usage: megatron-dwm plot ")


@pytest.mark.parametrize("name", ["train-tokenizer", "preprocess", "score", "select", "benefit", "report"])
def test_a_command_that_reads_json_lines_says_what_a_line_holds(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        importlib.import_module(COMMANDS[name].module).main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    example = {"report": '{"index": 17, "quality": 3.5}', "select": '{"text": "One document.", "score": 0.5}'}
    assert example.get(name, '{"text": "One document."}') in shown and "(default: " in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_main_that_takes_arguments(name: str):
    assert callable(importlib.import_module(COMMANDS[name].module).main)


def test_the_scripts_are_the_commands():
    for path, name in DOORS.items():
        assert f'run_module("{COMMANDS[name].module}")\n' in (ROOT / path).read_text(), path
    scripts = {
        str(path.relative_to(ROOT)) for folder in ("tools", "benchmarks") for path in (ROOT / folder).glob("*.py")
    }
    assert scripts - DOORS.keys() == {"tools/write_flags.py"}  # of use in the repository alone
    # gpu has benchmarks/gpu.sh, and starts precision itself; blend and evaluate are commands only.
    assert COMMANDS.keys() - set(DOORS.values()) == {"benchmark", "blend", "evaluate", "gpu", "precision"}


def test_extras_are_those_of_the_distribution():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    on_a_gpu = {"pynvml": "gpu"}  # which is of the distribution nvidia-ml-py
    assert "nvidia-ml-py" in declared["gpu"]
    extras = set(EXTRA_OF.values()) - {"gpu"}
    assert {module: name for name in extras for module in declared[name]} | on_a_gpu == EXTRA_OF
    assert declared["all"] == [f"megatron-dwm[{','.join(sorted(extras))}]"]


def test_a_command_whose_packages_are_missing_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    with pytest.raises(SystemExit) as ended:
        plot.main(["--run", str(tmp_path)])
    assert ended.value.code == EXIT_CODE
    assert capsys.readouterr().err == 'error: plot needs matplotlib; pip install "megatron-dwm[report]"\n'
