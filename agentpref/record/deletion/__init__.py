"""Removing runs: forgetting a user, letting old runs go."""
