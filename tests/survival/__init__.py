"""What runs survive: real processes, killed, stopped, cut off and crowded."""
