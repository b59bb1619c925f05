"""Fetching in a process of its own, so that the end of the trainer never costs a batch.

The Atropos API forgets a batch while it sends it. A trainer that is killed at that moment (out of memory, a
preempted node, a stray `kill -9`) would take it along. So a small process polls, without torch, in a session
of its own: it survives the trainer and its process group, records what is on its way, and then ends.

::

    trainer                                             fetching process
    FetchingProcess  -- stdin: settings, take, version, step, explain, stop -->  BatchPoller -- HTTP --> API
           ^         <-- stdout: recorded, taken, counters, explained, failed --     |
           |         <-- stderr: log lines -----------------------------------       | append, fsync
           +---------------------- reads the journal <-------------------------------+

Bodies travel through the journal only, so nothing is handed over that is not on the disk. Credentials travel
through stdin, never on a command line. When stdin ends, the trainer is gone: the process finishes the poll
under way, for at most `FetcherSettings.farewell` seconds, and exits. Until then it holds the journal's lock,
which a resumed trainer waits for.

What remains: if the machine dies between the API's sending and our fsync, that batch is lost.
"""

from __future__ import annotations

from atropos_client.fetcher._process import FetchingProcess
from atropos_client.fetcher._settings import FetcherSettings

__all__ = ["FetcherSettings", "FetchingProcess"]
