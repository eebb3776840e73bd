"""Learning: from preference pairs to a LoRA adapter, on one model in memory."""
