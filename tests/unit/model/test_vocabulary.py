"""Which rows of the vocabulary take part in the softmax."""

from __future__ import annotations

import pytest

from megatron_dwm.errors import UserError
from megatron_dwm.model.vocabulary import Vocabulary, saved_softmax_size


def test_a_checkpoint_says_what_takes_part():
    imported = Vocabulary(384, 300)
    assert saved_softmax_size(imported.arguments, 384) == 300
    assert saved_softmax_size({"hf_vocab_size": 300}, 384) == 300  # as imports named it at first
    assert saved_softmax_size({"padded_vocab_size": 384}, 384) == 384


def test_all_rows_take_part_in_a_model_from_scratch():
    assert not Vocabulary(128, 128).arguments


def test_more_tokens_than_take_part_are_refused():
    Vocabulary(384, 300).require_tokens(300)
    with pytest.raises(UserError, match="300 tokens and the tokenizer 301"):
        Vocabulary(384, 300).require_tokens(301)
