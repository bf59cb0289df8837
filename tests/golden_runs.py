"""Record the numbers of nine small runs, and compare two recordings bit for bit.

To check a change that must not change any number, record with the old code, record with the new code, and compare.

    python tests/golden_runs.py record /path/to/old/checkout golden/before
    python tests/golden_runs.py record . golden/after
    python tests/golden_runs.py compare golden/before golden/after

The runs are plain, frozen and bilevel training on one process, on TP2 x PP2, and on DP2 with the distributed optimizer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

MODEL = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights --init-method-std 0.1"
)
TRAINING = (
    "--micro-batch-size 2 --global-batch-size 8 --train-iters 24 --lr 1e-2 --lr-decay-style cosine --lr-warmup-iters 4 "
    "--log-interval 4 --eval-iters 2 --eval-interval 8 --save-interval 12 --num-workers 0 --hidden-dropout 0.1 "
    "--attention-dropout 0.1 --tokenizer-type NullTokenizer --vocab-size 100 --eod-mask-loss"
)
LAYOUTS = {
    "one": (1, ""),
    "tp2pp2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "dp2": (2, "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"),
}
MODES = {
    "off": "--dwm-mode off",
    "bilevel": (
        "--dwm-warmup-iters 4 --dwm-num-stages 2 --dwm-update-interval 2 --dwm-init-from lm --dwm-num-layers 1 "
        "--dwm-weighter-steps 2 --dwm-target-batch-size 8"  # the default was once the batch size
    ),
    "frozen": "--dwm-mode frozen --dwm-load {weighter}",
}
IGNORED_ARGUMENTS = {
    *("save", "load", "dwm_load", "data_cache_path", "train_data_path", "valid_data_path"),
    *("dwm_valid_data_path", "dwm_target_data_path"),  # the older and the newer name of one
}
"""Paths of the recording itself."""


def make_data(checkout: Path, folder: Path) -> None:
    """Write the datasets with the checkout's own ``tools/preprocess_data.py``."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(5)
    for name, step in (("first", 1), ("second", 3), ("target", 1), ("valid", 1)):
        starts = [generator.randrange(100) for _ in range(60)]
        documents = [[(start + step * i) % 100 for i in range(20 + n)] for n, start in enumerate(starts)]
        text = "".join(json.dumps({"text": " ".join(map(str, ids))}) + "\n" for ids in documents)
        (folder / f"{name}.jsonl").write_text(text)
        command = [sys.executable, str(checkout / "tools/preprocess_data.py"), "--input", f"{folder}/{name}.jsonl"]
        command += f"--output-prefix {folder}/{name} --tokenizer-type NullTokenizer --vocab-size 100".split()
        subprocess.run([*command, "--append-eod"], check=True, env=_environment(checkout), stdout=subprocess.DEVNULL)


def record(checkout: Path, output: Path) -> None:
    """Make the runs with the code of ``checkout``."""
    shutil.rmtree(output, ignore_errors=True)
    data = output / "data"
    make_data(checkout, data)
    for layout, (processes, parallel) in LAYOUTS.items():
        for mode, weighting in MODES.items():
            save = output / layout / mode
            weighting = weighting.format(weighter=output / layout / "bilevel" / "weighter" / "iter_0000024")
            paths = (
                f"--train-data-path 0.6 {data}/first_text_document 0.4 {data}/second_text_document "
                f"--valid-data-path {data}/valid_text_document --data-cache-path {output}/cache --save {save}"
            )
            if mode == "bilevel":
                # Earlier versions know only the flag's earlier name.
                paths += f" --dwm-valid-data-path {data}/target_text_document"
            flags = f"{MODEL} {TRAINING} {parallel} {weighting} {paths}"
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            command = [*torchrun, str(checkout / "pretrain_dwm.py"), *flags.split()]
            print(f"{layout}, {mode} ...", flush=True)
            finished = subprocess.run(command, env=_environment(checkout), capture_output=True, text=True)
            (output / layout / f"{mode}.log").write_text(finished.stdout + finished.stderr)
            if finished.returncode:
                raise SystemExit(f"failed; see {output / layout / mode}.log")


