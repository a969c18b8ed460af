"""Vision towers: where their tokens are, and their blocks on this rank's tokens."""
