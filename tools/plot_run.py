"""Draw a run: losses and the mean weight of each data source over iterations, as one PNG."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_dwm.analysis.plots import save_png, training_figure
from megatron_dwm.analysis.records import read_run
from megatron_dwm.config.flags import flag, parse
from megatron_dwm.errors import UserError, run_cli


@dataclass(frozen=True)
class PlotConfig:
    """Plot."""

    run: str | None = flag(None, "A run's --save folder, or its --metrics-jsonl file.")
    output: str | None = flag(None, "The PNG to write; run.png beside the records if not given.")

    def __post_init__(self) -> None:
        if self.run is None:
            raise UserError("--run is missing; give a run's --save folder")


def main() -> None:
    config: PlotConfig = parse(None, {"plot": PlotConfig}, description=__doc__ or "")["plot"]
    assert config.run is not None
    run = Path(config.run)
    folder = run if run.is_dir() else run.parent
    output = Path(config.output) if config.output else folder / "run.png"
    save_png(training_figure(read_run(run)), output)
    print(output)


if __name__ == "__main__":
    run_cli(main)
