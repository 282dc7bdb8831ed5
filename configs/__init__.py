"""Recipes: one file, one run. `gemma2_jax.config.load(name)` finds them."""
