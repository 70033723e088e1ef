"""Text for pruning, training and evaluation: sources, splits, windows of tokens, prompts, and offline samples."""
