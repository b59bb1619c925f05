"""Command line of the embedded server: `python -m local_stack.inference --model DIR --port P`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

import torch

from local_stack.inference.app import create_app
from local_stack.inference.engine import Engine
from local_stack.inference.errors import InferenceError
from local_stack.inference.server import InferenceServer
from local_stack.inference.settings import EngineSettings

_log = logging.getLogger(__name__)
_DEFAULTS = EngineSettings(model="")


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM; return the process's exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    settings = EngineSettings(
        model=options.model,
        dtype=options.dtype,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        max_cached_tokens=options.max_cached_tokens,
        seed=options.seed,
        logprobs_mode=options.logprobs_mode,
    )
    try:
        engine = Engine(settings)
    except (InferenceError, OSError) as error:
        _log.error("cannot serve %s: %s", options.model, error)
        return 1
    name = options.served_model_name or options.model
    _log.info("serving %s as %r on http://%s:%d", options.model, name, options.host, options.port)
    server = InferenceServer(
        create_app(engine, model_name=name), engine, host=options.host, port=options.port
    )
    server.run()
    return 0 if server.started else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m local_stack.inference",
        description="A small CPU inference server that speaks vLLM's HTTP.",
    )
    parser.add_argument("--model", required=True, help="model directory or hub id")
    parser.add_argument("--served-model-name", help="name in requests (default: as --model)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8001, help="port to listen on (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default=_DEFAULTS.dtype,
        help="precision; auto: float32, unless the checkpoint is half precision and the CPU computes in it",
    )
    parser.add_argument("--max-model-len", type=int, help="longest sequence in tokens (default: up to 4096)")
    parser.add_argument(
        "--max-num-seqs",
        type=int,
        default=_DEFAULTS.max_num_seqs,
        help="most sequences in a batch (default: %(default)s)",
    )
    parser.add_argument(
        "--max-cached-tokens",
        type=int,
        default=_DEFAULTS.max_cached_tokens,
        help="most key/value columns in memory over all sequences (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=_DEFAULTS.seed, help="of the sampling (default: %(default)s)"
    )
    parser.add_argument(
        "--logprobs-mode",
        choices=("raw_logprobs", "processed_logprobs"),
        default=_DEFAULTS.logprobs_mode,
        help="log-probs of the model itself, or of the distribution sampled from (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, help="computing threads (default: one per core)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
