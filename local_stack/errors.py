"""Errors of the local stack, as one tree.

::

    LocalStackError (Exception)
    ├── RunDirectoryError (ValueError)      the run directory cannot be used as asked
    ├── EngineMissingError (FileNotFoundError)  the inference engine that was asked for is not installed
    ├── ProcessDiedError (ChildProcessError)  a service ended although it should run
    ├── NotReadyError (TimeoutError)        a service did not answer in time
    └── StoppedByUserError                  Ctrl-C, or another request to end
"""

from __future__ import annotations


class LocalStackError(Exception):
    """Base class of everything that the local stack raises on purpose."""


class RunDirectoryError(LocalStackError, ValueError):
    """The run directory holds something that must not be overwritten; the message says what to do."""


class EngineMissingError(LocalStackError, FileNotFoundError):
    """The inference engine that was asked for is not installed; the message says how to install it."""


class ProcessDiedError(LocalStackError, ChildProcessError):
    """A service ended although it should run; the message names it and shows the end of its log."""


class NotReadyError(LocalStackError, TimeoutError):
    """A service did not answer in time; the message names it and shows the end of its log."""


class StoppedByUserError(LocalStackError):
    """Ctrl-C, or another request to end; raised only where everything that runs is known."""
