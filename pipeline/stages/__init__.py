"""The stages: one file for each command, written to be read from top to bottom."""
