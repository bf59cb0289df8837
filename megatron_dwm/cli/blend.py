"""Print each source's share of the training loss under a run's weights, overall and by stage, as --data-path lines.

The last line has the sources' mean weights, as flags of a run with one fixed weight per source.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote

from megatron_dwm.analysis.records import read_run, run_folder
from megatron_dwm.analysis.shares import learned_shares, learned_weights
from megatron_dwm.cli.command import run_command
from megatron_dwm.cli.run_argument import RunArgument, with_first_flag
from megatron_dwm.config.data import DataConfig
from megatron_dwm.config.flags import build, flag, parse
from megatron_dwm.data.blend import DataPaths, data_paths, short_names
from megatron_dwm.errors import UserError


@dataclass(frozen=True)
class BlendConfig(RunArgument):
    """Blend."""

    data_path: list[str] | None = flag(
        None,
        "Prefixes to print, one for each source. Default: those in the run's last checkpoint; without a checkpoint, "
        "the sources' names.",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the shares of a run's sources."""
    run_command(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> None:
    config: BlendConfig = parse(with_first_flag(argv), {"blend": BlendConfig}, description=__doc__)["blend"]
    run = read_run(Path(config.run))
    found = learned_shares(run)
    saved = _saved_paths(Path(config.run))
    prefixes = _prefixes(config.data_path, saved, run.sources)
    spelling = "--train-data-path" if saved is not None and saved.shared is None else "--data-path"
    for shares in found:
        print(f"# {shares.label}, {shares.iterations} iterations")
        for source, (low, high) in shares.interval.items():
            bounds = "too few iterations for an interval" if math.isnan(low) else f"{low:.4f} to {high:.4f}"
            share = f"{shares.mean[source]:.4f} ({bounds})" if shares.mean[source] else "0, left out"
            print(f"#   {_one_line(source)}: {share}")
        pairs = (f"{share:.6g} {quote(prefixes[source])}" for source, share in shares.mean.items() if share)
        print(f"{spelling} {' '.join(pairs)}")
    weights = learned_weights(run)
    print("# the mean weights of the sources' samples, for a run with one weight per source")
    for source in [source for source, weight in weights.items() if not weight]:
        print(f"#   {_one_line(source)}: 0, to be left out of the data, since other weights are 1")
        del weights[source]
    print(
        f"--dwm-mode rule --dwm-rule source-weights --dwm-rule-sources {' '.join(map(quote, weights))} "
        f"--dwm-rule-weights {' '.join(f'{weight:.6g}' for weight in weights.values())}"
    )


def _saved_paths(run: Path) -> DataPaths | None:
    """Return the datasets of a run as its last checkpoint names them; None if it has no checkpoint."""
    from megatron_dwm.analysis.samples import run_arguments

    try:
        saved = run_arguments(run_folder(run))
        return data_paths(build(DataConfig, saved), None)
    except UserError:
        return None


def _prefixes(given: list[str] | None, saved: DataPaths | None, sources: Sequence[str]) -> dict[str, str]:
    """Return what is printed for each source.

    Raises:
        UserError: --data-path does not name one prefix for each source.
    """
    prefixes = given or (saved.train[0] if saved is not None and saved.train is not None else [])
    # Matched by name: records list the sources in the order in which they first had a sample.
    named = dict(zip(short_names(prefixes), prefixes, strict=True))
    if named.keys() >= set(sources):
        return named
    if given is not None and len(given) != len(sources):
        raise UserError(
            f"--data-path: {len(given)} prefixes for {len(sources)} sources; give one for each of {', '.join(sources)}"
        )
    return dict(zip(sources, given or sources, strict=True))


def _one_line(name: str) -> str:
    return " ".join(name.split())


if __name__ == "__main__":
    main()
