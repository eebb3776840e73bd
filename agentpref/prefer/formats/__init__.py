"""The formats that preference data is exchanged in: one module for each family."""
