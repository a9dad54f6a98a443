"""Comparison with Hugging Face transformers from the same weights."""
