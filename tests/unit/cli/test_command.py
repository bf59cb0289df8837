"""What all commands of one process have in common."""

from __future__ import annotations

from logging import Handler

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, logging

from megatron_dwm.cli.command import run_command


def test_texts_that_are_longer_than_a_context_are_not_said_to_be_errors():
    """Transformers would warn of indexing errors, but what reads the texts cuts them."""
    words = Tokenizer(models.WordLevel({str(number): number for number in range(9)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=2)
    lines: list[str] = []
    handler = Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.add_handler(handler)
    try:
        run_command(lambda: tokenizer("1 2 3 4"))
    finally:
        logging.remove_handler(handler)
    assert lines == []
