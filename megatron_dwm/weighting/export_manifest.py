"""The manifest of an exported weighter: the run that it comes from, and the checksums of the export's files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dwm.checksums import checksum, find_damage, parse_checksums
from megatron_dwm.errors import UserError, shortened
from megatron_dwm.special_files import require_plain_files

MANIFEST = "dwm_manifest.json"
_DIGEST_OF_MANIFEST = "manifest_sha256"
"""The key of a digest of the rest of the manifest."""


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest for the files in ``folder``."""
    files = {path.name: vars(checksum(path)) for path in sorted(folder.iterdir()) if path.is_file()}
    content = {**facts, "files": files}
    text = json.dumps(content | {_DIGEST_OF_MANIFEST: _digest(content)}, indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return an export's manifest; empty for a folder without one.

    Raises:
        ValueError: it is not a manifest, or was changed. Manifests of earlier versions have no digest.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except OSError as error:
        raise ValueError(error.strerror) from None
    if not isinstance(manifest, dict):
        raise ValueError("not a JSON object")
    written = manifest.pop(_DIGEST_OF_MANIFEST, None)
    if written is not None and written != _digest(manifest):
        raise ValueError("changed since it was written")
    model = manifest.get("language_model", {})
    length = model.get("seq_length") if isinstance(model, dict) else 0
    if length is not None and not (isinstance(length, int) and length > 0):
        raise ValueError(f"language_model is {shortened(model, 40)}")
    return manifest


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def trained_length(folder: Path, hf_config: Any) -> int | None:
    """Return the length in tokens of the samples that a weighter was trained on; None if unknown.

    Args:
        folder: the weighter's folder, already verified.
        hf_config: its configuration, whose number of positions is used if there is no manifest.
    """
    length = read_manifest(folder).get("language_model", {}).get("seq_length")
    length = length or getattr(hf_config, "max_position_embeddings", None)
    return None if length is None else int(length)


def verify_export(flag: str, folder: Path) -> bool:
    """Verify a folder against its manifest, if it has one; other models have none.

    Args:
        flag: the flag that names the folder, for messages.
        folder: the weighter's folder.

    Returns:
        whether it is an export of this program. Exports of earlier versions have no checksums.

    Raises:
        UserError: the manifest is damaged, or a file is not a plain file, or not as it was exported.
    """
    require_plain_files(folder, f"{flag} {folder}", "export the weighter again, or give another")
    if not (folder / MANIFEST).exists():
        return False
    try:
        checksums = parse_checksums(read_manifest(folder).get("files", {}))
    except ValueError as error:
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise UserError(f"{flag} {folder}: {MANIFEST} cannot be read ({reason}); export the weighter again") from None
    if damage := find_damage(folder, checksums):
        raise UserError(f"{flag} {folder}: {damage}; export the weighter again, or give another")
    return True
