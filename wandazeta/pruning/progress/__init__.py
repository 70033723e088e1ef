"""Progress of a pruning on disk, and the key that identifies a pruning."""
