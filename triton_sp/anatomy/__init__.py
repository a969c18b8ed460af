"""What a model is made of: towers, decoder and the seam between them, and whether each can be sharded."""
