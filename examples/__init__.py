"""What a new user runs first."""
