"""Waits for the small collectives by which processes tell each other things, without a race at their end."""

from __future__ import annotations

from collections import deque
from typing import Any, Final

_newest_work: Final[deque[Any]] = deque(maxlen=8)
"""See `wait`; not with the run, which ends before its group does."""


def wait(work: Any) -> None:
    """Wait for a collective, and keep it for a while after its end.

    A thread of gloo that is the last to let go of it needs the interpreter, for its tensors. If the group is
    taken down just then, the thread that has the interpreter waits for that one, and both wait for ever.

    Its tensors are kept too: it is for a few numbers, which are also what processes exchange last.

    Args:
        work: What a function of `torch.distributed` returns with `async_op`.
    """
    keep(work)
    work.wait()


def keep(work: Any) -> None:
    """Keep a collective that is not waited for, or not yet; see `wait`."""
    _newest_work.append(work)
