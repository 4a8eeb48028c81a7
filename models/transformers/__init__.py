"""Transformers, on images and on text."""
