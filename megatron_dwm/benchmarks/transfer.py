"""Compare the runs of examples/transfer.sh: what a small model's weighter is worth to a larger one.

python benchmarks/transfer.py --runs runs/transfer/runs --output runs/transfer/transfer
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dwm.analysis.records import read_run, records_file
from megatron_dwm.atomic_write import atomic_write_text
from megatron_dwm.benchmarks.benefit_report import Arm, interval, loss_curve
from megatron_dwm.cli.command import run_command
from megatron_dwm.config.flags import flag, parse, require_at_least
from megatron_dwm.errors import UserError
from megatron_dwm.extras import require_packages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HALVES = {"random": "a random half of the corpus", "dsir": "the half that DSIR selects"}
ARMS = ("uniform", "frozen", "staged", "bilevel")

Halves = Mapping[str, Sequence[Arm]]
"""The arms that trained on each half of the corpus."""


@dataclass(frozen=True)
class TransferConfig:
    """Comparison."""

    runs: str = flag("runs/transfer/runs", "Folder of the runs, named HALF-ARM-SEED.")
    output: str = flag("runs/transfer/transfer", "Table and plot: this name with .json and .png.")
    seeds: int = flag(3, "Runs of each arm.")

    def __post_init__(self) -> None:
        require_at_least(self, 1, "seeds")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and write it and the plot."""
    run_command(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> None:
    config: TransferConfig = parse(argv, {"transfer": TransferConfig}, description=__doc__)["transfer"]
    require_packages("benchmark transfer", "matplotlib")
    from megatron_dwm.analysis.plots import save_png

    halves = {half: [_arm(config, half, name) for name in ARMS] for half in HALVES}
    print(table(halves))
    result = {half: {arm.name: {"test_loss": arm.test_losses} for arm in arms} for half, arms in halves.items()}
    atomic_write_text(Path(f"{config.output}.json"), json.dumps(result, indent=2) + "\n")
    save_png(figure(halves), Path(f"{config.output}.png"))
    print(f"{config.output}.json {config.output}.png")


def _arm(config: TransferConfig, half: str, name: str) -> Arm:
    """Return the runs of one weighting on one half.

    Raises:
        UserError: one is missing or has not finished.
    """
    places = [Path(config.runs) / f"{half}-{name}-{seed}" for seed in range(1, config.seeds + 1)]
    for place in places:
        if not records_file(place).is_file() or not read_run(place).evaluated("test"):
            raise UserError(f"--runs {config.runs}: {place} has no test loss; run examples/transfer.sh to its end")
    return Arm(name, list(map(read_run, places)))


def table(halves: Halves) -> str:
    """Return a table of means with 95 % intervals; differences are taken seed by seed."""
    first = halves["random"][0].test_losses
    lines = [f"{'trained on':<12} {'weights':<10} {'test loss':<20} {'minus uniform':<20} minus uniform, random half"]
    for half, arms in halves.items():
        uniform = arms[0].test_losses
        for arm in arms:
            of_half, of_all = (
                interval([a - b for a, b in zip(arm.test_losses, other, strict=True)])
                if other != arm.test_losses
                else ""
                for other in (uniform, first)
            )
            lines.append(f"{half:<12} {arm.name:<10} {interval(arm.test_losses):<20} {of_half:<20} {of_all}".rstrip())
    return "\n".join(lines)


def figure(halves: Halves) -> Figure:
    """Draw the evaluation losses over the iterations: mean of the seeds, and their range."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(10, 4.5), layout="constrained")
    panels = drawing.subplots(1, len(halves), sharey=True)
    for panel, (half, arms) in zip(panels, halves.items(), strict=True):
        for number, arm in enumerate(arms):
            iterations, mean, low, high = loss_curve(arm)
            panel.plot(iterations, mean, color=f"C{number}", label=arm.name)
            panel.fill_between(iterations, low, high, color=f"C{number}", alpha=0.15)
        panel.set_title(HALVES[half])
        panel.set_xlabel("iteration")
    panels[0].set_ylabel("loss on held-out text like the target (nats per token)")
    panels[0].legend(frameon=False)
    return drawing


if __name__ == "__main__":
    main()
