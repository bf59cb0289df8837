"""Model cards: the README.md of an exported folder, with the header that the Hugging Face Hub reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_dwm import __version__

CITATION = f"""\
```bibtex
@software{{megatron_dwm,
  title = {{Megatron-DWM: Megatron-style pretraining with a data weighting model}},
  author = {{{{The authors of Megatron-DWM}}}},
  version = {{{__version__}}},
  year = {{2025}}
}}
@inproceedings{{yu2025dynamic,
  title = {{LLM Data Selection and Utilization via Dynamic Bi-level Optimization}},
  author = {{Yu, Yang and Han, Kai and Zhou, Hang and Tang, Yehui and Huang, Kaiqi and Wang, Yunhe and Tao, Dacheng}},
  booktitle = {{Proceedings of the 42nd International Conference on Machine Learning}},
  year = {{2025}},
  note = {{arXiv:2507.16178}}
}}
```"""


def render_card(title: str, *, task: str, tags: Sequence[str], introduction: str, sections: Mapping[str, str]) -> str:
    """Return a card in Markdown.

    Args:
        title: the first heading.
        task: the Hub's name of what the model does, such as ``"text-generation"``.
        tags: the Hub's tags, in addition to those of the program.
        introduction: the text under the title.
        sections: text by heading.
    """
    from huggingface_hub import ModelCardData

    header = ModelCardData(library_name="transformers", pipeline_tag=task, tags=["megatron-dwm", *tags])
    parts = [f"---\n{header.to_yaml()}\n---", f"# {title}", introduction]
    parts += [f"## {heading}\n\n{text}" for heading, text in {**sections, "How to cite": CITATION}.items()]
    return "\n\n".join(parts) + "\n"


def bullets(facts: Mapping[str, object]) -> str:
    """Return facts as a list, without those that are None or empty."""
    return "\n".join(f"* {name}: {value}" for name, value in facts.items() if value not in (None, "", [], {}))
