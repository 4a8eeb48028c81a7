"""Clusters, tried on a real SLURM that this package starts on the machine it runs on."""
