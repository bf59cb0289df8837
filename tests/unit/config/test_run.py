"""The configuration of a run: what scripts for Megatron-LM ask for, and which values contradict each other."""

from __future__ import annotations

import dataclasses
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_dwm.config.checkpoint import CheckpointConfig
from megatron_dwm.config.optimizer import LrBounds
from megatron_dwm.config.run import PARTS, RunConfig, parse_run
from megatron_dwm.errors import UserError

MODEL = "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32"
DATA = "--mock-data --tokenizer-type NullTokenizer --vocab-size 100"
TRAINING = "--micro-batch-size 2 --lr 1e-3"
RUN = f"{MODEL} {DATA} {TRAINING} --train-iters 20"
BY_SAMPLES = f"{MODEL} {DATA} {TRAINING} --train-samples 64"


def parse(flags: str, world_size: int = 1) -> RunConfig:
    return parse_run(flags.split(), world_size)


def test_a_script_for_a_gpt_is_accepted(tmp_path: Path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).touch()
    config = parse(
        "--num-layers 32 --hidden-size 1024 --num-attention-heads 16 --seq-length 512 --max-position-embeddings 512 "
        "--attention-backend auto --micro-batch-size 1 --global-batch-size 64 --train-iters 9000 --weight-decay 0.1 "
        "--adam-beta1 0.9 --adam-beta2 0.95 --init-method-std 0.006 --clip-grad 1.0 --fp16 --lr 6.0e-5 "
        "--lr-decay-style cosine --min-lr 6.0e-6 --lr-warmup-fraction .001 --lr-decay-iters 8000 "
        "--tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 "
        f"--data-path data_text_document --vocab-file {tmp_path}/vocab.json --merge-file {tmp_path}/merges.txt "
        f"--split 949,50,1 --log-interval 100 --save-interval 10000 --eval-interval 1000 --save {tmp_path} "
        f"--load {tmp_path} --eval-iters 10 --tensorboard-dir {tmp_path} --dwm-mode off",
        world_size=256,
    )
    assert (config.sizes.data_parallel_size, config.sizes.num_microbatches) == (2, 32)
    assert config.tokenizer.tokenizer_type == "GPT2BPETokenizer"


def test_a_script_for_a_llama_is_accepted(caplog: pytest.LogCaptureFixture):
    config = parse(
        "--use-mcore-models --num-layers 32 --hidden-size 512 --ffn-hidden-size 1792 --num-attention-heads 32 "
        "--group-query-attention --num-query-groups 8 --kv-channels 128 --seq-length 8192 "
        "--max-position-embeddings 8192 --position-embedding-type rope --rotary-base 1000000 --rotary-percent 1.0 "
        "--attention-dropout 0.0 --hidden-dropout 0.0 --swiglu --init-method-std 0.0134 --attention-backend fused "
        "--apply-layernorm-1p --untie-embeddings-and-output-weights --disable-bias-linear --micro-batch-size 1 "
        "--global-batch-size 128 --train-samples 1953125 --lr-decay-samples 1949218 --lr-warmup-samples 3906 "
        "--lr 0.00015 --min-lr 0.00001 --decoupled-lr 5.0e-4 --decoupled-min-lr 4.5e-5 --lr-decay-style cosine "
        "--clip-grad 1.0 --weight-decay 0.1 --bf16 --grad-reduce-in-bf16 --cross-entropy-loss-fusion "
        "--calculate-per-token-loss --manual-gc --exit-duration-in-mins 235 --fp8-format hybrid "
        "--fp8-amax-history-len 1024 --fp8-amax-compute-algo max --tensor-model-parallel-size 1 "
        "--context-parallel-size 1 --sequence-parallel --use-distributed-optimizer --overlap-grad-reduce "
        "--overlap-param-gather --mock-data --tokenizer-type NullTokenizer --vocab-size 128256 --tiktoken-pattern v2 "
        "--split 99,1,0 --no-create-attention-mask-in-dataloader --no-mmap-bin-files --num-workers 1 "
        "--log-interval 1 --eval-iters 32 --eval-interval 100 --log-throughput --ckpt-format torch_dist "
        "--distributed-timeout-minutes 60 --dwm-mode off",
        world_size=8,
    )
    assert config.sizes.num_microbatches == 16
    assert config.model.fp8 == "hybrid" and not config.optimizer.has_fp32_grads
    assert caplog.messages == ["--use-mcore-models is deprecated; leave it out"]


SAVED = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "group_query_attention": False,
    "num_query_groups": 4,  # Megatron-LM sets it
    "seq_length": 16,
    "max_position_embeddings": 16,
    "position_embedding_type": "rope",
    "add_position_embedding": True,
    "rotary_base": 500,
    "swiglu": True,
    "layernorm_epsilon": 1e-6,
    "hidden_dropout": 0.0,
    "tokenizer_type": "NullTokenizer",
    "padded_vocab_size": 128,
    "lr": 5.0,
}


def test_the_model_of_a_checkpoint_is_taken_and_what_is_given_of_the_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    flags = "--use-checkpoint-args --num-layers 8 --vocab-size 100 --mock-data --hidden-dropout 0.5 --train-iters 20"

    def read_saved(checkpoint: CheckpointConfig) -> dict[str, Any]:
        assert checkpoint.load == str(tmp_path)
        return SAVED

    argv = f"{flags} {TRAINING} --load {tmp_path}".split()
    model = parse_run(argv, 1, read_saved=read_saved).model
    assert (model.num_layers, model.hidden_size, model.seq_length, model.padded_vocab_size) == (8, 64, 16, 128)
    assert (model.positions, model.rotary_base, model.swiglu, model.hidden_dropout) == ("rope", 500, True, 0.0)
    assert (model.query_groups, model.layernorm_epsilon) == (4, 1e-6)
    assert parse_run(argv, 1, read_saved=read_saved).optimizer.lr == 1e-3
    assert caplog.messages == []
    with pytest.raises(UserError, match="multi_latent_attention=True"):
        parse_run(argv, 1, read_saved=lambda _: SAVED | {"multi_latent_attention": True})
    with pytest.raises(UserError, match="--use-checkpoint-args is not supported"):
        parse_run(argv, 1)


