"""Weights that others trained, or an earlier run: read from a file, fitted to a model, and accounted for."""
