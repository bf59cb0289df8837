"""Whatever words a command line has, they make a configuration or are refused in one line."""

from __future__ import annotations

from typing import Any

from hypothesis import given, strategies

from megatron_dwm.config.flags import declared_flags
from megatron_dwm.config.run import FLAG_GROUPS, RunConfig, parse_run
from megatron_dwm.errors import UserError
from tests.fuzzing import assert_short_line, fuzz_settings
from tests.small_runs import DATA, LANGUAGE_MODEL, TRAINING, WEIGHTING, as_argv

WORKING = as_argv({**LANGUAGE_MODEL, **TRAINING, **DATA, **WEIGHTING})
FLAGS = [item for group in FLAG_GROUPS.values() for item in declared_flags(group)]
NAMES = [name for item in FLAGS for name in (*item.names, *item.old_names)]
NUMBERS = ["0", "1", "2", "3", "4", "8", "12", "-1", "0.5", "1e-5", "1e9", "nan", "inf", "-inf", "1e400", "9" * 5000]
ODD = ["", " ", "x", "--", "-", "None", "True", "[]", "{}", "٣", "1_0", "0x10", "a\nb", "\udcff", "é" * 400, "/", "\0"]

words = strategies.one_of(
    strategies.sampled_from([*NUMBERS, *ODD]),
    strategies.integers(-3, 64).map(str),
    strategies.floats().map(str),
    strategies.text(max_size=8),
)


@strategies.composite
def arguments(draw: strategies.DrawFn) -> list[str]:
    """Some flags with values of the right or of any kind and number, one of them written in one word now and then."""
    item = draw(strategies.sampled_from(FLAGS))
    name = draw(strategies.sampled_from([*item.names, *item.old_names]))
    values = strategies.sampled_from([str(choice) for choice in item.choices]) if item.choices else words
    count = draw(strategies.sampled_from([0, 1, 1, 1, 2, 4]) if item.value_type is not None else strategies.just(0))
    found = draw(strategies.lists(values | words, min_size=count, max_size=count))
    if len(found) == 1 and draw(strategies.booleans()):
        return [f"{name}={found[0]}"]
    return [name, *found]


def assert_parsed_or_refused(argv: list[str], processes: int) -> None:
    try:
        found: Any = parse_run(argv, processes)
    except UserError as error:
        assert_short_line(error)
    else:
        assert isinstance(found, RunConfig) and found.train_iters >= 0 and found.flat()


@fuzz_settings(60)
@given(
    changes=strategies.lists(arguments(), min_size=1, max_size=4), processes=strategies.sampled_from([1, 2, 4, 6, 8])
)
def test_changed_flags_make_a_run_or_are_one_line(changes: list[list[str]], processes: int) -> None:
    assert_parsed_or_refused([*WORKING, *(word for change in changes for word in change)], processes)


@fuzz_settings(40)
@given(
    argv=strategies.lists(
        strategies.one_of(
            words, strategies.sampled_from(NAMES), strategies.text(max_size=8).map(lambda text: f"--{text}")
        ).filter(lambda word: word not in ("-h", "--help", "--help-all")),
        max_size=8,
    )
)
def test_any_words_are_one_line(argv: list[str]) -> None:
    assert_parsed_or_refused(argv, 1)
