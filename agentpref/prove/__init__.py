"""Proof that a candidate is better than live and has forgotten nothing."""
