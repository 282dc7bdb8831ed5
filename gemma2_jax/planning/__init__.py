"""What a step would hold and send on GPUs that are not at hand, read off the compiled program."""
