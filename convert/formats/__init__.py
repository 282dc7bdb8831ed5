"""The names, layouts and configs of each checkpoint format. The package `files` has the bytes."""
