"""Megatron-style pretraining with a data weighting model."""

__version__ = "0.1.0"
