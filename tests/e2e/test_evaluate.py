"""``megatron-dwm evaluate``: checkpoints on tasks that are made of a file, by lm-evaluation-harness."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron_dwm.analysis import in_loop_tasks
from megatron_dwm.analysis.local_tasks import LOCAL_TASKS, local_task, read_passages
from megatron_dwm.cli import evaluate, import_hf
from megatron_dwm.cli import pretrain as pretrain_command
from megatron_dwm.config.tasks import TasksConfig
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.corpora.preprocess import PreprocessConfig, preprocess
from megatron_dwm.data.hf_tokenizers import save_hf_tokenizer
from megatron_dwm.data.tokenizers import build_tokenizer
from megatron_dwm.errors import UserError
from megatron_dwm.model.continuations import continuation_likelihoods
from tests.e2e.launch import pretrain, records, succeed
from tests.small_runs import LANGUAGE_MODEL, TRAINING
from tests.unit.data.made_tokenizers import sentencepiece_model

ANIMALS = ["horse", "rabbit", "heron", "salmon", "beetle", "badger", "falcon", "otter", "weasel", "cricket"]
PLACES = ["river", "forest", "meadow", "valley", "harbor", "garden"]
ITEMS = 10


def write_story(path: Path) -> None:
    """Write documents with a title, two sentences and a definition each; what an animal does follows from its name."""
    with path.open("w") as file:
        for number in range(40):
            animal, place = ANIMALS[number % len(ANIMALS)], PLACES[(number // 2) % len(PLACES)]
            text = (
                f"On day {number} the {animal} left its home early and went down to the old {place}. "
                f"There the {animal} waited until the evening for the {ANIMALS[(number + 1) % len(ANIMALS)]}.\n\n"
                f"{animal} {number}: the animal that lives near the {place} all year"
            )
            file.write(json.dumps({"title": f"Day {number} of the {animal}", "text": text}) + "\n")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of text, an untrained model as a checkpoint, and one trained on that text."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_story(folder / "story.jsonl")
    settings = TokenizerConfig("SentencePieceTokenizer", sentencepiece_model(folder / "bpe.model"))
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=400,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=False,
        )
    )
    tokenizer = build_tokenizer(settings)
    for name in ("untrained", "trained"):
        model.save_pretrained(folder / name)
        save_hf_tokenizer(tokenizer, settings, folder / name)
        if name == "untrained":
            texts = [json.loads(line)["text"] for line in (folder / "story.jsonl").read_text().splitlines()]
            tokens = torch.tensor([tokenizer.tokenize(text)[:64] for text in texts])
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
            for _ in range(30):
                model(input_ids=tokens, labels=tokens).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    import_hf.main(["--input", str(folder / "untrained"), "--save", str(folder / "run")])
    return folder


def evaluated(workplace: Path, *arguments: str | Path) -> dict[str, Any]:
    """Run the command and return what it wrote."""
    evaluate.main([str(word) for word in (*arguments, "--output", workplace / "out", "--limit", ITEMS)])
    assert (workplace / "out/evaluation.png").read_bytes().startswith(b"\x89PNG")
    document: dict[str, Any] = json.loads((workplace / "out/evaluation.json").read_text())
    return document


def test_a_checkpoint_and_hugging_face_folders_side_by_side(workplace: Path, capsys: pytest.CaptureFixture[str]):
    run, untrained, trained = workplace / "run/iter_0000001", workplace / "untrained", workplace / "trained"
    text = ["--task-text", workplace / "story.jsonl"]
    document = evaluated(workplace, workplace / "run", untrained, trained, "--tasks", *LOCAL_TASKS, *text)
    first, same, better = document["checkpoints"]
    assert (first["checkpoint"], first["run"], first["iteration"]) == (str(run), str(workplace / "run"), 1)
    assert first["results"] == same["results"]  # its export is the model that it was imported from

    by_task = {(result["task"], result["num_fewshot"]): result for result in better["results"]}
    assert by_task.keys() == {(task, count) for task in LOCAL_TASKS for count in (0, 2)}
    for (task, _), result in by_task.items():
        assert result["samples"] == ITEMS and result["metrics"]["acc"]["stderr"] is not None
        change = result["difference_from_first"]["answer_nll"]
        assert change["mean"] < -5 * change["stderr"] < 0  # it has learnt these very texts
        assert ("choice_nll" in result["metrics"]) == (task != "local-cloze")
    cloze = by_task["local-cloze", 0]["metrics"]["answer_nll"]
    assert cloze == pytest.approx(answer_nll(trained, workplace / "story.jsonl"), rel=1e-4)

    printed = capsys.readouterr().out
    assert f"local-title, 2 examples, {ITEMS} items" in printed
    assert f"{cloze['mean']:.3f} ± {cloze['stderr']:.3f} (-" in printed


def test_a_task_of_the_user(workplace: Path):
    rows = [{"question": "The sun", "options": ["rose", "sank"], "right": n % 2} for n in range(ITEMS)]
    (workplace / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (workplace / "tasks").mkdir()
    task = {
        "task": "own-sun",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{workplace}/rows.jsonl"}, "cache_dir": f"{workplace}/cache"},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc"}],
    }
    (workplace / "tasks/sun.yaml").write_text(json.dumps(task))  # JSON is YAML too
    words = ["--tasks", "own-sun", "--task-path", workplace / "tasks", "--num-fewshot", 0]
    (result,) = evaluated(workplace, workplace / "trained", *words)["checkpoints"][0]["results"]
    assert (result["task"], result["samples"]) == ("own-sun", ITEMS)
    assert result["metrics"]["acc"]["mean"] == 0.5  # the same answer to each question, which every second time is right


def signaled_in_tasks() -> None:
    """The command whose last rank gets a signal when it computes likelihoods for the first time."""
    calls = []

    def signaled(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 1 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return continuation_likelihoods(*args)

    in_loop_tasks.continuation_likelihoods = signaled
    pretrain_command.main()


def test_a_run_evaluates_its_model_on_tasks(workplace: Path, tmp_path: Path):
    """What it finds is what ``evaluate`` finds of its checkpoint, and the run is as it is without."""
    tokenizer = {"--tokenizer-type": "SentencePieceTokenizer", "--tokenizer-model": workplace / "bpe.model"}
    story, prefix = str(workplace / "story.jsonl"), str(tmp_path / "story")
    settings = TokenizerConfig("SentencePieceTokenizer", str(workplace / "bpe.model"))
    preprocess(PreprocessConfig(input=[story], output_prefix=prefix, append_eod=True), settings)
    tasks = {"--eval-tasks": ["local-cloze", "local-title"], "--eval-tasks-text": story, "--eval-tasks-limit": ITEMS}
    flags: dict[str, Any] = {**LANGUAGE_MODEL, **TRAINING, **tokenizer, "--train-iters": 6, "--dwm-mode": "off"}
    flags |= {"--train-data-path": f"{prefix}_text_document", "--tensor-model-parallel-size": 2}
    flags |= {"--seq-length": 64, "--max-position-embeddings": 64, "--metrics-jsonl": tmp_path / "plain.jsonl"}
    run = {"--save": tmp_path / "run", "--save-interval": 4, "--tensorboard-dir": tmp_path / "board"}
    run |= {"--metrics-jsonl": tmp_path / "with.jsonl", "--eval-tasks-interval": 4}
    succeed(tmp_path / "plain", 2, flags)
    run |= {"--load": tmp_path / "run", "--exit-signal-handler": True, "--eval-tasks-num-fewshot": [0, 2]}
    stopped = pretrain(tmp_path / "with", 2, {**flags, **tasks, **run}, main=signaled_in_tasks)
    assert stopped.codes == [0, 0] and "SIGUSR1 interrupts tasks of iteration 4" in stopped.output[0], stopped.text
    assert not records(tmp_path / "with.jsonl", "tasks")
    finished = succeed(tmp_path / "with", 2, {**flags, **tasks, **run})
    losses = [[r["lm_loss"] for r in records(tmp_path / name, "train")] for name in ("plain.jsonl", "with.jsonl")]
    assert losses[0] == losses[1]

    found = records(tmp_path / "with.jsonl", "tasks")
    assert [record["iteration"] for record in found] == [4] * 4 + [6] * 4
    text = ["--tasks", *tasks["--eval-tasks"], "--task-text", story]
    (checkpoint,) = evaluated(tmp_path, tmp_path / "run/iter_0000004", *text)["checkpoints"]
    for record, result in zip(found, checkpoint["results"], strict=False):
        for name in ("task", "num_fewshot", "samples"):
            assert record[name] == result[name]
        assert record["metrics"].keys() == result["metrics"].keys() >= {"acc", "answer_nll"}
        for name, value in result["metrics"].items():
            assert record["metrics"][name] == pytest.approx(value, rel=1e-4), name
    line = "dwm tasks at iteration 4 | local-cloze, 0 examples, 10 items | acc 0."
    assert line in finished.output[1]
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert [event.step for event in events.Scalars("dwm/tasks/local-title/2-shot choice_nll")] == [4, 6]


def answer_nll(folder: Path, text: Path) -> dict[str, float]:
    """The mean and standard error of the cloze's answers, computed by the model itself."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    task = local_task("local-cloze", read_passages([str(text)], []), ITEMS, seed=1234)
    found = []
    for row in task["custom_dataset"]()["test"]:
        query = tokenizer(row["query"], add_special_tokens=False)["input_ids"]
        whole = tokenizer(f"{row['query']} {row['answer']}", add_special_tokens=False)["input_ids"]
        assert whole[: len(query)] == query
        with torch.no_grad():
            logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        places = range(len(query) - 1, len(whole) - 1)
        found.append(-sum(float(logs[place, whole[place + 1]]) for place in places))
    values = torch.tensor(found, dtype=torch.float64)
    return {"mean": float(values.mean()), "stderr": float(values.std() / math.sqrt(len(values)))}


