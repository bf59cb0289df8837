"""The Hugging Face counterparts of Megatron-Core's tokenizers.

A data weighting model is a Hugging Face folder with a tokenizer, while the language model reads the ids of a
Megatron-Core tokenizer. The counterpart that is built here gives the same ids for the same text, so that both models
can read the same samples.
"""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dwm.atomic_write import atomic_files
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.data.tokenizer_folder import load_tokenizer_folder
from megatron_dwm.data.tokenizers import describe_tokenizer, end_of_document
from megatron_dwm.errors import UserError, shortened

if TYPE_CHECKING:
    from megatron.core.tokenizers.text.text_tokenizer import MegatronTokenizerText
    from transformers import PreTrainedTokenizerBase

# Piece types of SentencePiece's model file (sentencepiece_model.proto, ModelProto.SentencePiece.Type).
_NORMAL, _UNKNOWN, _CONTROL = 1, 2, 3
_FAST_TYPES = {_NORMAL, _UNKNOWN, _CONTROL, 6}  # 6: a byte of byte fallback
_BPE_MODEL = 2
_SPACE = "▁"  # how SentencePiece writes a space

# One text for each thing that a conversion can get wrong: spaces at either end and in runs, line ends, tabs, text that
# looks like control pieces, compatibility forms, combining marks, characters that only bytes can spell.
_PROBES = (
    "",
    " ",
    "Hello world",
    " Hello  world   again ",
    "\n\n\tif x == 1:\n        return 'y'  # 12345\r\n",
    "====== 000000 ...........",
    "<s>a</s> <unk><pad> <0x41><0x0A> <|endoftext|>",
    "Ünïcödé \ufb01ne \u2460\u2461 \uff46\uff55\uff4c\uff4c e\u0301 \u00a0x\u200b\u2581y",
    "\u4f60\u597d \u0917\u0940\u0924 \U0001f600\U0001f469\u200d\U0001f680 \x00\x7f",
)
_NUMBER_PROBES = ("0", "0 1 1 0")


def to_hf_tokenizer(tokenizer: MegatronTokenizerText, config: TokenizerConfig) -> PreTrainedTokenizerBase:
    """Return the Hugging Face tokenizer that gives the ids of ``tokenizer.tokenize``; its ``eos`` is ``eod``.

    It gives them with ``add_special_tokens=False``, unless ``--tokenizer-hf-include-special-tokens`` is given.

    Raises:
        UserError: the tokenizer has no end-of-document token, or no equivalent in transformers.
    """
    end_of_document(tokenizer, config)
    convert = {
        "sentencepiece": _from_sentencepiece,
        "huggingface": _from_hugging_face,
        "tiktoken": _from_tiktoken,
        "null": _from_null,
        "null-text": _from_null,  # its name from megatron-core 0.17 on
    }[tokenizer.library]
    try:
        counterpart = convert(tokenizer)
    except UserError:
        raise
    except Exception as error:  # the libraries raise whatever a damaged vocabulary makes them raise
        raise UserError(
            f"{describe_tokenizer(config)} cannot be written as a Hugging Face tokenizer ({shortened(error, 300)}); "
            "check that its files are complete"
        ) from error
    _check_same_ids(tokenizer, counterpart, config)
    return counterpart


def save_hf_tokenizer(
    tokenizer: MegatronTokenizerText, config: TokenizerConfig, directory: Path, max_length: int | None = None
) -> None:
    """Write the counterpart (:func:`to_hf_tokenizer`) for ``AutoTokenizer.from_pretrained(directory)``.

    If ``directory`` is to hold a model's ``config.json``, it must be there before: for a few model types
    ``AutoTokenizer`` rebuilds the tokenizer, and only then does the check here notice.

    Args:
        max_length: tokens that the model of this tokenizer reads at once, to which ``truncation=True`` cuts.

    Raises:
        UserError: as :func:`to_hf_tokenizer`, or the folder does not load as the same tokenizer.
    """
    counterpart = to_hf_tokenizer(tokenizer, config)
    if max_length is not None:
        counterpart.model_max_length = max_length
    with atomic_files(directory) as scratch:
        counterpart.save_pretrained(scratch)
    _check_same_ids(tokenizer, load_tokenizer_folder(directory), config)


