"""The torch layers against megatron-core's local ones, and their parallel layouts against one process."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_dwm.runtime.context_parallel import slice_sequence
from tests.distributed.built_model import build_model, random_tokens
from tests.distributed.harness import run_distributed
from tests.distributed.passes import logits, losses_and_gradients
from tests.small_runs import GPT, LLAMA, SEQ_LENGTH, Flags

LOCAL, TORCH = {"--transformer-impl": "local"}, {"--transformer-impl": "torch"}
TP2: Flags = {"--tensor-model-parallel-size": 2}
TOKENS = random_tokens(7)
ARCHITECTURES: dict[str, Flags] = {
    "learned positions, LayerNorm": GPT,
    "rotary, RMSNorm, SwiGLU, grouped queries": LLAMA,
    "normalized queries and keys": {**GPT, "--qk-layernorm": True},
    "normalized grouped queries and keys": {**LLAMA, "--qk-layernorm": True},
    "scaled by layer number": {**GPT, "--apply-query-key-layer-scaling": True},
    "wide heads, query bias": {**LLAMA, "--kv-channels": 16, "--add-qkv-bias": True},
    "one query group": {**LLAMA, "--num-query-groups": 1},
    "sliding window and rotation in some layers, queries and keys of length one": {
        **{**LLAMA, "--num-layers": 4, "--qk-l2-norm": True, "--window-size": "3,0", "--window-attn-skip-freq": 2},
        "--no-rope-freq": "[1,0]*2",
    },
    "softmax off by one": {**LLAMA, "--softmax-type": "off-by-one"},
    "softmax with a learnt offset, gated outputs, sigmoid GELU with gate, offset and bound": {
        **{**GPT, "--softmax-type": "learnable", "--attention-output-gate": True, "--quick-geglu": True},
        **{"--ffn-hidden-size": 48, "--glu-linear-offset": 1.0, "--activation-func-clamp-value": 0.5},
        "--disable-bias-linear": True,  # a built model's random biases are not divided as gates are
    },
}


def _assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    # Some gradients are zero but for rounding, such as that of the keys' bias, which softmax cancels.
    floor = 1e-2 * max(value.norm() for value in expected.values())
    for key, value in expected.items():
        error = (actual[key] - value).norm() / torch.maximum(value.norm(), floor)
        assert error < tolerance, f"{key}: relative error {error:.2g}"


def _document_mask() -> torch.Tensor:
    """True where attention is masked: in the future, and across the start of a document at token 5."""
    position = torch.arange(SEQ_LENGTH)
    document = (position >= 5).int()
    return ((position[:, None] < position) | (document[:, None] != document))[None, None]


Outcome = tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, tuple[str, object]]]
"""Token losses, gradients and checkpoint keys."""


def _both_layers(flags: Flags, mask: torch.Tensor | None) -> tuple[Outcome, Outcome]:
    """What megatron-core's local layers give, and ours with the same weights, which are those of every layout."""
    flags = {**flags, "--use-cpu-initialization": True}
    local, torch_layers = build_model({**flags, **LOCAL}, seed=99), build_model({**flags, **TORCH})
    local.chunks[0].load_state_dict(torch_layers.chunks[0].state_dict(), strict=True)
    keys = _sharded_keys(local.chunks[0]), _sharded_keys(torch_layers.chunks[0])
    expected = losses_and_gradients(local, TOKENS, mask)
    found = losses_and_gradients(torch_layers, TOKENS, mask)
    return (*expected, keys[0]), (*found, keys[1])


def _assert_same(outcomes: list[tuple[Outcome, Outcome]]) -> None:
    for (expected_losses, expected, expected_keys), (losses, gradients, keys) in outcomes:
        assert keys == expected_keys
        torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-6)
        _assert_close(gradients, expected, 1e-4)


def _sharded_keys(chunk) -> dict[str, tuple[str, object]]:
    return {name: (value.key, value.replica_id) for name, value in chunk.sharded_state_dict().items()}


BothLayers = dict[str, tuple[Outcome, Outcome]]


def _all_both_layers(parallel: Flags) -> BothLayers:
    return {name: _both_layers({**flags, **parallel}, None) for name, flags in ARCHITECTURES.items()}


@pytest.fixture(scope="module")
def one_process() -> BothLayers:
    return run_distributed(_all_both_layers, 1, {})[0]


@pytest.fixture(scope="module")
def two_ranks() -> list[BothLayers]:
    return run_distributed(_all_both_layers, 2, TP2)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_torch_layers_give_the_losses_and_gradients_of_local_layers(
    name: str, one_process: BothLayers, two_ranks: list[BothLayers]
):
    _assert_same([found[name] for found in (one_process, *two_ranks)])


