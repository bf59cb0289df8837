"""Checkpoints become Hugging Face models and the other way round, whatever the layout.

``tests/fixtures/megatron_args.json`` is what Megatron-LM (core_v0.16.1) saved as the arguments of two models.
"""

from __future__ import annotations

import json
import resource
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Olmo2ForCausalLM,
    Qwen3ForCausalLM,
    SeedOssForCausalLM,
)

from megatron_dwm.cli import export_hf, import_hf
from megatron_dwm.cli.saved_run import find_tokenizer, saved_model, saved_tokenizer
from megatron_dwm.config.checkpoint_args import UNKNOWN_PARTS, read_arguments
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.data.hf_tokenizers import save_hf_tokenizer
from megatron_dwm.data.tokenizers import build_tokenizer
from megatron_dwm.errors import EXIT_CODE, UserError
from megatron_dwm.model.gpt import build_model_chunks
from megatron_dwm.model.hf_config import hf_config
from megatron_dwm.model.transformer_config import transformer_config
from megatron_dwm.model.vocabulary import Vocabulary
from tests.distributed.built_model import random_tokens
from tests.distributed.harness import run_distributed
from tests.distributed.hf_models import random_model
from tests.distributed.passes import logits
from tests.e2e.datasets import make_dataset
from tests.e2e.launch import succeed
from tests.fixtures.megatron.record import scalars
from tests.paths import FIXTURES
from tests.programs import Finished, Fork
from tests.small_runs import GPT, IN_PROCESS, LLAMA_STYLE, OLMO2_NORMS, SEQ_LENGTH, parse_flags

SENTENCES = [
    "The ships lay in the harbour until the wind turned.",
    "A sample is worth what the next step makes of it.",
    "Numbers such as 12 and 345 are written in digits.",
    "Grüße aus der Hafenstadt, schrieb sie, und fuhr ab.",
]
SIZES = {
    "--num-layers": 4,
    "--hidden-size": 32,
    "--num-attention-heads": 4,
    "--seq-length": SEQ_LENGTH,
    "--max-position-embeddings": SEQ_LENGTH,
    "--init-method-std": 0.2,
}
QWEN3 = {"--qk-layernorm": True, "--kv-channels": 16}
QWEN2 = {"--add-qkv-bias": True}
UNTIED = {"--untie-embeddings-and-output-weights": True}
TIED = {"--untie-embeddings-and-output-weights": False}
LLAMA = {
    **SIZES,
    **LLAMA_STYLE,
    "--group-query-attention": True,
    "--num-query-groups": 2,
    "--ffn-hidden-size": 48,
}
RUN = {
    "--micro-batch-size": 2,
    "--global-batch-size": 8,
    "--train-iters": 3,
    "--lr": 1e-2,
    "--mock-data": True,
    "--num-workers": 0,
    "--eval-iters": 0,
    "--dwm-mode": "off",
}
TP2_PP2 = {"--tensor-model-parallel-size": 2, "--pipeline-model-parallel-size": 2}
TP2 = {"--tensor-model-parallel-size": 2, "--sequence-parallel": True}
PP2 = {"--pipeline-model-parallel-size": 2}
INTERLEAVED = {"--pipeline-model-parallel-size": 2, "--num-virtual-stages-per-pipeline-rank": 2}
TRAINED: dict[str, tuple[Any, dict[str, Any], int]] = {
    "llama with grouped queries, one process": (LlamaForCausalLM, LLAMA, 1),
    "qwen3 with wide heads, TP2 PP2": (Qwen3ForCausalLM, LLAMA | QWEN3 | TP2_PP2, 4),
    "olmo2, TP2": (Olmo2ForCausalLM, LLAMA | OLMO2_NORMS | TP2, 2),
    "qwen2 with tied head, as its twin, interleaved PP2": (
        SeedOssForCausalLM,
        LLAMA | TIED | QWEN2 | INTERLEAVED,
        2,
    ),
    "gpt2 with its own head, PP2": (GPT2LMHeadModel, SIZES | UNTIED | PP2, 2),
}
MEGATRON_ARGS = json.loads((FIXTURES / "megatron_args.json").read_text())


