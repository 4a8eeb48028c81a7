"""Thin commands over the packages beside them."""
