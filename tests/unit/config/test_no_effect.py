"""Flags that are accepted without effect: the run is the one without them; what would have an effect is refused."""

from __future__ import annotations

import re

import pytest

from megatron_dwm.config.flags import Flag, declared_flags
from megatron_dwm.config.no_effect import NoEffectConfig
from megatron_dwm.config.run import FLAG_GROUPS, RunConfig, parse_run
from megatron_dwm.errors import UserError

RUN = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 100 --micro-batch-size 2 --lr 1e-3 --train-iters 20 "
    "--global-batch-size 8 --dwm-mode off"
)
ONE_NEUTRAL_VALUE = {
    "ckpt_fully_parallel_load_exchange_algo": "broadcast",
    "cpu_offloading_num_layers": "0",
    "cuda_graph_impl": "none",
    "data_impl": "mmap",
    "dist_ckpt_workers": "1",
    "exp_avg_dtype": "fp32",
    "exp_avg_sq_dtype": "fp32",
    "main_grads_dtype": "fp32",
    "main_params_dtype": "fp32",
    "mtp_num_layers": "0",
    "null_tokenizer_pad_id": "-1",
    "pipeline_model_parallel_comm_backend": "nccl",
    "rope_type": "rope",
}
PIPELINE = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"


def _parse(flags: str, *more: str, world_size: int = 1) -> RunConfig:
    return parse_run([*RUN.split(), *flags.split(), *more], world_size)


@pytest.mark.parametrize("field", [item.field for item in declared_flags(NoEffectConfig)])
def test_the_run_is_the_one_without_the_flag(field: str):
    (item,) = (item for item in declared_flags(NoEffectConfig) if item.field == field)
    if item.value_type is None:
        values = []
    elif field in ONE_NEUTRAL_VALUE:
        values = [ONE_NEUTRAL_VALUE[field]]
    else:
        values = [str(item.choices[-1]) if item.choices else "7"]
        assert values != [str(item.default)]
    for name in item.names:
        assert _parse("", name, *values) == _parse("")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--pipeline-model-parallel-comm-backend ucc", "NCCL"),
        ("--cpu-offloading-num-layers 1", "use --recompute-granularity"),
        ("--main-grads-dtype bf16", "fp32"),
        ("--main-params-dtype fp16", "fp32"),
        ("--exp-avg-dtype fp8", "fp32"),
        ("--exp-avg-sq-dtype fp16", "fp32"),
        ("--rope-type yarn", "only multi-latent attention"),
        ("--data-impl lazy", "memory-mapped"),
        ("--cuda-graph-impl local", "do not fit into a captured step"),
        ("--mtp-num-layers 1", "predicts only the next token"),
    ],
)
def test_a_value_that_would_have_an_effect_is_refused_with_the_reason(flags: str, said: str):
    with pytest.raises(UserError, match=f"^{flags} is not supported: .*{said}"):
        _parse(flags)


@pytest.mark.parametrize(
    "item",
    [item for kind in FLAG_GROUPS.values() for item in declared_flags(kind) if item.refused],
    ids=lambda item: item.field,
)
def test_a_flag_that_is_known_and_not_supported_is_refused_with_the_reason(item: Flag):
    values = [] if item.value_type is None else [str(item.choices[-1]) if item.choices else "7"]
    with pytest.raises(UserError, match=rf"^{item.names[0]}.* is not supported: .*{re.escape(item.refused or '')}"):
        _parse("", item.names[0], *values)


def test_an_old_spelling_does_not_overrule_a_flag():
    with pytest.raises(UserError, match="contradicts --apply-query-key-layer-scaling"):
        _parse("--no-query-key-layer-scaling --apply-query-key-layer-scaling --fp16")


@pytest.mark.parametrize(
    ("early", "todays"),
    [
        ("--layernorm-epsilon 1e-6", "--norm-epsilon 1e-6"),
        ("--override-lr-scheduler", "--override-opt_param-scheduler"),
        ("--use-checkpoint-lr-scheduler", "--use-checkpoint-opt_param-scheduler"),
        ("--no-delay-grad-reduce", "--no-align-grad-reduce"),
        ("--no-scaled-masked-softmax-fusion", "--no-masked-softmax-fusion"),
        ("--local_rank 0", "--local-rank 0"),
    ],
)
def test_early_spellings_mean_todays(early: str, todays: str):
    assert _parse(early) == _parse(todays)


@pytest.mark.parametrize(
    "flag",
    [
        *("--fim-data", "--use-megatron-fsdp"),
        *("--optimizer-cpu-offload", "--use-kitchen-attention", "--use-nccl-ub"),
    ],
)
def test_the_flags_with_which_others_would_act_are_refused(flag: str):
    with pytest.raises(UserError, match=f"{flag} is not supported"):
        _parse(flag)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            f"{PIPELINE} --microbatch-group-size-per-virtual-pipeline-stage 5",
            "4 microbatches do not make groups of 5, and each needs at least 2",
        ),
        (
            f"{PIPELINE} --microbatch-group-size-per-virtual-pipeline-stage 3",
            "groups of 3, whose last would have 1, and each needs at least 2",
        ),
        (
            "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 4",
            "not divisible .* as the flags divide it",
        ),
        (
            "--pipeline-model-parallel-size 2 --account-for-loss-in-pipeline-split",
            "not divisible .* as the flags divide it",
        ),
        ("--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|tL", "does not place 4 layers on 2"),
        # The second is what Python 3.13 says.
        ("--cp-comm-type=--", "--cp-comm-type(: expected at least one argument| --: unknown)"),
        ("--num-layers=--", "--num-layers: (expected one argument|invalid int value: '--')"),
        ("--pipeline-model-parallel-layout=", "does not place 4 layers on 1"),
        (
            "--pipeline-model-parallel-layout EttttL --num-virtual-stages-per-pipeline-rank 2",
            "leave out the other flags",
        ),
        ("--decoder-first-pipeline-num-layers 1 --account-for-loss-in-pipeline-split", "give one of them"),
    ],
)
def test_stages_that_layers_do_not_fill_are_refused(flags: str, said: str):
    with pytest.raises(UserError, match=said):
        _parse(flags, world_size=2)


@pytest.mark.parametrize(
    "flags", ["--num-virtual-stages-per-pipeline-rank 1", "--num-layers-per-virtual-pipeline-stage 4"]
)
def test_one_virtual_stage_is_none(flags: str):
    config = _parse(flags)
    assert config.parallel.virtual_stages(config.model.num_layers) is None


@pytest.mark.parametrize(
    "flags", ["--num-virtual-stages-per-pipeline-rank 2", "--num-layers-per-virtual-pipeline-stage 2"]
)
def test_several_virtual_stages_need_a_pipeline(flags: str):
    with pytest.raises(UserError, match="2 virtual pipeline stages need --pipeline-model-parallel-size 2 or more"):
        _parse(flags)
