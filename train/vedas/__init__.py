"""Training of Vedas: its curriculum and its crop distillation."""
