"""Plot a run: losses and the mean weight of each data source over iterations, as one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_dwm.analysis.comparison import gain_line
from megatron_dwm.analysis.records import read_run, run_folder
from megatron_dwm.cli.command import run_command
from megatron_dwm.cli.run_argument import RunArgument, with_first_flag
from megatron_dwm.config.flags import flag, parse, require_paths
from megatron_dwm.extras import require_packages


@dataclass(frozen=True)
class PlotConfig(RunArgument):
    """Plot."""

    baseline: str | None = flag(
        None,
        "The same run with uniform weights (--dwm-mode off), to plot with it and to report the gain.",
    )
    output: str | None = flag(None, "PNG file to write. Default: run.png next to the records.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_paths(self, "output")


def main(argv: Sequence[str] | None = None) -> None:
    """Plot a run."""
    run_command(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> None:
    config: PlotConfig = parse(with_first_flag(argv), {"plot": PlotConfig}, description=__doc__)["plot"]
    require_packages("plot", "matplotlib")
    from megatron_dwm.analysis.plots import save_png, training_figure

    run = Path(config.run)
    output = Path(config.output) if config.output else run_folder(run) / "run.png"
    weighted, baseline = read_run(run), read_run(Path(config.baseline)) if config.baseline else None
    save_png(training_figure(weighted, baseline), output)
    print(f"{output}: losses and weights up to iteration {weighted.steps[-1]['iteration']}")
    if baseline is not None:
        print(gain_line(baseline, weighted))


if __name__ == "__main__":
    main()
