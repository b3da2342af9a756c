"""What a model is made of, and how it runs a block at a time."""
