"""Answers scored, and latents put to the test: accuracy, faithfulness reports, analyses, adapters for other harnesses."""
