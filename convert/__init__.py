"""Checkpoint converters: Hugging Face, Orbax and PEFT, each into each. `python -m gemma2_jax.convert --help`."""
