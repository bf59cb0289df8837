"""Code planted in a checkpoint, or in the tokenizer that it names, is not run by the tools."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from megatron_dwm.cli import export_hf, import_hf
from megatron_dwm.config.checkpoint_args import read_arguments
from megatron_dwm.errors import EXIT_CODE
from megatron_dwm.training.checkpoint_checksums import CHECKSUMS

TOKENIZER = """
import os
from transformers import PreTrainedTokenizer

open(os.environ["PLANTED_MARKER"], "w").close()

class Planted(PreTrainedTokenizer):
    def __init__(self, **kwargs):
        super().__init__(eos_token="e", **kwargs)
    vocab_size = 2
    def get_vocab(self): return {"e": 0, "a": 1}
    def _tokenize(self, text): return list(text)
    def _convert_token_to_id(self, token): return self.get_vocab().get(token, 1)
    def _convert_id_to_token(self, index): return "ea"[index]
    def save_vocabulary(self, folder, filename_prefix=None): return ()
"""


class Planted:
    """A pickle of it makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What planted code makes if it runs."""
    monkeypatch.setenv("PLANTED_MARKER", str(tmp_path / "marker"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "marker"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder of checkpoints, made of a small model."""
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9, n_positions=8)).save_pretrained(
        tmp_path / "hf"
    )
    import_hf.main(["--input", str(tmp_path / "hf"), "--save", str(tmp_path / "save")])
    return tmp_path / "save"


def export(checkpoint: Path, *flags: str) -> int:
    """Export the checkpoint and return the exit code."""
    try:
        export_hf.main(["--load", str(checkpoint), "--output", str(checkpoint.parent / "out"), *flags])
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    return 0


def test_a_checkpoint_cannot_allow_its_tokenizer_to_run_code(
    checkpoint: Path, marker: Path, capsys: pytest.CaptureFixture[str]
):
    planted = checkpoint.parent / "planted"
    planted.mkdir()
    (planted / "planted.py").write_text(TOKENIZER)
    described = {"tokenizer_class": "Planted", "auto_map": {"AutoTokenizer": ["planted.Planted", None]}}
    (planted / "tokenizer_config.json").write_text(json.dumps(described))
    folder = checkpoint / "iter_0000001"
    common = torch.load(folder / "common.pt", weights_only=False)
    common["args"].tokenizer_model = str(planted)
    common["args"].trust_remote_code = True
    torch.save(common, folder / "common.pt")
    (folder / CHECKSUMS).unlink()

    assert "trust_remote_code" not in read_arguments(folder)
    capsys.readouterr()
    assert export(checkpoint) == EXIT_CODE and not marker.exists()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "HuggingFaceTokenizer cannot be built" in error and str(planted) in error
    export(checkpoint, "--trust-remote-code")
    assert marker.exists()  # the user can


def test_a_pickle_in_the_checkpoints_description_is_not_run(
    checkpoint: Path, marker: Path, capsys: pytest.CaptureFixture[str]
):
    folder = checkpoint / "iter_0000001"
    (folder / ".metadata").write_bytes(pickle.dumps(Planted(marker)))
    (folder / CHECKSUMS).unlink()
    capsys.readouterr()
    flags = ("--tokenizer-type", "NullTokenizer", "--vocab-size", "8")
    assert export(checkpoint, *flags) == EXIT_CODE and not marker.exists()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ".metadata" in error and "mkdir" in error


def test_a_flipped_bit_is_found_by_its_checksum(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    (file, *_) = sorted((checkpoint / "iter_0000001").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    assert export(checkpoint, "--tokenizer-type", "NullTokenizer", "--vocab-size", "8") == EXIT_CODE
    assert file.name in capsys.readouterr().err and not (checkpoint.parent / "out").exists()
