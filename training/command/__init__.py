"""The command line around Hydra: jobs, sweeps, errors as sentences, and the check of an optimizer without training."""
