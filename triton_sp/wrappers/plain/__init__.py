"""Modules that are not Hugging Face's: their attention is found by its calls, and tried."""
