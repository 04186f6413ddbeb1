"""Analyses of a trained model, one command each: every one writes a table and a plot and prints the table."""

import conversion.commands  # noqa: F401  (says which extra a command needs where an import fails)
