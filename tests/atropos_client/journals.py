"""Bodies for journals, and programs that write one in a process of their own."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent

PRELUDE = """
import os, sys
from pathlib import Path
from atropos_client.journal import Journal
directory = Path(sys.argv[1])
"""


def body(seed: int, size: int = 200) -> bytes:
    """JSON of about `size` bytes, another for each seed."""
    generator = random.Random(seed)
    return json.dumps({"batch": [{"tokens": [[generator.random() for _ in range(size // 20)]]}]}).encode()


def start_program(program: str, directory: Path, *words: str, **options: Any) -> subprocess.Popen[str]:
    """Start a program that knows `Journal` and `directory`; `words` are its further arguments."""
    text = PRELUDE + textwrap.dedent(program)
    command = [sys.executable, "-c", text, str(directory), *words]
    return subprocess.Popen(command, cwd=ROOT, text=True, **options)
