"""Builds, runs and ends one run; every optimizer step, checkpoint and publish has its turn here."""
