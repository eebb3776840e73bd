"""What training and serving share: the base model, its tokenizer and its chat template."""
