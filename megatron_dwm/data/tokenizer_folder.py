"""The tokenizer of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dwm.errors import UserError, shortened
from megatron_dwm.special_files import require_plain_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REMEDY = "put a tokenizer's file there"
"""What to do about a special file in a tokenizer's folder."""


def load_tokenizer_folder(folder: str | Path, flag: str = "") -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hugging Face folder, from its files alone and without code from there.

    Args:
        flag: the flag that names the folder, for the error message.

    Raises:
        UserError: the folder has no tokenizer that can be loaded.
    """
    from transformers import AutoTokenizer

    named = f"{flag} {folder}".lstrip()
    require_plain_files(Path(folder), named, REMEDY)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever the tokenizer's class raises
        is_folder = Path(folder).is_dir()  # else transformers has searched its download cache
        problem = f"its tokenizer does not load ({shortened(error, 300)})" if is_folder else "no such folder"
        raise UserError(f"{named}: {problem}; give a Hugging Face folder with a tokenizer's files") from error
    require_vocabulary(tokenizer, folder, named)
    return tokenizer


def require_vocabulary(tokenizer: PreTrainedTokenizerBase, folder: str | Path, named: str) -> None:
    """Refuse a tokenizer that ``AutoTokenizer`` made from the model type of a folder's ``config.json`` alone.

    Where a folder holds no file of a vocabulary, it makes a tokenizer of a few special tokens.

    Args:
        folder: what the tokenizer was loaded from; a name on the Hub passes.
        named: the beginning of the error message, which names the folder.

    Raises:
        UserError: the folder has none of the files that this class of tokenizers reads.
    """
    files = sorted({*tokenizer.vocab_files_names.values(), "tokenizer.json"})
    needs_files = bool(tokenizer.vocab_files_names)  # tokenizers of characters or bytes need none
    if Path(folder).is_dir() and needs_files and not any(Path(folder, file).is_file() for file in files):
        raise UserError(f"{named}: no Hugging Face tokenizer there; put {' or '.join(files)} next to the model")