@pytest.fixture(scope="module")
def tokenizer_flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A SentencePiece tokenizer trained on a few sentences."""
    prefix = tmp_path_factory.mktemp("tokenizer") / "bpe"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return {"--tokenizer-type": "SentencePieceTokenizer", "--tokenizer-model": f"{prefix}.model"}


def _run(monkeypatch: pytest.MonkeyPatch, tool: Any, *argv: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["tool", *map(str, argv)])
    tool.main()


def _megatron_logits(folder: Path) -> torch.Tensor:
    """What the checkpoint computes when megatron-core itself loads it, in one process."""
    parallel_state.initialize_model_parallel()
    saved = read_arguments(folder)
    model = saved_model(saved)
    run = parse_flags({**IN_PROCESS, **GPT})
    config = transformer_config(model, run.parallel, run.training, run.optimizer, torch.device("cpu"))
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    (chunk,) = build_model_chunks(config, model, vocabulary=Vocabulary(384))
    loaded = dist_checkpointing.load({"model": chunk.sharded_state_dict()}, str(folder))
    chunk.load_state_dict(loaded["model"])
    computed = logits([chunk.eval()], random_tokens(7))
    assert computed is not None
    return computed


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_checkpoint_becomes_a_hugging_face_model_with_its_logits_and_tokenizer(
    name: str, tokenizer_flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kind, flags, processes = TRAINED[name]
    succeed(tmp_path / "log", processes, {**flags, **RUN, **tokenizer_flags, "--save": tmp_path / "save"})
    _run(monkeypatch, export_hf, "--load", tmp_path / "save", "--output", tmp_path / "hf")

    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    model: Any = loaded[0]
    assert type(model) is kind and not any(loaded[1].values())
    settings = TokenizerConfig("SentencePieceTokenizer", tokenizer_flags["--tokenizer-model"])
    tokenizer = build_tokenizer(settings)
    exported = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert model.config.vocab_size == tokenizer.vocab_size == len(exported) == 330
    assert model.config.eos_token_id == exported.eos_token_id == tokenizer.eod
    assert model.generation_config.eos_token_id == tokenizer.eod
    assert model.generation_config.bos_token_id == exported.bos_token_id is not None
    for text in SENTENCES:
        assert exported(text, add_special_tokens=False).input_ids == tokenizer.tokenize(text)

    (expected,) = run_distributed(_megatron_logits, 1, tmp_path / "save" / "iter_0000003")
    with torch.no_grad():
        computed = model(random_tokens(7)[:, :-1]).logits
    torch.testing.assert_close(computed, expected[..., :330], rtol=1e-5, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "log", "save"]


@pytest.mark.parametrize("kind", MEGATRON_ARGS)
def test_the_arguments_that_megatron_lm_saves_describe_its_model(kind: str):
    idle = {"recompute_num_layers": 1, "fp8_recipe": "mxfp8", "rope_scaling_factor": 2.0}
    saved = MEGATRON_ARGS[kind] | idle | ({"rotary_base": 500} if kind == "gpt2" else {})
    model = saved_model(saved)
    config = hf_config(model, vocab_size=256, num_layers=model.num_layers)
    assert config.model_type == kind
    assert (config.num_hidden_layers, config.hidden_size, config.max_position_embeddings) == (4, 32, 16)
    assert model.query_groups == (2 if kind == "llama" else 4)
    assert saved_tokenizer(saved, {}) == TokenizerConfig("NullTokenizer", vocab_size=255)


def test_a_tokenizer_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Relative paths in a checkpoint's arguments refer to the folder that the run was started from."""
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "tokenizer.model").touch()
    saved = {"save": "runs/mine", "tokenizer_model": "tokenizer.model", "vocab_file": None, "seed": 1}
    monkeypatch.chdir(tmp_path / "other")
    there = saved | {"tokenizer_model": str(tmp_path / "tokenizer.model")}
    assert find_tokenizer(saved, "../runs/mine") == there
    named = saved | {"tokenizer_model": "organization/name"}  # of the Hub
    assert find_tokenizer(named, "../runs/mine") == named
    monkeypatch.chdir(tmp_path)
    assert find_tokenizer(saved, "runs/mine") == saved


@pytest.mark.parametrize("name", UNKNOWN_PARTS)
def test_a_megatron_lm_model_of_other_parts_is_refused_by_its_argument(name: str):
    with pytest.raises(UserError, match=f"{name}=1"):
        saved_model(MEGATRON_ARGS["llama"] | {name: 1})


def _hugging_face(kind: str, tokenizer_flags: dict[str, Any], folder: Path) -> Any:
    """A model with random weights, and the tokenizer."""
    model = random_model(kind, vocab_size=336, positions=SEQ_LENGTH)
    model.save_pretrained(folder)
    settings = TokenizerConfig("SentencePieceTokenizer", tokenizer_flags["--tokenizer-model"])
    save_hf_tokenizer(build_tokenizer(settings), settings, folder)
    return model


