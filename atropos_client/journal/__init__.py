"""Keeps every batch on the disk before anything is done with it, and tracks its outcome: the durable journal.

The Atropos API removes a batch when it answers and keeps no copy. So a body is written here first, and the
ledger beside it says of every batch: received, trained at which step, set aside, or skipped.

Why SQLite (write-ahead log, `synchronous=FULL`) and not a file format of our own: a write is durable when it
returns, a torn one vanishes on the next open, space of deleted bodies is used again, several processes may
read and write, and all of that is tested better than we could test our own. A body of 11.3 MB, compressed to
4.3 MB, is durable after 107 ms, where a plain append takes 16 ms: in another process, for a batch that takes
seconds to train. Pages are 16 KiB: with 4 KiB an append that is not compressed took 75 ms instead of 51.

::

    <directory>/             0700
    ├── journal.sqlite3      0600; table `batches` (the ledger) and table `bodies`
    ├── journal.sqlite3-wal  the write-ahead log; gone after a clean end
    ├── journal.sqlite3-shm  its index
    ├── journal.marks        what its processes tell each other, and what outlives a killed one
    ├── unrecorded-*.json    a body that the database did not take; the next start does
    └── lock                 held by the run that writes, with its process ids; also by one without a journal

The ledger does not decide what was trained: the checkpoint does. Outcomes are provisional until a checkpoint
counts their batch, and `Journal.rewind` undoes those that it does not count.
"""

from __future__ import annotations

from atropos_client.journal._database import FILE_NAME as JOURNAL_FILE
from atropos_client.journal._export import ExportForm, export_batches
from atropos_client.journal._journal import Journal
from atropos_client.journal._lock import LOCK_NAME, WriterLock
from atropos_client.journal._marks import COUNTED, Marks
from atropos_client.journal._records import (
    JournaledBatch,
    JournalLimits,
    JournalUsage,
    LedgerEntry,
    Outcome,
    RewindReport,
    VerifyReport,
)

__all__ = [
    "COUNTED",
    "JOURNAL_FILE",
    "LOCK_NAME",
    "ExportForm",
    "Journal",
    "JournalLimits",
    "JournalUsage",
    "JournaledBatch",
    "LedgerEntry",
    "Marks",
    "Outcome",
    "RewindReport",
    "VerifyReport",
    "WriterLock",
    "export_batches",
]
