"""Flags from dataclasses: what they become, and what a mistake says."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from megatron_dwm.config.flags import declared_flags, flag, parse, read, require_at_least, require_given, to_argv
from megatron_dwm.errors import EXIT_CODE, UserError, run_cli
from megatron_dwm.runtime.logging import configure_logging


@dataclass(frozen=True)
class Small:
    """A few flags.

    Of every kind.
    """

    size: int | None = flag(None, "A number.")
    rate: float = flag(0.5, "100% of a number.")
    paths: list[str] | None = flag(None, "Words.", nargs="*")
    triple: list[int] | None = flag(None, "Three numbers.", nargs=3)
    kind: Literal["a", "b"] = flag("a", "A choice.")
    fast: bool = flag(False, "A switch.")
    fused: bool = flag(True, "A switch that turns off.")
    renamed: bool = flag(True, "Another.", "--without-renamed", "--disable-renamed")
    parts: int = flag(1, "Refused but at its default.", refused="there is one; leave it out")
    moved: list[str] | None = flag(None, "Another name.", nargs="*", old_names=("--earlier",))
    old: bool = flag(False, "Still works.", deprecated="use --kind b")
    derived: int = 3

    def __post_init__(self) -> None:
        require_at_least(self, 1, "size rate")


@dataclass(frozen=True)
class OtherConfig:
    """Other flags."""

    far: int = flag(1, "A number.")


def _parse(*argv: str, **options: Any) -> Small:
    return parse(list(argv), {"small": Small}, description="A test.", **options)["small"]


def test_defaults_are_those_of_the_class():
    assert _parse("--rate", "1") == Small(rate=1.0)


def test_values_take_the_types_of_the_fields():
    small = _parse(
        "--size", "3", "--rate", "2", "--paths", "x", "y", "--triple", "1", "2", "3", "--kind", "b", "--fast"
    )
    assert (small.size, small.rate, small.paths, small.triple, small.kind) == (3, 2.0, ["x", "y"], [1, 2, 3], "b")
    assert small.fast


@pytest.mark.parametrize(
    ("argument", "field"),
    [("--no-fused", "fused"), ("--without-renamed", "renamed"), ("--disable-renamed", "renamed")],
)
def test_a_switch_that_is_on_is_turned_off_by_its_flag(argument: str, field: str):
    assert getattr(_parse("--rate", "1", argument), field) is False


@pytest.mark.parametrize("missing", [None, "", []])
def test_a_flag_that_must_be_given_is_named_with_the_remedy(missing: object):
    small = Small(size=1, rate=1.0, paths=["x"])
    require_given(small, "size paths", "give one")
    object.__setattr__(small, "paths", missing)
    with pytest.raises(UserError, match=r"^--paths is missing; give a path$"):
        require_given(small, "size paths", "give a path")


def test_a_configuration_has_a_command_line_that_makes_it():
    argv = ["--size", "3", "--rate", "2.5", "--paths", "x", "y z", "--kind", "b", "--fast", "--no-fused"]
    assert to_argv(_parse(*argv)) == argv


def test_only_given_values_are_read():
    assert read(["--size", "4", "--no-fused"], [Small], description=None) == {"size": 4, "fused": False}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--size", "many"], "--size: invalid int value: 'many'"),
        (["--kind", "c"], "--kind: invalid choice: 'c'"),
        (["--siz", "3"], "unknown flag --siz; is it --size?"),
        (["--qqqq"], "unknown flag --qqqq; see --help"),
        (["--site"], "unknown flag --site; is it --size?"),
        (["--sites"], "unknown flag --sites; see --help"),
        (["--fast", "3"], "unexpected argument 3"),
        (["--triple", "1", "2"], "--triple: expected 3 arguments"),
        (["--parts", "2"], "--parts is not supported: there is one; leave it out"),
        (["--size", "0"], "--size 0: must be at least 1"),
        (["--rate", "nan"], "--rate: nan is not a finite number"),
        (["--rate=-inf"], "--rate: -inf is not a finite number"),
        (["--rate", "1e999"], "--rate: 1e999 is not a finite number"),
        (["--rate", "1,5"], "--rate: invalid float value: '1,5'"),
        (["--rate", ""], "--rate: invalid float value: ''"),
        (["--size", str(2**63)], f"--size: {2**63} is too large; give at most {2**63 - 1}"),
        (["--size", "9" * 5000], "--size: invalid int value: '9999"),
        (["--paths", "a", "b\udcff"], "--paths: 'b\\udcff' is not UTF-8; rename it"),
        (["--size"], "--size: expected one argument"),
        (["--gone=3"], "--gone is not supported: it is gone; leave it out\n"),
        (["--gone", "3", "--went", "--unknown", "--went=1"], "it is gone; leave it out (nor are --went)"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    def main() -> None:
        _parse(*argv, reason_unsupported=dict.fromkeys(("--gone", "--went"), "it is gone; leave it out").get)

    with pytest.raises(SystemExit) as ended:
        run_cli(main)
    assert ended.value.code == EXIT_CODE == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert said in captured.err


@pytest.mark.parametrize("value", ["9" * 5000, " ".join(["word"] * 2000)])
def test_a_long_value_is_cut_and_the_remedy_is_not(value: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        run_cli(lambda: print(_parse("--size", value)))
    error = capsys.readouterr().err
    assert "--size: invalid int value: '" in error and " ... " in error
    assert error.endswith("; see --help for the flags\n")
    assert len(error) < 1020


@pytest.mark.parametrize("path", ["x" * 300, "loop"])
def test_a_path_that_no_file_system_takes_is_one_line(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda: print((tmp_path / path).read_text()))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("error: /") and error.count("\n") == 1
    assert error.endswith("; give another path\n")


def test_a_refused_flag_may_repeat_its_default():
    assert _parse("--rate", "1", "--parts", "1").parts == 1


def test_a_deprecated_flag_works_and_says_what_to_use(caplog: pytest.LogCaptureFixture):
    assert _parse("--rate", "1", "--fast").fast
    assert caplog.messages == []
    assert _parse("--rate", "1", "--old").old
    assert caplog.messages == ["--old is deprecated; use --kind b"]


@pytest.mark.parametrize(
    "words", [["--earlier", "x"], ["--earlier=x"], ["--earlier", "x", "--earlier", "x"], ["--earlier=x", "--moved=x"]]
)
def test_an_earlier_spelling_works_and_says_the_present_one(words: list[str], caplog: pytest.LogCaptureFixture):
    assert _parse("--rate", "1", *words).moved == ["x"]
    assert caplog.messages == ["--earlier is deprecated; use --moved"]


def test_the_last_of_two_values_counts_and_says_so(caplog: pytest.LogCaptureFixture):
    assert _parse("--rate", "1", "--fast", "--fast", "--rate", "1.0").fast
    assert caplog.messages == []
    assert _parse("--rate", "1", "--rate=2", "--moved", "a", "b", "--moved", "c").moved == ["c"]
    assert caplog.messages == [
        "--rate is given twice, as 1.0 and 2.0; the last counts",
        "--moved is given twice, as a b and c; the last counts",
    ]


def _help(capsys: pytest.CaptureFixture[str], *argv: str, **options: Any) -> str:
    with pytest.raises(SystemExit) as ended:
        parse(list(argv), {"small": Small, "other": OtherConfig}, description="A test.", **options)
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_names_every_flag_and_its_default(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = _help(capsys, "--help")
    assert "A few flags:" in text and "100% of a number. (default: 0.5)" in text and "--far" in text
    assert all(name in text for item in declared_flags(Small) for name in item.names)
    assert "--earlier" not in text


def test_help_shows_the_main_flags_and_lists_the_other_groups(capsys: pytest.CaptureFixture[str]):
    text = _help(capsys, "--help", main_class=Small)
    assert "--size" in text and "--far" not in text
    assert "  other  Other flags (1 flags)\n" in text and "--help-all" in text
    assert "--size" in _help(capsys, "--help-all", main_class=Small)
    text = _help(capsys, "--help-all", "other", main_class=Small)
    assert "--far" in text and "--size" not in text
    with pytest.raises(UserError, match="--help-all: invalid choice: 'nothing'"):
        _help(capsys, "--help-all", "nothing", main_class=Small)


def test_help_is_printed_by_one_rank(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    package = logging.getLogger("megatron_dwm")
    for name in ("handlers", "level", "propagate"):
        monkeypatch.setattr(package, name, getattr(package, name))
    configure_logging(rank=0, world_size=2)
    assert "--size" in _help(capsys, "--help")
    configure_logging(rank=1, world_size=2)
    assert _help(capsys, "--help") == ""


def test_fields_without_a_flag_are_left_alone():
    assert "derived" not in {item.field for item in declared_flags(Small)}
    with pytest.raises(UserError):
        _parse("--derived", "4")