def compare(before: Path, after: Path) -> list[str]:
    """Return a line for each number that differs between two recordings."""
    differences: list[str] = []
    for layout in LAYOUTS:
        for mode in MODES:
            one, other = (folder / layout / mode for folder in (before, after))
            differences += _unequal(f"{layout}/{mode} metrics", _metrics(one), _metrics(other))
            for iteration in ("iter_0000012", "iter_0000024"):
                name = f"{layout}/{mode}/{iteration}"
                differences += _unequal(
                    name, _checkpoint(one / iteration, before), _checkpoint(other / iteration, after)
                )
            for export in sorted((one / "weighter").glob("*")):
                name = f"{layout}/{mode}/weighter/{export.name}"
                differences += _unequal(name, _export(export, before), _export(other / "weighter" / export.name, after))
    return differences


def _metrics(folder: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {str(number): {k: v for k, v in line.items() if k != "seconds"} for number, line in enumerate(lines)}


def _checkpoint(folder: Path, recording: Path) -> dict[str, Any]:
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    state: dict[str, Any] = dict(_load_state_dict_from_keys(None, storage_reader=FileSystemReader(folder)))
    common = dist_checkpointing.load_common_state_dict(str(folder))
    arguments = vars(common.pop("args"))
    state |= {f"args.{name}": value for name, value in arguments.items() if name not in IGNORED_ARGUMENTS}
    weighter = folder / "dwm_state.pt"
    if weighter.is_file():
        state["dwm_state"] = torch.load(weighter, weights_only=True)
        if config := state["dwm_state"]["weighter_config"]:  # may name the folder that the weighter is from
            state["dwm_state"]["weighter_config"] = config.replace(str(recording), "")
    return state | common


def _export(folder: Path, recording: Path) -> dict[str, Any]:
    contents = {path.name: path.read_bytes().replace(bytes(recording), b"") for path in folder.iterdir()}
    manifest = json.loads(contents.pop("dwm_manifest.json"))
    manifest.pop("manifest_sha256")  # of paths of the recording too
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()} | manifest


def _unequal(name: str, one: Any, other: Any) -> list[str]:
    """Return the paths at which two nested values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        lines = [f"{name}: {key} only {'before' if key in one else 'after'}" for key in one.keys() ^ other.keys()]
        for key in one.keys() & other.keys():
            lines += _unequal(f"{name}: {key}", one[key], other[key])
        return lines
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [line for n, pair in enumerate(zip(one, other, strict=True)) for line in _unequal(f"{name}[{n}]", *pair)]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and _bits(one) == _bits(other)
        return [] if same else [f"{name}: another tensor"]
    if hasattr(one, "tobytes") and hasattr(other, "tobytes"):
        return [] if one.tobytes() == other.tobytes() else [f"{name}: another array"]
    if hasattr(one, "getvalue") and hasattr(other, "getvalue"):
        return [] if one.getvalue() == other.getvalue() else [f"{name}: other bytes"]
    return [] if one == other or repr(one) == repr(other) else [f"{name}: {one!r:.80} became {other!r:.80}"]


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _environment(checkout: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    recording = commands.add_parser("record", help="make the runs with a checkout's code")
    recording.add_argument("checkout", type=Path)
    recording.add_argument("output", type=Path)
    comparing = commands.add_parser("compare", help="list what differs; exit code 1 if anything does")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    options = parser.parse_args()
    if options.command == "record":
        record(options.checkout.resolve(), options.output.resolve())
        return
    differences = compare(options.before.resolve(), options.after.resolve())
    print("\n".join(differences) or "every number is the same")
    raise SystemExit(bool(differences))


if __name__ == "__main__":
    main()
