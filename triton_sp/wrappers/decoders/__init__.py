"""The decoder on this rank's tokens."""
