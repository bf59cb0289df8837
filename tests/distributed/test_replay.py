"""Learning from the replay on several ranks: the ridge regression's solution, and a replay in another layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.weighting.bilevel import ridge
from megatron_dwm.weighting.bilevel.learning import GradientLearner
from megatron_dwm.weighting.bilevel.replay import Replay
from megatron_dwm.weighting.bilevel.ridge import RidgeLearner
from megatron_dwm.weighting.ngram.calibration import Calibration
from megatron_dwm.weighting.weighter import Weighter
from megatron_dwm.weighting.weighter_init import random_weighter_model
from megatron_dwm.weighting.weights import standardized
from tests.distributed.harness import run_distributed

SAMPLES, LENGTH, BUCKETS = 12, 10, 64
SETTINGS: dict[str, Any] = {
    "dwm_arch": "ngram",
    "dwm_ngram_buckets": BUCKETS,
    "dwm_temperature": 0.7,
    "dwm_kl_weight": 0.3,
    "dwm_ridge": 2.0,
    "dwm_replay_half_life": 2.0,
    "dwm_clip_alignment": 1.5,
}


def weighter(start: float = 0.0, **settings: Any) -> tuple[WeightingConfig, Weighter]:
    config = WeightingConfig(dwm_mode="off", **SETTINGS, **settings)
    model = random_weighter_model(config, 50, LENGTH, 49, seed=1)
    if start:
        torch.nn.init.normal_(model.embedding.weight, std=start)
    return config, Weighter(model, config, torch.device("cpu"))


def rank_positions(samples: int = SAMPLES) -> torch.Tensor:
    return torch.arange(dist.get_rank(), samples, dist.get_world_size())


def filled(batches: int = 3) -> Replay:
    kept, generator = Replay(64, SETTINGS["dwm_replay_half_life"]), torch.Generator().manual_seed(5)
    for _ in range(batches):
        tokens = torch.randint(0, 50, (SAMPLES, LENGTH), generator=generator)
        alignments = torch.randn(SAMPLES, dtype=torch.float64, generator=generator)
        kept.append(tokens[rank_positions()], rank_positions(), alignments)
    return kept


def dense_solution(config: WeightingConfig, model: Any, kept: Replay, prior: torch.Tensor) -> torch.Tensor:
    """The regression's weights [B] by a dense solver, from a replay that is whole on this rank."""
    normal, right = config.dwm_ridge * torch.eye(BUCKETS, dtype=torch.float64), torch.zeros(BUCKETS).double()
    for age, aligned in enumerate(reversed(kept.batches)):
        rows = torch.zeros(SAMPLES, BUCKETS).double()
        buckets, values = model.features(aligned.tokens.long())
        rows.scatter_add_(1, buckets, values.double())
        rows -= rows.mean(0)
        wanted = standardized(aligned.alignments, config.dwm_clip_alignment) * config.dwm_temperature
        count = 0.5 ** (age / 2.0)
        normal += count * rows.T @ rows
        right += count * rows.T @ (wanted / config.dwm_kl_weight - rows @ prior)
    return prior + torch.linalg.solve(normal, right)


@pytest.mark.parametrize("start", [0.0, 0.5])
@pytest.mark.parametrize("world", [1, 3])
def test_a_linear_weighter_learns_the_ridge_regressions_solution(world: int, start: float):
    def solve() -> tuple[torch.Tensor, torch.Tensor | None, str, float]:
        torch.manual_seed(7)
        config, learned = weighter(start, dwm_weighter_steps=200)
        prior = learned.model.embedding.weight.detach().double().squeeze(1).clone()
        kept = filled()
        residual = RidgeLearner(config, learned).learn(kept)
        expected = dense_solution(config, learned.model, kept, prior) if world == 1 else None
        return learned.model.embedding.weight.detach().squeeze(1).clone(), expected, learned.hash(), residual

    results = run_distributed(solve, world)
    expected = results[0][1] if world == 1 else run_distributed(solve, 1)[0][0]
    assert expected is not None
    for found, _, digest, residual in results:
        assert digest == results[0][2] and residual < 1e-9
        assert torch.allclose(found.double(), expected.double(), rtol=0, atol=1e-6)


def test_more_steps_come_closer_and_old_batches_count():
    def distances() -> list[float]:
        config, learned = weighter(dwm_weighter_steps=200)
        RidgeLearner(config, learned).learn(filled())
        exact = learned.model.embedding.weight.detach().clone()
        found = []
        for steps, batches in ((1, 3), (3, 3), (6, 3), (200, 2)):
            config, fewer = weighter(dwm_weighter_steps=steps)
            RidgeLearner(config, fewer).learn(filled(batches))
            found.append(float((fewer.model.embedding.weight.detach() - exact).norm() / exact.norm()))
        return found

    ((one, three, six, without_newest),) = run_distributed(distances, 1)
    assert one > three > six and six < 0.1
    assert without_newest > 0.1


