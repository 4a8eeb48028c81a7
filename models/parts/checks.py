"""Checks that several models share."""

from __future__ import annotations


def check_rates(**rates: float) -> None:
    """Raise ValueError unless every probability, by the name of its option, is at least 0 and below 1."""
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {rate}")