def _assert_same_weights(folder: Path, expected: Any) -> None:
    state, known = AutoModelForCausalLM.from_pretrained(folder).state_dict(), expected.state_dict()
    assert state.keys() == known.keys()
    for name, tensor in known.items():
        kept = tensor[: len(state[name])] if "embed" in name or "wte" in name or "lm_head" in name else tensor
        assert torch.equal(state[name], kept), name


def _as_flags(line: str) -> dict[str, Any]:
    """Flags and their values, True for a switch, of a command line without lists."""
    words = shlex.split(line)
    return {
        name: True if value.startswith("--") else value
        for name, value in zip(words, [*words[1:], "--"], strict=True)
        if name.startswith("--")
    }


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_weights_survive_the_way_to_megatron_and_back(
    kind: str,
    tokenizer_flags: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    model = _hugging_face(kind, tokenizer_flags, tmp_path / "hf")
    _run(monkeypatch, import_hf, "--input", tmp_path / "hf", "--save", tmp_path / "imported")
    printed, written = capsys.readouterr().out.splitlines()
    assert written.startswith(f"{tmp_path / 'imported' / 'iter_0000001'}: ")
    assert (tmp_path / "imported/latest_checkpointed_iteration.txt").read_text() == "1"
    _run(monkeypatch, export_hf, "--load", tmp_path / "imported", "--output", tmp_path / "back")
    _assert_same_weights(tmp_path / "back", model)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").config.vocab_size == 336

    # A step with learning rate zero, under another layout, whose vocabulary is padded otherwise.
    start = _as_flags(printed) | {"--save": tmp_path / "save"}
    assert start["--load"] == str(tmp_path / "imported")
    run = RUN | {"--train-iters": 1, "--lr": 0.0, "--ckpt-format": "torch_dist"}
    succeed(tmp_path / "log", 4, {**start, **run, **TP2_PP2, **tokenizer_flags})
    _run(monkeypatch, export_hf, "--load", tmp_path / "save", "--ckpt-step", "1", "--output", tmp_path / "tuned")
    _assert_same_weights(tmp_path / "tuned", model)


@pytest.mark.parametrize("kind", ["qwen3, yarn of other attention", "gpt2"])
def test_an_imported_model_computes_what_it_did_and_so_after_a_change_of_layout(
    kind: str,
    tokenizer_flags: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Its 336 tokens are padded to 384 rows; the logits lie far below the padding's."""
    model = _hugging_face(kind, tokenizer_flags, tmp_path / "hf")
    _lower_logits(model.eval())
    model.save_pretrained(tmp_path / "hf")
    _run(monkeypatch, import_hf, "--input", tmp_path / "hf", "--save", tmp_path / "imported")
    start = _as_flags(capsys.readouterr().out.splitlines()[0])

    document = torch.randint(0, 330, (RUN["--global-batch-size"] * SEQ_LENGTH + 1,)).tolist()
    data = {"--data-path": make_dataset(tmp_path, "document", [document], 330), "--mock-data": False}
    samples = torch.tensor(document).unfold(0, SEQ_LENGTH + 1, SEQ_LENGTH)
    with torch.no_grad():
        logits = model(samples[:, :-1]).logits
    assert float(logits.max()) < -15
    expected = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten()))

    run = RUN | data | {"--tokenizer-type": "NullTokenizer", "--vocab-size": 330, "--lr": 0.0, "--train-iters": 1}
    run |= {"--hidden-dropout": 0.0, "--attention-dropout": 0.0}
    load = tmp_path / "imported"
    for number, (processes, layout) in enumerate([(1, {}), (4, TP2_PP2)]):
        folder = tmp_path / str(number)
        place = {"--load": load, "--save": folder, "--tensorboard-dir": folder / "board"}
        succeed(folder / "log", processes, start | run | layout | place)
        assert scalars(folder / "board")["lm loss"] == [[1, pytest.approx(expected, rel=1e-5)]]
        load = folder  # saved under this layout, loaded under the next
    _run(monkeypatch, export_hf, "--load", load, "--output", tmp_path / "back")
    _assert_same_weights(tmp_path / "back", model)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").config.vocab_size == 336


