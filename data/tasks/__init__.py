"""What is served for a task: images that were read become train, validation and test loaders, the same way for all."""
