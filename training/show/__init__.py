"""What is seen of a run: pictures, texts, tables."""
