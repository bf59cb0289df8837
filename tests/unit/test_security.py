"""Models and tokenizers that name code do not run it; docs/security.md names the tests that plant files."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from megatron_dwm.analysis.task_evaluation import TaskEvaluator
from megatron_dwm.config.checkpoint_args import read_arguments
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.corpora.readers import Reader
from megatron_dwm.data.hf_tokenizers import fingerprint_of_folder, save_hf_tokenizer, vocabulary_fingerprint
from megatron_dwm.data.tokenizers import build_tokenizer
from megatron_dwm.errors import UserError
from megatron_dwm.model.hf_folder import read_hugging_face
from megatron_dwm.training.torch_format import open_torch_checkpoint
from megatron_dwm.weighting.weighter_folder import SampleTokens, read_weighter_folder
from tests.paths import ROOT
from tests.small_runs import GPT, IN_PROCESS, parse_flags

SETTINGS = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=30)
TOKENIZER = build_tokenizer(SETTINGS)
SIZES = {"vocab_size": 31, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}


def load_weighter(folder: Path) -> Any:
    samples = SampleTokens(8, 31, 30, vocabulary_fingerprint(TOKENIZER, SETTINGS), str)
    return read_weighter_folder("--dwm-load", str(folder), samples, seed=1).model


@pytest.fixture
def weighter(tmp_path: Path) -> Path:
    """A folder as others may give it, without a manifest."""
    folder = tmp_path / "weighter"
    LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1)).save_pretrained(folder)
    save_hf_tokenizer(TOKENIZER, SETTINGS, folder)
    return folder


def plant_code(folder: Path, file: str, changes: dict[str, Any], proof: Path) -> None:
    """Let ``file`` name a module beside it that makes the folder ``proof`` when it is imported."""
    (folder / "planted.py").write_text(f"import os\nos.mkdir({str(proof)!r})\n")
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**values, **changes}))


AUTO_MAP = {
    "AutoConfig": "planted.Config",
    "AutoModelForSequenceClassification": "planted.Model",
    "AutoModelForCausalLM": "planted.Model",
}


@pytest.mark.parametrize("model_type", ["llama", "a_type_of_their_own"])
def test_code_that_a_models_configuration_names_is_not_run(model_type: str, weighter: Path, tmp_path: Path):
    """A model type that transformers knows is loaded with its class; another one is refused."""
    proof, changes = tmp_path / "ran", {"model_type": model_type, "auto_map": AUTO_MAP}
    plant_code(weighter, "config.json", changes, proof)
    language_model = tmp_path / "language_model"
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(language_model)
    plant_code(language_model, "config.json", changes, proof)
    if model_type == "llama":
        assert isinstance(load_weighter(weighter), LlamaForSequenceClassification)
        read_hugging_face(language_model)
    else:
        with pytest.raises(UserError, match=f"--dwm-load {weighter}: "):
            load_weighter(weighter)
        with pytest.raises(UserError, match=f"--input {language_model}: cannot be loaded"):
            read_hugging_face(language_model)
    assert not proof.exists()


def test_code_that_a_tokenizers_configuration_names_is_not_run(weighter: Path, tmp_path: Path):
    changes = {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": [None, "planted.Tokenizer"]}}
    plant_code(weighter, "tokenizer_config.json", changes, tmp_path / "ran")
    with pytest.raises(UserError, match="its tokenizer does not load"):
        fingerprint_of_folder(weighter)
    assert not (tmp_path / "ran").exists()


class Planted:
    """An object whose unpickling makes the folder ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_in_place_of_weights_is_not_run(weighter: Path, tmp_path: Path):
    (weighter / "model.safetensors").unlink()
    torch.save({"score.weight": Planted(tmp_path / "ran")}, weighter / "pytorch_model.bin")
    with pytest.raises(UserError, match=f"--dwm-load {weighter}: cannot be loaded"):
        load_weighter(weighter)
    assert not (tmp_path / "ran").exists()


