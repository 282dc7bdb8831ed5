"""From documents to batches: `python_docs` and `sources` read, `encoding` tokenizes, `packing` lays out rows.

`batches` puts them together and is what a training loop uses. Nothing in here puts arrays on devices.
"""
