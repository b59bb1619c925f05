"""Proves a publish: the server's log-probs are those of the trainer with the published weights."""
