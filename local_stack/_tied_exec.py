"""Become another program that dies with its parent.

    python -I -S _tied_exec.py PARENT_PID PROGRAM ARGUMENT...

A launcher that is killed (SIGKILL, out of memory) cannot stop what it started. On Linux the kernel can: a
process may ask to be signalled when its parent ends. The request survives `exec`, so this file makes it and
then turns into the real program; no extra process remains. Asking between fork and exec (`preexec_fn`)
would do the same, but is not safe in a program with threads.

Elsewhere than on Linux it only becomes the program. Imports nothing but the standard library, to start in
milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Tie this process to its parent and become the given program."""
    parent, *program = arguments
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != int(parent):  # it ended before the request was in place
            sys.exit(1)
    # A shell that starts a job in the background may have it ignore Ctrl-C, and ignoring is inherited too.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.execvp(program[0], program)  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    main(sys.argv[1:])
