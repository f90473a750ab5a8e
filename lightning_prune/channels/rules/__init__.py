"""How channels flow through each operation: small rules, one table."""

from lightning_prune.channels.rules import contract, elementwise, normalise, parts, shape
from lightning_prune.channels.rules.registry import RULES, Rule, rule

__all__ = ["RULES", "Rule", "contract", "elementwise", "normalise", "parts", "rule", "shape"]
