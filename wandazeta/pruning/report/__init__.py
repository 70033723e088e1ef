"""Report of a pruning as a table, charts and an HTML page."""
