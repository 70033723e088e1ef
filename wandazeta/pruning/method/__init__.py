"""The pruning of one block: scores, masks, statistics, SparseGPT and regional optimisation."""
