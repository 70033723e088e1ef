"""Finding, loading, streaming and sharding models."""
