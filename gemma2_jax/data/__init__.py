"""From documents to batches, in the order of the work:

`reading` and `python_docs` give records, `sources` says which are trained on, `records` makes documents of them, `chat`
and `encoding` make tokens, `tokenizing` does so in many processes and `store` keeps them, `packing` lays out rows and
`plans` keeps which, `mixtures` takes rows of several sources, and `batches` is what a training loop uses. Nothing in
here puts arrays on devices.
"""
