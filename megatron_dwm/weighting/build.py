"""Builds the weighting of a run from the flags."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megatron_dwm.data.batch import Batch
from megatron_dwm.data.hf_tokenizers import save_hf_tokenizer
from megatron_dwm.errors import UserError
from megatron_dwm.safe_unpickling import DAMAGE, short_reason
from megatron_dwm.weighting.bilevel.gradient_check import check_at_start
from megatron_dwm.weighting.bilevel.gradient_mean import GradientMean
from megatron_dwm.weighting.bilevel.outer_update import OuterUpdate
from megatron_dwm.weighting.bilevel.weighting import BilevelFlops, BilevelParts, BilevelWeighting
from megatron_dwm.weighting.build_rules import build_rule
from megatron_dwm.weighting.context import WeightingContext, lm_gradients, scoring_options, weight_metrics
from megatron_dwm.weighting.export import FolderExporter, NoExport, WeighterExporter, run_facts
from megatron_dwm.weighting.flops import outer_update_flops, scoring_flops
from megatron_dwm.weighting.frozen import FrozenParts, FrozenWeighting
from megatron_dwm.weighting.ngram import MODEL_TYPE
from megatron_dwm.weighting.policy import SampleWeighting, State
from megatron_dwm.weighting.rules import ShuffledWeighting
from megatron_dwm.weighting.sample_gather import SampleGather
from megatron_dwm.weighting.sample_reader import SampleReader
from megatron_dwm.weighting.saved_state import check_weighter_state
from megatron_dwm.weighting.uniform import UniformWeighting
from megatron_dwm.weighting.warmup import Start, WarmupWeighting
from megatron_dwm.weighting.weighter import Weighter
from megatron_dwm.weighting.weighter_folder import WeighterFolder, read_weighter_folder, text_reader, window_reader
from megatron_dwm.weighting.weighter_init import (
    random_weighter_model,
    weighter_model_from_json,
    weighter_model_from_lm,
)
from megatron_dwm.weighting.weighter_stages import WeighterStage, weighter_stages

logger = logging.getLogger(__name__)


def build_weighting(context: WeightingContext) -> SampleWeighting:
    """Return the weighting for ``--dwm-mode``.

    Raises:
        UserError: flags that do not fit the data.
    """
    if context.config.weighting.dwm_mode == "off":
        return UniformWeighting()
    return _Builder(context).build()


def check_gradients(context: WeightingContext, batch: Batch, target: Batch) -> None:
    """Compare the run's hypergradient with finite differences (``--dwm-check``); every rank calls it.

    Raises:
        UserError: on every rank, if they differ or there is nothing to check.
    """
    check_at_start(lm_gradients(context), SampleGather(context.partition, context.parallel_state), batch, target)


class _Builder:
    def __init__(self, context: WeightingContext) -> None:
        self.context, self.config, self.inputs = context, context.config, context.inputs
        self.settings, self.engine = context.config.weighting, context.engine
        self.sample_gather = SampleGather(context.partition, context.parallel_state)
        self.weight_metrics, self.options = weight_metrics(context), scoring_options(context.config)

    def build(self) -> SampleWeighting:
        return WarmupWeighting(self.context.stages, self.weight_metrics, self._start())

    def _start(self) -> Start:
        if self.settings.has_trainable_weighter:
            return self._start_bilevel
        return self._start_frozen if self.settings.dwm_mode == "frozen" else self._start_rule()

    def _start_rule(self) -> Start:
        rule = build_rule(self.context, lm_gradients(self.context), self.weight_metrics, self.options)

        def start(iteration: int, state: State) -> SampleWeighting:
            rule.load_state_dict(state)
            logger.info(f" > weighting starts at iteration {iteration}: the rule {self.settings.dwm_rule}")
            return rule

        return start

    def _start_frozen(self, iteration: int, state: State) -> SampleWeighting:
        assert self.settings.dwm_load is not None  # of every run in this mode
        parts = FrozenParts(
            weighter_stages("--dwm-load", self.settings.dwm_load, self.config.train_iters),
            self._frozen_weighter,
            self._exporter(has_separate_tokenizer=True),
            self.settings.dwm_score_cache,
            self._scoring_flops,
        )
        weighting = FrozenWeighting(self.weight_metrics, self.options, parts, iteration)
        self._announce(iteration, weighting.weighter)
        weighting.load_state_dict(state)
        return weighting

    def _frozen_weighter(self, stage: WeighterStage) -> Weighter:
        """Read the weighter of a stage; the first one was read at the start."""
        inputs, folder = self.inputs, self.inputs.folder
        if folder is None or folder.path != stage.folder:
            assert inputs.samples is not None  # there is a weighter
            folder = read_weighter_folder("--dwm-load", stage.folder, inputs.samples, self.config.training.seed)
        return self._weighter_of_folder(folder, folder.model)

    def _start_bilevel(self, iteration: int, state: State) -> SampleWeighting:
        is_restored = state.get("weighter") is not None
        if is_restored:
            try:
                check_weighter_state(state)
                weighter = self._restored_weighter(state)
            except DAMAGE as error:
                raise _damaged_state(error) from None
            self._log_kept_architecture(weighter)
        else:
            weighter = self._new_weighter()
            if iteration > self.context.stages.warmup_iters + 1:
                logger.warning(
                    f"the checkpoint holds no weighter, so a new one starts at iteration {iteration}; to continue "
                    "with an earlier one, give its export as --dwm-init-from"
                )
            self._announce(iteration, weighter)
        momentum = self.config.target_momentum
        gradient_mean = GradientMean(self.engine.chunks, momentum) if momentum > 0 else None
        passes = lm_gradients(self.context, gradient_mean)
        parts = BilevelParts(
            self.engine,
            weighter,
            OuterUpdate(self.settings, passes, weighter, self.sample_gather),
            self.context.make_target_loader(state.get("consumed_target_samples", 0)),
            self._exporter(has_separate_tokenizer=bool(weighter.tokenizer_fingerprint)),
            BilevelFlops(self._scoring_flops(weighter), self._update_flops(weighter)),
            gradient_mean,
        )
        if self.settings.dwm_mode == "rule":
            shuffle_seed = self.config.training.seed
            weighting: BilevelWeighting = ShuffledWeighting(self.weight_metrics, self.options, parts, shuffle_seed)
        else:
            weighting = BilevelWeighting(self.weight_metrics, self.options, parts)
        if is_restored:
            try:
                weighting.load_state_dict(state)
            except DAMAGE as error:
                raise _damaged_state(error) from None
        return weighting

    def _weighter(
        self,
        model: Any,
        reader: SampleReader | None = None,
        tokenizer_fingerprint: str = "",
        tokenizer_digest: str = "",
    ) -> Weighter:
        return Weighter(
            model,
            self.settings,
            self.context.device,
            reader=reader,
            tokenizer_fingerprint=tokenizer_fingerprint,
            tokenizer_digest=tokenizer_digest,
            bf16=self.config.optimizer.bf16,
        )

    def _weighter_of_folder(self, folder: WeighterFolder, model: Any) -> Weighter:
        """Return a weighter that reads samples like the one in a folder."""
        fingerprint = "" if folder.separate_tokenizer is None else folder.fingerprint
        return self._weighter(model, folder.reader, fingerprint, folder.tokenizer_digest)

    def _restored_weighter(self, state: State) -> Weighter:
        """Return a checkpoint's weighter, which reads samples as it did when it was saved.

        Raises:
            UserError: it has another tokenizer, which the flags do not name, or fewer tokens than the run's tokenizer.
        """
        model, folder = weighter_model_from_json(state["weighter_config"]), self.inputs.folder
        embeddings, tokens = model.config.vocab_size, int(self.context.tokenizer.vocab_size)
        if not state.get("weighter_tokenizer") and embeddings < tokens:
            raise UserError(
                f"--load: the checkpoint's weighter has {embeddings} tokens and the tokenizer {tokens}; give the flags "
                "of the tokenizer that it was trained with"
            )
        if fingerprint := state.get("weighter_tokenizer"):
            is_same = folder is not None and folder.separate_tokenizer is not None and folder.fingerprint == fingerprint
            digest = state.get("weighter_tokenizer_digest")  # checkpoints of earlier versions have none
            if folder is None or not is_same or digest not in (None, folder.tokenizer_digest):
                raise UserError(
                    f"--dwm-init-from {self.settings.dwm_init_from}: the checkpoint's weighter has another tokenizer; "
                    "give the folder that it was started from"
                )
            assert self.inputs.samples is not None  # there is a weighter
            # For the checkpoint's classifier: that of the folder may read fewer or more tokens at once.
            reader, _ = text_reader(
                "--dwm-init-from", folder.path, model, folder.separate_tokenizer, self.inputs.samples
            )
            weighter = self._weighter(model, reader, folder.fingerprint, folder.tokenizer_digest)
        else:
            weighter = self._weighter(model, window_reader(model, self.config.model.sequence))
        weighter.load_state(state)
        return weighter

    def _new_weighter(self) -> Weighter:
        """Create the weighter that the flags specify; a collective call of all ranks."""
        if self.inputs.folder is not None:
            return self._weighter_of_folder(self.inputs.folder, self.inputs.folder.model)
        return self._weighter(self._new_model())

    def _new_model(self) -> Any:
        settings, model, seed = self.settings, self.config.model, self.config.training.seed
        vocab, eod = int(self.context.tokenizer.vocab_size), int(self.context.tokenizer.eod)
        if settings.dwm_init_from == "random":
            return random_weighter_model(settings, vocab, model.sequence, eod, seed)
        with self.engine.full_parameters():
            return weighter_model_from_lm(self.engine.chunks, model, settings, vocab, eod, seed)

    def _log_kept_architecture(self, weighter: Weighter) -> None:
        """Log that a checkpoint's weighter is kept, if the flags specify another kind."""
        kind, arch = weighter.model.config.model_type, self.settings.dwm_arch
        wanted = MODEL_TYPE if arch == "ngram" else arch
        if self.settings.dwm_init_from == "random" and kind != wanted:
            logger.info(f" > the checkpoint's weighter, a {kind}, is kept; --dwm-arch {arch} applies only to a new one")

    def _announce(self, iteration: int, weighter: Weighter) -> None:
        kind, size, mode = type(weighter.model).__name__, weighter.num_parameters, self.settings.dwm_mode
        logger.info(f" > weighting starts at iteration {iteration}: {kind} of {size} parameters, {mode}")
        if self.inputs.folder is not None and self.inputs.folder.reading:
            logger.info(f" > the weighter's samples: {self.inputs.folder.reading}")

    def _exporter(self, *, has_separate_tokenizer: bool) -> WeighterExporter:
        save, folder, tokenizer = self.config.checkpoint.save, self.inputs.folder, self.config.tokenizer
        if save is None:
            return NoExport()
        assert self.inputs.samples is not None  # there is a weighter
        save_tokenizer: Callable[[Path], Any]
        if has_separate_tokenizer and folder is not None and folder.separate_tokenizer is not None:
            save_tokenizer, fingerprint, special = folder.separate_tokenizer.save_pretrained, folder.fingerprint, True
        else:
            length = self.inputs.samples.seq_length
            save_tokenizer = partial(save_hf_tokenizer, self.context.tokenizer, tokenizer, max_length=length)
            fingerprint, special = self.inputs.samples.fingerprint, tokenizer.tokenizer_hf_include_special_tokens
        facts = run_facts(
            self.settings,
            self.config.model,
            self.config.train_iters,
            self.config.global_batch_size,
            self.context.paths,
            fingerprint,
            adds_special_tokens=special,
        )
        return FolderExporter(Path(save) / "weighter", save_tokenizer, facts)

    def _scoring_flops(self, weighter: Weighter) -> float:
        parameters, samples = weighter.num_active_parameters, self.config.global_batch_size
        return scoring_flops(parameters, samples, self.config.model.sequence)

    def _update_flops(self, weighter: Weighter) -> float:
        vocab, parameters = self.context.padded_vocab_size, weighter.num_active_parameters
        return outer_update_flops(self.config, vocab, parameters, is_linear=weighter.is_linear)


def _damaged_state(error: Exception) -> UserError:
    return UserError(
        f"--load: the checkpoint's state of the weighting is damaged ({short_reason(error)}); give --ckpt-step of an "
        "earlier one"
    )
