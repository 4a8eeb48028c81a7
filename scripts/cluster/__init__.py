"""The parts of scripts/submit.py: what a job is, how batch systems are told, the script, and its submission."""
