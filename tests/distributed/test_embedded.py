"""Weighting in other programs' loops: the examples of docs/embedding.md, as they are.

In their data every second sample is of the target's kind, the others are noise. Uniform weights, of a weighter whose
learning rate is 0, are plain training bit for bit, although outer updates are made.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch.nn.utils.rnn import pad_sequence

from megatron_dwm.errors import UserError
from megatron_dwm.weighting.embedded import EmbeddedWeighting, WeighterSize
from tests.distributed.harness import run_distributed
from tests.paths import ROOT

STEPS, FEW_STEPS = 16, 6


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports an example by the name of its file, as a program in its folder would."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    yield importlib.import_module
    for name in [name for name in sys.modules if name.startswith("embed_")]:
        del sys.modules[name]


def own_lines(path: Path) -> int:
    """Lines of a program without imports, docstrings and comments."""
    tree, left_out = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            left_out |= {*range(node.lineno, node.end_lineno + 1)}
        elif isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            left_out |= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    lines = enumerate(path.read_text().splitlines(), start=1)
    return sum(bool(line.strip()) and number not in left_out for number, line in lines)


def blocks(heading: str) -> list[str]:
    """The programs below a heading of docs/embedding.md."""
    section = (ROOT / "docs/embedding.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_the_examples_are_short_and_the_page_quotes_them():
    for name in ("torch", "trainer", "megatron"):
        assert own_lines(ROOT / f"examples/embed_{name}.py") < 60
    (loop,) = blocks("A plain PyTorch loop")
    program = {line.strip() for line in (ROOT / "examples/embed_torch.py").read_text().splitlines()}
    assert all(line.strip() in program for line in loop.splitlines())


def test_the_page_computes_alignments(capsys: pytest.CaptureFixture[str]):
    (program,) = blocks("Alignments alone")
    torch.manual_seed(0)
    exec(program, {})
    printed = capsys.readouterr().out
    assert printed.startswith("tensor([") and "dtype=torch.float64" in printed


def uniform(settings: Any) -> Any:
    """The same settings for a weighter that never learns."""
    return dataclasses.replace(settings, dwm_lr=0.0)


def assert_target_counts_more(weights: torch.Tensor) -> None:
    """Every sample of the target's kind has a larger weight than every sample of noise."""
    assert float(weights[::2].min()) > float(weights[1::2].max())
    assert float(weights[::2].mean()) > 1.5 * float(weights[1::2].mean())


def test_a_plain_loop_with_its_state_kept(examples: Any):
    example = examples("embed_torch")
    _, weights = example.train(STEPS)
    assert_target_counts_more(weights)
    assert float(weights.mean()) == pytest.approx(1)
    losses, _ = example.train(STEPS, uniform(example.SETTINGS))
    plain, _ = example.train(STEPS, settings=None)
    assert losses == plain


def test_a_weighter_goes_on_from_its_state(examples: Any):
    example = examples("embed_torch")

    def started() -> tuple[Any, Any, EmbeddedWeighting]:
        torch.manual_seed(0)
        model = example.TinyModel()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        targets = example.target_batches(16, seed=2)
        weighting = EmbeddedWeighting.for_module(
            model, optimizer, targets, WeighterSize(example.VOCABULARY), train_iters=8, settings=example.SETTINGS
        )
        return model, optimizer, weighting

    model, optimizer, first = started()
    batch = next(example.mixed_batches(16, seed=1))
    for _ in range(4):
        first.before_step()
        (first.weigh(batch) * example.next_token_losses(model, batch)).mean().backward()
        optimizer.step()
        result = first.after_step(batch)
    assert result is not None and result.alignments.shape == (16,)
    _, _, second = started()
    assert torch.equal(second.weigh(batch), torch.ones(16))
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.weigh(batch), first.weigh(batch)) and second.iteration == 4
    assert not torch.equal(first.weigh(batch), torch.ones(16))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dwm_mode": "off"}, "dwm_mode off: only bilevel"),
        ({"dwm_target_momentum": 0.6}, "dwm_target_momentum 0.6: only"),
        ({"dwm_source_offsets": True}, "dwm_source_offsets: only"),
    ],
)
def test_what_needs_pretrain_dwm_is_refused(change: dict[str, Any], said: str, examples: Any):
    example = examples("embed_torch")
    model, settings = example.TinyModel(), dataclasses.replace(example.SETTINGS, **change)
    with pytest.raises(UserError, match=said):
        EmbeddedWeighting.for_module(
            model, None, iter([]), WeighterSize(example.VOCABULARY), train_iters=8, settings=settings
        )


def in_trainer(example: ModuleType, steps: int, settings: Any) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    """The losses that a Trainer logs, its model at the end, and the last weights."""
    trainer, callback = example.train(steps, settings)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, dict(trainer.model.state_dict()), None if callback is None else callback.weights


