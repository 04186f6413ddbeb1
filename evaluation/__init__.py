"""What models are worth: how answers are read and compared."""
