"""What only a GPU can confirm: `run.sh` runs all of it."""
