"""Configuration: frozen dataclasses of flags, one file a subject."""
