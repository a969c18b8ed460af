"""Building blocks for your own model script, where `wrap` does not fit: adapters and sharded attention."""