def test_a_model_that_is_evaluated_does_not_run_code_of_its_own(weighter: Path, tmp_path: Path):
    tasks = TaskEvaluator([], None, num_fewshot=[0], limit=1, batch_size=1, seed=1)
    planted = {
        "config.json": {"model_type": "a_type_of_their_own", "auto_map": AUTO_MAP},
        "tokenizer_config.json": {
            "tokenizer_class": "Theirs",
            "auto_map": {"AutoTokenizer": [None, "planted.Tokenizer"]},
        },
    }
    for file, changes in planted.items():
        whole = (weighter / file).read_text()
        plant_code(weighter, file, changes, tmp_path / "ran")
        refused = f"^--checkpoints {weighter}: (its tokenizer does not load|cannot be loaded)"
        with pytest.raises(UserError, match=refused):
            tasks.evaluate(weighter)
        (weighter / file).write_text(whole)
    assert not (tmp_path / "ran").exists()


def test_a_task_that_is_not_named_runs_no_code(tmp_path: Path):
    """A task that is named does: it is a program, as docs/security.md says."""
    (tmp_path / "rows.jsonl").write_text('{"question": "The sun"}\n')
    task = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{tmp_path}/rows.jsonl"}, "cache_dir": f"{tmp_path}/cache"},
        "output_type": "loglikelihood",
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    for name, target in (("own", '" rose"'), ("planted", "!function planted.Model")):
        text = json.dumps({**task, "task": name})[:-1]
        (tmp_path / f"{name}.yaml").write_text(f"{text}, doc_to_target: {target}}}\n")
    (tmp_path / "config.json").write_text("{}")
    plant_code(tmp_path, "config.json", {}, tmp_path / "ran")
    for name, is_run in (("own", False), ("planted", True)):
        options: dict[str, Any] = {"num_fewshot": [0], "limit": 1, "batch_size": 1, "seed": 1}
        with contextlib.suppress(UserError, AttributeError):  # of the module that has made its folder
            TaskEvaluator([name], None, **options, task_path=[str(tmp_path)]).kinds()
        assert (tmp_path / "ran").exists() == is_run


def test_a_pickle_in_a_checkpoint_of_the_older_format_is_not_run(tmp_path: Path):
    path = tmp_path / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
    path.parent.mkdir(parents=True)
    torch.save({"args": Planted(tmp_path / "ran"), "model": {}}, path)
    config = parse_flags({**GPT, **IN_PROCESS, "--dwm-mode": "off", "--load": tmp_path})
    with pytest.raises(UserError, match=r"model_optim_rng\.pt cannot be read"):
        read_arguments(path.parents[1])
    with pytest.raises(UserError, match=r"is damaged: model_optim_rng\.pt cannot be read"):
        open_torch_checkpoint(path, config.checkpoint, config.parallel, config.sizes, 0)
    assert not (tmp_path / "ran").exists()
    for content, said in (([1], "no arguments"), ({"args": Namespace(), "model": 3}, "no model")):
        torch.save(content, path)
        with pytest.raises(UserError, match=f"is damaged: .* holds {said}"):
            open_torch_checkpoint(path, config.checkpoint, config.parallel, config.sizes, 0)


def test_a_pickle_in_the_description_of_a_parquet_column_is_not_run(tmp_path: Path):
    """Earlier versions of pyarrow made a column's type by it."""
    description = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Planted(tmp_path / "ran")),
    }
    field = pyarrow.field("text", pyarrow.string(), metadata=description)
    table = pyarrow.table([pyarrow.array(["a text"])], schema=pyarrow.schema([field]))
    pyarrow.parquet.write_table(table, tmp_path / "texts.parquet")
    (record,) = Reader([str(tmp_path / "texts.parquet")], ["text"])
    assert record.content == {"text": "a text"} and not (tmp_path / "ran").exists()


def test_every_test_that_the_page_names_exists():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "security.md").read_text()))
    written = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert len(named) > 10 and named <= written, named - written
