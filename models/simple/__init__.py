"""Nets simple or small enough for quick looks and exact references."""
