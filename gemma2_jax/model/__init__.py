"""What is computed: the model, its adapters, its attention and its loss. Training and data are not known here."""
