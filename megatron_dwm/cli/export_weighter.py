"""Write the weighter of a checkpoint as a Hugging Face folder with a model card.

A run exports its weighter at the end of each stage and with each checkpoint; this exports the weighter of any
checkpoint, with a model card that states what its run has gained. The folder is loaded again and compared with the
checkpoint before it appears under its final name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_dwm.cli.command import run_command
from megatron_dwm.cli.saved_run import ExportArguments, checkpoint_folder, find_tokenizer
from megatron_dwm.config.checkpoint_args import read_arguments
from megatron_dwm.config.flags import flag, parse
from megatron_dwm.config.saved_config import saved_config
from megatron_dwm.errors import UserError, reported_write_failure, with_article


@dataclass(frozen=True)
class ExportWeighterConfig(ExportArguments):
    """Export."""

    baseline: str | None = flag(
        None, "A run with uniform weights (its --save folder), with which the card compares this run."
    )


def export(config: ExportWeighterConfig) -> str:
    """Write the folder named in ``config``.

    Returns:
        a line that describes what was written.

    Raises:
        UserError: no such checkpoint, or it holds no weighter.
    """
    from megatron_dwm.data.blend import data_paths
    from megatron_dwm.data.hf_tokenizers import fingerprint_of, to_hf_tokenizer
    from megatron_dwm.data.tokenizers import build_tokenizer
    from megatron_dwm.model.hf_weights import require_finite
    from megatron_dwm.training.checkpoint_folders import iteration_of
    from megatron_dwm.training.saved_checkpoint import open_checkpoint, reported_damage
    from megatron_dwm.weighting.export import export_weighter, run_facts, weighter_facts
    from megatron_dwm.weighting.inputs import run_stages
    from megatron_dwm.weighting.saved_state import check_weighter_state
    from megatron_dwm.weighting.weighter import model_digest
    from megatron_dwm.weighting.weighter_init import weighter_model_from_json

    folder = checkpoint_folder(config.load, config.ckpt_step)
    state = open_checkpoint(folder).read_dwm_state()
    if not state.get("weighter"):
        raise UserError(
            f"--load {folder}: the checkpoint holds no weighter (weighting was off, or had not begun); give a later "
            "--ckpt-step, or a run with --dwm-mode bilevel or frozen"
        )
    run = saved_config(find_tokenizer(read_arguments(folder), config.load))
    iteration = iteration_of(folder)
    effect = measured_effect(config, iteration)
    with reported_damage(folder):
        check_weighter_state(state)
        model = weighter_model_from_json(state["weighter_config"])
        model.load_state_dict(state["weighter"])
    for name, param in model.named_parameters():
        require_finite(f"--load {folder}: the weighter's {name}", param)
    if fingerprint := state.get("weighter_tokenizer"):
        tokenizer = _separate_tokenizer(Path(run.weighting.dwm_load or run.weighting.dwm_init_from), fingerprint)
    else:
        tokenizer = to_hf_tokenizer(build_tokenizer(run.tokenizer), run.tokenizer)
        tokenizer.model_max_length = run.model.seq_length
    paths = data_paths(run.data, run.weighting.dwm_target_data_path if run.weighting.needs_target else None)
    stage = run_stages(run.weighting, run.train_iters).stage(iteration)
    special = bool(fingerprint) or run.tokenizer.tokenizer_hf_include_special_tokens
    facts = weighter_facts(iteration, stage, sum(p.numel() for p in model.parameters()), model_digest(model))
    facts |= run_facts(
        run.weighting,
        run.model,
        run.train_iters,
        run.sizes.global_batch_size,
        paths,
        fingerprint_of(tokenizer),
        adds_special_tokens=special,
    )
    check = partial(_check_loads, model=model, fingerprint=fingerprint_of(tokenizer))
    with reported_write_failure("--output", config.output):
        export_weighter(model, tokenizer.save_pretrained, Path(config.output), facts, effect=effect, check=check)
    kind, count = with_article(type(model).__name__), facts["weighter_parameters"]
    return (
        f"{config.output}: wrote {kind} of {count:,} parameters and "
        f"{tokenizer.model_max_length} tokens, from {folder}; loaded again, its weights and scores are the checkpoint's"
    )


def _separate_tokenizer(started_from: Path, fingerprint: str) -> Any:
    """Return the Hugging Face tokenizer of a weighter that does not have the run's.

    Args:
        started_from: the folder that the weighter was started from.
        fingerprint: of the weighter's tokenizer.

    Raises:
        UserError: the folder is gone, or has another tokenizer now.
    """
    from megatron_dwm.data.hf_tokenizers import fingerprint_of
    from megatron_dwm.data.tokenizer_folder import load_tokenizer_folder

    if not (started_from / "config.json").is_file():  # a run's exports, one for each stage
        started_from = next(iter(sorted(started_from.glob("iter_*"))), started_from)
    tokenizer = load_tokenizer_folder(started_from)
    if fingerprint_of(tokenizer) != fingerprint:
        raise UserError(
            f"{started_from}: its tokenizer is not the one that the weighter was started with; restore that folder"
        )
    return tokenizer


def _check_loads(folder: Path, *, model: Any, fingerprint: str) -> None:
    """Load the folder again, and compare it with the checkpoint's weighter.

    Raises:
        UserError: it cannot be loaded, or differs from the checkpoint's weighter.
    """
    from transformers import AutoModelForSequenceClassification

    from megatron_dwm.data.hf_tokenizers import fingerprint_of_folder
    from megatron_dwm.weighting.export_manifest import verify_export

    verify_export("--output", folder)
    loaded = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    expected, found = model.state_dict(), loaded.state_dict()
    different = [name for name in expected if name not in found or not torch.equal(found[name], expected[name])]
    sample = torch.arange(min(8, model.config.vocab_size))[None]
    with torch.no_grad():
        scores = [which.eval()(input_ids=sample).logits for which in (model, loaded)]
    if different or not torch.equal(*scores) or fingerprint_of_folder(folder) != fingerprint:
        raise UserError(f"--output {folder}: loaded again, it differs from the checkpoint's weighter; export it again")


def measured_effect(config: ExportWeighterConfig, iteration: int) -> str | None:
    """Return the results in the records of the run and of the baseline, in Markdown; None without records.

    Args:
        iteration: the checkpoint's; later records are not results of its weighter.

    Raises:
        UserError: the baseline is not a run, or cannot be compared.
    """
    from megatron_dwm.analysis.comparison import gain_line
    from megatron_dwm.analysis.records import read_run, records_file
    from megatron_dwm.analysis.shares import learned_shares

    if not records_file(Path(config.load)).is_file():
        if config.baseline is not None:
            raise UserError(
                f"--baseline {config.baseline}: --load {config.load} has no metrics.jsonl to compare with it; leave "
                "--baseline out"
            )
        return None
    run = read_run(Path(config.load)).until(iteration)
    lines = []
    if config.baseline is not None:
        gain = gain_line(read_run(Path(config.baseline)).until(iteration), run)
        lines.append(f"* Against a run with uniform weights: {gain}. One run each: another seed gives other results.")
    evaluations = run.evaluated("valid")
    if evaluations:
        lines.append(f"* Loss of {evaluations[-1]['lm_loss']:.4f} at iteration {evaluations[-1]['iteration']}.")
    sizes = [step["effective_sample_size"] for step in run.steps if step.get("effective_sample_size") is not None]
    if sizes:
        lines.append(f"* Effective sample size at iteration {iteration}: {sizes[-1]:.2f} of the batch.")
    if any(step.get("weight_by_source") for step in run.steps):
        overall = learned_shares(run)[0]
        shares = ", ".join(f"`{source}` {share:.3f}" for source, share in overall.mean.items())
        lines.append(f"* Shares that the weights gave the sources, over {overall.iterations} iterations: {shares}.")
    return "\n".join(lines) or None


def main(argv: Sequence[str] | None = None) -> None:
    """Export a checkpoint's weighter."""
    run_command(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> None:
    print(export(parse(argv, {"export": ExportWeighterConfig}, description=__doc__)["export"]))


if __name__ == "__main__":
    main()
