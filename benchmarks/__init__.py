"""Measurements, each a command that prints a table, beside a peer measured in the same run."""
