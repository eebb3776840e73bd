"""Copying and merging whole homes."""
