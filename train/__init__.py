"""Training from a checkout: data, objectives and one script per stage. Not installed with the library."""
