"""Select documents within a budget: at random, by a score, by perplexity, or by the shares of the sources.

Each row is an object such as {"text": "One document.", "score": 0.5}: the text under the key of --json-key, the number
that ranks under that of --score-key. Rows are kept in the input's order. A manifest beside the output says how many of
each source, and by which threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from megatron_dwm.analysis.selection import select_files
from megatron_dwm.analysis.selection_flags import SelectConfig
from megatron_dwm.cli.command import limit_progress_bars, run_command
from megatron_dwm.config.flags import parse


def main(argv: Sequence[str] | None = None) -> None:
    """Select documents."""
    run_command(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> None:
    config: SelectConfig = parse(argv, {"select": SelectConfig}, description=__doc__)["select"]
    if config.tokenizer is not None:
        limit_progress_bars()
    found = select_files(config)
    kept = " and ".join(
        f"{found[f'{unit}_kept']:,} of {found[f'{unit}_kept'] + found[f'{unit}_dropped']:,} {unit}"
        for unit in ("documents", "tokens")
        if f"{unit}_kept" in found
    )
    print(f"{config.output}: kept {kept}, {found['output']['bytes']:,} bytes; {config.output}.manifest.json says which")


if __name__ == "__main__":
    main()
