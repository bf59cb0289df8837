"""A language model ready to train in some layout, built as a run builds it; for use inside ``run_distributed``.

Shape legend: N samples of the global batch, n of this replica, s sequence length.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.run import RunConfig
from megatron_dwm.data.batch import Batch
from megatron_dwm.data.sampler import BatchPartition
from megatron_dwm.model.engine import PipelineEngine
from megatron_dwm.model.full_state import gather_full_state
from megatron_dwm.model.gpt import bind_schedule_hooks, build_model_chunks, wrap_with_ddp
from megatron_dwm.model.hf_weights import to_hf_state_dict
from megatron_dwm.model.optimizer_parts import optimizer_parts
from megatron_dwm.model.transformer_config import transformer_config
from megatron_dwm.model.vocabulary import Vocabulary
from megatron_dwm.runtime.process_groups import ParallelState, build_model_groups, current_parallel_state, set_seeds
from megatron_dwm.training.optimizer import build_optimizer
from megatron_dwm.weighting.bilevel.lm_gradients import LMGradients
from megatron_dwm.weighting.bilevel.outer_update import OuterUpdate
from megatron_dwm.weighting.sample_gather import SampleGather
from tests.small_runs import IN_PROCESS, NUM_SAMPLES, SEQ_LENGTH, VOCAB_SIZE, Flags, parse_flags

LAYOUTS: dict[str, tuple[int, Flags]] = {
    "one process": (1, {}),
    "TP2": (2, {"--tensor-model-parallel-size": 2}),
    "TP2, sequence parallel": (2, {"--tensor-model-parallel-size": 2, "--sequence-parallel": True}),
    "PP2": (2, {"--pipeline-model-parallel-size": 2}),
    "PP2, interleaved": (
        2,
        {"--num-layers": 4, "--pipeline-model-parallel-size": 2, "--num-virtual-stages-per-pipeline-rank": 2},
    ),
    "TP2 x PP2": (4, {"--tensor-model-parallel-size": 2, "--pipeline-model-parallel-size": 2}),
    "DP2": (2, {}),
    "DP2, distributed optimizer": (2, {"--use-distributed-optimizer": True}),
    "TP2, sequence parallel, x DP2, distributed optimizer, overlapped": (
        4,
        {
            "--tensor-model-parallel-size": 2,
            "--sequence-parallel": True,
            "--use-distributed-optimizer": True,
            "--overlap-grad-reduce": True,
            "--overlap-param-gather": True,
        },
    ),
}

COMBINED = ("PP2, interleaved", "TP2 x PP2", "TP2, sequence parallel, x DP2, distributed optimizer, overlapped")
"""Layouts that together have each kind of parallelism: what is wrong in one alone is wrong here too."""

_CP2: Flags = {"--context-parallel-size": 2}
CONTEXT_PARALLEL: dict[str, tuple[int, Flags]] = {
    "CP2": (2, _CP2),
    "PP2, interleaved, x CP2": (4, {**LAYOUTS["PP2, interleaved"][1], **_CP2}),
    "CP2 x DP2, distributed optimizer, overlapped": (
        4,
        {**_CP2, "--use-distributed-optimizer": True, "--overlap-grad-reduce": True, "--overlap-param-gather": True},
    ),
    "TP2, sequence parallel, x PP2 x CP2 x DP2": (
        16,
        {**LAYOUTS["TP2 x PP2"][1], "--sequence-parallel": True, **_CP2},
    ),
}
"""Layouts with context parallelism, in which each rank holds two chunks of every sequence."""

ALL_TRAINED = Vocabulary(VOCAB_SIZE)
"""All rows take part in the softmax."""

HfState = dict[str, torch.Tensor]
"""Tensors of a model by their Hugging Face names."""


@dataclass
class BuiltModel:
    """The parts of a run that the mathematics concerns."""

    config: RunConfig
    parallel_state: ParallelState
    chunks: list[Any]
    optimizer: Any
    engine: PipelineEngine
    sample_gather: SampleGather

    def lm_gradients(self, kind: type[LMGradients] = LMGradients) -> LMGradients:
        settings, micro = self.config.weighting, self.config.training.micro_batch_size
        return kind(settings, self.engine, self.optimizer, micro)

    def outer(self, weighter: Any) -> OuterUpdate[LMGradients]:
        return OuterUpdate(self.config.weighting, self.lm_gradients(), weighter, self.sample_gather)

    def batch(self, tokens: torch.Tensor, mask: torch.Tensor) -> Batch:
        """Return this replica's part of global ``tokens`` [N, s + 1] and ``mask`` [N, s]."""
        replica_tokens, replica_mask = (
            self.sample_gather.select_replica(tokens),
            self.sample_gather.select_replica(mask),
        )
        positions = torch.arange(SEQ_LENGTH).expand(len(replica_tokens), -1).contiguous()
        index = torch.arange(len(replica_tokens))
        inputs, labels = replica_tokens[:, :-1].contiguous(), replica_tokens[:, 1:].contiguous()
        return Batch(inputs, labels, replica_mask.contiguous(), positions, index, torch.zeros_like(index))

    def parameters(self) -> HfState:
        return self.named({p: p.data for chunk in self.chunks for p in chunk.parameters()})

    def gradient(self) -> HfState:
        """Return the gradient buffers' content; with the distributed optimizer, the ranks' shards are joined."""
        tensors = {}
        for part in optimizer_parts(self.optimizer):
            for chunk in self.chunks:
                for param in chunk.parameters():
                    value = param.main_grad.detach().clone()
                    if isinstance(part, DistributedOptimizer):
                        flat = torch.zeros_like(value).view(-1)
                        if param in part.model_param_group_index_map:
                            owned = part._get_model_param_range_map(param)["param"]
                            flat[owned.start : owned.end] = value.view(-1)[owned.start : owned.end]
                        dist.all_reduce(flat, group=self.parallel_state.dp_cp_group)
                        value = flat.view_as(value)
                    tensors[param] = value
        return self.named(tensors)

    def gathered(self, tensors: dict[Any, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Gather the tensors of this rank's parameters, by checkpoint key."""
        saved = {param: param.data.clone() for param in tensors}
        for param, value in tensors.items():
            param.data.copy_(value)
        full = gather_full_state(self.chunks, lambda key: True)
        for param, value in saved.items():
            param.data.copy_(value)
        return full

    def named(self, tensors: dict[Any, torch.Tensor]) -> HfState:
        """Gather the tensors of this rank's parameters, by Hugging Face name."""
        model = self.config.model
        return to_hf_state_dict(self.gathered(tensors), model, layers=model.num_layers, vocab_size=VOCAB_SIZE)


def build_model(flags: Flags, seed: int = 1234, vocabulary: Vocabulary = ALL_TRAINED) -> BuiltModel:
    """Build the model of :data:`IN_PROCESS` and ``flags``; norms and biases are random, so that each counts.

    A process may build several models in one layout.
    """
    config = parse_flags({**IN_PROCESS, **flags}, dist.get_world_size())
    core_config = transformer_config(
        config.model, config.parallel, config.training, config.optimizer, torch.device("cpu")
    )
    parallel, virtual = config.parallel, config.parallel.virtual_stages(config.model.num_layers)
    if not mpu.model_parallel_is_initialized():  # by another model of the test
        build_model_groups(parallel, virtual)
    layout = current_parallel_state()
    set_seeds(seed, layout)
    bare = build_model_chunks(core_config, config.model, vocabulary=vocabulary)
    noise = torch.Generator().manual_seed(seed + layout.pp_rank)
    for chunk in bare:
        for param in chunk.parameters():
            if param.dim() == 1:  # the same values under every size of tensor parallelism
                slices = layout.tp_size if param.tensor_model_parallel else 1
                values = torch.randn(slices, *param.shape, generator=noise)
                param.data += 0.1 * values[layout.tp_rank % slices].to(param.dtype)
    chunks = wrap_with_ddp(bare, core_config, config.parallel, config.optimizer, config.training)
    optimizer = build_optimizer(config.optimizer, config.model, config.parallel, config.profiling, chunks)
    bind_schedule_hooks(core_config, chunks, optimizer, config.parallel)
    schedule = PipelineEngine(chunks, core_config, layout, SEQ_LENGTH, check_for_nan=not config.optimizer.fp16)
    micro, dp = config.training.micro_batch_size, layout.dp_size
    sample_gather = SampleGather(BatchPartition(micro, config.sizes.num_microbatches, layout.dp_rank, dp), layout)
    return BuiltModel(config, layout, chunks, optimizer, schedule, sample_gather)


def parse_model(flags: Flags) -> ModelConfig:
    """Return the model's configuration from ``flags``."""
    return parse_flags({**IN_PROCESS, **flags}).model


def random_tokens(seed: int) -> torch.Tensor:
    """Return random tokens [N, s + 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB_SIZE, (NUM_SAMPLES, SEQ_LENGTH + 1), generator=generator)


def random_mask(seed: int, masked: int = 3) -> torch.Tensor:
    """Return a mask [N, s] with ``masked`` zeros at random places in each row."""
    order = torch.rand(NUM_SAMPLES, SEQ_LENGTH, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    return (order >= masked).float()


def uneven_mask(tokens: int) -> torch.Tensor:
    """Return a mask [N, s] that leaves every second sample its first ``tokens`` tokens only."""
    mask = torch.ones(NUM_SAMPLES, SEQ_LENGTH)
    mask[1::2, tokens:] = 0
    return mask


class Reference:
    """The same language model as one Hugging Face model in float64, differentiated by autograd."""

    def __init__(self, flags: Flags, state: HfState) -> None:
        from transformers import AutoModelForCausalLM

        from megatron_dwm.model.hf_config import hf_config

        # Some layouts need more layers than ``flags`` say.
        layers = 1 + max(int(found[1]) for name in state if (found := re.match(r"(?:h|layers)\.(\d+)\.", name)))
        config = hf_config(parse_model(flags), vocab_size=VOCAB_SIZE, num_layers=layers)
        self.model: Any = AutoModelForCausalLM.from_config(config).double().eval()
        doubled = {k: v.double() for k, v in state.items()}
        head = doubled.pop("lm_head.weight", None)
        self.model.base_model.load_state_dict(doubled, strict=True)
        if head is not None:
            self.model.lm_head.load_state_dict({"weight": head}, strict=True)
        self.params = dict(self.model.base_model.named_parameters())
        if head is not None:
            self.params["lm_head.weight"] = self.model.lm_head.weight

    def losses(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the mean token loss of each sample [N]."""
        token_losses = self.token_losses(tokens)
        return (token_losses * mask.double()).sum(1) / mask.double().sum(1)

    def token_losses(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the token losses [N, s]."""
        logits = self.model(tokens[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")

    def gradient(self, loss: torch.Tensor) -> HfState:
        grads = torch.autograd.grad(loss, list(self.params.values()), retain_graph=True)
        return dict(zip(self.params, grads, strict=True))


def inner(one: HfState, other: HfState) -> torch.Tensor:
    """Return ⟨one, other⟩ in float64."""
    return functools.reduce(torch.add, ((one[k].double() * other[k].double()).sum() for k in one))


def relative_error(found: HfState, expected: HfState) -> float:
    """Return the largest ‖found − expected‖ / ‖expected‖ over tensors.

    The norm of an almost zero tensor is replaced by a thousandth of the largest one's.
    """
    assert found.keys() == expected.keys()
    floor = 1e-3 * max(float(value.norm()) for value in expected.values())
    return max(float((found[k].double() - v).norm()) / max(float(v.norm()), floor) for k, v in expected.items())
