"""NumPy arrays in the place of tensors: packing runs beside the training of the step before.

On one thread, where torch would wait for the threads of that step; and what is done to short arrays starts
several times faster.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Integers = NDArray[np.int64]
Array = NDArray[Any]


def as_array(values: Tensor) -> Array:
    """The same memory."""
    array: Array = values.numpy()
    return array
