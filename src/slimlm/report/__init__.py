"""Tables from records; knows nothing else."""
