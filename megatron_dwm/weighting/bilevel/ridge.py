"""Training of a linear n-gram weighter on the replay: ridge regression, which has a closed form.

Near uniform weights the objective -Σ â_i w_i + λ KL(w ‖ uniform) is, up to a constant, λ/2τ² times the variance of
s - τ â/λ over the batch. The best scores are τ/λ times the alignment that is expected from a sample's features, and a
ridge regression finds them. Parameters of features that occur in few samples stay near 0, where Adam would make them as
large as those of frequent features.

With the weight p_i of sample i of the replay, which depends on its age, an intercept for each batch, and the parameters
β₀ that the weighter started with (0, unless it comes from a folder), the problem

    min_β Σ_i p_i (x_iᵀ β - intercept - τ â_i / λ)² + ρ ‖β - β₀‖²

is solved by conjugate gradients in float64, from the last update's solution. Few iterations suffice. Every rank holds
the rows x_i of its own samples; products with them are summed over the ranks.

The scores are then calibrated (:mod:`megatron_dwm.weighting.ngram.calibration`) on batches that were scored before the
weighter learned from them, because a regression fits the samples that it has learned from better than new ones.

Shape legend: B buckets, R batches, c samples of this rank, f n-grams of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.errors import UserError
from megatron_dwm.runtime.collectives import all_reduce_over_world
from megatron_dwm.weighting.bilevel.replay import AlignedBatch, Replay, sum_over_ranks
from megatron_dwm.weighting.weighter import CHUNK_TOKENS, Weighter
from megatron_dwm.weighting.weights import best_scores

CALIBRATION_BATCHES = 20
"""The newest batches that the scores are calibrated by; the older ones were scored by a weighter that knew less."""
RESIDUAL_TOLERANCE = 1e-10
"""Residual, relative to the right-hand side's norm, at which the iterations end."""


_Features = tuple[torch.Tensor, torch.Tensor]
"""Buckets, int32, and values, float32 [m, f], of m samples."""


@dataclass(frozen=True)
class _Rows:
    """This rank's samples of the replay, as rows of the regression; ignored n-grams have the value 0."""

    pieces: list[_Features]
    """Features of some of the samples each; products with all at once would need too much memory."""
    batch_of: torch.Tensor
    """The batch of each sample [c]."""
    targets: torch.Tensor
    """[c], float64; their mean over each whole batch is 0."""
    batch_weights: torch.Tensor
    """How much a batch's samples count [R], float64."""
    batch_sizes: torch.Tensor
    """Samples of each batch on all ranks [R], float64."""

    def scores(self, weights: torch.Tensor) -> torch.Tensor:
        """Return X β [c]."""
        return torch.cat(
            [
                (weights.index_select(0, buckets.flatten()).view_as(values) * values).sum(1)
                for buckets, values in self.pieces
            ]
        )

    def times(self, weights: torch.Tensor) -> torch.Tensor:
        """Return X β [c], less its mean over each batch; a collective call."""
        products = self.scores(weights)
        sums = torch.zeros_like(self.batch_sizes).index_add_(0, self.batch_of, products)
        all_reduce_over_world(sums)
        return products - (sums / self.batch_sizes)[self.batch_of]

    def transposed_times(self, residuals: torch.Tensor, num_buckets: int) -> torch.Tensor:
        """Return Xᵀ P r [B]; a collective call. ``residuals`` have the mean 0 over each batch."""
        weighted = residuals * self.batch_weights[self.batch_of]
        sums = weighted.new_zeros(num_buckets)
        of_pieces = weighted.split([len(buckets) for buckets, _ in self.pieces])
        for (buckets, values), factors in zip(self.pieces, of_pieces, strict=True):
            sums.index_add_(0, buckets.flatten(), (values * factors[:, None]).flatten())
        all_reduce_over_world(sums)
        return sums


def are_features_kept(tokens: int) -> bool:
    """Return whether the features of a rank's replay with this many tokens are kept between updates."""
    return tokens <= CHUNK_TOKENS


