"""Checkpoints that a run goes on from: their format, manifest and retention."""
