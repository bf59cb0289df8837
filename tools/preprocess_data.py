"""Turn JSON lines into Megatron's indexed data sets; flags and output are those of Megatron-LM's tool."""

from __future__ import annotations

import os
import warnings

from megatron_dwm.config.flags import parse
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.config.unsupported_flags import reason_unsupported
from megatron_dwm.corpora.preprocess import PreprocessConfig, preprocess
from megatron_dwm.errors import run_cli
from megatron_dwm.runtime.logging import configure_logging


def main() -> None:
    classes = {"preprocess": PreprocessConfig, "tokenizer": TokenizerConfig}
    configs = parse(None, classes, description=__doc__, reason_unsupported=reason_unsupported)
    configure_logging()
    # Each worker tokenizes one text at a time; threads beside them would only warn about the fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    preprocess(configs["preprocess"], configs["tokenizer"])


if __name__ == "__main__":
    run_cli(main)
