"""Compressed models inside transformers."""
