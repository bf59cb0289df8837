"""Preprocessing as jobs of datatrove: each task tokenizes a part of the input, and the last job makes one dataset."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

from megatron_dwm import __version__
from megatron_dwm.config.slurm import SlurmConfig
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.corpora.dataset_shards import DatasetShardWriter, publish_shards
from megatron_dwm.corpora.dataset_writer import dataset_prefix
from megatron_dwm.corpora.encoder import Encoder
from megatron_dwm.corpora.parts import file_parts
from megatron_dwm.corpora.pipelines import FunctionStep, RecordReader
from megatron_dwm.corpora.preprocess import PreprocessConfig, tokenizer_stamp
from megatron_dwm.corpora.readers import input_files
from megatron_dwm.corpora.storage import stamp_of
from megatron_dwm.corpora.unfinished_jobs import UnfinishedJobs
from megatron_dwm.errors import UserError

logger = logging.getLogger(__name__)


def preprocess_in_tasks(
    config: PreprocessConfig, tokenizer_config: TokenizerConfig, slurm: SlurmConfig
) -> tuple[list[str], str | None]:
    """Run the unfinished tasks here, or submit them to SLURM; the datasets will be those of :func:`preprocess`.

    Returns:
        the names of the datasets, without suffix, and the number of the SLURM job that makes them; None if it is done.

    Raises:
        UserError: flags that change the order of documents or the number of datasets, or bad input.
    """
    if config.output_per_file or (config.partitions > 1 and not config.keep_sequential_samples):
        name = "--output-per-file" if config.output_per_file else f"--partitions {config.partitions}"
        other = "--executor datatrove" if slurm.slurm_partition is None else "--slurm-partition"
        raise UserError(f"{name} is not possible with {other}; leave one of them out")
    Encoder(config.json_keys, tokenizer_config, append_eod=config.append_eod)  # to find a bad tokenizer at once
    prefix = Path(config.output_prefix).absolute()
    parts = file_parts(input_files(config.input), config.split_bytes)
    work = UnfinishedJobs(str(prefix), "--output-prefix", "shards")
    depends: dict[str, Any] = {"version": __version__, "parts": list(map(vars, parts)), "keys": config.json_keys}
    depends |= {"inputs": [stamp_of(part.path) for part in parts], "tokenizer": tokenizer_stamp(tokenizer_config)}
    depends |= {"append_eod": config.append_eod, "skip_malformed": config.skip_malformed}
    work.claim(json.dumps(depends, indent=2, default=str) + "\n")
    folder = work.folder.path("data")
    shards = DatasetShardWriter(
        folder,
        config.json_keys,
        tokenizer_config,
        append_eod=config.append_eod,
        skip_malformed=config.skip_malformed,
    )
    publish = FunctionStep(partial(publish_shards, Path(folder), config.json_keys, len(parts), prefix))
    records = RecordReader(parts, columns=config.json_keys)
    jobs = [work.job("shards", [records, shards], len(parts)), work.job("dataset", [publish])]
    number = work.run("preprocess", jobs, config.workers, slurm)
    if number is None:
        for skipped in sorted(Path(folder).glob("*.skipped")):
            logger.warning(skipped.read_text(encoding="utf-8", errors="surrogateescape"))
        work.remove()
    return [dataset_prefix(Path(config.output_prefix), key) for key in config.json_keys], number
