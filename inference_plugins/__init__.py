"""What is loaded INTO other people's servers: single files that need the standard library and nothing else."""
