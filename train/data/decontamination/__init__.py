"""The parts of `train.decontaminate`."""
