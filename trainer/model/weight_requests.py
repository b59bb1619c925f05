"""Lets process 0 read weights that are spread over processes piece by piece, at its own pace."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Final

import torch

from trainer.model.sharding import Spread

_END: Final = -1


class WeightRequests:
    """Asks the other processes for one piece of the weights at a time.

    A reader that waits for a server, stops anywhere, or begins again leaves nobody in half a collective: the
    others wait for a number, and are told when there are no more.

    Args:
        spread: How the weights are spread.
    """

    def __init__(self, spread: Spread) -> None:
        self._spread = spread
        self._gathering = threading.Lock()
        self._session: object = None
        self.failure: BaseException | None = None
        """What has kept process 0 from gathering a piece, for which the others still wait."""

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Within it process 0 may ask; the others that hold parts of its copy go through `heard`.

        Raises:
            BaseException: `failure`: nothing more can be said to them.
        """
        with self._gathering:
            self._session = object()
        try:
            yield
        finally:
            with self._gathering:
                self._session = None
                if self.failure is not None:
                    raise self.failure
                self._tell(_END)

    def begin(self) -> Callable[[int], AbstractContextManager[None]]:
        """Return what a reader asks with, in this session: a block in which one piece is gathered."""
        return partial(self._piece, self._session)

    def heard(self) -> Iterator[int]:
        """Yield the numbers that process 0 asks for, until its session ends; on the others."""
        while (number := self._tell(_END)) != _END:
            yield number

    @contextlib.contextmanager
    def _piece(self, session: object, number: int) -> Iterator[None]:
        with self._gathering:
            if session is None or session is not self._session:
                raise RuntimeError("weights are read for a transfer that has ended")
            try:
                self._tell(number)
                yield
            except BaseException as error:
                self.failure = error
                raise

    def _tell(self, number: int) -> int:
        told = torch.tensor([number])
        self._spread.tell(told)
        return int(told)
