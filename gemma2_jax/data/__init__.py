"""From documents to batches: `python_docs` and `sources` read, `encoding` tokenises, `packing` lays out rows.

`pipeline` puts them together and is what a training loop uses. Nothing in here puts arrays on devices.
"""