CLOZE = ["--tasks", "local-cloze", "--task-text", "{story}"]
BAD_MODELS = ("cut", "lacking", "infinite", "small", "short")


def write_bad_models(workplace: Path) -> None:
    """Write folders whose weights are cut off, lack a tensor or are not finite, and models of few tokens or places."""
    if (workplace / "short").exists():
        return
    for name in BAD_MODELS:
        shutil.copytree(workplace / "untrained", workplace / name)
    weights = {name: load_file(workplace / "untrained/model.safetensors") for name in ("lacking", "infinite", "small")}
    del weights["lacking"]["model.norm.weight"]
    weights["infinite"]["model.norm.weight"][0] = math.inf
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights["small"][name] = weights["small"][name][:100].clone()
    for name, tensors in weights.items():
        save_file(tensors, workplace / name / "model.safetensors", metadata={"format": "pt"})
    file = workplace / "cut/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for name, value in (("small", {"vocab_size": 100}), ("short", {"max_position_embeddings": 4})):
        config = json.loads((workplace / name / "config.json").read_text())
        (workplace / name / "config.json").write_text(json.dumps(config | value))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere", "--tasks", "local-cloze"], "--checkpoints nowhere: no config.json of Hugging Face and no latest_"),
        (["{untrained}"], "--tasks is missing; give at least one"),
        (["{untrained}", "--tasks", "local-riddle"], "--tasks local-riddle: no such local task; give one of local-c"),
        (["{untrained}", "--tasks", "local-cloze", "--num-fewshot", "-1"], "--num-fewshot -1: give numbers of at"),
        (["{untrained}", "--tasks", "local-cloze", "--task-text", "no.txt"], "--task-text no.txt: no such file; give"),
        (["{untrained}", "--tasks", "local-title", "--task-text", "{title}"], "has 1 titles with a sentence below th"),
        (["{untrained}", "--tasks", "local-title", "--task-text", "{bad}"], 'line 1: no JSON object with the key "te'),
        (["{untrained}", "--tasks", "arc", "--task-text", "{title}"], "--task-text and --task-packages are for local"),
        (["{bad_model}", "--tasks", "local-cloze", "--task-text", "{story}"], "bad_model: its tokenizer does not load"),
        (["{untrained}", *CLOZE, "--task-path", "none"], "--task-path none: no such folder; give the folder of a"),
        (["{untrained}", *CLOZE, "--num-fewshot", "9"], "--num-fewshot 9: local tasks have 8 examples; give fewer"),
        (["{untrained}", *CLOZE, "--output", "{story}"], "story.jsonl: cannot be written (Not a directory); give an"),
        (["{cut}", *CLOZE], "cut: cannot be loaded (Error while deserializing header"),
        (["{lacking}", *CLOZE], "lacking: its weights lack model.norm.weight; give a whole model"),
        (["{infinite}", *CLOZE], "infinite: its weights are not finite; give another"),
        (["{small}", *CLOZE], "small: its tokenizer has 400 tokens and its model only 100; put the tokenizer"),
        (["{short}", *CLOZE], "tokens and the model's context 4; leave its task out of --tasks, or give another model"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], line: str, workplace: Path, capsys: pytest.CaptureFixture[str]):
    write_bad_models(workplace)
    (workplace / "title.txt").write_text("A Title\n\nOne sentence that stands below this title.\n")
    (workplace / "bad.jsonl").write_text('{"content": "text"}\n')
    (workplace / "bad_model").mkdir(exist_ok=True)
    (workplace / "bad_model/config.json").write_text("{}")
    places = {"title": "title.txt", "bad": "bad.jsonl", "story": "story.jsonl"}
    names = {name: workplace / places.get(name, name) for name in ("untrained", "bad_model", *BAD_MODELS, *places)}
    words = [word.format(**names) for word in arguments]
    output = [] if "--output" in words else ["--output", str(workplace / "none")]
    with pytest.raises(SystemExit) as end:
        evaluate.main([*words, *output])
    error = capsys.readouterr().err.strip()
    assert end.value.code == 2 and line in error and len(error.splitlines()) == 1
    assert not (workplace / "none").exists()


