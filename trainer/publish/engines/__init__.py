"""Adapters for each inference engine: its routes, and how the trainer joins its weight transfer."""
