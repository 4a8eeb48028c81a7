"""Measurements of parts: the input pipeline, the rank-two fit. Whole steps are measured by scripts/benchmark.py."""