def test_features_of_the_replay_are_found_once_and_change_nothing(monkeypatch: pytest.MonkeyPatch):
    """What is kept is the newest batches' features; a replay of more tokens than are kept gives the same weights."""

    def learned(tokens_kept: int) -> tuple[str, list[int], int]:
        monkeypatch.setattr(ridge, "CHUNK_TOKENS", tokens_kept)
        config, model = weighter(dwm_weighter_steps=3)
        learner, kept, read = RidgeLearner(config, model), Replay(2, None), []
        features = model.features

        def counted(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            read.append(len(tokens))
            return features(tokens)

        monkeypatch.setattr(model, "features", counted)
        for aligned in filled(4).batches:
            kept.append(aligned.tokens, aligned.positions, aligned.alignments)
            learner.learn(kept)
        return model.hash(), read, learner.kept_bytes

    ((digest, read, size),) = run_distributed(learned, 1, 2 * SAMPLES * LENGTH)
    ((same, read_anew, nothing),) = run_distributed(learned, 1, SAMPLES * LENGTH // 2)
    assert read == [SAMPLES] * 4 and sum(read_anew) == SAMPLES * (1 + 2 + 2 + 2)
    assert same == digest
    assert size == 2 * SAMPLES * (2 * LENGTH - 1) * 8 and nothing == 0


@pytest.mark.parametrize("world", [1, 3])
def test_scores_are_calibrated_by_batches_that_were_not_yet_learned_from(world: int):
    def learned() -> tuple[list[torch.Tensor], list[torch.Tensor], Calibration, str]:
        config, model = weighter(dwm_weighter_steps=5, dwm_calibration_points=4)
        learner, kept, before = RidgeLearner(config, model), Replay(64, None), []
        for aligned, whole in zip(filled().batches, run_alone, strict=True):
            linear = model.model.embedding.weight.detach().double().squeeze(1)
            buckets, values = model.model.features(whole.tokens.long())
            before.append((linear[buckets] * values).sum(1))
            kept.append(aligned.tokens, aligned.positions, aligned.alignments)
            learner.learn(kept)
        return before, [aligned.unseen_scores for aligned in kept.batches], model.model.calibration, model.hash()

    ((run_alone),) = run_distributed(lambda: list(filled().batches), 1)
    results = run_distributed(learned, world)
    config, _ = weighter()
    for before, unseen, calibration, digest in results:
        assert digest == results[0][3]
        assert not before[0].any() and before[1].std() > 0.01
        for expected, found in zip(before, unseen, strict=True):
            assert torch.allclose(found, expected, rtol=0, atol=1e-6)
        wanted = [
            standardized(aligned.alignments, config.dwm_clip_alignment) * config.dwm_temperature / config.dwm_kl_weight
            for aligned in run_alone
        ]
        errors = [want - want.mean() - (score - score.mean()) for want, score in zip(wanted, unseen, strict=True)]
        curve = Calibration(4)
        curve.fit(torch.cat(unseen), torch.cat(errors))
        assert torch.equal(calibration.scores, curve.scores) and torch.equal(calibration.calibrated, curve.calibrated)


@pytest.mark.parametrize("kind", [RidgeLearner, GradientLearner])
def test_learning_goes_on_the_same_from_a_saved_replay_in_another_layout(kind: Any):
    hidden = 0 if kind is RidgeLearner else 4

    def moved(state: Any) -> tuple[Any, torch.Tensor, str]:
        config, learned = weighter(dwm_ngram_hidden_size=hidden, dwm_weighter_steps=5)
        learner, kept = kind(config, learned), Replay(64, config.dwm_replay_half_life)
        if state is None:
            kept = filled()
        else:
            kept.load(state, rank_positions, torch.device("cpu"))
            kept.num_appended = 3
        learner.learn(kept)
        flat = torch.cat([param.detach().flatten() for param in learned.model.parameters()])
        return kept.state(), flat, learned.check_replicas()

    ((state, expected, digest),) = run_distributed(moved, 1, None)
    ((_, _, same),) = run_distributed(moved, 1, state)
    assert same == digest  # bit for bit in the same layout
    for again, found, replica in run_distributed(moved, 2, state):
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-5)
        assert all(
            torch.equal(one[key], other[key])
            for one, other in zip(again, state, strict=True)
            for key in ("tokens", "alignments")
        )
        assert all(
            torch.allclose(one["unseen_scores"], other["unseen_scores"], rtol=0, atol=1e-6)
            for one, other in zip(again, state, strict=True)
            if "unseen_scores" in other
        )
        assert replica
