"""Integrations with frameworks and engines: a module for each, imported by its own name."""
