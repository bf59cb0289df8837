"""The manifest of an exported weighter: what run it is from, and the checksums of the export's files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dwm.checksums import checksum, find_damage, parse_checksums
from megatron_dwm.errors import UserError

MANIFEST = "dwm_manifest.json"


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest of the files that are in ``folder``."""
    files = {path.name: vars(checksum(path)) for path in sorted(folder.iterdir()) if path.is_file()}
    text = json.dumps({**facts, "files": files}, indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a verified export's manifest; an empty one of a folder that has none."""
    path = folder / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def trained_length(folder: Path, hf_config: Any) -> int | None:
    """Return the tokens of the samples that a weighter learned from; None if that is not known.

    Args:
        folder: verified, the weighter's.
        hf_config: its configuration, whose positions count if there is no manifest.
    """
    length = read_manifest(folder).get("language_model", {}).get("seq_length")
    length = length or getattr(hf_config, "max_position_embeddings", None)
    return None if length is None else int(length)


def verify_export(flag: str, folder: Path) -> bool:
    """Hold a folder against its manifest, if it has one: models that others made have none.

    Args:
        flag: the flag that names the folder, for messages.
        folder: the weighter's.

    Returns:
        whether it is an export of ours. Those of earlier versions have no checksums.

    Raises:
        UserError: the manifest is damaged, or a file is not as it was exported.
    """
    path = folder / MANIFEST
    if not path.exists():
        return False
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError("no object")
        checksums = parse_checksums(manifest.get("files", {}))
    except (OSError, RecursionError, ValueError) as error:
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise UserError(f"{flag} {folder}: {MANIFEST} cannot be read ({reason}); export the weighter again") from None
    if damage := find_damage(folder, checksums):
        raise UserError(f"{flag} {folder}: {damage}; export the weighter again, or give another")
    return True
