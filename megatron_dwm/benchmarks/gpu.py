"""The benchmark on one GPU: cost and memory at two sizes, precision of the alignments, benefit.

    bash benchmarks/gpu.sh --output runs/gpu

Each part runs in separate processes, and its results are written as soon as it has finished, so that a time limit loses
only the rest. Nothing is downloaded: the texts come from installed packages. Parts with existing results are not
measured again.

  - costs-125m, costs-1b: ``benchmarks/overhead.py`` in bf16: time, memory, kernel launches, reads by the host; and
    the memory that ``--plan`` predicts;
  - precision: alignments in bf16 against those in fp32;
  - benefit: a short comparison of uniform, bilevel and oracle weights on text.

``--size tiny`` uses very small models, so that a CPU takes a minute, to test that the program works.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_dwm.atomic_write import atomic_write_text
from megatron_dwm.benchmarks.benchmark_flags import parse_benchmark
from megatron_dwm.benchmarks.gpu_flags import BENEFIT, COSTS, PRECISION, TURNS, VOCAB_SIZE, Size, words
from megatron_dwm.benchmarks.gpu_report import figure, tables
from megatron_dwm.benchmarks.mixture import Mixture, build_mixture
from megatron_dwm.benchmarks.programs import call
from megatron_dwm.cli.command import run_command
from megatron_dwm.config.flags import flag
from megatron_dwm.errors import UserError
from megatron_dwm.extras import require_packages

logger = logging.getLogger(__name__)

Part = Literal["costs-125m", "costs-1b", "precision", "benefit"]


@dataclass(frozen=True)
class GpuConfig:
    """Measurement on one GPU."""

    output: str = flag("runs/gpu", "Folder for one JSON file per part, and for gpu.png.")
    scratch: str | None = flag(None, "Folder for texts, runs and logs. Default: a subfolder of --output.")
    size: Size = flag("full", "full: for a GPU with 80 GB or more; tiny: for a test on a CPU.")
    parts: list[Part] = flag(list(get_args(Part)), "What to measure.")
    report: bool = flag(
        False, "Measure nothing; plot the results in --output, and print them as tables for docs/gpu.md."
    )

    @property
    def scratch_folder(self) -> Path:
        """Where everything but the results is."""
        return Path(self.scratch) if self.scratch else Path(self.output) / "scratch"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all parts, or those that are missing, and report."""
    run_command(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> None:
    config, run_flags = parse_benchmark(GpuConfig, argv, __doc__)
    require_packages("benchmark gpu", "matplotlib")
    if run_flags:
        raise UserError(
            f"unknown flag {run_flags[0]}; benchmark gpu has --output, --scratch, --size, --parts, --report"
        )
    failed = {} if config.report else _Measurement(config).run()
    results = read_results(Path(config.output))
    if results:
        from megatron_dwm.analysis.plots import save_png

        print(tables(results))
        picture = Path(config.output) / "gpu.png"
        save_png(figure(results), picture)
        print(f"{picture}: {len(results)} parts; their figures are next to it")
    if failed:
        raise UserError("; ".join(f"{part} failed: {reason}" for part, reason in failed.items()))


def read_results(output: Path) -> dict[str, Any]:
    """Return the results of the parts."""
    files = {part: output / f"{part}.json" for part in get_args(Part)}
    return {part: json.loads(file.read_text()) for part, file in files.items() if file.is_file()}


class _Measurement:
    def __init__(self, config: GpuConfig) -> None:
        self.config, self.output, self.scratch = config, Path(config.output), config.scratch_folder
        self.parts: list[Part] = [part for part in config.parts if not self._result(part).is_file()]
        self.failed: dict[str, str] = {}

    def run(self) -> dict[str, str]:
        """Measure the parts; return those that failed, with the reason."""
        self.output.mkdir(parents=True, exist_ok=True)
        costs = [part for part in ("costs-125m", "costs-1b") if part in self.parts]
        on_text: dict[Part, Callable[[Mixture], None]] = {"precision": self._precision, "benefit": self._benefit}
        wanted = [part for part in on_text if part in self.parts]
        made: list[Mixture] = []
        # What needs no device comes first, so that nothing else runs while costs are timed.
        prepared: dict[str, Callable[[], None]] = {f"plan of {part}": partial(self._plan, part) for part in costs}
        if wanted:
            prepared["texts"] = lambda: made.append(self._texts())
        self._at_once(prepared)
        for part in costs:
            self._measured(part, partial(self._costs, part))
        if made:
            # Nothing is timed against a clock in these two, so they share the device.
            self._at_once({part: partial(on_text[part], made[0]) for part in wanted})
        return self.failed

    def _at_once(self, actions: Mapping[str, Callable[[], None]]) -> None:
        """Run several parts at the same time."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(self._measured, actions.keys(), actions.values()))

    def _measured(self, part: str, action: Callable[[], None]) -> None:
        """Run one part; its failure does not prevent the others."""
        start = time.perf_counter()
        try:
            action()
        except UserError as error:
            self.failed[part] = str(error)
        outcome = "failed" if part in self.failed else "done"
        logger.info(f"{part}: {outcome} after {time.perf_counter() - start:.0f} s")

    def _result(self, part: str) -> Path:
        return self.output / f"{part}.json"

    def _log(self, part: str) -> Path:
        return self.scratch / f"{part}.log"

    def _planned(self, part: str) -> Path:
        return self.scratch / f"{part}-planned.json"

    def _plan(self, part: str) -> None:
        plan = ["--plan", "--plan-world-size", 1, "--plan-json", self._planned(part)]
        call("pretrain", *words(COSTS[part][self.config.size]), *plan, log=self._log(f"{part}-plan"))

    def _costs(self, part: str) -> None:
        if not self._planned(part).is_file():
            raise UserError("it has no plan to be compared with")
        flags, turns = words(COSTS[part][self.config.size]), words(TURNS[part][self.config.size])
        measured = self.scratch / f"{part}-measured.json"
        call("benchmark", "overhead", *flags, *turns, "--json", measured, log=self._log(part))
        figures = json.loads(measured.read_text()) | {"plan": json.loads(self._planned(part).read_text())}
        atomic_write_text(self._result(part), json.dumps(figures, indent=2) + "\n")

    def _texts(self) -> Mixture:
        return build_mixture(self.scratch / "benefit", "library", VOCAB_SIZE, clean=False)

    def _precision(self, mixture: Mixture) -> None:
        data = [*mixture.training_flags, "--dwm-target-data-path", str(mixture.target)]
        data += ["--data-cache-path", str(self.scratch / "cache")]
        flags = [*words(PRECISION[self.config.size]), *data, "--json", self._result("precision")]
        call("benchmark", "precision", *flags, log=self._log("precision"))

    def _benefit(self, _mixture: Mixture) -> None:
        folder, size = self.scratch / "benefit", self.config.size
        flags = ["--output", folder, "--corpus", "library", "--vocab-size", VOCAB_SIZE, *words(BENEFIT[size])]
        call("benchmark", "benefit", *flags, log=self._log("benefit"))
        result = json.loads((folder / "benefit.json").read_text())
        atomic_write_text(self._result("benefit"), json.dumps(result | {"curves": _curves(folder / "runs")}) + "\n")


def _curves(runs: Path) -> dict[str, list[list[float]]]:
    """Return the evaluation losses of each run: [iteration, loss]."""
    from megatron_dwm.analysis.records import read_run, records_file

    folders = [folder for folder in sorted(runs.iterdir()) if records_file(folder).is_file()]
    return {
        folder.name: [[point["iteration"], point["lm_loss"]] for point in read_run(folder).evaluated("valid")]
        for folder in folders
    }


if __name__ == "__main__":
    main()
