"""Reading of a Hugging Face causal language model's folder, which is refused if config.json and weights disagree.

config.json declares what the weight files must hold. transformers tolerates differences (it initializes what
is missing, ignores what is left over, unties a head that exists), which gives a different model. Here they are errors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.errors import UserError, shortened
from megatron_dwm.model.hf_config import architecture, hf_config, model_config
from megatron_dwm.model.quiet_loading import quiet_loading
from megatron_dwm.special_files import require_plain_files

_HEAD = "lm_head.weight"
_EMBEDDINGS = "embed_tokens.weight", "wte.weight"
_FREQUENCIES = "rotary_emb.inv_freq"
_ROUNDED = 1e-2  # 16-bit files hold frequencies with at least 8 bits of precision


class FolderTensors(Mapping[str, torch.Tensor]):
    """The tensors of a folder's weight files by name; each is read on access, into separate memory."""

    def __init__(self, places: Mapping[str, Path]) -> None:
        """
        Args:
            places: the file of each tensor.
        """
        self.places = dict(places)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._read(name).clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def dtype(self, name: str) -> torch.dtype:
        """Return the precision of a tensor in its file."""
        return self._read(name).dtype

    def dtypes(self, names: Iterable[str]) -> Iterator[tuple[str, torch.dtype]]:
        """Yield the precision of tensors in their files; each file of pickled tensors is opened once."""
        names = list(names)
        paths = {self.places[name] for name in names}
        pickled = {path: _pickled(path) for path in paths if path.suffix != ".safetensors"}
        for name in names:
            path = self.places[name]
            yield name, (pickled[path][name] if path in pickled else self._read(name)).dtype

    def main_dtype(self) -> torch.dtype:
        """Return the floating-point precision that most of the bytes have."""
        sizes = {torch.float32: 0}
        for name in self:
            tensor = self._read(name)
            if tensor.is_floating_point():
                sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    def _read(self, name: str) -> torch.Tensor:
        """Return a memory-mapped tensor, of which only the parts that are used are read."""
        path = self.places[name]
        if path.suffix != ".safetensors":
            return _pickled(path)[name]
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor


class BaseModelTensors(Mapping[str, torch.Tensor]):
    """The tensors of a causal language model by the names of :mod:`megatron_dwm.model.hf_weights`.

    They are read on access, in one precision, which holds all of them exactly. Biases that megatron-core
    has and the model does not have are zeros.
    """

    def __init__(
        self,
        files: FolderTensors,
        names: Mapping[str, str],
        zeros: Mapping[str, torch.Size],
        dtype: torch.dtype,
        rows: Mapping[str, slice],
    ) -> None:
        """
        Args:
            names: a tensor's name in the files, by its name here.
            zeros: shapes of the biases that the model does not have.
            rows: the rows of the tensor in the files that a tensor consists of, by its name here; default: all.
        """
        self.files, self.names, self.zeros, self.dtype, self.rows = files, dict(names), dict(zeros), dtype, dict(rows)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self.zeros:
            return torch.zeros(self.zeros[name], dtype=self.dtype)
        return self.files[self.names[name]][self.rows.get(name, slice(None))].to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        yield from self.names
        yield from self.zeros

    def __len__(self) -> int:
        return len(self.names) + len(self.zeros)


@dataclass(frozen=True)
class HuggingFaceModel:
    """A causal language model in a folder."""

    model: ModelConfig
    vocab_size: int
    state: BaseModelTensors


