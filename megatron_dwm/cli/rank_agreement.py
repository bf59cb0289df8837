"""Checks before training that flags, versions and files are the same on every rank.

Ranks that differ in a flag, in the version of a package or in the content of a file would hang in a collective, or,
worse, train on inconsistent numbers.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_dwm.checksums import checksum
from megatron_dwm.config.flags import declared_flags, flag_name
from megatron_dwm.config.run import PARTS, RunConfig
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.data.blend import DataPaths
from megatron_dwm.data.index_cache import data_stamp
from megatron_dwm.data.tokenizer_folder import local_folder
from megatron_dwm.training.checkpoint_folders import latest_checkpoint

PACKAGES = ("torch", "megatron-core", "transformers", "numpy", "transformer-engine", "megatron-dwm")

Facts = dict[str, str]
"""Facts by their names in error messages."""


def rank_facts(config: RunConfig, paths: DataPaths, weighter_digest: str | None) -> Facts:
    """Return the facts that must be the same on every rank: flags, versions, data, checkpoint and weighter.

    Data that this rank cannot read is left out, because only one rank of a model replica reads data.

    Args:
        weighter_digest: digest of the weighters that were read from folders, if any.
    """
    flags = [item for part in PARTS.values() for item in declared_flags(part)]
    declared, facts = {item.field: item for item in flags}, {}
    for field, value in config.flat().items():
        item = declared.get(field)
        if item is not None and item.value_type is None:  # a switch, which may turn something off
            facts[item.names[0]] = "given" if value != item.default else "not given"
        else:
            facts[item.names[0] if item is not None else flag_name(field)] = repr(value)
    facts["Python"] = ".".join(platform.python_version_tuple()[:2])
    for package in PACKAGES:
        try:
            facts[f"package {package}"] = version(package)
        except PackageNotFoundError:
            facts[f"package {package}"] = "not installed"
    for flag, (prefixes, weights) in paths.blends().items():
        facts[f"blend of {flag}"] = repr((prefixes, weights))  # a file may name them, and may differ between nodes
        if all(Path(f"{prefix}{suffix}").is_file() for prefix in prefixes for suffix in (".bin", ".idx")):
            facts[f"data of {flag}"] = data_stamp(prefixes)
    for name, path in tokenizer_files(config.tokenizer):
        facts[f"{name} in {path.name}"] = checksum(path).sha256
    facts["checkpoint of --load"] = str(latest_checkpoint(config.checkpoint))
    if weighter_digest is not None:
        facts["weighter of --dwm-load or --dwm-init-from"] = weighter_digest
    return facts


def tokenizer_files(config: TokenizerConfig) -> Iterator[tuple[str, Path]]:
    """Yield the files of a tokenizer, each with the flag that names it or its folder."""
    for name in ("tokenizer_model", "tokenizer_metadata", "vocab_file", "merge_file"):
        value = getattr(config, name)
        if value is None:
            continue
        path = local_folder(value)
        if path.is_file():
            yield flag_name(name), path
        elif path.is_dir():  # may also be the folder of a model, whose weights do not matter
            for file in sorted(path.iterdir()):
                if file.is_file() and (file.suffix == ".model" or re.search("token|vocab|merges", file.name)):
                    yield flag_name(name), file
