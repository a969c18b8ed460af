"""The batch: read, compared between ranks, and laid out as one stream of tokens."""
