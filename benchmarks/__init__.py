"""Measurements against peers: run each as `python -m benchmarks.<name>`; none of them is a test."""