def test_each_part_of_attention_and_feed_forward_layers_changes_the_losses():
    def losses(kinds: list[Flags]) -> list[torch.Tensor | None]:
        return [losses_and_gradients(build_model({**flags, **LOCAL}), TOKENS)[0] for flags in kinds]

    parts: list[Flags] = [
        *({"--window-size": "3,0"}, {"--window-size": "3,0", "--window-attn-skip-freq": "[1,0]"}),
        *({"--no-rope-freq": 2}, {"--qk-l2-norm": True}, {"--softmax-type": "off-by-one"}),
        *({"--activation-func-clamp-value": 0.5}, {"--glu-linear-offset": 1}),
    ]
    (found,) = run_distributed(losses, 1, [{**LLAMA, **part} for part in ({}, *parts)])
    for number, (one, other) in enumerate(itertools.combinations(found, 2)):
        assert one is not None and other is not None and not torch.allclose(one, other, rtol=1e-3), number


@pytest.mark.parametrize("flags", [GPT, LLAMA], ids=["gpt", "llama"])
def test_a_document_mask_is_honoured_as_by_local_layers(flags: Flags):
    outcomes = run_distributed(_both_layers, 1, flags, _document_mask())
    _assert_same(outcomes)
    ((_, (unmasked, _, _)),) = run_distributed(_both_layers, 1, flags, None)
    assert not torch.allclose(outcomes[0][1][0], unmasked, rtol=1e-3)


def test_layer_norms_have_transformer_engines_checkpoint_keys():
    def keys() -> set[str]:
        built = build_model({**GPT, **TORCH})
        return {value.key for value in built.chunks[0].module.sharded_state_dict().values()}

    (found,) = run_distributed(keys, 1)
    assert found >= {
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.self_attention.linear_qkv.layer_norm_bias",
        "decoder.layers.mlp.linear_fc1.layer_norm_weight",
        "decoder.final_layernorm.weight",
    }
    assert not any("input_layernorm" in key for key in found)


def _torch_layers(flags: Flags) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """Token losses and gradients; the weights are the same in every layout."""
    return losses_and_gradients(build_model({**flags, **TORCH, "--use-cpu-initialization": True}), TOKENS)


@pytest.fixture(scope="module")
def divided_sequences() -> list[dict[str, Any]]:
    """Losses and gradients on two ranks that divide the sequences too, which the local layers cannot."""
    flags = {**TP2, "--sequence-parallel": True}
    every = {name: {**architecture, **flags} for name, architecture in ARCHITECTURES.items()}
    return run_distributed(lambda: {name: _torch_layers(flags) for name, flags in every.items()}, 2)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tensor_parallel_ranks_give_the_gradients_of_one_process(
    name: str, one_process: BothLayers, two_ranks: list[BothLayers], divided_sequences: list[dict[str, Any]]
):
    _, (expected_losses, expected, _) = one_process[name]
    found = [both[name][1] for both in two_ranks] + [rank[name] for rank in divided_sequences]
    for losses, gradients, *_ in found:
        torch.testing.assert_close(losses, expected_losses, rtol=1e-4, atol=1e-5)
        _assert_close(gradients, expected, 1e-4)


@pytest.mark.parametrize("flags", [{**GPT, "--qk-layernorm": True}, LLAMA], ids=["gpt", "llama"])
def test_gains_centered_on_zero_are_one_plus_the_weights(flags: Flags):
    """Two models have the same losses and gradients, if the weights of one's norms are smaller by 1."""

    def both() -> list[tuple[torch.Tensor | None, dict[str, torch.Tensor]]]:
        plain, centered = (build_model({**flags, **TORCH, **more}) for more in ({}, {"--apply-layernorm-1p": True}))
        gains = [name for name in plain.chunks[0].state_dict() if name.endswith("layernorm.weight")]
        norm = centered.chunks[0].module.decoder.final_layernorm
        weights = {name: value.clone() for name, value in plain.chunks[0].state_dict().items() if value is not None}
        assert len(gains) > 2 and not type(norm)(norm.config, 4).weight.any()
        centered.chunks[0].load_state_dict(weights | {name: weights[name] - 1 for name in gains}, strict=False)
        return [losses_and_gradients(built, TOKENS) for built in (plain, centered)]

    (((expected_losses, expected), (losses, gradients)),) = run_distributed(both, 1)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-6)
    _assert_close(gradients, expected, 1e-4)


def test_unfused_attention_computes_the_same_by_matrix_products():
    def kernels(more: Flags) -> tuple[torch.Tensor | None, set[str]]:
        with torch.profiler.profile() as profile:
            losses, _ = losses_and_gradients(build_model({**LLAMA, **TORCH, **more}), TOKENS)
        return losses, {event.key for event in profile.key_averages()}

    ((default, fused), (losses, unfused)) = run_distributed(
        lambda: (kernels({}), kernels({"--attention-backend": "unfused"})), 1
    )[0]
    torch.testing.assert_close(losses, default, rtol=1e-5, atol=1e-6)
    kernel = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert kernel in fused and kernel not in unfused and "aten::_scaled_dot_product_attention_math" in unfused


