"""Lightning callbacks for clusters: lost ranks, ranks that differ, requeued SLURM jobs."""
