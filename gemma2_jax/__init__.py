"""Gemma 2 in JAX and Flax NNX: train, convert and run."""
