"""Command line of the embedded server: `python -m local_stack.inference --model DIR --port P`."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence

import torch

from local_stack.inference.app import InferenceServer
from local_stack.inference.engine import Engine
from local_stack.inference.errors import InferenceError
from local_stack.inference.records import EngineSettings

_log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM; return the process's exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    settings = EngineSettings(
        model=options.model,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        seed=options.seed,
    )
    try:
        engine = Engine(settings)
    except (InferenceError, OSError) as error:
        _log.error("cannot serve %s: %s", options.model, error)
        return 1
    name = options.served_model_name or options.model
    _log.info("serving %s as %r on http://%s:%d", options.model, name, options.host, options.port)
    server = InferenceServer(engine, model_name=name, host=options.host, port=options.port)
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn raises the signal that has ended it once more; stopping is no failure.
        signal.signal(number, lambda *_: None)
    server.run()
    return 0 if server.started else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m local_stack.inference",
        description="A small CPU inference server that speaks vLLM's HTTP.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    defaults = EngineSettings(model="")
    add("--model", required=True, help="model directory or hub id")
    add("--served-model-name", help="name in requests; None: as --model")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=8001, help="port to listen on")
    add("--max-model-len", type=int, help="longest sequence in tokens; None: the model's, up to 4096")
    add("--max-num-seqs", type=int, default=defaults.max_num_seqs, help="most sequences that run at once")
    add("--seed", type=int, default=defaults.seed, help="of the sampling")
    add("--threads", type=int, help="computing threads; None: one per core")
    return parser


if __name__ == "__main__":
    sys.exit(main())
