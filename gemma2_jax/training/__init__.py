"""A training run: one step, the loop around it, what it keeps and what it prints."""
