"""Starting processes: the ranks of one machine, and what clusters need before and after theirs (slurm/ has the scripts)."""
