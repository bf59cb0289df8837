"""Likelihoods of continuations under the model in training are those of its Hugging Face counterpart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_dwm.model.continuations import Continuation, Likelihood, continuation_likelihoods
from megatron_dwm.model.hf_config import hf_config
from tests.distributed.built_model import CONTEXT_PARALLEL, LAYOUTS, HfState, build_model, parse_model
from tests.distributed.harness import run_distributed
from tests.small_runs import LLAMA, SEQ_LENGTH, VOCAB_SIZE, Flags

MICRO_BATCH = 8
MODEL: Flags = {**LLAMA, "--num-layers": 4, "--hidden-dropout": 0.3, "--attention-dropout": 0.3}
"""Its dropout must not act."""
LAYOUTS_HERE = ["TP2, sequence parallel", "DP2, distributed optimizer", "PP2, interleaved, x CP2"]


def _continuations() -> list[Continuation]:
    """Texts of all lengths, the last of which do not fit; and each token after one text, of which one is likeliest."""
    generator = torch.Generator().manual_seed(3)
    lengths = [(2, 1), (3, 2), (9, 4), (SEQ_LENGTH, SEQ_LENGTH - 1), (SEQ_LENGTH + 1, 1), (SEQ_LENGTH + 9, 3)]
    texts = [torch.randint(VOCAB_SIZE, (size,), generator=generator).tolist() for size, _ in lengths]
    some = [Continuation(text, length) for text, (_, length) in zip(texts, lengths, strict=True)]
    return some + [Continuation([*texts[2], token], 1) for token in range(VOCAB_SIZE)]


def _found(flags: Flags) -> tuple[list[Likelihood], HfState, bool]:
    built = build_model(flags)
    before = torch.get_rng_state()
    found = continuation_likelihoods(built.engine, _continuations(), MICRO_BATCH, VOCAB_SIZE)
    # Fewer than there are replicas.
    one = continuation_likelihoods(built.engine, _continuations()[:1], MICRO_BATCH, VOCAB_SIZE)
    assert one[0].log_likelihood == pytest.approx(found[0].log_likelihood, rel=1e-6)
    is_as_before = bool(torch.equal(before, torch.get_rng_state())) and all(chunk.training for chunk in built.chunks)
    return found, built.parameters(), is_as_before


def _expected(state: HfState) -> list[Likelihood]:
    model = parse_model(MODEL)
    config = hf_config(model, vocab_size=VOCAB_SIZE, num_layers=model.num_layers)
    reference: Any = AutoModelForCausalLM.from_config(config)
    reference.lm_head.load_state_dict({"weight": state["lm_head.weight"]})
    reference.base_model.load_state_dict({name: value for name, value in state.items() if name != "lm_head.weight"})
    likelihoods = []
    for tokens, length in _continuations():
        kept = torch.tensor(tokens[-(SEQ_LENGTH + 1) :])
        with torch.no_grad():
            logs = reference.eval()(kept[None, :-1]).logits[0].log_softmax(-1)[-length:]
        right = kept[-length:]
        is_greedy = bool((logs.argmax(-1) == right).all())
        likelihoods.append(Likelihood(float(logs.gather(1, right[:, None]).sum()), is_greedy))
    return likelihoods


@pytest.mark.parametrize("layout", LAYOUTS_HERE)
def test_likelihoods_are_those_of_hugging_face(layout: str):
    world, parallel = (LAYOUTS | CONTEXT_PARALLEL)[layout]
    results = run_distributed(_found, world, {**MODEL, **parallel})
    expected = _expected(results[0][1])
    wanted = [each.log_likelihood for each in expected]
    for found, _, is_as_before in results:
        assert is_as_before
        assert [each.log_likelihood for each in found] == pytest.approx(wanted, abs=1e-4, rel=1e-5)
        assert [each.is_greedy for each in found] == [each.is_greedy for each in expected]
        assert sum(each.is_greedy for each in found[-VOCAB_SIZE:]) == 1
