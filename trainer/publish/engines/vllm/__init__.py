"""Speaks to vLLM: its routes, its adapters, and its own sender of weights."""
