"""The torch layers against megatron-core's local ones, and their parallel layouts against one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from megatron.core import tensor_parallel

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.optimizer import OptimizerConfig
from megatron_dwm.config.parallel import ParallelConfig
from megatron_dwm.config.training import TrainingConfig
from tests.distributed import tiny
from tests.distributed.harness import run_distributed

ARCHITECTURES = {
    "learned positions, LayerNorm": tiny.gpt(),
    "rotary, RMSNorm, SwiGLU, grouped queries": tiny.llama(),
    "normalized queries and keys": tiny.gpt(qk_layernorm=True),
    "normalized grouped queries and keys": tiny.llama(qk_layernorm=True),
    "scaled by layer number": tiny.gpt(apply_query_key_layer_scaling=True),
    "wide heads, query bias": tiny.llama(kv_channels=16, add_qkv_bias=True),
    "one query group": tiny.llama(num_query_groups=1),
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
    position = torch.arange(tiny.SEQ_LENGTH)
    document = (position >= 5).int()
    return ((position[:, None] < position) | (document[:, None] != document))[None, None]


Outcome = tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, tuple[str, object]]]
"""Token losses, gradients and checkpoint keys."""


def _both_layers(model: ModelConfig, parallel: ParallelConfig, mask: torch.Tensor | None) -> tuple[Outcome, Outcome]:
    """What megatron-core's local layers give, and ours with the same weights."""
    tiny.initialize(parallel)
    local, local_config = tiny.build(replace(model, transformer_impl="local"), parallel)
    torch_layers, config = tiny.build(replace(model, transformer_impl="torch"), parallel, seed=99)
    torch_layers[0].load_state_dict(local[0].state_dict(), strict=True)
    keys = _sharded_keys(local[0]), _sharded_keys(torch_layers[0])
    expected = tiny.losses_and_gradients(local, local_config, parallel, mask)
    found = tiny.losses_and_gradients(torch_layers, config, parallel, mask)
    return (*expected, keys[0]), (*found, keys[1])


def _assert_same(outcomes: list[tuple[Outcome, Outcome]]) -> None:
    for (expected_losses, expected, expected_keys), (losses, gradients, keys) in outcomes:
        assert keys == expected_keys
        torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-6)
        _assert_close(gradients, expected, 1e-4)


