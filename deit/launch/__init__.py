"""Starting trainings: recipes, cluster settings, Slurm and local submission, status.

Nothing here imports torch: the launcher answers at once on a login node.
"""
