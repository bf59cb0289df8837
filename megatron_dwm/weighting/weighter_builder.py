"""Builds a run's weighter (new, from a folder or from a checkpoint) and its exporter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megatron_dwm.data.hf_tokenizers import save_hf_tokenizer
from megatron_dwm.errors import UserError
from megatron_dwm.model.hf_model import gather_first_layers
from megatron_dwm.weighting.context import WeightingContext
from megatron_dwm.weighting.export import FolderExporter, NoExport, WeighterExporter, run_facts
from megatron_dwm.weighting.inputs import WeighterInputs
from megatron_dwm.weighting.policy import State
from megatron_dwm.weighting.sample_reader import SampleReader
from megatron_dwm.weighting.weighter import Weighter
from megatron_dwm.weighting.weighter_folder import WeighterFolder, read_weighter_folder, text_reader, window_reader
from megatron_dwm.weighting.weighter_init import (
    lm_shaped_model,
    random_weighter_model,
    weighter_model_from_json,
    zero_head,
)
from megatron_dwm.weighting.weighter_stages import WeighterStage


class WeighterBuilder:
    """Builds weighters that read the run's samples."""

    def __init__(self, context: WeightingContext, inputs: WeighterInputs) -> None:
        self.context, self.inputs, self.settings = context, inputs, context.settings

    def new(self) -> Weighter:
        """Create the weighter that the flags specify; a collective call of all ranks."""
        if self.inputs.folder is not None:
            return self._of_folder(self.inputs.folder)
        return self._weighter(self._new_model())

    def of_stage(self, stage: WeighterStage) -> Weighter:
        """Read the weighter of a frozen run's stage; the first one was read at the start.

        Raises:
            UserError: it cannot be read.
        """
        folder = self.inputs.folder
        if folder is None or folder.path != stage.folder:
            folder = read_weighter_folder("--dwm-load", stage.folder, self.inputs.samples, self.context.seed)
        return self._of_folder(folder)

    def restored(self, state: State) -> Weighter:
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
            # For the checkpoint's classifier: that of the folder may read fewer or more tokens at once.
            reader, _ = text_reader(
                "--dwm-init-from", folder.path, model, folder.separate_tokenizer, self.inputs.samples
            )
            weighter = self._weighter(model, reader, folder.fingerprint, folder.tokenizer_digest)
        else:
            weighter = self._weighter(model, window_reader(model, self.inputs.samples.seq_length))
        weighter.load_state(state)
        return weighter

    def exporter(self, *, has_separate_tokenizer: bool) -> WeighterExporter:
        """Return the exporter of the weighter, which writes next to the run's checkpoints.

        Args:
            has_separate_tokenizer: whether the weighter has its folder's tokenizer, and not the run's.
        """
        save, folder, flags = self.context.save, self.inputs.folder, self.context.tokenizer_flags
        if save is None:
            return NoExport()
        save_tokenizer: Callable[[Path], Any]
        if has_separate_tokenizer and folder is not None and folder.separate_tokenizer is not None:
            save_tokenizer, fingerprint, special = folder.separate_tokenizer.save_pretrained, folder.fingerprint, True
        else:
            samples = self.inputs.samples
            save_tokenizer = partial(save_hf_tokenizer, self.context.tokenizer, flags, max_length=samples.seq_length)
            fingerprint, special = samples.fingerprint, flags.tokenizer_hf_include_special_tokens
        facts = run_facts(
            self.settings,
            self.context.model,
            self.context.stages.train_iters,
            self.context.sizes.global_batch_size,
            self.context.paths,
            fingerprint,
            adds_special_tokens=special,
        )
        return FolderExporter(Path(save) / "weighter", save_tokenizer, facts)

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
            bf16=self.context.bf16,
        )

    def _of_folder(self, folder: WeighterFolder) -> Weighter:
        fingerprint = "" if folder.separate_tokenizer is None else folder.fingerprint
        return self._weighter(folder.model, folder.reader, fingerprint, folder.tokenizer_digest)

    def _new_model(self) -> Any:
        """Return a model of random weights, or one with the language model's embedding and first layers."""
        settings, model, seed = self.settings, self.context.model, self.context.seed
        vocab, eod = int(self.context.tokenizer.vocab_size), int(self.context.tokenizer.eod)
        if settings.dwm_init_from == "random":
            return random_weighter_model(settings, vocab, model.seq_length, eod, seed)
        classifier, layers = lm_shaped_model(model, settings, vocab, eod, seed), settings.dwm_num_layers
        with self.context.engine.full_parameters():
            state = gather_first_layers(self.context.engine.chunks, model, num_layers=layers, vocab_size=vocab)
        classifier.base_model.load_state_dict(state)
        zero_head(classifier)
        return classifier
