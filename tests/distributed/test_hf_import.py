"""A Hugging Face model that was imported computes what it did, in every layout, and comes back as it was."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Tokenizer

from megatron_dwm.cli import export_hf, import_hf
from megatron_dwm.cli.saved_run import saved_model
from megatron_dwm.config.checkpoint_args import read_arguments
from megatron_dwm.model.gpt import build_model_chunks
from megatron_dwm.model.hf_folder import read_hugging_face
from megatron_dwm.model.transformer_config import transformer_config
from megatron_dwm.model.vocabulary import Vocabulary, saved_tokens
from megatron_dwm.runtime.process_groups import build_model_groups, current_parallel_state, set_seeds
from tests.distributed.built_model import LAYOUTS, random_tokens
from tests.distributed.harness import run_distributed
from tests.distributed.hf_models import MODELS, random_model
from tests.distributed.passes import logits
from tests.small_runs import GPT, IN_PROCESS, SEQ_LENGTH, Flags, parse_flags

UNPADDED = 260
"""Three more than the tokenizer has."""
END = 256
TOKENS = random_tokens(7)
BYTES = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


EQUIVALENT_MODEL_TYPES = {"mistral": "llama", "seed_oss": "qwen2"}
"""What models are exported as that compute the same as another."""
SPREAD = [
    "llama with biases of attention, linear",
    "qwen2, window in some layers",
    "qwen3, yarn of other attention",
    "olmo2",
    "olmo2, wide heads, one group",
    "nemotron",
    "gpt2",
]
"""Models that are tried on several ranks: tied and untied, biases, norms of one head and of all, fused and not."""


def _rounding(name: str, key: str) -> float:
    """The norms of a Nemotron are 1 greater in megatron-core, in fp32; nothing else is rounded."""
    return 1e-7 if name == "nemotron" and "norm" in key else 0.0


def _save(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Save a model and a tokenizer of bytes, in several files."""
    model = random_model(name, vocab_size=UNPADDED, positions=SEQ_LENGTH, dtype=dtype)
    model.save_pretrained(folder, max_shard_size="20KB")
    Qwen2Tokenizer(vocab=BYTES, merges=[]).save_pretrained(folder)
    return model


def _import(folder: Path) -> None:
    import_hf.import_model(import_hf.ImportConfig(str(folder / "hf"), str(folder / "core")))


