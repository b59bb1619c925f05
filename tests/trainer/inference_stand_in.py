"""A stand-in inference server in a thread, whose model is two numbers, and which misbehaves on demand.

The log-prob of a token is a smooth function of both numbers, so two versions of the "weights" differ at
every token, and an update that is applied to one number only is half applied.
"""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from schemas.inference import CollectiveRpcRequest, CompletionRequest, WeightVersionRequest
from trainer.publish import Probes
from trainer.publish.verification.compare_logprobs import ProbeScores

PROBES = Probes(texts=[list(range(7, 47)), list(range(90, 40, -1)), [3, 1, 4, 1, 5, 9, 2, 6]], passage=[])

VOCABULARY = 100
BLOCK = 16
"""Tokens that the prefix cache keeps as a whole."""

Weights = tuple[float, float]
Answer = tuple[int, Any]

BASE: Weights = (0.5, 0.3)
STEP: Weights = (0.6, 0.2)


def scores(weights: Weights, token_id_lists: list[list[int]]) -> list[list[float]]:
    one, other = weights
    return [
        [
            -2.0 + one * math.sin(3.0 * token + position) + other * math.cos(5.0 * token - position)
            for position, token in enumerate(tokens)
        ][1:]
        for tokens in token_id_lists
    ]


def next_logprobs(
    weights: Weights, prompt: list[int], *, cached: Weights | None = None, temperature: float = 1.0
) -> list[float]:
    """Log-probs of the token after a prompt, over `VOCABULARY` tokens.

    `cached`: the weights that computed the prompt's beginning, where those are other ones.
    """
    position = len(prompt)
    one, other = weights
    if cached is not None:
        one, other = (one + cached[0]) / 2, (other + cached[1]) / 2
    logits = [
        (one * math.sin(3.0 * token + position) + other * math.cos(5.0 * token - position)) / temperature
        for token in range(VOCABULARY)
    ]
    normalizer = math.log(math.fsum(math.exp(logit) for logit in logits))
    return [logit - normalizer for logit in logits]


class Policy:
    """What the trainer holds: the weights, how to write them, and what it expects of a server."""

    def __init__(self, weights: Weights, dtype: str = "float32") -> None:
        self.weights = weights
        self.dtype = dtype

    def capture(self) -> Callable[[Path], None]:
        return partial(self.write, weights=self.weights)

    def write(self, path: Path, weights: Weights) -> None:
        path.mkdir()
        (path / "weights.json").write_text(json.dumps(weights))
        (path / "config.json").write_text(json.dumps({"dtype": self.dtype}))

    def score(self, probes: Probes) -> ProbeScores:
        rows = tuple(next_logprobs(self.weights, prompt) for prompt in probes.prompts)
        return ProbeScores(texts=scores(self.weights, probes.texts), next_tokens=rows)