def test_flags_of_older_scripts_mean_what_they_meant():
    config = parse(f"{RUN} --use-rotary-position-embeddings --no-position-embedding --use-flash-attn")
    assert config.model.positions == "rope"


@pytest.mark.parametrize(
    ("flags", "in_fp32"),
    [
        ("", False),
        ("--accumulate-allreduce-grads-in-fp32", True),
        ("--bf16", True),
        ("--bf16 --grad-reduce-in-bf16", False),
        ("--bf16 --grad-reduce-in-bf16 --accumulate-allreduce-grads-in-fp32", False),
        ("--fp16", False),
    ],
)
def test_gradients_have_megatrons_precision(flags: str, in_fp32: bool):
    assert parse(f"{RUN} {flags}").optimizer.has_fp32_grads is in_fp32


@pytest.mark.parametrize(
    ("flags", "checks"),
    [
        ("", True),
        ("--bf16", True),
        ("--fp16", False),
        ("--fp16 --loss-scale 1024", True),
        ("--no-check-for-nan-in-loss-and-grad", False),
    ],
)
def test_a_nan_ends_a_run_unless_the_loss_scale_is_dynamic(flags: str, checks: bool):
    config = parse(f"{RUN} {flags}")
    assert config.training.should_check_for_nan(config.optimizer) is checks


@pytest.mark.parametrize(("flags", "dtype"), [("", "float32"), ("--bf16", "bfloat16"), ("--fp16", "float16")])
def test_parameters_have_the_precision_of_the_flags(flags: str, dtype: str):
    assert str(parse(f"{RUN} {flags}").optimizer.params_dtype) == f"torch.{dtype}"


def test_a_run_counted_in_samples_ends_at_their_number_whatever_the_batches_so_far():
    def last_iteration(flags: str, resumed_at: tuple[int, int]) -> int:
        return dataclasses.replace(parse(flags), resumed_at=resumed_at).train_iters

    smaller, larger = (f"{BY_SAMPLES} --global-batch-size {size}" for size in (4, 16))
    assert last_iteration(smaller, (0, 0)) == 16
    assert last_iteration(smaller, (4, 32)) == 4 + 8  # four batches of 8 before
    assert last_iteration(larger, (4, 32)) == 4 + 2
    assert last_iteration(smaller, (8, 64)) == 8
    assert last_iteration(f"{RUN} --global-batch-size 4", (4, 32)) == 20


def test_bounds_of_the_learning_rate_are_in_samples():
    def bounds(flags: str) -> LrBounds:
        training = (config := parse(flags)).training
        is_in_samples = training.train_samples is not None
        return config.optimizer.lr_bounds(training.length, config.sizes.global_batch_size, is_in_samples=is_in_samples)

    assert bounds(f"{RUN} --lr-warmup-iters 3") == LrBounds(total=40, decay=40, warmup=6, wsd_decay=None)
    assert bounds(f"{RUN} --lr-decay-iters 10 --lr-warmup-fraction 0.1") == LrBounds(40, 20, 2.0, None)
    wsd = "--lr-decay-style WSD --lr-wsd-decay"
    assert bounds(f"{RUN} {wsd}-iters 5") == LrBounds(40, 40, 0, 10)
    assert bounds(f"{BY_SAMPLES} --lr-decay-samples 50 --lr-warmup-samples 7 {wsd}-samples 9") == LrBounds(64, 50, 7, 9)


def test_tensor_parallel_ranks_may_share_a_query_group():
    flags = "--tensor-model-parallel-size 4 --group-query-attention --num-query-groups 2"
    assert parse(f"{RUN} {flags}", world_size=4).model.query_groups == 2


def test_the_flat_flags_hold_each_once_as_plain_values():
    config = parse(RUN)
    flat = config.flat()
    assert flat.keys() == {field.name for part in PARTS.values() for field in dataclasses.fields(part)}
    assert len(flat) == sum(len(dataclasses.fields(part)) for part in PARTS.values())
    plain = (type(None), bool, int, float, str, list)
    assert all(isinstance(value, plain) for value in flat.values())
    assert Namespace(**flat).num_layers == 4


def test_the_help_names_the_command_as_the_user_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["megatron-dwm pretrain"])
    for flags in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            parse(flags)
        assert capsys.readouterr().out.startswith("usage: megatron-dwm pretrain ")


def test_configurations_cannot_be_changed():
    config = parse(RUN)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.num_layers = 5  # type: ignore[misc]


def test_recomputing_attention_overrules_recomputing_layers(caplog: pytest.LogCaptureFixture):
    assert parse(f"{RUN} --recompute-activations --recompute-granularity full").model.recomputation == "selective"
    assert "--recompute-activations overrules --recompute-granularity full" in caplog.text


def test_what_recomputation_is_left_in_a_script_is_warned_of(caplog: pytest.LogCaptureFixture):
    assert parse(f"{RUN} --recompute-num-layers 1").model.recompute_granularity is None
    assert "--recompute-num-layers has no effect without --recompute-granularity" in caplog.text
