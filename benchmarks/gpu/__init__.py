"""Measurements that only a GPU can give: `run.sh` runs all of them."""
