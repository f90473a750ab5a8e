"""Attention modules whose heads can leave: replacements of those whose code takes the inner width from the input."""

from lightning_prune.channels.attention.base import FreeWidth
from lightning_prune.channels.attention.replace import (
    check_kinds,
    narrowed,
    replace,
    replaceable,
    replaced,
    replaced_modules,
)

__all__ = ["FreeWidth", "check_kinds", "narrowed", "replace", "replaceable", "replaced", "replaced_modules"]