def read_hugging_face(folder: Path, flag: str = "--input") -> HuggingFaceModel:
    """Read a model that was saved by ``save_pretrained``; its weights are read on access.

    Args:
        flag: the flag that names the folder, for messages.

    Raises:
        UserError: it cannot be read, is not a supported model, or its config.json does not match its
            weights.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{flag} {folder}: no config.json there; give the folder of a Hugging Face model")
    require_plain_files(folder, f"{flag} {folder}", "save the model again")
    try:
        return _read(folder)
    except UserError as error:
        raise UserError(f"{flag} {folder}: {error}") from error
    except Exception as error:  # transformers, safetensors and pickle raise many kinds of errors
        raise UserError(f"{flag} {folder}: cannot be loaded ({shortened(error)}); save the model again") from error


def _read(folder: Path) -> HuggingFaceModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    declared = json.loads((folder / "config.json").read_text())
    files = weight_files(folder)
    _check_layers(declared, len(files))
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            "its adapter (adapter_config.json) is not merged into its weights; merge it and save the model again"
        )
    if getattr(config, "quantization_config", None):
        raise UserError("config.json has a quantization_config; give a model that is not quantized")
    model = model_config(config)
    with quiet_loading():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=files.main_dtype(),  # so that tensors stay mapped into memory, and are not read
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused below
            local_files_only=True,
            trust_remote_code=False,
        )
    language_model, report = loaded
    _refuse_differences(report)
    _check_head(config, files)
    _check_rope(declared, config, language_model, files)
    prefix = language_model.base_model_prefix
    names = {
        name: f"{prefix}.{name}" if f"{prefix}.{name}" in files else name
        for name in language_model.base_model.state_dict()
    }
    if model.untie_embeddings_and_output_weights:
        names[_HEAD] = _HEAD
    check_dtypes(files, names.values())
    rows: dict[str, slice] = {}
    if config.model_type == "phi3" and architecture(model) != "phi3":
        names, rows = _split_fused(names, model)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(
            hf_config(model, vocab_size=config.vocab_size, num_layers=model.num_layers)
        )
    zeros = {name: tensor.shape for name, tensor in whole.base_model.state_dict().items() if name not in names}
    if missing := [name for name in zeros if not name.endswith(".bias")]:  # a missing bias is 0, as in hf_config
        raise UserError(f"its weights lack {missing[0]}, which the model needs; save the model again")
    state = BaseModelTensors(files, names, zeros, _precision(files), rows)
    return HuggingFaceModel(model, int(config.vocab_size), state)


def _split_fused(names: Mapping[str, str], model: ModelConfig) -> tuple[dict[str, str], dict[str, slice]]:
    """Map the names of a Phi-3 to those of a Llama, which has separate matrices, and to the rows of each.

    A Phi-3 that rotates whole heads is equivalent to a Llama.
    """
    queries, keys, ffn = model.num_attention_heads * model.head_size, model.query_groups * model.head_size, model.ffn
    parts = {
        "qkv_proj": {
            "q_proj": slice(queries),
            "k_proj": slice(queries, queries + keys),
            "v_proj": slice(queries + keys, queries + 2 * keys),
        },
        "gate_up_proj": {"gate_proj": slice(ffn), "up_proj": slice(ffn, 2 * ffn)},
    }
    split_names: dict[str, str] = {}
    rows: dict[str, slice] = {}
    for name, in_files in names.items():
        whole = next((whole for whole in parts if f".{whole}." in name), None)
        for part, its_rows in parts[whole].items() if whole else ():
            split_name = name.replace(str(whole), part)
            split_names[split_name], rows[split_name] = in_files, its_rows
        if whole is None:
            split_names[name] = in_files
    return split_names, rows


def weight_files(folder: Path) -> FolderTensors:
    """Return the tensors in a folder's weight files, not yet read.

    The files are those that transformers takes: safetensors before pickles of tensors.

    Raises:
        UserError: there are none.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return FolderTensors(dict.fromkeys(_names(folder / name), folder / name))
        index = folder / f"{name}.index.json"
        if index.is_file():
            parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return FolderTensors({tensor: folder / part for part in parts for tensor in _names(folder / part)})
    raise UserError("no model.safetensors and no pytorch_model.bin there; give a folder with weights")


def _names(path: Path) -> list[str]:
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        path.open("rb").close()  # safetensors reports a file without read permission as missing
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    return list(_pickled(path))


