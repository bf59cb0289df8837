"""The configuration of a run: what scripts for Megatron-LM ask for, and which values contradict each other."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_dwm.config.checkpoint import CheckpointConfig
from megatron_dwm.config.optimizer import LrBounds
from megatron_dwm.config.run import PARTS, RunConfig, parse_run
from megatron_dwm.errors import EXIT_CODE, UserError, run_cli

MODEL = "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32"
DATA = "--mock-data --tokenizer-type NullTokenizer --vocab-size 100"
TRAINING = "--micro-batch-size 2 --lr 1e-3"
RUN = f"{MODEL} {DATA} {TRAINING} --train-iters 20"
BY_SAMPLES = f"{MODEL} {DATA} {TRAINING} --train-samples 64"


def _parse(flags: str, world_size: int = 1) -> RunConfig:
    return parse_run(flags.split(), world_size)


def test_a_script_for_a_gpt_is_accepted(tmp_path: Path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).touch()
    config = _parse(
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
    assert (config.data_parallel_size, config.num_microbatches) == (2, 32)
    assert config.tokenizer.tokenizer_type == "GPT2BPETokenizer"


def test_a_script_for_a_llama_is_accepted(caplog: pytest.LogCaptureFixture):
    config = _parse(
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
    assert config.num_microbatches == 16
    assert config.model.fp8 == "hybrid" and not config.optimizer.grads_in_fp32
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
    config = _parse(f"{RUN} --use-rotary-position-embeddings --no-position-embedding --use-flash-attn")
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
    assert _parse(f"{RUN} {flags}").optimizer.grads_in_fp32 is in_fp32


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
    config = _parse(f"{RUN} {flags}")
    assert config.training.should_check_for_nan(config.optimizer) is checks


@pytest.mark.parametrize(("flags", "dtype"), [("", "float32"), ("--bf16", "bfloat16"), ("--fp16", "float16")])
def test_parameters_have_the_precision_of_the_flags(flags: str, dtype: str):
    assert str(_parse(f"{RUN} {flags}").optimizer.params_dtype) == f"torch.{dtype}"


def test_a_run_counted_in_samples_ends_at_their_number_whatever_the_batches_so_far():
    def last_iteration(flags: str, resumed_at: tuple[int, int]) -> int:
        return dataclasses.replace(_parse(flags), resumed_at=resumed_at).train_iters

    smaller, larger = (f"{BY_SAMPLES} --global-batch-size {size}" for size in (4, 16))
    assert last_iteration(smaller, (0, 0)) == 16
    assert last_iteration(smaller, (4, 32)) == 4 + 8  # four batches of 8 before
    assert last_iteration(larger, (4, 32)) == 4 + 2
    assert last_iteration(smaller, (8, 64)) == 8
    assert last_iteration(f"{RUN} --global-batch-size 4", (4, 32)) == 20


def test_bounds_of_the_learning_rate_are_in_samples():
    def bounds(flags: str) -> LrBounds:
        training = (config := _parse(flags)).training
        is_in_samples = training.train_samples is not None
        return config.optimizer.lr_bounds(training.length, config.global_batch_size, is_in_samples=is_in_samples)

    assert bounds(f"{RUN} --lr-warmup-iters 3") == LrBounds(total=40, decay=40, warmup=6, wsd_decay=None)
    assert bounds(f"{RUN} --lr-decay-iters 10 --lr-warmup-fraction 0.1") == LrBounds(40, 20, 2.0, None)
    wsd = "--lr-decay-style WSD --lr-wsd-decay"
    assert bounds(f"{RUN} {wsd}-iters 5") == LrBounds(40, 40, 0, 10)
    assert bounds(f"{BY_SAMPLES} --lr-decay-samples 50 --lr-warmup-samples 7 {wsd}-samples 9") == LrBounds(64, 50, 7, 9)


def test_batches_follow_from_the_world():
    config = _parse(f"{RUN} --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2", world_size=8)
    assert (config.data_parallel_size, config.global_batch_size, config.num_microbatches) == (2, 4, 1)
    assert _parse(f"{BY_SAMPLES} --global-batch-size 6").train_iters == 10


def test_tensor_parallel_ranks_may_share_a_query_group():
    flags = "--tensor-model-parallel-size 4 --group-query-attention --num-query-groups 2"
    assert _parse(f"{RUN} {flags}", world_size=4).model.query_groups == 2


def test_the_flat_flags_hold_each_once_as_plain_values():
    config = _parse(RUN)
    flat = config.flat()
    assert flat.keys() == {field.name for part in PARTS.values() for field in dataclasses.fields(part)}
    assert len(flat) == sum(len(dataclasses.fields(part)) for part in PARTS.values())
    plain = (type(None), bool, int, float, str, list)
    assert all(isinstance(value, plain) for value in flat.values())
    assert Namespace(**flat).num_layers == 4


def test_configurations_cannot_be_changed():
    config = _parse(RUN)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.num_layers = 5  # type: ignore[misc]


MISTAKES = {
    "--seed 4294967296": "--seed 4294967296: must be at most 4000000000",
    f"--train-iters {2**63 - 1}": f"--train-iters {2**63 - 1}: more than 1e+12 samples would be read; lower it",
    f"--eval-iters {2**62}": f"--eval-iters {2**62}: more than 1e+12 samples would be read; lower it",
    f"--num-workers {2**62}": f"--num-workers {2**62}: must be at most 1024",
    "--num-layers 10001": "--num-layers 10001: must be at most 10000",
    "--dwm-num-layers 10001": "--dwm-num-layers 10001: must be at most 10000",
    f"--dwm-ngram-buckets {2**40}": f"--dwm-ngram-buckets {2**40}: must be at most {2**31}",
    "--save=": "--save '': is empty; give a path, or leave it out",
    "--save=~/run": "--save ~/run: the shell has not replaced ~; write the path out, or begin with ./",
    "--metrics-jsonl $RUN/metrics": "--metrics-jsonl $RUN/metrics: the shell has not replaced $; write the path out",
    "--save s3://bucket/run": "--save s3://bucket/run: is a URL; give a path on this machine",
    "--tensorboard-dir file:///tmp/tb": "--tensorboard-dir file:///tmp/tb: is a URL; give a path on this machine",
    "--data-args-path=": "--data-args-path '': is empty; give a path, or leave it out",
    "--metrics-jsonl=": "--metrics-jsonl '': is empty; give a path, or leave it out",
    "--embedding-init-method-std -1": "--embedding-init-method-std -1.0: must be at least 0",
    "--num-distributed-optimizer-instances 2": "has no effect without --use-distributed-optimizer; add it",
    "--use-distributed-optimizer --num-distributed-optimizer-instances 3": "3 does not divide the 4 ranks",
    "--window-size 4": "--window-size 4: give the number of previous tokens that a token attends to",
    "--window-size 4,1": "and 0 for later tokens, which a GPT must not attend to",
    "--window-attn-skip-freq 2": "--window-attn-skip-freq has no effect without --window-size; add that",
    "--window-size 4,0 --window-attn-skip-freq [1]*9": "neither a positive number nor a pattern",
    "--position-embedding-type rope --no-rope-freq 3": "--no-rope-freq 3 does not divide --num-layers 4",
    "--no-rope-freq 2": "--no-rope-freq has no effect without --position-embedding-type rope",
    "--glu-linear-offset 1": "--glu-linear-offset has no effect without --swiglu or --quick-geglu",
    "--quick-geglu --swiglu": "--swiglu and --quick-geglu exclude each other",
    "--qk-layernorm --qk-l2-norm": "--qk-layernorm and --qk-l2-norm exclude each other",
    "--normalization RMSNorm --dwm-qk-norm-all-heads": "--dwm-qk-norm-all-heads has no effect without --qk-layernorm",
    "--qk-layernorm --dwm-qk-norm-all-heads": "with --normalization LayerNorm: only RMSNorm spans all heads",
    "--swiglu --activation-func-clamp-value 0": "--activation-func-clamp-value 0.0: must be above 0",
    "--log-progress": "--log-progress writes to the --save folder; give it",
    "--straggler-ctrlr-port 70000": "a port is at most 65535",
    "--full-validation": "--full-validation: generated data (--mock-data) has no end",
    "--no-such-flag 3": "unknown flag --no-such-flag",
    "--num-layers many": "--num-layers: invalid int value: 'many'",
    "--num-layers 0": "--num-layers 0: must be at least 1",
    "--hidden-size 16 --swiglu": "--hidden-size 16 with --swiglu",
    "--hidden-size 30": "--hidden-size 30 is not divisible by --num-attention-heads 4",
    "--tensor-model-parallel-size 3": "world size 4 is not divisible by --tensor-model-parallel-size 3",
    "--tensor-model-parallel-size 4 --num-attention-heads 2": "--num-attention-heads 2 is not divisible",
    "--tensor-model-parallel-size 2 --ffn-hidden-size 33": "--ffn-hidden-size 33 is not divisible",
    "--tensor-model-parallel-size 2 --padded-vocab-size 101": "--padded-vocab-size 101 is not divisible",
    "--tensor-model-parallel-size 2 --sequence-parallel --seq-length 31": "--seq-length (with --sequence-parallel) 31",
    "--tensor-model-parallel-size 2 --num-attention-heads 6 --hidden-size 48 --group-query-attention "
    "--num-query-groups 3": "--num-query-groups 3 is neither a multiple nor a divisor",
    "--pipeline-model-parallel-size 4 --num-layers 6": "--num-layers 6 is not divisible",
    "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 3": "is not divisible",
    "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 0": "must be at least 1",
    "--num-virtual-stages-per-pipeline-rank 2": "--pipeline-model-parallel-size 2 or more",
    "--global-batch-size 12": "--global-batch-size 12 is not divisible by --micro-batch-size 2",
    "--dwm-mode off --global-batch-size 13": "--global-batch-size 13 is not divisible by --micro-batch-size 2",
    "--dwm-target-batch-size 3": "--dwm-target-batch-size 3 is not divisible",
    "--train-samples 40": "exactly one of --train-iters and --train-samples",
    "--lr-decay-samples 40": "--lr-decay-samples 40 has no effect with --train-iters; use --lr-decay-iters",
    "--lr-warmup-samples 4": "--lr-warmup-samples 4 has no effect",
    "--lr-warmup-iters 20": "warm-up of 20 iters does not end before its decay at 20",
    "--lr-warmup-iters 5 --lr-decay-iters 5": "warm-up of 5 iters",
    "--lr-warmup-iters 2 --lr-warmup-fraction 0.1": "exclude each other",
    "--lr-warmup-fraction 1.5": "--lr-warmup-fraction 1.5: must be less than 1",
    "--lr-decay-style WSD": "--lr-wsd-decay-iters",
    "--min-lr 1": "--min-lr 1.0 exceeds --lr",
    "--lr-warmup-init 1": "--lr-warmup-init 1.0 exceeds --lr",
    "--decoupled-min-lr 1e-5": "without --decoupled-lr",
    "--decoupled-lr 1e-5 --decoupled-min-lr 1e-4": "exceeds --decoupled-lr",
    "--weight-decay-incr-style linear": "--start-weight-decay and --end-weight-decay",
    "--start-weight-decay 0.1": "no effect with --weight-decay-incr-style constant",
    "--weight-decay-incr-style linear --start-weight-decay 0.2 --end-weight-decay 0.1": "can only grow",
    "--use-checkpoint-opt-param-scheduler --override-opt-param-scheduler": "exclude each other",
    "--fp16 --bf16": "exclude each other",
    "--no-weight-decay-cond-type apply_wd_to_qk_layernorm": "no effect without --qk-layernorm",
    "--adam-beta2 1": "--adam-beta2 1.0: must be less than 1",
    "--clip-grad -1": "--clip-grad -1.0: must be at least 0",
    "--seed 0": "--seed 0: must be at least 1",
    "--exit-interval -1": "--exit-interval -1: must be at least 0",
    "--manual-gc-interval 10": "without --manual-gc",
    "--hidden-dropout 1": "--hidden-dropout 1.0: must be less than 1",
    "--num-query-groups 2": "without --group-query-attention",
    "--swiglu --squared-relu": "exclude each other",
    "--seq-length 64": "--seq-length 64 exceeds --max-position-embeddings 32",
    "--no-position-embedding": "--no-position-embedding with --position-embedding-type learned_absolute",
    "--use-rope-scaling": "without --position-embedding-type rope",
    "--rotary-base 500": "--rotary-base has no effect without --position-embedding-type rope",
    "--position-embedding-type rope --rope-scaling-factor 2": "without --use-rope-scaling",
    "--position-embedding-type rope --kv-channels 5": "heads of an even size, not 5",
    "--position-embedding-type rope --rotary-percent 0": "--rotary-percent 0.0",
    "--recompute-granularity full": "--recompute-method",
    "--recompute-modules mlp": "--recompute-modules has no effect without --recompute-granularity",
    "--fp8-recipe mxfp8": "--fp8-recipe has no effect without --fp8-format",
    "--no-fp8-wgrad": "--no-fp8-wgrad has no effect without --fp8-format",
    "--fp8-format hybrid": "use --fp8-recipe tensorwise",
    "--num-experts 8": "--num-experts is not supported",
    "--moe-router-topk 2": "--moe-router-topk is not supported: only dense models",
    "--context-parallel-size 3": "x --context-parallel-size 3; start a multiple of 3 processes",
    "--context-parallel-size 0": "--context-parallel-size 0: must be at least 1",
    "--context-parallel-size 4 --seq-length 28": "--seq-length 28 is not divisible by 2 x --context-parallel-size 4",
    "--context-parallel-size 2 --hybrid-context-parallel": "--hybrid-context-parallel is not supported",
    "--cp-comm-type ring": "--cp-comm-type ring: unknown; choose from p2p, all_gather, a2a, a2a+p2p",
    "--cp-comm-type p2p a2a": "--cp-comm-type p2p a2a: ",
    "--context-parallel-size 2 --cp-comm-type a2a+p2p": "needs two --hierarchical-context-parallel-sizes",
    "--context-parallel-size 4 --hierarchical-context-parallel-sizes 2 4": "2 4 do not make --context-parallel-size 4",
    "--context-parallel-size 4 --cp-comm-type a2a --group-query-attention --num-query-groups 2": "x 4, the ranks that",
    "--rerun-mode report_stats": "--rerun-mode report_stats is not supported: megatron-core 0.16 fails at it",
    "--error-injection-rate 5": "tests --rerun-mode validate_results",
    "--wandb-project x": "--wandb-project x needs --wandb-exp-name",
    "--dwm-peak-tflops 0": "--dwm-peak-tflops 0.0: must be above 0",
    "--save a --non-persistent-global-ckpt-dir ./a": "--non-persistent-global-ckpt-dir ./a: is also --save, whose ch",
    "--eval-tasks local-cloze": "--eval-tasks has no effect without --eval-tasks-interval; add that",
    "--eval-tasks-interval 5": "--eval-tasks-interval has no effect without --eval-tasks; add that",
    "--eval-tasks local-cloze --eval-tasks-interval 0": "--eval-tasks-interval 0: must be at least 1",
    "--eval-tasks local-cloze --eval-tasks-interval 5": "--tokenizer-type NullTokenizer has none",
    "--eval-tasks piqa --eval-tasks-interval 5 --eval-tasks-text a.txt": "--eval-tasks-text is for local tasks",
    "--eval-tasks piqa --eval-tasks-interval 5 --eval-tasks-num-fewshot -1": "--eval-tasks-num-fewshot -1: give numb",
    "--plan": "--plan is for pretrain_dwm.py",
    "--plan-world-size 8": "--plan-world-size 8 goes with --plan",
    "--rampup-batch-size 4 4 100": "--rampup-batch-size needs --train-samples",
    "--overlap-param-gather": "--use-distributed-optimizer",
    "--ddp-bucket-size 0": "--ddp-bucket-size 0: must be at least 1",
    "--num-workers -1": "--num-workers -1: must be at least 0",
    "--dwm-mode rule": "--dwm-mode rule needs --dwm-rule",
    "--dwm-rule random": "--dwm-rule random goes with --dwm-mode rule, not bilevel",
    "--dwm-mode rule --dwm-rule random --dwm-rule-strength -1": "--dwm-rule-strength -1.0: must be at least 0",
    "--dwm-mode rule --dwm-rule shuffled --dwm-rule-strength 2": "--dwm-rule-strength 2.0 goes with --dwm-rule random",
    "--dwm-mode rule --dwm-rule oracle": "--dwm-rule oracle needs --dwm-rule-sources",
    "--dwm-mode rule --dwm-rule source-weights --dwm-rule-sources a": "source-weights and --dwm-rule-weights go",
    "--dwm-mode rule --dwm-rule source-weights --dwm-rule-sources a b --dwm-rule-weights 1": "--dwm-rule-weights 1.0:",
    "--dwm-mode rule --dwm-rule source-weights --dwm-rule-sources a --dwm-rule-weights 0": "--dwm-rule-weights 0.0:",
    "--dwm-mode rule --dwm-rule top-alignment --dwm-rule-fraction 1.5": "--dwm-rule-fraction 1.5: must be above 0",
    "--dwm-mode rule --dwm-rule loss --dwm-rule-fraction 0.2": "--dwm-rule-fraction 0.2 goes with --dwm-rule top",
    "--dwm-mode rule --dwm-rule source-alignment --dwm-kl-weight 0": "--dwm-kl-weight 0: the sources' scores",
    "--dwm-mode rule --dwm-rule loss --dwm-rule-sources a b": "--dwm-rule-sources a b goes with --dwm-rule oracle",
    "--dwm-mode rule --dwm-rule loss --dwm-check": "--dwm-check goes with --dwm-mode bilevel, not rule",
    "--dwm-target-momentum 1": "--dwm-target-momentum 1.0: must be at least 0 and below 1",
    "--dwm-mode rule --dwm-rule shuffled --dwm-target-batch-size 3": "--dwm-target-batch-size 3 is not divisible",
    "--micro-batch-size 4 --global-batch-size 8 --tensor-model-parallel-size 2 --sequence-parallel --tp-comm-overlap "
    "--dwm-alignment finite-difference --dwm-target-batch-size 2": "2 with --tp-comm-overlap: its buffers",
    "--data-path x": "--mock-data excludes",
    "--tokenizer-type HuggingFaceTokenizer": "needs --tokenizer-model",
    "--tokenizer-metadata /none": "--tokenizer-metadata /none: no such file",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_is_one_line_and_code_2(flags: str, capsys: pytest.CaptureFixture[str]):
    def main() -> None:
        _parse(f"{RUN} {flags}", world_size=4)

    with pytest.raises(SystemExit) as ended:
        run_cli(main)
    assert ended.value.code == EXIT_CODE
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert MISTAKES[flags] in error


def test_a_path_of_blanks_is_refused_as_an_empty_one_is():
    with pytest.raises(UserError, match="--save ' ': is empty; give a path, or leave it out"):
        parse_run([*RUN.split(), "--save", " "], world_size=4)


def test_context_parallelism_divides_the_world_and_the_sequence():
    config = _parse(f"{RUN} --context-parallel-size 2 --tensor-model-parallel-size 2", world_size=8)
    assert (config.data_parallel_size, config.global_batch_size) == (2, 4)
    with pytest.raises(UserError, match="--seq-length 28 / --context-parallel-size 2 is not divisible"):
        flags = "--context-parallel-size 2 --tensor-model-parallel-size 4 --sequence-parallel --seq-length 28"
        _parse(f"{RUN} {flags}", world_size=8)


def test_only_what_looks_at_the_target_needs_a_target_set():
    run = RUN.replace("--mock-data", "--data-path x")
    for mode in ("bilevel", "rule --dwm-rule shuffled"):
        with pytest.raises(UserError, match="needs --dwm-target-data-path"):
            _parse(f"{run} --dwm-mode {mode}")
        assert _parse(f"{run} --dwm-mode {mode} --dwm-target-data-path y").weighting.has_weighter
    for rule in ("similarity", "source-alignment", "top-alignment"):
        with pytest.raises(UserError, match=f"--dwm-rule {rule} needs --dwm-target-data-path"):
            _parse(f"{run} --dwm-mode rule --dwm-rule {rule}")
        assert not _parse(f"{run} --dwm-mode rule --dwm-rule {rule} --dwm-target-data-path y").weighting.has_weighter
    for rule in ("random --dwm-rule-strength 0.5", "loss", "linupper", "oracle --dwm-rule-sources x"):
        weighting = _parse(f"{run} --dwm-mode rule --dwm-rule {rule}").weighting
        assert not weighting.has_weighter and not weighting.needs_target
    assert _parse(f"{run} --dwm-mode frozen --dwm-load x").weighting.has_weighter
    assert not _parse(f"{run} --dwm-mode off").weighting.has_weighter


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--lr-decay-iters 10", "--lr-decay-iters 10 has no effect with --train-samples; use --lr-decay-samples"),
        ("--lr-warmup-iters 1", "use --lr-warmup-samples"),
        ("--lr-warmup-samples 64", "warm-up of 64 samples"),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 3", "use --lr-wsd-decay-samples"),
        ("--global-batch-size 128", "--train-samples 64 is less than one batch"),
    ],
)
def test_a_run_counted_in_samples_has_its_schedule_in_samples(flags: str, said: str):
    with pytest.raises(UserError, match=said):
        _parse(f"{BY_SAMPLES} {flags}")


def test_what_recomputation_is_left_in_a_script_is_warned_of(caplog: pytest.LogCaptureFixture):
    assert _parse(f"{RUN} --recompute-num-layers 1").model.recompute_granularity is None
    assert "--recompute-num-layers has no effect without --recompute-granularity" in caplog.text


@pytest.mark.parametrize(
    ("flags", "world", "samples", "micro"),
    [
        ("", 1, 4, 4),
        ("", 2, 4, 2),
        ("--dwm-target-batch-size 32", 2, 32, 4),
        ("--dwm-target-batch-size 6", 2, 6, 3),  # one microbatch a replica
        ("--dwm-target-batch-size 1", 1, 1, 1),
        ("--micro-batch-size 32", 1, 4, 4),
        (
            "--micro-batch-size 8 --tp-comm-overlap --tensor-model-parallel-size 2 --sequence-parallel "
            "--dwm-alignment finite-difference",
            2,
            8,
            8,
        ),
        ("--global-batch-size 36", 1, 8, 4),
        ("--micro-batch-size 2 --global-batch-size 18", 1, 4, 2),
        ("--micro-batch-size 6 --global-batch-size 60", 5, 10, 2),
        ("--pipeline-model-parallel-size 2 --num-layers 4 --num-virtual-stages-per-pipeline-rank 2", 2, 8, 4),
        (
            "--micro-batch-size 16 --pipeline-model-parallel-size 2 --num-layers 4 "
            "--num-virtual-stages-per-pipeline-rank 2",
            2,
            32,
            16,
        ),
        (
            "--micro-batch-size 2 --global-batch-size 10 --pipeline-model-parallel-size 2 --num-layers 4 "
            "--num-virtual-stages-per-pipeline-rank 2 --microbatch-group-size-per-virtual-pipeline-stage 3",
            2,
            6,
            2,
        ),
    ],
)
def test_targets_are_an_eighth_of_the_batch_and_few_are_one_microbatch(
    flags: str, world: int, samples: int, micro: int
):
    config = _parse(f"{RUN} --micro-batch-size 4 --global-batch-size 32 {flags}", world)
    assert (config.target_batch_size, config.target_micro_batch) == (samples, micro)
    assert samples % (micro * config.data_parallel_size) == 0


@pytest.mark.parametrize(
    ("flags", "momentum", "samples"),
    [
        ("", 0.78, 1),
        ("--dwm-target-batch-size 8", 0.0, 8),  # what it was before there was a mean
        ("--dwm-target-batch-size 8 --dwm-target-momentum 0.5", 0.5, 8),
        ("--dwm-target-momentum 0", 0.0, 1),
        ("--dwm-mode rule --dwm-rule similarity", 0.0, 8),
    ],
)
def test_few_targets_are_averaged_over_updates(flags: str, momentum: float, samples: int):
    config = _parse(f"{RUN} --micro-batch-size 2 --global-batch-size 8 {flags}")
    assert (config.target_momentum, config.target_batch_size) == (momentum, samples)
