"""Starting processes: the ranks of one machine here, clusters in slurm/."""
