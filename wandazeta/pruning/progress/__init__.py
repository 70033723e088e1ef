"""The progress folder of a pruning and the key that identifies it."""
