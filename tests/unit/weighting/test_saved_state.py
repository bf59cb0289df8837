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
}


@pytest.mark.parametrize("state", [{}, NOT_STARTED, {"consumed_target_samples": 3}, WHOLE, {"of another": "weighting"}])
def test_what_checkpoints_hold_passes(state: dict[str, Any]):
    check_weighter_state(state)


@pytest.mark.parametrize(
    "changes",
    [
        *({name: value} for name in WHOLE if name != "weighter_prior" for value in ([1], torch.ones(3))),
        *({name: None} for name in WHOLE if name not in ("weighter_prior", "target_gradients")),
        {"outer_updates": -1},
        {"weighter": {"score.weight": None}},
        *({"replay": [BATCH | changed]} for changed in ({"tokens": None}, {"alignments": torch.ones(3)})),
    ],
)
def test_another_type_or_none_is_refused(changes: dict[str, Any]):
    (name,) = changes
    with pytest.raises(
        ValueError, match="its parameters|its replay" if name in ("weighter", "replay") else f"its {name}"
    ):
        check_weighter_state(WHOLE | changes)
