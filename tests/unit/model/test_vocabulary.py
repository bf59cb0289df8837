"""Which rows of the vocabulary take part in the softmax."""

from __future__ import annotations

import pytest

from megatron_dwm.errors import UserError
from megatron_dwm.model.vocabulary import Vocabulary, saved_tokens


def test_a_checkpoint_says_what_takes_part():
    imported = Vocabulary(384, 300)
    assert saved_tokens(imported.arguments) == imported.softmax_size == 300
    assert saved_tokens(Vocabulary(384, 384).arguments) == 384  # which may be more than its tokenizer has
    assert saved_tokens({"hf_vocab_size": 300}) == 300  # as imports named it at first
    assert saved_tokens({"padded_vocab_size": 384}) is None


def test_all_rows_take_part_in_a_model_from_scratch():
    assert Vocabulary(128).softmax_size == 128 and not Vocabulary(128).arguments


def test_more_tokens_than_take_part_are_refused():
    Vocabulary(384, 300).require_tokens(300)
    with pytest.raises(UserError, match="300 tokens and the tokenizer 301"):
        Vocabulary(384, 300).require_tokens(301)
