"""Files, signals, ranks, memory, argument checks and the environment of a run."""
