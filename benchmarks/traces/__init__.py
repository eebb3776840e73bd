"""Offline reinforcement learning on logged conversations, in a world whose optimum is known."""
