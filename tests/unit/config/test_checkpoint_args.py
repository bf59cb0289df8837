"""Whether a run's model is the one of a checkpoint's arguments.

``tests/fixtures/megatron_args.json`` is what Megatron-LM (core_v0.16.1) saved as the arguments of two models.
"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dwm.config import checkpoint_args
from megatron_dwm.config.checkpoint_args import differing_flag
from megatron_dwm.config.flags import declared_flags
from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.run import parse_run
from megatron_dwm.errors import UserError
from tests.paths import FIXTURES

MEGATRON: dict[str, dict[str, Any]] = json.loads((FIXTURES / "megatron_args.json").read_text())
COMMON = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 "
    "--micro-batch-size 1 --train-iters 10 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer --vocab-size 255 "
    "--dwm-mode off "
)
FLAGS = {
    "gpt2": COMMON,
    "llama": COMMON
    + "--ffn-hidden-size 48 --group-query-attention --num-query-groups 2 --position-embedding-type rope "
    "--normalization RMSNorm --norm-epsilon 1e-6 --swiglu --disable-bias-linear --untie-embeddings-and-output-weights ",
}


def arguments(flags: str) -> dict[str, Any]:
    return parse_run(flags.split(), 1).arguments()


@pytest.mark.parametrize("kind", FLAGS)
def test_the_model_of_the_same_flags_is_the_same(kind: str):
    run = arguments(FLAGS[kind])
    assert differing_flag(run, MEGATRON[kind]) is None
    assert differing_flag(run, run) is None


SAME = {
    "no choice of groups": ("gpt2", "--group-query-attention --num-query-groups 4"),
    "a bias that is there anyway": ("gpt2", "--add-qkv-bias"),
    "sizes that follow from others": ("gpt2", "--ffn-hidden-size 128 --kv-channels 8"),
    "an older name": ("llama", "--use-rotary-position-embeddings"),
    "positions that are not stored": ("llama", "--max-position-embeddings 64"),
    "training": ("llama", "--hidden-dropout 0.3 --attention-dropout 0 --seq-length 8 --init-method-std 1"),
}


@pytest.mark.parametrize("case", SAME)
def test_what_does_not_change_the_model_may_change(case: str):
    kind, flags = SAME[case]
    assert differing_flag(arguments(FLAGS[kind] + flags), MEGATRON[kind]) is None


OTHER = {
    "--num-layers 2": "--num-layers 2 is not what the checkpoint was saved with, 4",
    "--ffn-hidden-size 64": "--ffn-hidden-size 64 is not what the checkpoint was saved with, 48",
    "--num-query-groups 1": "--num-query-groups 1 is not what the checkpoint was saved with, 2",
    "--normalization LayerNorm": "--normalization LayerNorm is not what the checkpoint was saved with, RMSNorm",
    "--position-embedding-type none": "--position-embedding-type none is not what the checkpoint was saved with, rope",
    "--qk-layernorm": "--qk-layernorm is given, but was not given when the checkpoint was saved",
    "--dwm-output-norm": "--dwm-output-norm is given, but was not given when the checkpoint was saved",
    "--add-qkv-bias": "--add-qkv-bias is given, but was not given when the checkpoint was saved",
}
OTHER_FUNCTION = {
    "--rotary-base 500": "--rotary-base 500 is not what the checkpoint was saved with, 10000",
    "--rotary-percent 0.5": "--rotary-percent 0.5 is not what the checkpoint was saved with, 1.0",
    "--rotary-interleaved": "--rotary-interleaved is given, but was not given when the checkpoint was saved",
    "--use-rope-scaling": "--use-rope-scaling is given, but was not given when the checkpoint was saved",
    "--norm-epsilon 1e-5": "--norm-epsilon 1e-05 is not what the checkpoint was saved with, 1e-06",
    "--apply-layernorm-1p": "--apply-layernorm-1p is given, but was not given when the checkpoint was saved",
    "--no-position-embedding": "--no-position-embedding is given, but was not given when the checkpoint was saved",
} | {
    f"{flag} {value}": f"{flag} is {value}, but was not given when the checkpoint was saved"
    for flag, value in {
        "--rotary-seq-len-interpolation-factor": "2",
        "--window-size": "8,0",
        "--no-rope-freq": "2",
        "--activation-func-clamp-value": "2.5",
    }.items()
}


@pytest.mark.parametrize("flags", [*OTHER, *OTHER_FUNCTION])
def test_another_model_is_named_by_flag_and_both_values(flags: str):
    run = arguments(FLAGS["llama"] + flags)
    if flags in OTHER:
        remedy = "change it, or --load"
        expected = f"{OTHER[flags]}; {remedy}"
        assert differing_flag(run, MEGATRON["llama"], finetune=True) == expected
    else:
        expected = f"{OTHER_FUNCTION[flags]}; change it, or load with --finetune"
        assert differing_flag(run, MEGATRON["llama"], finetune=True) is None
    assert differing_flag(run, MEGATRON["llama"]) == expected


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--swiglu", "--swiglu is not given, but was given"),
        ("--disable-bias-linear", "--disable-bias-linear is not given, but was given"),
        ("--untie-embeddings-and-output-weights", "--untie-embeddings-and-output-weights is not given, but was given"),
    ],
)
def test_a_flag_that_the_checkpoint_had_is_missed(flag: str, said: str):
    difference = differing_flag(arguments(FLAGS["llama"].replace(flag, "")), MEGATRON["llama"])
    assert difference is not None and difference.startswith(said)


def test_a_value_that_the_checkpoint_had_is_missed():
    saved = MEGATRON["llama"] | {"window_size": (8, 0)}
    difference = differing_flag(arguments(FLAGS["llama"]), saved) or ""
    assert difference.startswith(
        "--window-size is not given, but was 8,0 when the checkpoint was saved; change it, or "
    )
    older = {name: value for name, value in saved.items() if name != "window_size"}  # of a version without the flag
    assert differing_flag(arguments(FLAGS["llama"]), older) is None


def test_learned_positions_are_compared():
    run = arguments(FLAGS["gpt2"].replace("--max-position-embeddings 16", "--max-position-embeddings 64"))
    assert "--max-position-embeddings 64" in (differing_flag(run, MEGATRON["gpt2"]) or "")


@pytest.mark.parametrize("name", ["max_position_embeddings", "make_vocab_size_divisible_by", "tokenizer_type"])
def test_with_a_vocabulary_file_what_megatron_lm_compares_is_compared(name: str):
    run = arguments(FLAGS["llama"])
    other = MEGATRON["llama"] | {name: 64}
    assert differing_flag(run, other) is None
    difference = differing_flag(run | {"vocab_file": "vocab.json"}, other)
    assert difference is not None and difference.startswith("--" + name.replace("_", "-"))


def test_another_activation_is_another_function():
    difference = differing_flag(arguments(FLAGS["gpt2"] + "--squared-relu"), MEGATRON["gpt2"])
    assert difference is not None and difference.startswith("--squared-relu is given")


def test_a_model_of_foreign_parts_is_refused():
    with pytest.raises(UserError, match="--load: the checkpoint was saved with multi_latent_attention=True"):
        differing_flag(arguments(FLAGS["llama"]), MEGATRON["llama"] | {"multi_latent_attention": True})


SAID_OTHERWISE = {"group_query_attention", "use_rotary_position_embeddings", "max_position_embeddings"}
SIZES_OF_DATA = {"seq_length", "padded_vocab_size", "make_vocab_size_divisible_by"}
TRAINING = {
    "hidden_dropout",
    "attention_dropout",
    "init_method_std",
    "init_method_xavier_uniform",
    "embedding_init_method_std",
    "calculate_per_token_loss",
}
HOW_IT_IS_COMPUTED = {
    "apply_query_key_layer_scaling",  # the softmax undoes it
    "attention_softmax_in_fp32",
    "fp32_residual_connection",
    "transformer_impl",
    "attention_backend",
    "use_flash_attn",
    "deprecated_use_mcore_models",
    "distribute_saved_activations",
    "activations_checkpoint_method",
    "checkpoint_activations",
    "no_persist_layer_norm",
    "cross_entropy_fusion_impl",
    "first_last_layers_bf16",
    "num_layers_at_start_in_bf16",
    "num_layers_at_end_in_bf16",
}


def test_arguments_saved_under_an_earlier_name_have_the_present_one(tmp_path: Path):
    """And one is not taken from a checkpoint at all: whether a tokenizer may run code of its own."""
    saved = Namespace(dwm_valid_data_path=["x"], num_layers=2, trust_remote_code=True)
    torch.save({"args": saved}, tmp_path / "common.pt")
    assert checkpoint_args.read_arguments(tmp_path) == {"dwm_target_data_path": ["x"], "num_layers": 2}


def test_a_file_without_arguments_is_refused(tmp_path: Path):
    for content in ({"iteration": 3}, [1], {"args": {"num_layers": 2}}):
        torch.save(content, tmp_path / "common.pt")
        with pytest.raises(UserError, match=r"common\.pt holds no arguments"):
            checkpoint_args.read_arguments(tmp_path)
    (tmp_path / "common.pt").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"common\.pt cannot be read"):
        checkpoint_args.read_arguments(tmp_path)


def test_every_field_of_the_model_is_compared_or_known_not_to_matter():
    compared = {
        *checkpoint_args._SIZES,
        *checkpoint_args._PARTS,
        *checkpoint_args._FUNCTION,
        *checkpoint_args.UNKNOWN_PARTS,
    }
    rest = SAID_OTHERWISE | SIZES_OF_DATA | TRAINING | HOW_IT_IS_COMPUTED
    fields = {item.field for item in declared_flags(ModelConfig)}
    kernels = {name for name in fields if name.endswith("_fusion") or name.startswith(("recompute_", "fp8"))}
    assert fields - compared - kernels == rest


def test_windows_and_layers_may_be_said_in_other_words():
    """Megatron-LM saves what it has made of the flags' values."""
    saved = {**MEGATRON["llama"], "window_size": (7, 0), "window_attn_skip_freq": [1, 0, 1, 0], "no_rope_freq": 2}
    window = " --window-size (7,0) --no-rope-freq 2"
    same = arguments(FLAGS["llama"] + f"{window} --window-attn-skip-freq ([1]+[0])*2")
    assert differing_flag(same, saved) is None
    other = arguments(FLAGS["llama"] + f"{window} --window-attn-skip-freq 2")
    assert differing_flag(other, saved) == (
        "--window-attn-skip-freq 2 is not what the checkpoint was saved with, [1,0,1,0]; change it, or load with "
        "--finetune"
    )
