"""With what both trainers compute, in these tests."""

from __future__ import annotations

LEARNING_RATE = 1e-3
FLOAT32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
