"""The benchmark of one training step; run it with `python -m benchmarks.step`."""
