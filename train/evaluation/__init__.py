"""What `python -m train.evaluate` is made of: rows, answers, results on disk, and their summary."""
