"""Megatron-style pretraining with a data weighting model."""

from megatron_dwm.import_hooks import install_import_hooks

__version__ = "0.1.0"

install_import_hooks()
