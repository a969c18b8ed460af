"""The process group: who is in it, what travels, how its ranks agree and how they hear of a failure."""
