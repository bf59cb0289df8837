"""Compare the speed of ``megatron-dwm score`` with that of the classifier alone, in one process.

    python benchmarks/scoring.py

The classifier's forward pass is timed on whole windows at several batch sizes; scoring is compared with the best of
them, in turns. Scoring is timed from the file of JSON lines to the finished output, including the loading of the model.
Documents are prose from Python's library, of all lengths. On a CPU, time is this process's processor time, so that
other work on the machine does not count.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch

from megatron_dwm.atomic_write import atomic_write_text
from megatron_dwm.benchmarks.programs import call
from megatron_dwm.cli.command import run_command
from megatron_dwm.config.flags import flag, parse, require_at_least
from megatron_dwm.extras import require_packages

BATCH_SIZES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class ScoringBenchmarkConfig:
    """Measurement."""

    output: str = flag("runs/scoring", "Folder for the corpus and the classifier.")
    json_file: str | None = flag(None, "Also write the result to this file.", "--json")
    weighter: str | None = flag(None, "Folder of a classifier. Default: one with random weights is created.")
    num_layers: int = flag(4, "Number of layers of the created classifier.")
    hidden_size: int = flag(256, "Hidden size of the created classifier.")
    window: int = flag(256, "Tokens scored at once.")
    batch_tokens: int | None = flag(None, "Tokens of a batch. Default: as in score.")
    documents: int = flag(400, "Number of documents to score.")
    repeats: int = flag(3, "Number of repetitions.")

    def __post_init__(self) -> None:
        require_at_least(self, 1, "num_layers hidden_size window batch_tokens documents repeats")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the ratio."""
    run_command(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> None:
    description = {"scoring": ScoringBenchmarkConfig}
    config: ScoringBenchmarkConfig = parse(argv, description, description=__doc__)["scoring"]
    require_packages("benchmark scoring", "datatrove", "orjson", "pyarrow")
    from megatron_dwm.analysis.score_inputs import parts_of
    from megatron_dwm.analysis.scoring import ScoreSettings, score_steps
    from megatron_dwm.corpora.pipelines import Job, run_here

    folder = Path(config.output)
    source, texts = _documents(config, folder)
    weighter = config.weighter or str(make_classifier(config, folder / "classifier", texts))
    settings = ScoreSettings(weighter, False, config.window, "mean", config.batch_tokens, "score")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scorer = settings.load(device)
    tokens = sum(map(len, scorer.tokenize(texts)))
    generator = torch.Generator().manual_seed(1)
    forward = {}
    for size in BATCH_SIZES:
        batch = torch.randint(0, len(scorer.tokenizer), (size, config.window), generator=generator).to(device)
        forward[size] = _speed(scorer, batch, repeats=max(1, 8 // size))
    best = max(forward, key=lambda size: forward[size])
    batch = torch.randint(0, len(scorer.tokenizer), (best, config.window), generator=generator).to(device)
    ratios, speeds = [], []
    for turn in range(config.repeats):
        of_model = _speed(scorer, batch, repeats=max(1, tokens // batch.numel() // 2))
        with tempfile.TemporaryDirectory(dir=folder) as output:
            start = _seconds()
            to = str(Path(output) / str(turn))
            steps = score_steps(parts_of([str(source)], 10**9), to, settings)
            run_here(Job(steps, 1, f"{to}/logs"), workers=1)
            speeds.append(tokens / (_seconds() - start))
        ratios.append(speeds[-1] / of_model)
    result = {
        "documents": len(texts),
        "tokens": tokens,
        "forward_tokens_per_second": forward,
        "best_batch_size": best,
        "scoring_tokens_per_second": statistics.median(speeds),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }
    print("\n".join(f"forward, batches of {size:>2}: {speed:,.0f} tokens/s" for size, speed in forward.items()))
    print(f"scoring: {result['scoring_tokens_per_second']:,.0f} tokens/s, {result['ratio']:.2f} of the best of them")
    if config.json_file:
        atomic_write_text(Path(config.json_file), json.dumps(result, indent=2) + "\n")


def _speed(scorer: Any, batch: torch.Tensor, repeats: int) -> float:
    """Return the tokens per second of the classifier's forward pass."""
    with torch.inference_mode(), scorer.precision():
        scorer.model(input_ids=batch)
        _wait(batch)
        start = _seconds()
        for _ in range(repeats):
            scorer.model(input_ids=batch)
        _wait(batch)
    return repeats * batch.numel() / (_seconds() - start)


def _seconds() -> float:
    return perf_counter() if torch.cuda.is_available() else process_time()


def _wait(batch: torch.Tensor) -> None:
    if batch.is_cuda:
        torch.cuda.synchronize()


def _documents(config: ScoringBenchmarkConfig, folder: Path) -> tuple[Path, list[str]]:
    """Return the file of the documents, and their texts."""
    corpus = folder / "corpus"
    if not (corpus / "prose.train.jsonl").is_file():
        call("build-corpus", "--output", corpus)
    lines = (corpus / "prose.train.jsonl").read_text().splitlines()[: config.documents]
    source = folder / "documents.jsonl"
    atomic_write_text(source, "".join(f"{line}\n" for line in lines))
    return source, [json.loads(line)["text"] for line in lines]


def make_classifier(config: ScoringBenchmarkConfig, folder: Path, texts: Sequence[str]) -> Path:
    """Write a classifier with random weights, and a tokenizer trained on the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=["<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    pieces.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"hidden_size": config.hidden_size, "intermediate_size": 4 * config.hidden_size}
    sizes |= {"num_hidden_layers": config.num_layers, "num_attention_heads": max(1, config.hidden_size // 64)}
    hf_config = AutoConfig.for_model("llama", vocab_size=4096, num_labels=1, pad_token_id=0, **sizes)
    AutoModelForSequenceClassification.from_config(hf_config).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
