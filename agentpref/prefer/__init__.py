"""What was liked: from feedback and comparisons to the pairs that adapters are trained on."""
