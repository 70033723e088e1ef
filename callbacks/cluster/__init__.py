"""Lightning callbacks for several ranks and for clusters: lost ranks, ranks that differ, requeued SLURM jobs."""
