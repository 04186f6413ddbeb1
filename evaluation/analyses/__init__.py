"""Analyses of a trained model, one command each: every one writes a table and a plot and prints the table."""