def _pickled(path: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return tensors


def _precision(files: FolderTensors) -> torch.dtype:
    """Return a precision that holds all parameters exactly, whatever config.json declares."""
    dtypes = {files.dtype(name) for name in files if not name.endswith(_FREQUENCIES)}
    precision: torch.dtype | None = None
    for dtype in sorted((dtype for dtype in dtypes if dtype.is_floating_point), key=str):
        precision = dtype if precision is None else torch.promote_types(precision, dtype)
    if precision is None:
        raise UserError("its weights are not floating-point numbers; give a model that is not quantized")
    return precision


def _check_layers(declared: Mapping[str, Any], tensors: int) -> None:
    """Refuse more layers than there are tensors, which would be built before the mismatch is found."""
    for name in ("num_hidden_layers", "n_layer"):
        layers = declared.get(name)
        if isinstance(layers, int) and layers > tensors:
            raise UserError(f"config.json has {name} {layers} and the weights {tensors} tensors; correct it")


def check_dtypes(files: FolderTensors, names: Iterable[str]) -> None:
    """Refuse integer and 8-bit parameters: they mean nothing without their scales, other tensors that are not read.

    Raises:
        UserError: a tensor is of such a type.
    """
    for name, dtype in files.dtypes(names):
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise UserError(f"{name} has type {dtype}; give a model that is not quantized")


def _refuse_differences(report: dict[str, Any]) -> None:
    if report["mismatched_keys"]:
        name, found, declared = sorted(report["mismatched_keys"])[0]
        raise UserError(
            f"config.json declares {name} of shape {list(declared)} and the weights have {list(found)}; "
            f"correct {_properties(name)} in it"
        )
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"its weights lack {missing[0]}; give a whole model, or correct config.json")
    if left_over := sorted(report["unexpected_keys"]):
        raise UserError(
            f"its weights hold {left_over[0]}, which the model of config.json does not have; correct "
            f"{_properties(left_over[0])} in it"
        )


def _properties(name: str) -> str:
    """Return the properties of config.json that determine whether a tensor exists, and its shape."""
    if name.endswith((*_EMBEDDINGS, _HEAD)):
        return "vocab_size or hidden_size"
    if name.endswith(".bias"):
        return "the biases (attention_bias, mlp_bias) or num_hidden_layers"
    if any(part in name for part in ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "c_attn")):
        return "the heads (num_attention_heads, num_key_value_heads, head_dim) or the layers"
    return "the sizes or num_hidden_layers"


def _check_head(config: Any, tensors: FolderTensors) -> None:
    """Refuse a separate output head in a model that declares tied embeddings."""
    if not config.tie_word_embeddings or _HEAD not in tensors:
        return
    embeddings = [name for name in tensors if name.endswith(_EMBEDDINGS)]
    if embeddings and not torch.equal(tensors[_HEAD], tensors[embeddings[0]]):
        raise UserError(
            f"config.json has tie_word_embeddings true, but the weights have a separate {_HEAD}; set it to false, or "
            "remove the tensor if the head is the embedding"
        )


def _check_rope(raw: Mapping[str, Any], config: Any, language_model: Any, tensors: FolderTensors) -> None:
    """Refuse rotary frequencies in the files (saved by older versions) that differ from config.json."""
    declared = getattr(config, "rope_parameters", None) or {}
    if raw.get("rope_theta", declared.get("rope_theta")) != declared.get("rope_theta"):
        raise UserError(
            f"config.json has rope_theta {raw['rope_theta']} and {declared['rope_theta']} in rope_parameters; "
            "leave one out"
        )
    rotary = getattr(language_model.base_model, "rotary_emb", None)
    for name in tensors:
        if name.endswith(_FREQUENCIES) and rotary is not None:
            found = tensors[name]
            expected = type(rotary)(config).original_inv_freq.float()
            if found.shape != expected.shape or not torch.allclose(found.float(), expected, rtol=_ROUNDED):
                raise UserError(
                    f"the frequencies in {name} are not those of rope_parameters {declared}; correct these in "
                    "config.json"
                )
