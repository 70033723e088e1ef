"""The report of a pruning as tables, pictures and an HTML page."""
