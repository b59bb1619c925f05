"""A run in vLLM's environment, where its sender's classes are: `... MODEL OUTPUT STEPS [settings]`, launched.

Only the wire is TCP instead of NCCL (`tests.vllm.cpu_wire`).
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.trainer.batches import make_bodies
from tests.trainer.runs import run
from tests.vllm.cpu_wire import install
from trainer.publish.engines.vllm import nccl_transport

if __name__ == "__main__":
    install()
    nccl_transport.require_vllm = lambda *_: None  # there is no GPU
    model, output, steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    run(model, output, make_bodies(steps), *sys.argv[4:], steps=steps)
