"""What the training of several architectures shares: the trainer, stages, caches of features."""