def test_an_answer_without_room_names_the_checkpoint(workplace: Path, tmp_path: Path, capsys):
    """And not the temporary folder of its export."""
    write_bad_models(workplace)
    import_hf.main(["--input", str(workplace / "short"), "--save", str(tmp_path / "run")])
    words = [str(tmp_path / "run"), *CLOZE, "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        evaluate.main([word.format(story=workplace / "story.jsonl") for word in words])
    assert f"error: --checkpoints {tmp_path / 'run' / 'iter_0000001'}: the answer " in capsys.readouterr().err


def test_a_checkpoint_that_fails_leaves_the_results_of_those_before_it(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_bad_models(workplace)
    places = [str(workplace / name) for name in ("untrained", "lacking")]
    text = ["--tasks", "local-title", "--task-text", str(workplace / "story.jsonl"), "--num-fewshot", "0"]
    with pytest.raises(SystemExit):
        evaluate.main([*places, *text, "--limit", "2", "--output", str(tmp_path / "out")])
    (kept,) = json.loads((tmp_path / "out/evaluation.json").read_text())["checkpoints"]
    assert kept["checkpoint"] == places[0]
    printed = capsys.readouterr().err.splitlines()  # no progress bars, which this is no terminal for
    assert printed == [f"error: --checkpoints {places[1]}: its weights lack model.norm.weight; give a whole model"]


def test_an_answer_without_room_ends_a_run_before_it_starts(workplace: Path):
    flags = TasksConfig(1, ["local-title"], [str(workplace / "story.jsonl")])
    tokenizer = AutoTokenizer.from_pretrained(workplace / "untrained")
    assert in_loop_tasks._evaluator(flags, tokenizer, 64)
    with pytest.raises(UserError, match=r"--seq-length 8: the answer 'On day .* leave its task out of --eval-tasks"):
        in_loop_tasks._evaluator(flags, tokenizer, 8)
