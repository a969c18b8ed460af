"""The composite around tower and decoder: features are made by parts, and go where their placeholders are."""
