"""The model card of an exported weighter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_dwm.data.blend import TARGET_FLAG
from megatron_dwm.model_card import bullets, render_card
from megatron_dwm.weighting.ngram import MODEL_TYPE
from megatron_dwm.weighting.windows import UNLIMITED_LENGTH

NOT_MEASURED = (
    "Not measured in this folder. `megatron-dwm export-weighter --baseline RUN` writes a card with what the weighter's "
    "run has gained over a run with uniform weights."
)


def weighter_card(facts: Mapping[str, Any], model: Any, tokenizer: Any, *, name: str, effect: str | None) -> str:
    """Return the card.

    Args:
        facts: the manifest's part about the run.
        model: the classifier.
        tokenizer: the Hugging Face tokenizer.
        name: name of the folder.
        effect: the measured gain; None if it was not measured.
    """
    window = tokenizer.model_max_length if tokenizer.model_max_length < UNLIMITED_LENGTH else None
    data = {flag: _blend(blend) for flag, blend in facts.get("data", {}).items()}
    language_model = facts.get("language_model", {})
    stage = facts.get("stage")
    sections = {
        "Data": bullets({f"`{flag}`": blend for flag, blend in data.items() if flag != TARGET_FLAG}) or "Not recorded.",
        "Target": f"It favors what lowers the loss on {data[TARGET_FLAG]}."
        if TARGET_FLAG in data
        else "Its run had no target set: the weighter was frozen, or is not from a run.",
        "Training": bullets(
            {
                "Mode": facts.get("mode"),
                "Started from": facts.get("initialised_from"),
                "Iteration": facts.get("iteration"),
                "Stage": f"{stage} of {facts['num_stages']}" if stage is not None and "num_stages" in facts else stage,
                "Temperature": facts.get("temperature"),
                "KL weight": facts.get("kl_weight"),
                "Offsets by source": "added to the scores in its run, but not part of this weighter"
                if facts.get("source_offsets")
                else None,
                "Global batch": facts.get("global_batch_size"),
                "Language model": ", ".join(f"{key} {value}" for key, value in language_model.items()),
            }
        )
        or "Not recorded.",
        "Tokens": bullets(
            {
                "Window": f"{window} tokens; the tokenizer truncates to that with `truncation=True`"
                if window
                else None,
                "Padding": f"`{tokenizer.pad_token}` ({tokenizer.pad_token_id}), on the {tokenizer.padding_side}",
                "End of document": f"`{tokenizer.eos_token}` ({tokenizer.eos_token_id})",
                "Added to a text": _added(tokenizer),
            }
        ),
        "Measured effect": effect or NOT_MEASURED,
        "Limits": "\n".join(
            [
                "* A score has no unit; only differences within a set of texts matter. It says what helped one "
                "language model on one target set at one time of its training, not which text is good.",
                "* Scores also reflect properties that correlate with usefulness in the data (length, topic, form).",
                f"* Texts longer than {window or 'its samples in training'}{' tokens' if window else ''} are outside "
                "what it has seen, and much shorter ones too.",
            ]
        ),
        "How to load": _loading(model, name),
    }
    return render_card(
        name,
        task="text-classification",
        tags=["data-selection", "data-weighting"],
        introduction=f"A data weighting model of {model.num_parameters():,} parameters ({type(model).__name__}). It "
        "gives a text a score; the softmax of a batch's scores gives the weights of its samples in pretraining.",
        sections=sections,
    )


def _blend(blend: Mapping[str, Any]) -> str:
    prefixes, weights = blend["prefixes"], blend.get("weights")
    if not weights:
        return ", ".join(f"`{prefix}`" for prefix in prefixes)
    return ", ".join(f"{weight:g} of `{prefix}`" for weight, prefix in zip(weights, prefixes, strict=True))


def _added(tokenizer: Any) -> str:
    ids = tokenizer("").input_ids
    return ", ".join(f"`{token}`" for token in tokenizer.convert_ids_to_tokens(ids)) or "nothing"


def _loading(model: Any, name: str) -> str:
    ours = model.config.model_type == MODEL_TYPE
    lines = [
        "```python",
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        *(["", "import megatron_dwm  # registers the architecture"] if ours else []),
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        f'model = AutoModelForSequenceClassification.from_pretrained("{name}").eval()',
        'batch = tokenizer(["a text", "another"], padding=True, truncation=True, return_tensors="pt")',
        "scores = model(**batch).logits.squeeze(-1)",
        "```",
        "",
        f"`pretrain_dwm.py --dwm-mode frozen --dwm-load {name}` weights the samples of another run with it, and "
        f"`megatron-dwm score --weighter {name}` scores documents.",
    ]
    return "\n".join(lines)