def _export(folder: Path, output: Path, **changes: Any) -> str:
    return export_hf.export(export_hf.ExportConfig(load=str(folder / "core"), output=str(output), **changes), {})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each model in ``hf``, in several files, and its import in ``core``."""
    made = {}
    for number, name in enumerate(MODELS):
        folder = made[name] = tmp_path_factory.mktemp(f"model{number}")
        _save(name, folder / "hf")
        _import(folder)
    return made


def _computed(folders: dict[str, Path], parallel: Flags) -> dict[str, torch.Tensor | None]:
    """What the imports compute in one layout, loaded as a run loads them."""
    run = parse_flags({**IN_PROCESS, **GPT, **parallel}, dist.get_world_size())
    build_model_groups(run.parallel, run.parallel.virtual_stages(4))
    set_seeds(1, current_parallel_state())
    found = {}
    for name, folder in folders.items():
        checkpoint = folder / "core" / "iter_0000001"
        saved = read_arguments(checkpoint)
        model = saved_model(saved)
        config = transformer_config(model, run.parallel, run.training, run.optimizer, torch.device("cpu"))
        rows = saved["padded_vocab_size"]
        vocabulary = Vocabulary(rows, saved_tokens(saved))
        chunks = build_model_chunks(config, model, vocabulary=vocabulary)
        keys = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
        template = {key: chunk.sharded_state_dict() for key, chunk in zip(keys, chunks, strict=True)}
        loaded = dist_checkpointing.load(template, str(checkpoint))
        for key, chunk in zip(keys, chunks, strict=True):
            chunk.load_state_dict(loaded[key])
        found[name] = logits([chunk.eval() for chunk in chunks], TOKENS)
    return found


@pytest.mark.parametrize("layout", ["one process", "TP2, sequence parallel", "PP2, interleaved"])
def test_an_import_has_the_models_logits(layout: str, folders: dict[str, Path]):
    """260 tokens are padded to 384 rows."""
    processes, parallel = LAYOUTS[layout]
    tried = folders if processes == 1 else {name: folders[name] for name in SPREAD}
    results = run_distributed(_computed, processes, tried, parallel)
    for name, folder in tried.items():
        reference: Any = AutoModelForCausalLM.from_pretrained(folder / "hf")
        with torch.no_grad():
            expected = reference(TOKENS[:, :-1]).logits
        computed = [found[name] for found in results if found[name] is not None]
        assert computed
        for logits_of_rank in computed:
            torch.testing.assert_close(logits_of_rank[..., :UNPADDED], expected, rtol=1e-5, atol=1e-5, msg=name)
            assert (logits_of_rank[..., UNPADDED:].exp() == 0).all()


@pytest.mark.parametrize("name", MODELS)
def test_an_import_is_exported_as_the_model_that_it_was(name: str, folders: dict[str, Path], tmp_path: Path):
    """In several files; biases that the model had not are exported as the zeros that they are."""
    output = tmp_path / "back"
    said = _export(folders[name], output, max_shard_size="50KB")
    assert re.match(rf"{re.escape(str(output))}: wrote an? \w+ of ", said)
    assert said.endswith("tensors are the checkpoint's")
    assert len(list(output.glob("*.safetensors"))) > 1
    assert {path.stat().st_mode & 0o777 for path in output.iterdir()} == {0o644}

    known: Any = AutoModelForCausalLM.from_pretrained(folders[name] / "hf")
    back: Any = AutoModelForCausalLM.from_pretrained(output)
    with torch.no_grad():
        torch.testing.assert_close(back(TOKENS[:, :-1]).logits, known(TOKENS[:, :-1]).logits, rtol=1e-5, atol=1e-5)
    if "rotated whole" in name:  # a Mistral, whose matrices are not together, computes the same
        assert back.config.model_type == "mistral"
        return
    state, added = back.state_dict(), 0
    for key, tensor in known.state_dict().items():
        torch.testing.assert_close(state.pop(key), tensor, rtol=0, atol=_rounding(name, key), msg=key)
    for key, tensor in state.items():
        assert key.endswith(".bias") and not tensor.any()
        added += 1
    assert (added > 0) == ("with biases of" in name)
    written = json.loads((output / "config.json").read_text())
    assert written["architectures"] == [type(back).__name__] and written["dtype"] == "float32"
    kind = known.config.model_type
    assert written["model_type"] == (kind if "window" in name else EQUIVALENT_MODEL_TYPES.get(kind, kind))


def test_tokens_that_no_tokenizer_has_stay_in_the_softmax_without_padding_too(tmp_path: Path):
    """As in Qwen2.5, whose vocabulary is a multiple of 128."""
    model = random_model("llama", vocab_size=384, positions=SEQ_LENGTH)
    model.save_pretrained(tmp_path / "hf")
    Qwen2Tokenizer(vocab=BYTES, merges=[]).save_pretrained(tmp_path / "hf")
    _import(tmp_path)
    _export(tmp_path, tmp_path / "back")
    back: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert torch.equal(back.lm_head.weight, model.lm_head.weight)


def test_an_export_states_its_window_special_tokens_and_generation(folders: dict[str, Path], tmp_path: Path):
    output = tmp_path / "back"
    _export(folders["qwen3"], output)
    tokenizer, model = AutoTokenizer.from_pretrained(output), AutoModelForCausalLM.from_pretrained(output)
    assert tokenizer.model_max_length == SEQ_LENGTH
    assert len(tokenizer("a" * 100, truncation=True).input_ids) == SEQ_LENGTH
    generation = model.generation_config
    assert (generation.eos_token_id, generation.pad_token_id, generation.max_length) == (END, END, SEQ_LENGTH)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (END, None)
    assert model.generate(torch.ones(1, 1, dtype=torch.long), do_sample=False).shape[1] <= SEQ_LENGTH
    card = (output / "README.md").read_text()
    for part in (
        "a checkpoint that Megatron-DWM imported",
        "pipeline_tag: text-generation",
        "## Data",
        "## Measured effect",
        "## Limits",
        "arXiv:2507.16178",
    ):
        assert part in card


def test_weights_of_16_bits_stay_what_they_are(tmp_path: Path):
    for name, dtype in (("qwen2", torch.bfloat16), ("nemotron", torch.float16)):
        folder = tmp_path / name
        known = _save(name, folder / "hf", dtype)
        _import(folder)
        _export(folder, folder / "back")
        state = read_hugging_face(folder / "back").state
        for key, tensor in known.base_model.state_dict().items():
            torch.testing.assert_close(state[key], tensor, rtol=0, atol=_rounding(name, key), msg=key)
        assert state["embed_tokens.weight"].dtype == dtype
