"""Runs whose weighting goes wrong say so."""

from __future__ import annotations

from pathlib import Path

import pytest
from megatron.core.models.common.language_module.language_module import LanguageModule

from megatron_dwm.cli import pretrain as pretrain_command
from tests.e2e.launch import pretrain, records, succeed
from tests.small_runs import DATA, LANGUAGE_MODEL, TRAINING, WEIGHTING


@pytest.mark.parametrize(
    ("changes", "sign", "named"),
    [
        # The floor is what a batch of 8 has with any weights but uniform ones.
        ({"--dwm-min-effective-sample-size": 1.0}, "collapsed weights", "--dwm-min-effective-sample-size 1"),
        ({"--dwm-lr": 0}, "equal scores", "--dwm-lr"),
    ],
)
def test_a_sign_is_logged_and_recorded(changes: dict, sign: str, named: str, tmp_path: Path):
    metrics = tmp_path / "metrics.jsonl"
    flags = {**LANGUAGE_MODEL, **TRAINING, **DATA, **WEIGHTING, **changes, "--metrics-jsonl": metrics}
    finished = succeed(tmp_path / "log", 1, flags)
    signs = [record["sign"] for record in records(metrics, "health")]
    assert len(signs) > 2 and set(signs) == {sign}
    assert "warning: iteration" in finished.errors[0] and named in finished.errors[0]


def test_alignments_that_are_all_zero_end_the_run(tmp_path: Path):
    # All matrices are zero and stay so: every hidden state is zero, and with it every gradient.
    flags = {**LANGUAGE_MODEL, **TRAINING, **DATA, **WEIGHTING, "--init-method-std": 0}
    finished = pretrain(tmp_path / "log", 1, flags)
    assert finished.codes == [2] and "Traceback" not in finished.text
    assert finished.errors[0].splitlines()[-1].startswith("error: the alignments of all samples with the target set")


def reduce_the_loss() -> None:
    """The command with a model whose loss is already the mean over its tokens, as some fused losses are."""
    token_losses = LanguageModule.compute_language_model_loss
    LanguageModule.compute_language_model_loss = lambda self, labels, logits: token_losses(self, labels, logits).mean()
    pretrain_command.main()


def test_a_loss_that_hides_the_samples_losses_is_refused(tmp_path: Path):
    flags = {**LANGUAGE_MODEL, **TRAINING, **DATA, **WEIGHTING, "--cross-entropy-loss-fusion": True}
    finished = pretrain(tmp_path / "log", 1, flags, main=reduce_the_loss)
    assert finished.codes == [2], finished.text
    warning, message = finished.errors[0].splitlines()
    assert warning.startswith("warning: --cross-entropy-loss-fusion: a CPU has no fused kernel")
    assert message.startswith("error: the model returns a loss of shape [] where token losses [4, 32] are needed")
    assert "--cross-entropy-loss-fusion" in message


def test_the_fused_loss_of_megatron_core_gives_token_losses(tmp_path: Path):
    flags = {**LANGUAGE_MODEL, **TRAINING, **DATA, **WEIGHTING, "--train-iters": 8}
    losses = []
    for name, fused in (("plain", False), ("fused", True)):
        metrics = tmp_path / f"{name}.jsonl"
        succeed(tmp_path / name, 1, {**flags, "--cross-entropy-loss-fusion": fused, "--metrics-jsonl": metrics})
        losses.append([record["lm_loss"] for record in records(metrics, "train")])
    assert len(losses[0]) == 8 and losses[1] == pytest.approx(losses[0], rel=1e-4)