class StandIn:
    """Speaks vLLM's routes. `faults` maps a path to what it does instead of its job."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.label = "default"
        self.paused = False
        self.calls: list[str] = []
        """`METHOD path?query`, in order."""
        self.authorizations: set[str | None] = set()
        self.faults: dict[str, Answer | Callable[[], Answer | None]] = {}
        """An answer to give instead, or what gives one; None goes on to do the job."""
        self.load: Callable[[Weights, Weights], Weights] = lambda old, new: new
        """What loading makes of the old and the new weights."""
        self.released = threading.Event()
        """Ends every hang."""
        self.noise: Callable[[], float] = lambda: 0.0
        self.cache: dict[tuple[int, ...], Weights] = {}
        """The first block of prompts, and the weights that computed it."""
        self.keeps_cache = False
        """Answer that the cache is empty, and keep it."""
        self.tells_cached_tokens = True
        self.scales_logprobs = False
        """Give log-probs of the distribution that was sampled from."""
        self.generates: Callable[[list[float]], int] = lambda row: row.index(max(row))
        """Chooses the next token by the log-probs of all."""
        self.url = ""

    def paths(self) -> list[str]:
        return [call.split(" ")[1].split("?")[0] for call in self.calls]

    def hang(self) -> Answer:
        self.released.wait(30)
        return 500, {"error": "woken"}

    def reply(self, path: str, body: bytes) -> Answer:
        """Misbehave, or do the job."""
        fault = self.faults.get(path)
        return (fault() if callable(fault) else fault) or self.answer(path, body)

    def answer(self, path: str, body: bytes) -> Answer:
        """Do the job."""
        match path:
            case "/health":
                return 200, None
            case "/v1/models":
                return 200, {"object": "list", "data": [{"id": "policy"}, {"id": "x", "parent": "policy"}]}
            case "/is_paused":
                return 200, {"is_paused": self.paused}
            case "/pause" | "/resume":
                self.paused = path == "/pause"
                return 200, {"status": "ok"}
            case "/collective_rpc":
                request = CollectiveRpcRequest.model_validate_json(body)
                assert request.method == "reload_weights"
                directory = Path(request.kwargs["weights_path"])
                one, other = json.loads((directory / "weights.json").read_text())
                self.weights = self.load(self.weights, (one, other))
                return 200, {"results": [None]}
            case "/reset_prefix_cache":
                if not self.keeps_cache:
                    self.cache.clear()
                return 200, {"success": True}
            case "/update_weight_version":
                self.label = WeightVersionRequest.model_validate_json(body).new_version
                return 200, {"success": True, "new_version": self.label}
            case "/weight_info":
                return 200, {"weight_version": self.label}
            case "/v1/completions":
                return 200, self.complete(CompletionRequest.model_validate_json(body))
        return 404, {"detail": "Not Found"}

    def scored(self, request: CompletionRequest) -> list[list[float]]:
        """Log-probs of the prompts' tokens."""
        assert request.model == "policy"
        prompts: Any = request.prompt
        return scores(self.weights, prompts)

    def complete(self, request: CompletionRequest) -> dict[str, Any]:
        if request.logprobs is not None:
            return self.generate(request)
        assert request.prompt_logprobs == 0
        prompts: Any = request.prompt
        choices = []
        for index, (prompt, row) in enumerate(zip(prompts, self.scored(request), strict=True)):
            logprobs = [
                {str(token): {"logprob": score + self.noise(), "rank": 1}}
                for token, score in zip(prompt[1:], row, strict=True)
            ]
            choices.append({"index": index, "text": "", "prompt_logprobs": [None, *logprobs]})
        return {"model": request.model, "choices": choices[::-1], "usage": {}}

    def sample(self, prompt: list[int], temperature: float, model: str = "policy") -> tuple[list[float], int]:
        """Log-probs of the next token, and how many of the prompt's came from the cache, which is filled."""
        assert model == "policy"
        block = tuple(prompt[:BLOCK])
        hit = len(block) == BLOCK and block in self.cache
        cached = self.cache.setdefault(block, self.weights)
        divisor = temperature if self.scales_logprobs else 1.0
        row = next_logprobs(self.weights, prompt, cached=cached, temperature=divisor)
        return [logprob + self.noise() for logprob in row], BLOCK if hit else 0

    def generate(self, request: CompletionRequest) -> dict[str, Any]:
        assert request.model is not None
        assert request.max_tokens == 1
        assert request.temperature
        assert request.logprobs
        assert request.return_tokens_as_token_ids
        prompt: Any = request.prompt
        row, cached = self.sample(prompt, request.temperature, request.model)
        likeliest = sorted(range(len(row)), key=row.__getitem__, reverse=True)[: request.logprobs]
        token = self.generates(row)
        logprobs = {
            "tokens": [f"token_id:{token}"],
            "token_logprobs": [row[token]],
            "top_logprobs": [{f"token_id:{each}": row[each] for each in (token, *likeliest)}],
        }
        usage: dict[str, Any] = {"prompt_tokens": len(prompt)}
        if self.tells_cached_tokens:
            usage["prompt_tokens_details"] = {"cached_tokens": cached}
        choice = {"index": 0, "text": "", "logprobs": logprobs}
        return {"model": request.model, "choices": [choice], "usage": usage}


@contextmanager
def serving(*stand_ins: StandIn) -> Iterator[None]:
    """Serve each stand-in on its own port until the block ends."""
    servers = [_server(stand_in) for stand_in in stand_ins]
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,)) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for stand_in, server, thread in zip(stand_ins, servers, threads, strict=True):
            stand_in.released.set()
            server.shutdown()
            thread.join()
            server.server_close()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that ended in the middle, as tests let them; what else fails is shown."""
        if not isinstance(sys.exception(), ConnectionResetError):
            super().handle_error(request, client_address)


def _server(stand_in: StandIn) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self.reply()

        def do_POST(self) -> None:
            self.reply()

        def reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            stand_in.calls.append(f"{self.command} {self.path}")
            stand_in.authorizations.add(self.headers.get("Authorization"))
            status, content = stand_in.reply(urlsplit(self.path).path, body)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            data = b"" if content is None else data
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except ConnectionError:
                self.close_connection = True

        def log_message(self, *arguments: Any) -> None:
            pass

    server = _Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    stand_in.url = f"http://127.0.0.1:{server.server_address[1]}"
    return server
