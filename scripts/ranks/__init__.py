"""What several processes share out, measured."""
