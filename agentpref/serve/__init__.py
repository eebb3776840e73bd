"""Serving: which revision answers, and how one takes over from another."""
