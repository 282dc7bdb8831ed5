"""Megatron's `.bin` and `.idx` files: read, written, packed like any text, and taken in Megatron-LM's own order."""
