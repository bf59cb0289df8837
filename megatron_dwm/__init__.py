"""Megatron-style pretraining with a data weighting model."""

from megatron_dwm.auto_classes import register_auto_classes

__version__ = "0.1.0"

register_auto_classes()