def _sharded_keys(chunk) -> dict[str, tuple[str, object]]:
    return {name: (value.key, value.replica_id) for name, value in chunk.sharded_state_dict().items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("tp", [1, 2])
def test_torch_layers_give_the_losses_and_gradients_of_local_layers(name: str, tp: int):
    parallel = ParallelConfig(tensor_model_parallel_size=tp)
    outcomes = run_distributed(_both_layers, tp, ARCHITECTURES[name], parallel, None)
    assert len(outcomes) == tp
    _assert_same(outcomes)


@pytest.mark.parametrize("model", [tiny.gpt(), tiny.llama()], ids=["gpt", "llama"])
def test_a_document_mask_is_honoured_as_by_local_layers(model: ModelConfig):
    outcomes = run_distributed(_both_layers, 1, model, ParallelConfig(), _document_mask())
    _assert_same(outcomes)
    ((_, (unmasked, _, _)),) = run_distributed(_both_layers, 1, model, ParallelConfig(), None)
    assert not torch.allclose(outcomes[0][1][0], unmasked, rtol=1e-3)


def test_layer_norms_have_transformer_engines_checkpoint_keys():
    def keys() -> set[str]:
        tiny.initialize(ParallelConfig())
        chunks, _ = tiny.build(tiny.gpt(transformer_impl="torch"), ParallelConfig())
        return {value.key for value in chunks[0].sharded_state_dict().values()}

    (found,) = run_distributed(keys, 1)
    assert found >= {
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.self_attention.linear_qkv.layer_norm_bias",
        "decoder.layers.mlp.linear_fc1.layer_norm_weight",
        "decoder.final_layernorm.weight",
    }
    assert not any("input_layernorm" in key for key in found)


def _one_layout(model: ModelConfig, parallel: ParallelConfig):
    tiny.initialize(parallel)
    chunks, config = tiny.build(replace(model, transformer_impl="torch"), parallel)
    return tiny.losses_and_gradients(chunks, config, parallel)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tensor_parallel_ranks_give_the_gradients_of_one_process(name: str, sequence_parallel: bool):
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
    ((expected_losses, expected),) = run_distributed(_one_layout, 1, ARCHITECTURES[name], ParallelConfig())
    for losses, gradients in run_distributed(_one_layout, 2, ARCHITECTURES[name], parallel):
        torch.testing.assert_close(losses, expected_losses, rtol=1e-4, atol=1e-5)
        _assert_close(gradients, expected, 1e-4)


def test_recomputation_changes_no_gradient():
    def gradients(**flags):
        parallel = ParallelConfig()
        tiny.initialize(parallel)
        chunks, config = tiny.build(tiny.llama(transformer_impl="torch", **flags), parallel)
        return tiny.losses_and_gradients(chunks, config, parallel)[1]

    (expected,) = run_distributed(gradients, 1)
    for flags in (
        {"recompute_activations": True},
        {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ):
        (found,) = run_distributed(lambda flags=flags: gradients(**flags), 1)
        _assert_close(found, expected, 1e-6)


def test_double_precision_layers_agree_to_double_precision():
    def errors() -> float:
        parallel = ParallelConfig()
        tiny.initialize(parallel)
        local, _ = tiny.build(tiny.llama(transformer_impl="local"), parallel)
        torch_layers, _ = tiny.build(tiny.llama(transformer_impl="torch"), parallel)
        expected, found = tiny.logits([local[0].double()]), tiny.logits([torch_layers[0].double()])
        assert expected is not None and found is not None
        return float((found - expected).abs().max())

    (error,) = run_distributed(errors, 1)
    assert error < 1e-10


def test_half_precision_keeps_losses_near_those_of_full_precision():
    def losses(optimizer: OptimizerConfig) -> torch.Tensor:
        parallel = ParallelConfig()
        tiny.initialize(parallel)
        chunks, config = tiny.build(tiny.llama(transformer_impl="torch"), parallel, optimizer=optimizer)
        found, _ = tiny.losses_and_gradients(chunks, config, parallel, optimizer=optimizer)
        assert found is not None
        return found.float()

    (full,) = run_distributed(losses, 1, tiny.OPTIMIZER)
    (half,) = run_distributed(losses, 1, OptimizerConfig(lr=1e-3, bf16=True))
    assert 0 < (half - full).abs().max() < 0.1


def test_attention_dropout_draws_from_each_tensor_parallel_ranks_own_stream():
    def dropped() -> tuple[torch.Tensor, torch.Tensor, bool]:
        parallel = ParallelConfig(tensor_model_parallel_size=2)
        tiny.initialize(parallel)
        model = tiny.gpt(transformer_impl="torch", attention_dropout=0.5)
        chunks, _ = tiny.build(model, parallel)
        attention = chunks[0].decoder.layers[0].self_attention.core_attention
        ones = torch.ones(tiny.SEQ_LENGTH, 1, 2, 8)
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
        parallel = ParallelConfig(tensor_model_parallel_size=tp)
        tiny.initialize(parallel)
        training = TrainingConfig(micro_batch_size=1, train_iters=1, use_cpu_initialization=use_cpu)
        chunks, _ = tiny.build(tiny.gpt(transformer_impl="torch"), parallel, training)
        return tensor_parallel.gather_from_tensor_model_parallel_region(
            chunks[0].decoder.layers[0].mlp.linear_fc1.weight.T
        ).detach()

    on_cpu = run_distributed(embedding, tp, True)[0]
    on_device = run_distributed(embedding, tp, False)[0]
    assert on_cpu.shape == on_device.shape
    assert not torch.equal(on_cpu, on_device)
    assert on_device.std() == pytest.approx(0.2, rel=0.1)
