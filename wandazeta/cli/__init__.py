"""Command line: LightningCLI with the commands `prune` and `diagnose`."""