def test_double_precision_layers_agree_to_double_precision():
    def errors() -> float:
        found, expected = (
            logits([build_model({**LLAMA, **kind}).chunks[0].module.double()], TOKENS) for kind in (TORCH, LOCAL)
        )
        assert expected is not None and found is not None
        return float((found - expected).abs().max())

    (error,) = run_distributed(errors, 1)
    assert error < 1e-10


def test_half_precision_keeps_losses_near_those_of_full_precision():
    flags = {**LLAMA, "--num-layers": 2, "--hidden-size": 32, "--init-method-std": 0.2}  # bf16's errors grow with depth
    ((full, _),) = run_distributed(_torch_layers, 1, flags)
    ((half, _),) = run_distributed(_torch_layers, 1, {**flags, "--bf16": True})
    assert full is not None and half is not None
    assert 0 < (half.float() - full).abs().max() < 0.1


def test_attention_dropout_draws_from_each_tensor_parallel_ranks_own_stream():
    def dropped() -> tuple[torch.Tensor, torch.Tensor, bool]:
        built = build_model({**GPT, **TORCH, "--attention-dropout": 0.5, "--tensor-model-parallel-size": 2})
        attention = built.chunks[0].module.decoder.layers[0].self_attention.core_attention
        ones = torch.ones(SEQ_LENGTH, 1, 2, 4)
        before = torch.get_rng_state()
        first = attention(ones, ones, ones, None)
        untouched = torch.equal(before, torch.get_rng_state())
        attention.eval()
        return first, attention(ones, ones, ones, None), untouched

    (first, kept, untouched), (second, _, _) = run_distributed(dropped, 2)
    torch.testing.assert_close(kept, torch.ones_like(kept))
    assert untouched
    assert not torch.equal(first, kept)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("tp", [1, 2])
def test_initial_weights_follow_the_flag_for_cpu_initialization(tp: int):
    def embedding(use_cpu: bool) -> torch.Tensor:
        flags = {"--tensor-model-parallel-size": tp, "--use-cpu-initialization": use_cpu, "--init-method-std": 0.2}
        built = build_model({**GPT, **TORCH, **flags})
        return tensor_parallel.gather_from_tensor_model_parallel_region(
            built.chunks[0].module.decoder.layers[0].mlp.linear_fc1.weight.T
        ).detach()

    on_cpu, on_device = run_distributed(lambda: (embedding(True), embedding(False)), tp)[0]
    assert on_cpu.shape == on_device.shape
    assert not torch.equal(on_cpu, on_device)
    assert on_device.std() == pytest.approx(0.2, rel=0.1)


def _divided_attention(flags: Flags) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Outputs and gradients of attention, causal and with a mask: this rank's part of the whole, and of its own."""
    length, size = 24, dist.get_world_size()
    lengths = {"--seq-length": length, "--max-position-embeddings": length}
    built = build_model({**LLAMA, **flags, **lengths, "--context-parallel-size": size})
    rank, group = built.parallel_state.cp_rank, built.parallel_state.cp_group
    divided = built.chunks[0].module.decoder.layers[0].self_attention.core_attention
    whole = copy.copy(divided)
    whole.cp_group = None
    generator = torch.Generator().manual_seed(4)
    wanted = torch.randn(length, 2, 16, generator=generator)
    inputs = [torch.randn(length, 2, heads, 4, generator=generator) for heads in (4, 2, 2)]
    ended = torch.rand(2, length, generator=generator).gt(0.8).cumsum(dim=1)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    documents = ((ended[:, :, None] != ended[:, None, :]) | future)[:, None]

    def attend(attention: Any, part: Any, mask: torch.Tensor | None) -> list[torch.Tensor]:
        own = [tensor[part].clone().requires_grad_() for tensor in inputs]
        output = attention(*own, mask)
        (output * wanted[part]).sum().backward()
        return [output.detach(), *(tensor.grad for tensor in own if tensor.grad is not None)]

    rank_part = slice_sequence(torch.arange(length), rank, size, dim=0)
    pairs = []
    for mask in (None, documents):
        rank_mask = (
            None if mask is None else get_batch_on_this_cp_rank({"attention_mask": mask}, group)["attention_mask"]
        )
        expected, found = attend(whole, slice(None), mask), attend(divided, rank_part, rank_mask)
        pairs += [(tensor[rank_part], other) for tensor, other in zip(expected, found, strict=True)]
    return pairs


@pytest.mark.parametrize(
    ("size", "flags"),
    [(2, {}), (3, {"--attention-backend": "unfused"}), (2, {"--window-size": "5,0", "--softmax-type": "learnable"})],
)
def test_context_parallel_ranks_attend_as_one_process(size: int, flags: Flags):
    for pairs in run_distributed(_divided_attention, size, flags):
        assert len(pairs) == 8
        for expected, found in pairs:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
