"""A weighter's state in a checkpoint whose parts are missing or of another type is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_dwm.weighting.saved_state import check_weighter_state
from megatron_dwm.weighting.warmup import NOT_STARTED

BATCH = {"tokens": torch.ones(4, 8, dtype=torch.int32), "alignments": torch.ones(4)}
WHOLE: dict[str, Any] = {
    "consumed_target_samples": 2,
    "outer_updates": 1,
    "weighter_config": "{}",
    "weighter": {"score.weight": torch.ones(3)},
    "weighter_optimizer": {},
    "replay": [BATCH],
    "weighter_prior": None,
    "target_gradients": 0.4,
    "source_offsets": {"books": [0.5, 8.0]},
}
OPTIONAL = ("weighter_prior", "target_gradients", "source_offsets")


@pytest.mark.parametrize("state", [{}, NOT_STARTED, {"consumed_target_samples": 3}, WHOLE, {"of another": "weighting"}])
def test_what_checkpoints_hold_passes(state: dict[str, Any]):
    check_weighter_state(state)


@pytest.mark.parametrize(
    "changes",
    [
        *({name: value} for name in WHOLE if name != "weighter_prior" for value in ([1], torch.ones(3))),
        *({name: None} for name in WHOLE if name not in OPTIONAL),
        {"outer_updates": -1},
        *({"source_offsets": {"books": sums}} for sums in (None, [0.5], [0.5, None], [0.5, 8.0, 1.0], torch.ones(2))),
        {"weighter": {"score.weight": None}},
        *({"replay": [BATCH | changed]} for changed in ({"tokens": None}, {"alignments": torch.ones(3)})),
    ],
)
def test_another_type_or_none_is_refused(changes: dict[str, Any]):
    (name,) = changes
    said = {"weighter": "its parameters", "replay": "its replay", "source_offsets": "source"}
    with pytest.raises(ValueError, match=said.get(name, f"its {name}")):
        check_weighter_state(WHOLE | changes)
