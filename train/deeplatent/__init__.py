"""Training of DeepLatent: its data, its collator, the teacher's states, and the objective of each stage."""
