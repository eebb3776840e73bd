"""Judges: models and rules that compare answers, and how far each can be trusted."""
