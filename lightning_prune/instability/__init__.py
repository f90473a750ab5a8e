"""Instability analysis of a recipe: trunks, branches that differ in SGD noise, lines between their ends."""
