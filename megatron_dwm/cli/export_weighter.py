"""Write the weighter of a checkpoint as a Hugging Face folder with a model card.

A run exports its weighter at the end of each stage and with each checkpoint; this writes that of any checkpoint, and
what its run has gained. The folder is loaded again and compared with the checkpoint before it gets its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_dwm.cli.command import run_command
from megatron_dwm.cli.saved_run import ExportArguments, checkpoint_folder, saved_config
from megatron_dwm.config.checkpoint_args import read_arguments
from megatron_dwm.config.flags import flag, parse
from megatron_dwm.errors import UserError


@dataclass(frozen=True)
class ExportWeighterConfig(ExportArguments):
    """Export."""

    baseline: str | None = flag(
        None, "A run with uniform weights (its --save folder), over which the card says what this run has gained."
    )


def export(config: ExportWeighterConfig) -> str:
    """Write the folder that ``config`` names.

    Returns:
        a line that says what was written.

    Raises:
        UserError: no such checkpoint, or it holds no weighter.
    """
    from megatron_dwm.data.blend import data_paths
    from megatron_dwm.data.hf_tokenizers import vocabulary_fingerprint
    from megatron_dwm.data.tokenizers import build_tokenizer
    from megatron_dwm.training.checkpoint_folders import iteration_of
    from megatron_dwm.training.saved_checkpoint import open_checkpoint
    from megatron_dwm.weighting.export import export_weighter, run_facts, weighter_facts
    from megatron_dwm.weighting.stage_schedule import bilevel_stages, frozen_stages
    from megatron_dwm.weighting.weighter import model_digest
    from megatron_dwm.weighting.weighter_init import weighter_model_from_json

    folder = checkpoint_folder(config.load, config.ckpt_step)
    state = open_checkpoint(folder).read_dwm_state()
    if not state.get("weighter"):
        raise UserError(
            f"--load {folder}: the checkpoint holds no weighter (weighting was off, or had not begun); give a later "
            "--ckpt-step, or a run with --dwm-mode bilevel or frozen"
        )
    run = saved_config(read_arguments(folder))
    effect = _effect(config)
    model = weighter_model_from_json(state["weighter_config"])
    model.load_state_dict(state["weighter"])
    tokenizer = build_tokenizer(run.tokenizer)
    fingerprint = vocabulary_fingerprint(tokenizer, run.tokenizer)
    paths = data_paths(run.data, run.weighting.dwm_target_data_path if run.weighting.needs_target else None)
    stages = bilevel_stages if run.weighting.needs_target else frozen_stages
    iteration = iteration_of(folder)
    facts = {
        **weighter_facts(
            iteration,
            stages(run.weighting, run.train_iters).stage(iteration),
            sum(param.numel() for param in model.parameters()),
            model_digest(model),
        ),
        **run_facts(run, paths, fingerprint),
    }

    def check(written: Path) -> None:
        _check_loads(written, model, facts, int(tokenizer.vocab_size), int(tokenizer.eod))

    export_weighter(model, tokenizer, run.tokenizer, Path(config.output), facts, effect=effect, check=check)
    return (
        f"{config.output}: wrote a {type(model).__name__} of {facts['weighter_parameters']:,} parameters, window "
        f"{facts['window']} tokens, from {folder}; loaded again, its weights and scores are the checkpoint's"
    )


def _check_loads(folder: Path, model: Any, facts: dict[str, Any], vocab_size: int, eod: int) -> None:
    """Load the folder as a run does, and compare it with the checkpoint's weighter.

    Raises:
        UserError: it does not load, or is another weighter.
    """
    from megatron_dwm.weighting.weighter_init import weighter_model_from_folder

    window = int(facts["window"])
    loaded = weighter_model_from_folder(
        "--output", str(folder), window, vocab_size, eod, facts["tokenizer_fingerprint"], seed=0
    )
    expected = model.state_dict()
    different = [name for name, tensor in loaded.state_dict().items() if not torch.equal(tensor, expected[name])]
    sample = torch.arange(window)[None] % vocab_size
    with torch.no_grad():
        scores = [which.eval()(input_ids=sample).logits for which in (model, loaded)]
    if different or not torch.equal(*scores):
        raise UserError(f"--output {folder}: loaded again, {(different or ['its score'])[0]} is not the checkpoint's")


def _effect(config: ExportWeighterConfig) -> str | None:
    """Return what the records of the run and of the baseline say, in Markdown; None without records.

    Raises:
        UserError: the baseline is none, or cannot be compared.
    """
    from megatron_dwm.analysis.comparison import gain_line
    from megatron_dwm.analysis.records import read_run
    from megatron_dwm.analysis.shares import learnt_shares

    if not (Path(config.load) / "metrics.jsonl").is_file():
        if config.baseline is not None:
            raise UserError(
                f"--baseline {config.baseline}: --load {config.load} has no metrics.jsonl to compare with it"
            )
        return None
    run = read_run(Path(config.load))
    lines = []
    if config.baseline is not None:
        gain = gain_line(read_run(Path(config.baseline)), run)
        lines.append(f"* Against a run with uniform weights: {gain}. One run each: another seed comes out differently.")
    evaluations = run.evaluated("valid")
    if evaluations:
        lines.append(f"* Loss of {evaluations[-1]['lm_loss']:.4f} at iteration {evaluations[-1]['iteration']}.")
    sizes = [step["effective_sample_size"] for step in run.steps if step.get("effective_sample_size") is not None]
    if sizes:
        lines.append(f"* Effective sample size of the last step: {sizes[-1]:.2f} of the batch.")
    if any(step.get("weight_by_source") for step in run.steps):
        overall = learnt_shares(run)[0]
        shares = ", ".join(f"{source} {share:.3f}" for source, share in overall.mean.items())
        lines.append(f"* Shares that the weights gave the sources, over {overall.iterations} iterations: {shares}.")
    return "\n".join(lines) or None


def main(argv: Sequence[str] | None = None) -> None:
    """Export a checkpoint's weighter."""
    run_command(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> None:
    print(export(parse(argv, {"export": ExportWeighterConfig}, description=__doc__)["export"]))


if __name__ == "__main__":
    main()
