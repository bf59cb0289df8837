"""Print each source's share of the training loss under a run's weights, overall and by stage, as --data-path lines.

The last line has the sources' mean weights, as flags of a run with one fixed weight per source.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_dwm.analysis.records import read_run
from megatron_dwm.analysis.shares import learned_shares, learned_weights
from megatron_dwm.cli.command import run_command
from megatron_dwm.cli.run_argument import RunArgument, with_run_flag
from megatron_dwm.config.flags import flag, parse
from megatron_dwm.errors import UserError


@dataclass(frozen=True)
class BlendConfig(RunArgument):
    """Blend."""

    data_path: list[str] | None = flag(None, "Prefixes to print instead of the sources' names, in the same order.")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the shares of a run's sources."""
    run_command(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> None:
    config: BlendConfig = parse(with_run_flag(argv), {"blend": BlendConfig}, description=__doc__)["blend"]
    run = read_run(Path(config.run))
    found = learned_shares(run)
    names = config.data_path or run.sources
    if len(names) != len(run.sources):
        raise UserError(
            f"--data-path: {len(names)} prefixes for {len(run.sources)} sources; give one for each of "
            f"{', '.join(run.sources)}"
        )
    for shares in found:
        print(f"# {shares.label}, {shares.iterations} iterations")
        for source, (low, high) in shares.interval.items():
            bounds = "too few iterations for an interval" if math.isnan(low) else f"{low:.4f} to {high:.4f}"
            print(f"#   {source}: {shares.mean[source]:.4f} ({bounds})")
        pairs = (f"{share:.6f} {name}" for name, share in zip(names, shares.mean.values(), strict=True))
        print(f"--data-path {' '.join(pairs)}")
    weights = learned_weights(run)
    print("# the mean weights of the sources' samples, for a run with one weight per source")
    print(
        f"--dwm-mode rule --dwm-rule source-weights --dwm-rule-sources {' '.join(weights)} "
        f"--dwm-rule-weights {' '.join(f'{weight:.4f}' for weight in weights.values())}"
    )


if __name__ == "__main__":
    main()
