"""What a model is made of: towers, a decoder and their fusion, and whether each can be sharded."""
