"""Text from a model: the engine, how tokens are chosen, and what serves and measures it."""