def is_loaded_unchanged(model_type: str, tokenizer: MegatronTokenizerText, config: TokenizerConfig) -> bool:
    """Return whether ``AutoTokenizer`` loads the counterpart as it is from a folder of a model of ``model_type``.

    Raises:
        UserError: there is no counterpart.
    """
    to_hf_tokenizer(tokenizer, config)  # its errors are not about the model
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({"model_type": model_type}))
        try:
            save_hf_tokenizer(tokenizer, config, Path(folder))
        except UserError:
            return False
    return True


def vocabulary_fingerprint(tokenizer: MegatronTokenizerText, config: TokenizerConfig) -> str:
    """Return the SHA-256 (hex) of the (token, id) pairs, as :func:`fingerprint_of_folder` does of the saved folder."""
    return fingerprint_of(to_hf_tokenizer(tokenizer, config))


def fingerprint_of_folder(directory: Path) -> str:
    """Return the SHA-256 (hex) of the (token, id) pairs of the tokenizer in a Hugging Face folder.

    Raises:
        UserError: the folder has no tokenizer that can be loaded.
    """
    return fingerprint_of(load_tokenizer_folder(directory))


def fingerprint_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 (hex) of a Hugging Face tokenizer's (token, id) pairs."""
    pairs = sorted(tokenizer.get_vocab().items(), key=lambda pair: (pair[1], pair[0]))
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def digest_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 (hex) of all that determines the ids that a Hugging Face tokenizer gives to a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {} if backend is None else json.loads(backend.to_str())
    for setting in ("padding", "truncation"):  # of the last call
        rules.pop(setting, None)
    facts = [fingerprint_of(tokenizer), rules, tokenizer.special_tokens_map, tokenizer.model_max_length]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _check_same_ids(
    tokenizer: MegatronTokenizerText, counterpart: PreTrainedTokenizerBase, config: TokenizerConfig
) -> None:
    """Refuse a counterpart that differs in the ids of :data:`_PROBES`, or in the end-of-document token."""
    problem = f"{describe_tokenizer(config)} cannot be written as a Hugging Face {type(counterpart).__name__}"
    special = tokenizer.library == "huggingface" and config.tokenizer_hf_include_special_tokens
    for text in _NUMBER_PROBES if tokenizer.library.startswith("null") else _PROBES:
        expected = list(tokenizer.tokenize(text))
        # Not verbose: it would warn if the text is longer than the model's context.
        actual = counterpart(text, add_special_tokens=special, verbose=False).input_ids
        if actual != expected:
            raise UserError(
                f"{problem}: {text!r} gets the ids {shortened(actual, 60)} instead of {shortened(expected, 60)}; use "
                "another tokenizer or model type"
            )
    end = end_of_document(tokenizer, config)
    if counterpart.eos_token_id != end:
        raise UserError(
            f"{problem}: its end of document would be {counterpart.eos_token_id} instead of {end}; "
            "use another tokenizer or model type"
        )


def _from_hugging_face(tokenizer: MegatronTokenizerText) -> PreTrainedTokenizerBase:
    counterpart: PreTrainedTokenizerBase = copy.deepcopy(tokenizer._tokenizer.tokenizer)
    if counterpart.pad_token is None:
        counterpart.pad_token = counterpart.eos_token
    return counterpart


