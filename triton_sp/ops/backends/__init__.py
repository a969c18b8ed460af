"""Other implementations of the stage attend, to be chosen by name: `SPConfig(attention=...)`."""
