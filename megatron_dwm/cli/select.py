"""Select documents within a budget: at random, by a score, by perplexity, or by the shares of the sources.

Each row is an object such as {"text": "One document.", "score": 0.5}: the text under the key of --json-key, the number
to rank by under that of --score-key. Rows are kept in the input's order. A manifest next to the output lists how many
of each source were kept, and the threshold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from megatron_dwm.analysis.selection_flags import SelectConfig
from megatron_dwm.cli.command import limit_progress_bars, run_command
from megatron_dwm.config.flags import build, flag_name, read
from megatron_dwm.config.slurm import SlurmConfig
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.config.unsupported_flags import reason_unsupported
from megatron_dwm.errors import UserError
from megatron_dwm.extras import require_packages


def main(argv: Sequence[str] | None = None) -> None:
    """Select documents."""
    run_command(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> None:
    classes = [SelectConfig, SlurmConfig, TokenizerConfig]
    values = read(argv, classes, description=__doc__, reason_unsupported=reason_unsupported)
    config, slurm = build(SelectConfig, values), build(SlurmConfig, values)
    require_packages("select", "datatrove", "orjson", "pyarrow", *["data_selection"] * (config.method == "dsir"))
    from megatron_dwm.analysis.selection import select_files

    tokenizer_config = _tokenizer_config(config, values)
    if config.tokenizer is not None:
        limit_progress_bars()
    found = select_files(config, tokenizer_config, slurm)
    if isinstance(found, str):
        print(f"{config.output}: submitted job {found}; the same command says when it is done")
        return
    kept = " and ".join(
        f"{found[f'{unit}_kept']:,} of {found[f'{unit}_kept'] + found[f'{unit}_dropped']:,} {unit}"
        for unit in ("documents", "tokens")
        if f"{unit}_kept" in found
    )
    if config.duplicates != "keep":
        kept += f" after {found['duplicates_dropped']:,} duplicates"
    print(f"{config.output}: kept {kept}, {found['output']['bytes']:,} bytes; {config.output}.manifest.json says which")


def _tokenizer_config(config: SelectConfig, values: Mapping[str, Any]) -> TokenizerConfig | None:
    """Return the tokenizer of the indexed dataset, if that is the output format.

    Raises:
        UserError: flags of a tokenizer are given but not used, or needed but not given.
    """
    given = [field.name for field in dataclasses.fields(TokenizerConfig) if field.name in values]
    if config.output_format == "indexed":
        if not given:
            raise UserError("--output-format indexed needs a tokenizer; give --tokenizer-type and --tokenizer-model")
        return build(TokenizerConfig, values)
    if given:
        raise UserError(f"{flag_name(given[0])} is for --output-format indexed; leave it out")
    return None


if __name__ == "__main__":
    main()
