"""Fetches in a process of its own, so that the end of the trainer never costs a batch.

The Atropos API forgets a batch while it sends it. A trainer that is killed at that moment (out of memory, a
preempted node, a stray `kill -9`) would take it along. So a small process polls, without torch, in a session
of its own: it survives the trainer and its process group, records what is on its way, and then ends.

::

    trainer                                              fetching process
    Fetcher: FetchingProcess -- stdin: settings, "look" -->  FetchLoop -- HTTP --> API
           ^        |         <-- stdout: "look", last words --   |  ^
           |        | what is wanted                     counters |  |
           |        +-------------> journal.marks <---------------+  |
           +----------------------- journal <------- append, fsync --+

The journal is what they share. Batches are its rows. What is wanted, and what was counted, are numbers in its
marks, which cost no wait for the disk. The pipes carry no more than that there is something to look at, the
settings at the start, because they hold credentials, and what the process failed of, because that may be the
journal. Its log lines go to the standard error that it inherits.

What is wanted is the number of the last batch to fetch, which bounds what waits in the journal. Batches are
parsed by the trainer; the process looks into what does not begin and end like one.

When standard input ends, the trainer stops or is gone: the process finishes the poll under way, for at most
`FetcherSettings.farewell` seconds, and exits. Until then it holds the journal's lock, which a resumed trainer
waits for.

What remains: if the machine dies between the API's sending and our fsync, that batch is lost.
"""

from __future__ import annotations

from atropos_client.fetcher._fetcher import STOP_PATIENCE, Fetcher
from atropos_client.fetcher._records import FetchCounters, FetchedBatch
from atropos_client.fetcher._settings import FetcherSettings

__all__ = ["STOP_PATIENCE", "FetchCounters", "FetchedBatch", "Fetcher", "FetcherSettings"]
