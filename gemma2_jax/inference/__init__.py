"""Text from a model: prefill, cached decoding and sampling."""
