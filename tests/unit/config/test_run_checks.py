"""Flags that cannot work, alone or together: each is one line, and exit code 2."""

from __future__ import annotations

import pytest

from megatron_dwm.config.run import parse_run
from megatron_dwm.errors import EXIT_CODE, UserError, run_cli
from tests.unit.config.test_run import BY_SAMPLES, RUN, parse

MISTAKES = {
    "--seed 4294967296": "--seed 4294967296: must be at most 4000000000",
    f"--train-iters {2**63 - 1}": f"--train-iters {2**63 - 1}: more than 1e+12 samples would be read; lower it",
    "--eval-micro-batch-size 3": "--eval-global-batch-size 8 is not divisible by --eval-micro-batch-size 3 x data",
    "--eval-global-batch-size 0": "--eval-global-batch-size 0: must be at least 1",
    "--start-eval-at-iter -1": "--start-eval-at-iter -1: must be at least 0",
    f"--eval-iters {2**62}": f"--eval-iters {2**62}: more than 1e+12 samples would be read; lower it",
    f"--num-workers {2**62}": f"--num-workers {2**62}: must be at most 1024",
    "--num-layers 10001": "--num-layers 10001: must be at most 10000",
    "--dwm-num-layers 10001": "--dwm-num-layers 10001: must be at most 10000",
    f"--dwm-ngram-buckets {2**40}": f"--dwm-ngram-buckets {2**40}: must be at most {2**31}",
    "--save=": "--save '' is empty; give a path, or leave it out",
    "--save=~/run": "--save ~/run: the shell has not replaced ~; write the path out, or begin with ./",
    "--metrics-jsonl $RUN/metrics": "--metrics-jsonl $RUN/metrics: the shell has not replaced $; write the path out",
    "--save s3://bucket/run": "--save s3://bucket/run is a URL; give a path on this machine",
    "--tensorboard-dir file:///tmp/tb": "--tensorboard-dir file:///tmp/tb is a URL; give a path on this machine",
    "--data-args-path=": "--data-args-path '' is empty; give a path, or leave it out",
    "--metrics-jsonl=": "--metrics-jsonl '' is empty; give a path, or leave it out",
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
    "--save a --non-persistent-global-ckpt-dir ./a": "--non-persistent-global-ckpt-dir ./a is also --save, where ch",
    "--eval-tasks local-cloze": "--eval-tasks has no effect without --eval-tasks-interval; add that",
    "--eval-tasks-interval 5": "--eval-tasks-interval has no effect without --eval-tasks; add that",
    "--eval-tasks local-cloze --eval-tasks-interval 0": "--eval-tasks-interval 0: must be at least 1",
    "--eval-tasks local-cloze --eval-tasks-interval 5": "--tokenizer-type NullTokenizer cannot encode",
    "--eval-tasks piqa --eval-tasks-interval 5 --eval-tasks-text a.txt": "--eval-tasks-text is for local tasks",
    "--eval-tasks piqa --eval-tasks-interval 5 --eval-tasks-num-fewshot -1": "--eval-tasks-num-fewshot -1: give numb",
    "--plan": "--plan is for pretrain_dwm.py",
    "--plan-world-size 8": "--plan-world-size 8 has no effect without --plan",
    "--rampup-batch-size 4 4 100": "--rampup-batch-size needs --train-samples",
    "--overlap-param-gather": "--use-distributed-optimizer",
    "--ddp-bucket-size 0": "--ddp-bucket-size 0: must be at least 1",
    "--num-workers -1": "--num-workers -1: must be at least 0",
    "--dwm-mode rule": "--dwm-mode rule needs --dwm-rule",
    "--dwm-rule random": "--dwm-rule random is for --dwm-mode rule, not bilevel",
    "--dwm-mode rule --dwm-rule random --dwm-rule-strength -1": "--dwm-rule-strength -1.0: must be at least 0",
    "--dwm-mode rule --dwm-rule shuffled --dwm-rule-strength 2": "--dwm-rule-strength 2.0 is for --dwm-rule random",
    "--dwm-mode rule --dwm-rule oracle": "--dwm-rule oracle needs --dwm-rule-sources",
    "--dwm-mode rule --dwm-rule source-weights --dwm-rule-sources a": "source-weights and --dwm-rule-weights go",
    "--dwm-mode rule --dwm-rule source-weights --dwm-rule-sources a b --dwm-rule-weights 1": "--dwm-rule-weights 1.0:",
    "--dwm-mode rule --dwm-rule source-weights --dwm-rule-sources a --dwm-rule-weights 0": "--dwm-rule-weights 0.0:",
    "--dwm-mode rule --dwm-rule top-alignment --dwm-rule-fraction 1.5": "--dwm-rule-fraction 1.5: must be above 0",
    "--dwm-mode rule --dwm-rule loss --dwm-rule-fraction 0.2": "--dwm-rule-fraction 0.2 is for --dwm-rule top",
    "--dwm-mode rule --dwm-rule source-alignment --dwm-kl-weight 0": "--dwm-kl-weight 0: the sources' scores",
    "--dwm-mode rule --dwm-rule loss --dwm-rule-sources a b": "--dwm-rule-sources a b is for --dwm-rule oracle",
    "--dwm-mode rule --dwm-rule loss --dwm-check": "--dwm-check is for --dwm-mode bilevel, not rule",
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
        parse(f"{RUN} {flags}", world_size=4)

    with pytest.raises(SystemExit) as ended:
        run_cli(main)
    assert ended.value.code == EXIT_CODE
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert MISTAKES[flags] in error


def test_a_path_of_blanks_is_refused_as_an_empty_one_is():
    with pytest.raises(UserError, match="--save ' ' is empty; give a path, or leave it out"):
        parse_run([*RUN.split(), "--save", " "], world_size=4)


def test_context_parallelism_divides_the_world_and_the_sequence():
    config = parse(f"{RUN} --context-parallel-size 2 --tensor-model-parallel-size 2", world_size=8)
    assert (config.sizes.data_parallel_size, config.sizes.global_batch_size) == (2, 4)
    with pytest.raises(UserError, match="--seq-length 28 / --context-parallel-size 2 is not divisible"):
        flags = "--context-parallel-size 2 --tensor-model-parallel-size 4 --sequence-parallel --seq-length 28"
        parse(f"{RUN} {flags}", world_size=8)


def test_only_what_looks_at_the_target_needs_a_target_set():
    run = RUN.replace("--mock-data", "--data-path x")
    for mode in ("bilevel", "rule --dwm-rule shuffled"):
        with pytest.raises(UserError, match="needs --dwm-target-data-path"):
            parse(f"{run} --dwm-mode {mode}")
        assert parse(f"{run} --dwm-mode {mode} --dwm-target-data-path y").weighting.has_weighter
    for rule in ("similarity", "source-alignment", "top-alignment"):
        with pytest.raises(UserError, match=f"--dwm-rule {rule} needs --dwm-target-data-path"):
            parse(f"{run} --dwm-mode rule --dwm-rule {rule}")
        assert not parse(f"{run} --dwm-mode rule --dwm-rule {rule} --dwm-target-data-path y").weighting.has_weighter
    for rule in ("random --dwm-rule-strength 0.5", "loss", "linupper", "oracle --dwm-rule-sources x"):
        weighting = parse(f"{run} --dwm-mode rule --dwm-rule {rule}").weighting
        assert not weighting.has_weighter and not weighting.needs_target
    assert parse(f"{run} --dwm-mode frozen --dwm-load x").weighting.has_weighter
    assert not parse(f"{run} --dwm-mode off").weighting.has_weighter


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
        parse(f"{BY_SAMPLES} {flags}")
