"""Models that make images: auto-encoders, and two nets that play against each other."""
