"""What one run is and what it leaves: its live state and its steps, its folder, checkpoints, resume, provenance."""
