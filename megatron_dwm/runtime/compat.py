"""Differences between the supported versions of megatron-core, 0.16 to 0.19."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from inspect import signature
from typing import Any

from megatron_dwm.errors import UserError

SERIES = ("0.16.", "0.17.", "0.18.", "0.19.")
_REMEDY = "pip install 'megatron-core>=0.16,<0.20'"


def require_megatron_core() -> None:
    """Refuse versions of megatron-core that are not supported.

    Raises:
        UserError: it is missing or of another version.
    """
    try:
        found = version("megatron-core")
    except PackageNotFoundError:
        raise UserError(f"megatron-core is not installed; {_REMEDY}") from None
    if not found.startswith(SERIES):
        raise UserError(f"megatron-core {found} is installed; {_REMEDY}")


def sharded_save_options() -> dict[str, str]:
    """Return the options with which ``dist_checkpointing.save`` uses megatron-core's writer in any version.

    From 0.17 on the default is a separate package from NVIDIA.
    """
    from megatron.core import dist_checkpointing

    name = "async_strategy"
    return {name: "mcore"} if name in signature(dist_checkpointing.save).parameters else {}


@contextlib.contextmanager
def common_state_given(read: Callable[[], dict[str, Any]]) -> Iterator[None]:
    """Make megatron-core get a checkpoint's common state from ``read`` instead of a file, inside the context."""
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import common

    # Up to 0.16 it is read by a strategy, from common.pt; later by a function, from there or from among the tensors.
    strategy = getattr(common, "TorchCommonLoadStrategy", None)
    holder, name = (serialization, "load_common_state_dict") if strategy is None else (strategy, "load_common")
    replaced = getattr(holder, name)
    setattr(holder, name, lambda *_: read())
    try:
        yield
    finally:
        setattr(holder, name, replaced)


def build_core_tokenizer(flags: Mapping[str, Any]) -> Any:
    """Build megatron-core's tokenizer from the tokenizer's flags as Megatron-LM's core_v0.16.1 names them.

    From 0.17 on the builder is in another module, and reads some of the flags under other names.
    """
    if find_spec("megatron.core.tokenizers.utils") is None:
        from megatron.core.tokenizers.text.utils.build_tokenizer import build_tokenizer

        return build_tokenizer(Namespace(**flags))
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer as build_newer_tokenizer

    renamed: dict[str, Any] = {
        "special_tokens": flags["tokenizer_special_tokens"],
        "metadata_path": flags["tokenizer_metadata"],
        "tokenizer_hf_no_use_fast": not flags["tokenizer_hf_use_fast"],
        "tokenizer_hf_no_include_special_tokens": not flags["tokenizer_hf_include_special_tokens"],
        "tokenizer_sentencepiece_ignore_extra_whitespaces": True,
        "chat_template": None,
        "pad_vocab_size": False,  # the model's padding is this program's
    }
    if flags["tokenizer_type"] == "NullTokenizer":  # from 0.17 on the size includes the end-of-document token
        renamed["vocab_size"] = flags["vocab_size"] + 1
    return build_newer_tokenizer(Namespace(**{**flags, **renamed}))


def mlp_submodules(spec: Any) -> Any:
    """Return the submodules in the specification of an MLP, which is a partial call in later versions."""
    return spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules
