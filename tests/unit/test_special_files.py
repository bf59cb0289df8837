"""Named pipes, sockets, devices and files without permission are refused, and not waited for."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dwm.analysis.report.content import read_benefit
from megatron_dwm.config.checkpoint_args import read_arguments
from megatron_dwm.config.data import DataConfig
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.data.blend import data_paths
from megatron_dwm.data.tokenizer_folder import load_tokenizer_folder
from megatron_dwm.data.tokenizers import build_tokenizer
from megatron_dwm.errors import UserError
from megatron_dwm.model.hf_folder import read_hugging_face
from megatron_dwm.model.tp_comm_overlap import read_overlap_settings
from megatron_dwm.special_files import find_special_file
from megatron_dwm.training.saved_checkpoint import DamagedCheckpointError, open_checkpoint, verify_torch_checkpoint
from megatron_dwm.weighting.export_manifest import verify_export


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as open_socket:
        open_socket.bind(str(path))


KINDS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "link to a pipe": lambda path: (os.mkfifo(path.parent.parent / "pipe"), path.symlink_to("../pipe")),
    "socket": bind,
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_found(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "folder" / "below").mkdir(parents=True)
    (tmp_path / "folder" / "link").symlink_to("nowhere")
    assert find_special_file(tmp_path / "folder") is None
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    KINDS[kind](Path("folder/entry"))
    found = find_special_file(tmp_path / "folder")
    assert found == "entry is a named pipe, a socket or a device where a file belongs"


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "checkpoint": (".metadata", open_checkpoint),
    "checkpoint of the older format": (
        "mp_rank_00/model_optim_rng.pt",
        lambda path: list(verify_torch_checkpoint(path)),
    ),
    "arguments": ("common.pt", read_arguments),
    "arguments of the older format": ("mp_rank_00/model_optim_rng.pt", read_arguments),
    "export": ("model.safetensors", lambda path: verify_export("--dwm-load", path)),
    "model": ("generation_config.json", read_hugging_face),
    "tokenizer of a model": ("tokenizer.json", load_tokenizer_folder),
    "tokenizer": (
        "tokenizer.json",
        lambda path: build_tokenizer(TokenizerConfig("HuggingFaceTokenizer", tokenizer_model=str(path))),
    ),
    "blend": ("", lambda path: data_paths(DataConfig(data_args_path=str(path)), None)),
    "overlap": ("", lambda path: read_overlap_settings(str(path))),
    "comparison": ("", read_benefit),
}


@pytest.mark.parametrize("reader", READERS)
def test_it_is_refused_wherever_files_of_others_are_read(reader: str, tmp_path: Path):
    name, read = READERS[reader]
    path = tmp_path / "iter_0000004"
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    if name:
        (path / "config.json").write_text("{}")
    os.mkfifo(path / name)
    with pytest.raises((UserError, DamagedCheckpointError), match="a named pipe, a socket or a device where a file"):
        read(path)


@pytest.mark.parametrize("reader", [name for name, (file, _) in READERS.items() if file])
def test_a_file_without_permission_is_not_called_damaged(reader: str, tmp_path: Path):
    name, read = READERS[reader]
    path = tmp_path / "iter_0000004"
    (path / name).parent.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / name).touch(mode=0o200)

    def work() -> None:
        # Without root's capabilities (version 3 of the call, this process, none) permissions count for root too.
        assert ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), bytes(24)) == 0
        with pytest.raises(UserError) as raised:
            read(path)
        line = f"{Path(name).name} may not be read (Permission denied); give this user the permission"
        os._exit(0 if str(raised.value).endswith(line) and "damaged" not in str(raised.value) else 1)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == 0