def _from_sentencepiece(tokenizer: MegatronTokenizerText) -> PreTrainedTokenizerBase:
    """Return a ``tokenizers`` BPE where that is exact; else SentencePiece itself, wrapped by transformers.

    ``tokenizers`` is not exact for Unigram (scores are summed in another precision, and runs such as ``=====`` are
    ties), for normalization by a character map (combining marks), and for user-defined symbols after a leading space.
    """
    from transformers import PreTrainedTokenizerFast, SentencePieceBackend
    from transformers.convert_slow_tokenizer import import_protobuf

    library = tokenizer._tokenizer
    if library.special_token_to_id:
        raise UserError(
            "--tokenizer-special-tokens with --tokenizer-sentencepiece-legacy cannot be written as a Hugging "
            "Face tokenizer; train the SentencePiece model with these tokens"
        )
    pieces = library.tokenizer
    protobuf = import_protobuf()
    model = protobuf.ModelProto.FromString(pieces.serialized_model_proto())
    names = {
        f"{name}_token": pieces.id_to_piece(index)
        for name in ("bos", "eos", "unk", "pad")
        if (index := getattr(pieces, f"{name}_id")()) >= 0
    }
    names.setdefault("pad_token", names["eos_token"])
    # SentencePiece never reads control pieces from text; split_special_tokens makes transformers do the same.
    options: dict[str, Any] = {
        "split_special_tokens": True,
        "model_input_names": ["input_ids", "attention_mask"],
        **names,
    }
    if (
        model.trainer_spec.model_type == _BPE_MODEL
        and not model.normalizer_spec.precompiled_charsmap
        and not model.trainer_spec.treat_whitespace_as_suffix
        and {piece.type for piece in model.pieces} <= _FAST_TYPES
    ):
        return PreTrainedTokenizerFast(tokenizer_object=_sentencepiece_bpe(model), **options)
    return SentencePieceBackend(vocab_file=tokenizer.path, **options)


def _sentencepiece_bpe(model: Any) -> Any:
    """Convert a SentencePiece BPE model (a ``ModelProto``) to a ``tokenizers.Tokenizer``."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    ids = {piece.piece: index for index, piece in enumerate(model.pieces)}
    normal = {piece.piece for piece in model.pieces if piece.type == _NORMAL}
    # SentencePiece joins whichever neighbors make the best piece: every way to split a piece is a merge.
    merges = sorted(
        (-piece.score, ids[piece.piece[:cut]], ids[piece.piece[cut:]])
        for piece in model.pieces
        if piece.type == _NORMAL
        for cut in range(1, len(piece.piece))
        if piece.piece[:cut] in normal and piece.piece[cut:] in normal
    )
    spec, normalizer = model.trainer_spec, model.normalizer_spec
    bpe = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=[(model.pieces[left].piece, model.pieces[right].piece) for _, left, right in merges],
            unk_token=model.pieces[spec.unk_id].piece,
            fuse_unk=True,
            byte_fallback=spec.byte_fallback,
        )
    )
    steps: list[Any] = []
    if normalizer.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if normalizer.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    bpe.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if normalizer.add_dummy_prefix else []
    bpe.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    bpe.add_special_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=True)
            for piece in model.pieces
            if piece.type in (_UNKNOWN, _CONTROL)
        ]
    )
    return bpe


def _from_tiktoken(tokenizer: MegatronTokenizerText) -> PreTrainedTokenizerBase:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    library = tokenizer._tokenizer

    class Ranks(TikTokenConverter):
        """The converter, which takes the ranks that Megatron-Core has read instead of a file."""

        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            ranks: dict[bytes, int] = library.token2id
            return ranks

    converter = Ranks()  # type: ignore[no-untyped-call]
    vocabulary, merges = converter.extract_vocab_merges_from_model("")
    vocabulary |= {token: index for index, token in enumerate(library.special_tokens)}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(library.tokenizer._pat_str), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in library.special_tokens])
    names = {
        f"{name}_token": library.special_tokens[getattr(library, f"{name}_id")]
        for name in ("unk", "bos", "eos", "mask", "pad", "cls", "sep")
    }
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_input_names=["input_ids", "attention_mask"], **names)


def _from_null(tokenizer: MegatronTokenizerText) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    numbers = Tokenizer(models.WordLevel(vocab={str(index): index for index in range(tokenizer.vocab_size)}))
    numbers.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = str(tokenizer.eod)
    # Without split_special_tokens the end-of-document number would also be found inside longer numbers.
    return PreTrainedTokenizerFast(
        tokenizer_object=numbers,
        eos_token=end,
        pad_token=end,
        split_special_tokens=True,
        model_input_names=["input_ids", "attention_mask"],
    )
