"""From documents to batches: `python_docs` and `sources` read, `encoding` tokenizes, `packing` lays out rows.

`batches` combines them and is what a training loop uses. Nothing in here puts arrays on devices.
"""
