"""The report of a pruning as table, charts and an HTML page."""