@pytest.mark.parametrize("processes", [1, 2])
def test_a_trainer_by_a_callback(examples: Any, processes: int):
    example = examples("embed_trainer")

    def trainings() -> Any:
        plainly = [in_trainer(example, FEW_STEPS, settings) for settings in (uniform(example.SETTINGS), None)]
        return [in_trainer(example, STEPS, example.SETTINGS), *plainly]

    for weighted, unweighted, plain in run_distributed(trainings, processes):
        assert_target_counts_more(weighted[2])
        assert torch.equal(unweighted[2], torch.ones(16))
        # transformers adds the token losses up in another order for the log; the gradients are those of the same terms.
        assert len(plain[0]) == FEW_STEPS and unweighted[0] == pytest.approx(plain[0], rel=1e-6)
        assert all(torch.equal(unweighted[1][name], value) for name, value in plain[1].items())
        assert not all(torch.equal(weighted[1][name], value) for name, value in plain[1].items())


def padded_rows(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch of rows, without the loss of their first two tokens and of the padding."""
    tokens = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    labels = tokens.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def test_a_trainer_with_samples_of_different_lengths_in_microbatches(examples: Any, tmp_path: Path):
    example = examples("embed_trainer")
    batches = example.mixed_batches(16, seed=1)
    lengths = torch.randint(6, example.LENGTH, (2 * STEPS, 16), generator=torch.Generator().manual_seed(3)).tolist()
    rows = [
        row[:n] for batch, sizes in zip(batches, lengths, strict=False) for row, n in zip(batch, sizes, strict=True)
    ]

    def training(settings: Any) -> tuple[float, torch.Tensor]:
        torch.manual_seed(0)
        config = example.GPT2Config(vocab_size=32, n_positions=16, n_embd=32, n_layer=1, n_head=2)
        arguments = example.TrainingArguments(
            str(tmp_path), max_steps=STEPS, per_device_train_batch_size=8, gradient_accumulation_steps=2,
            learning_rate=1e-2, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
            remove_unused_columns=False, train_sampling_strategy="sequential",
        )  # fmt: skip
        callback = None
        if settings is not None:
            callback = example.WeightingCallback(example.target_batches(16, seed=2), example.LENGTH, settings)
        trainer = example.Trainer(
            example.GPT2LMHeadModel(config), arguments, data_collator=padded_rows, train_dataset=rows,
            eval_dataset=rows[:19], callbacks=[callback] if callback else [],
            compute_loss_func=callback.loss if callback else None,
        )  # fmt: skip
        trainer.train()
        return trainer.evaluate()["eval_loss"], torch.empty(0) if callback is None else callback.weights

    settings = example.SETTINGS
    for weighted, unweighted, plain in run_distributed(
        lambda: [training(given) for given in (settings, uniform(settings), None)], 2
    ):
        assert_target_counts_more(weighted[1])
        assert unweighted[0] == pytest.approx(plain[0], rel=1e-6) and weighted[0] != pytest.approx(plain[0], rel=1e-3)


def test_samples_of_another_length_and_batches_of_unequal_sizes_are_refused(examples: Any):
    example = examples("embed_torch")

    def refusals() -> list[str]:
        rank, found = torch.distributed.get_rank(), []
        for samples, lengths in ((16 + rank, [16] * 8), (16, [16] * 4 + [15] * 4)):
            torch.manual_seed(0)
            model = example.TinyModel()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            targets, size = example.target_batches(16, seed=2), WeighterSize(example.VOCABULARY)
            weighting = EmbeddedWeighting.for_module(
                model, optimizer, targets, size, train_iters=8, settings=example.SETTINGS
            )
            with pytest.raises(UserError) as refused:
                for batch, length in zip(example.mixed_batches(samples, seed=1), lengths, strict=False):
                    weighting.before_step()
                    weights = weighting.weigh(batch[:, :length])
                    (weights * example.next_token_losses(model, batch[:, :length])).mean().backward()
                    optimizer.step()
                    weighting.after_step(batch[:, :length])
            found.append(str(refused.value))
        return found

    for samples, lengths in run_distributed(refusals, 2):
        assert samples.startswith("batches have 16 and 17 samples; pass batches of one size on all processes")
        assert lengths.startswith("batches have 15 and 16 tokens per sample;")


def test_a_loop_over_megatron_core(examples: Any):
    example = examples("embed_megatron")

    def trainings() -> Any:
        results = []
        for steps, settings in ((STEPS, example.SETTINGS), (FEW_STEPS, uniform(example.SETTINGS)), (FEW_STEPS, None)):
            results.append(example.train(steps, 2, 2, settings))
            parallel_state.destroy_model_parallel()
        return results

    for weighted, unweighted, plain in run_distributed(trainings, 4):
        assert_target_counts_more(weighted[1])
        assert unweighted[0] == plain[0] and len(plain[0]) == FEW_STEPS
        assert torch.equal(unweighted[1], torch.ones(16))
