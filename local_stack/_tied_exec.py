"""Become another program that dies with its parent.

    python -I -S _tied_exec.py PARENT_PID [--with-children] PROGRAM ARGUMENT...

A launcher that is killed (SIGKILL, out of memory) cannot stop what it started. On Linux the kernel can: a
process may ask to be signalled when its parent ends. The request survives `exec`, so this file makes it and
then turns into the real program; no extra process remains. Asking between fork and exec (`preexec_fn`)
would do the same, but is not safe in a program with threads.

The request is not inherited. A program that starts processes of its own and does not tie them (vLLM's engine
survives its API server) gets a watchdog with `--with-children`: a small process that sleeps until the program
has ended, however it ended, and then kills what is left of its process group.

Elsewhere than on Linux it only becomes the program. Imports nothing but the standard library, to start in
milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_WITH_CHILDREN = "--with-children"


def main(arguments: list[str]) -> None:
    """Tie this process to its parent and become the given program."""
    parent, *program = arguments
    with_children = program[0] == _WITH_CHILDREN
    if with_children:
        program = program[1:]
    if sys.platform == "linux":
        _ask_for_signal(signal.SIGKILL)
        if os.getppid() != int(parent):  # it ended before the request was in place
            sys.exit(1)
        if with_children:
            _start_watchdog()
    # A shell that starts a job in the background may have it ignore Ctrl-C, and ignoring is inherited too.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.execvp(program[0], program)  # noqa: S606 - no shell is wanted


def _ask_for_signal(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def _start_watchdog() -> None:
    """Fork a process that outlives this one, by just long enough to kill its group."""
    watched = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    if os.fork() == 0:
        _ask_for_signal(signal.SIGUSR1)
        if os.getppid() == watched:
            signal.sigwait({signal.SIGUSR1})
        os.killpg(os.getpgid(0), signal.SIGKILL)  # this process included
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


if __name__ == "__main__":
    main(sys.argv[1:])
