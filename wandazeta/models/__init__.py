"""Load, stream and shard models, and find and call their blocks."""
