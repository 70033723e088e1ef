"""Text for pruning and training: sources, windows, prompts and offline samples."""