def _lower_logits(model: Any) -> None:
    """Subtract some 35 from all logits: the final hidden state has a place that is always about 1."""
    head = model.get_output_embeddings()
    norm = model.base_model.ln_f if hasattr(model.base_model, "ln_f") else model.base_model.norm
    with torch.no_grad():
        if getattr(norm, "bias", None) is None:  # RMSNorm: its input's first place is large in every layer's residual
            model.base_model.embed_tokens.weight[:, 0] = 30.0
            norm.weight[0] = 1.0
            head.weight[:, 0] = -35.0 / 5.5
        else:
            norm.weight[0], norm.bias[0] = 0.0, 1.0
            head.weight[:, 0] = -35.0


def _refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tool: Any, *argv: Any) -> str:
    with pytest.raises(SystemExit) as ended:
        _run(monkeypatch, tool, *argv)
    assert ended.value.code == EXIT_CODE
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_another_architecture_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    config = BertConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    BertLMHeadModel(config).save_pretrained(tmp_path / "hf")
    capsys.readouterr()
    said = _refused(monkeypatch, capsys, import_hf, "--input", tmp_path / "hf", "--save", tmp_path / "save")
    assert "a bert model cannot be imported; use one of llama, " in said
    assert not (tmp_path / "save").exists()


def test_mistakes_are_one_line_and_leave_nothing_behind(
    tokenizer_flags: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    _hugging_face("llama", tokenizer_flags, tmp_path / "hf")
    _run(monkeypatch, import_hf, "--input", tmp_path / "hf", "--save", tmp_path / "save")
    there = sorted(tmp_path.rglob("*"))
    capsys.readouterr()

    def refused(tool: Any, **flags: Any) -> str:
        words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
        return _refused(monkeypatch, capsys, tool, *words)

    save, out = tmp_path / "save", tmp_path / "out"
    assert "--output is missing" in refused(export_hf, load=save)
    assert f"--output {save} exists" in refused(export_hf, load=save, output=save)
    below_a_file = tmp_path / "hf" / "config.json" / "out"
    assert f"--output {below_a_file}: cannot be written" in refused(export_hf, load=save, output=below_a_file)
    assert "latest_checkpointed_iteration.txt" in refused(export_hf, load=tmp_path / "hf", output=out)
    assert "iter_0000007" in refused(export_hf, load=save, ckpt_step=7, output=out)
    assert "--tokenizer-model" in refused(
        export_hf, load=save, output=out, tokenizer_type="SentencePieceTokenizer", tokenizer_model=tmp_path / "none"
    )
    assert "1001 tokens" in refused(export_hf, load=save, output=out, tokenizer_type="NullTokenizer", vocab_size=1000)
    assert f"--save {save}: holds checkpoints" in refused(import_hf, input=tmp_path / "hf", save=save)
    assert "no config.json" in refused(import_hf, input=tmp_path / "none", save=out)
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights["model.norm.weight"][1] = float("inf")
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    assert "norm.weight holds numbers that are not finite" in refused(import_hf, input=tmp_path / "hf", save=out)
    assert sorted(tmp_path.rglob("*")) == there


def test_an_import_beside_a_run_or_another_import_is_refused(
    tokenizer_flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Until its first save, a run has no tracker; resumed, it would take the imported model for its own."""
    _hugging_face("llama", tokenizer_flags, tmp_path / "hf")
    words = ["--input", str(tmp_path / "hf"), "--save", str(tmp_path / "save")]
    others, write = list[Finished](), import_hf.write_checkpoint

    def write_beside(*arguments: Any) -> None:
        others.append(Fork(lambda: import_hf.main(words)).finish())
        write(*arguments)

    monkeypatch.setattr(import_hf, "write_checkpoint", write_beside)
    import_hf.main(words)
    assert [other.returncode for other in others] == [2]
    assert others[0].stderr.startswith(f"error: --save {tmp_path / 'save'}: another run is writing there (")
    assert (tmp_path / "save" / "iter_0000001" / "metadata.json").is_file()


def test_a_full_disk_is_one_line_and_leaves_nothing(tokenizer_flags: dict[str, Any], tmp_path: Path):
    _hugging_face("llama", tokenizer_flags, tmp_path / "hf")
    there = sorted(tmp_path.rglob("*"))

    def on_a_full_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        import_hf.main(["--input", str(tmp_path / "hf"), "--save", str(tmp_path / "save")])

    finished = Fork(on_a_full_disk).finish()
    error = finished.stderr
    assert finished.returncode == EXIT_CODE and error.count("\n") == 1, error
    assert error.startswith(f"error: --save {tmp_path / 'save'}: cannot be written (")
    assert "make room, or give another folder" in error
    assert sorted(tmp_path.rglob("*")) == there
