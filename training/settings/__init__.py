"""What a run is told: composed by Hydra, checked against signatures, and built."""