class RidgeLearner:
    """Ridge regression on the replay."""

    def __init__(self, config: WeightingConfig, weighter: Weighter) -> None:
        """
        Raises:
            UserError: the KL weight is 0, so that the best scores are infinite.
        """
        if config.dwm_kl_weight == 0:
            raise UserError(
                "--dwm-kl-weight 0: a linear n-gram weighter's scores would be infinite; give a number above 0"
            )
        self.config, self.weighter = config, weighter
        self.prior: torch.Tensor | None = None
        """The parameters that the regression shrinks towards [B], float64; None if they are 0."""
        self._kept: list[tuple[AlignedBatch, _Features]] = []
        """Features of the replay's batches, which do not change; empty if they are not kept."""
        weights = self._weights()
        if bool(weights.any()):
            self.prior = weights

    @property
    def kept_bytes(self) -> int:
        """Bytes of the kept features."""
        return sum(tensor.nbytes for _, features in self._kept for tensor in features)

    def learn(self, replay: Replay) -> float:
        """Improve the parameters by conjugate gradients.

        Returns:
            norm of the remaining gradient, relative to that of the right-hand side.

        Raises:
            FloatingPointError: the weights are not finite.
        """
        rows, ridge = self._rows(replay), self.config.dwm_ridge
        weights = self._weights()
        if self.weighter.model.calibration is not None:
            self._keep_unseen_scores(replay.newest, rows.scores(weights))
        prior = torch.zeros_like(weights) if self.prior is None else self.prior.to(weights)
        solution, count = weights - prior, len(weights)
        wanted_change = rows.targets if self.prior is None else rows.targets - rows.times(prior)
        right_hand_side = rows.transposed_times(wanted_change, count)

        def normal_product(vector: torch.Tensor) -> torch.Tensor:
            return rows.transposed_times(rows.times(vector), count) + ridge * vector

        residual = right_hand_side - normal_product(solution)
        direction, scale = residual.clone(), right_hand_side.norm()
        square = residual.square().sum()
        zero = torch.zeros_like(square)
        for _ in range(self.config.dwm_weighter_steps):
            # Once solved, the solution no longer changes; the host need not read whether it is.
            is_solved = square.sqrt() <= RESIDUAL_TOLERANCE * scale
            product = normal_product(direction)
            step = torch.where(is_solved, zero, square / (direction * product).sum())
            solution += step * direction
            residual -= step * product
            last_square, square = square, residual.square().sum()
            direction = residual + torch.where(is_solved, zero, square / last_square) * direction
        weights = prior + solution
        is_finite = weights.isfinite().all().to(scale)
        norm, wanted, is_sound = torch.stack([square.sqrt(), scale, is_finite]).tolist()
        if not is_sound:
            raise FloatingPointError("the weighter's weights are not finite; raise --dwm-kl-weight, or start a new one")
        with torch.no_grad():
            self.weighter.model.embedding.weight.copy_(weights.unsqueeze(1))
        if self.weighter.model.calibration is not None:
            self._calibrate(replay)
        return float(norm / wanted) if wanted > 0 else 0.0

    def _weights(self) -> torch.Tensor:
        weights: torch.Tensor = self.weighter.model.embedding.weight.detach().squeeze(1).double().clone()
        return weights

    def _rows(self, replay: Replay) -> _Rows:
        device = self.weighter.model.embedding.weight.device
        targets, batch_of = [], []
        for number, aligned in enumerate(replay.batches):
            targets.append(self._wanted_scores(aligned)[aligned.positions])
            batch_of.append(torch.full((len(aligned.positions),), number))
        sizes = torch.tensor([len(aligned.alignments) for aligned in replay.batches], dtype=torch.float64)
        columns = torch.cat(batch_of), torch.cat(targets), replay.batch_weights(), sizes
        return _Rows(self._pieces(replay), *(column.to(device, non_blocking=True) for column in columns))

    def _wanted_scores(self, aligned: AlignedBatch) -> torch.Tensor:
        """Return the scores that would suit a batch best [N], float64, with the mean 0."""
        config = self.config
        settings = config.dwm_temperature, config.dwm_kl_weight, config.dwm_clip_alignment
        return best_scores(aligned.alignments, *settings)

    @staticmethod
    def _keep_unseen_scores(newest: AlignedBatch, rank_scores: torch.Tensor) -> None:
        """Keep the scores of the newest batch, by weights that have not learned from it; a collective call.

        Args:
            rank_scores: scores of this rank's samples in the whole replay [c], the newest last.
        """
        of_newest = rank_scores[len(rank_scores) - len(newest.positions) :]
        positions = newest.positions.to(rank_scores.device, non_blocking=True)
        newest.unseen_scores = sum_over_ranks(of_newest, positions, len(newest.alignments)).cpu()

    def _calibrate(self, replay: Replay) -> None:
        """Fit the curve to the newest batches, as they were scored before the weighter learned from them."""
        scores, errors = [], []
        for aligned in list(replay.batches)[-CALIBRATION_BATCHES:]:
            if aligned.unseen_scores is not None:
                scores.append(aligned.unseen_scores)
                centered = aligned.unseen_scores - aligned.unseen_scores.mean()
                errors.append(self._wanted_scores(aligned) - centered)
        calibration = self.weighter.model.calibration
        if len(scores) > 1 and sum(map(len, scores)) >= len(calibration.scores):
            calibration.fit(torch.cat(scores), torch.cat(errors))

    def _pieces(self, replay: Replay) -> list[_Features]:
        """Return the features of the replay's samples, oldest first."""
        # With a tokenizer of its own, a weighter has another number of features in each batch.
        if self.weighter.reader is None and are_features_kept(sum(a.tokens.numel() for a in replay.batches)):
            known = {id(aligned): features for aligned, features in self._kept}
            self._kept = [
                (aligned, known.get(id(aligned)) or self._features(aligned.tokens)) for aligned in replay.batches
            ]
            buckets, values = zip(*(features for _, features in self._kept), strict=True)
            return [(torch.cat(buckets), torch.cat(values))]
        self._kept = []
        tokens = torch.cat([aligned.tokens for aligned in replay.batches])
        return [self._features(part) for part in tokens.split(max(1, CHUNK_TOKENS // tokens.shape[1]))]

    def _features(self, tokens: torch.Tensor) -> _Features:
        buckets, values = self.weighter.features(tokens.long())
        return buckets.to(torch.int32), values
