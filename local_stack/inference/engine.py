"""The engine: one thread that owns the model and generates for everybody.

Other threads hand it work through a queue; between two steps it does what was handed in. So pausing, loading
weights and answering about the state happen at step boundaries, in the order in which they were asked for.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from enum import Enum
from pathlib import Path
from typing import TypeVar

from local_stack.inference.errors import EngineFailure, InferenceError
from local_stack.inference.packed_model import PackedModel
from local_stack.inference.scheduler import Scheduler
from local_stack.inference.sequences import Generation, GenerationRequest
from local_stack.inference.settings import EngineSettings
from local_stack.inference.stopping import StopRules
from local_stack.inference.text import TextCodec
from local_stack.inference.weights import read_checkpoint
from schemas.inference import PauseMode

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


class _Flow(Enum):
    RUNNING = "running"
    DRAINING = "draining"  # running sequences go on, waiting ones stay in the queue
    FROZEN = "frozen"


class Engine:
    """Generates for many requests at once, in a thread of its own.

    Every method may be called from any thread. The methods that return a `Future` return at once.

    Args:
        settings: The model and the limits.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self._model = PackedModel(settings)
        self.codec = TextCodec(str(settings.model))
        self._rules = StopRules.of(self.codec, self._model.eos_token_ids())
        self._scheduler = Scheduler(self._model, self._rules, settings, self._deliver)
        self._settings = settings
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._flow = _Flow.RUNNING
        self._drained: list[Future[None]] = []
        self._weight_version = "default"
        self._stopping = False
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="inference-engine", daemon=True)

    @property
    def model(self) -> str:
        """What the server was started with: a directory or a hub id."""
        return self._settings.model

    @property
    def vocabulary_size(self) -> int:
        """Token ids are below this."""
        return self._model.vocabulary_size

    @property
    def max_model_len(self) -> int:
        """Longest sequence in tokens, prompt and completion together."""
        return self._model.max_model_len

    @property
    def weight_version(self) -> str:
        """The label set last."""
        return self._weight_version

    @property
    def paused(self) -> bool:
        """Whether new requests have to wait for `resume`."""
        return self._flow is not _Flow.RUNNING

    @property
    def running(self) -> int:
        """Sequences in the batch at the moment."""
        return self._scheduler.running

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End all requests with what they have, then the thread; returns without waiting for it."""
        self._stopping = True
        self._hand_in(lambda: None)

    def join(self, timeout: float) -> None:
        """Wait for the end of the thread, at most `timeout` seconds."""
        self._thread.join(timeout)

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request that was checked; its future gets the result."""
        self._hand_in(lambda: self._add(request))

    def cancel(self, request: GenerationRequest) -> None:
        """End a request nobody waits for any more."""
        self._hand_in(lambda: self._scheduler.abort(request))

    def pause(self, mode: PauseMode) -> Future[None]:
        """Stop generating; the future is done when nothing is being computed any more.

        Args:
            mode: `abort` ends all requests, `wait` lets the running ones end first, `keep` freezes them.
        """
        done: Future[None] = Future()
        self._hand_in(lambda: self._pause(mode, done))
        return done

    def resume(self) -> Future[None]:
        """Go on generating."""
        return self._call(self._resume)

    def set_weight_version(self, label: str) -> Future[None]:
        """Label the weights being served."""
        return self._call(lambda: setattr(self, "_weight_version", label))

    def forget_keys(self) -> Future[None]:
        """Compute the keys and values of all running sequences anew, with the weights of the moment."""
        return self._call(self._scheduler.preempt)

    def reload_weights(self, directory: Path) -> Future[None]:
        """Replace the weights by those in `directory`, between two steps; running sequences go on with them.

        Reading and checking happen in the caller's thread. The keys and values of running sequences stay as
        the old weights made them (like vLLM); `forget_keys` has them computed anew.

        Raises:
            CheckpointMismatch: Nothing was changed.
        """
        sources = self._model.targets.sources(read_checkpoint(directory))
        return self._call(lambda: self._model.targets.fill(sources))

    def _call(self, function: Callable[[], _Result]) -> Future[_Result]:
        future: Future[_Result] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except Exception as error:  # noqa: BLE001 - handed to whoever asked; the engine must live on
                future.set_exception(error)

        self._hand_in(run)
        return future

    def _hand_in(self, task: Callable[[], None]) -> None:
        self._work.put(task)
        if self._ended:  # nobody else will run it; what it does is harmless now
            self._run_queued()

    def _add(self, request: GenerationRequest) -> None:
        if self._stopping:
            request.future.set_exception(EngineFailure("the server is stopping"))
        else:
            request.weight_version_start = self._weight_version
            self._scheduler.add(request)

    def _pause(self, mode: PauseMode, done: Future[None]) -> None:
        if mode == "abort":
            self._scheduler.abort()
        self._flow = _Flow.DRAINING if mode == "wait" and self._scheduler.running else _Flow.FROZEN
        self._drained.append(done)
        self._report_drained()

    def _resume(self) -> None:
        self._flow = _Flow.RUNNING
        self._report_drained()

    def _report_drained(self) -> None:
        if self._flow is _Flow.DRAINING and self._scheduler.running:
            return
        if self._flow is _Flow.DRAINING:
            self._flow = _Flow.FROZEN
        for done in self._drained:
            done.set_result(None)
        self._drained.clear()

    def _run(self) -> None:
        while not self._stopping:
            self._do_what_was_handed_in()
            if not self._has_work():
                continue
            try:
                self._scheduler.step(admit=self._flow is _Flow.RUNNING)
            except Exception as error:  # noqa: BLE001 - one bad step must not end the server: its requests fail
                self._fail_all(error)
            self._report_drained()
        self._scheduler.abort()
        self._resume()
        self._ended = True
        self._run_queued()

    def _do_what_was_handed_in(self) -> None:
        """Run everything in the queue; if there is nothing to generate, wait for something."""
        if not self._has_work():
            self._work.get()()
        self._run_queued()

    def _run_queued(self) -> None:
        while True:
            try:
                task = self._work.get_nowait()
            except queue.Empty:
                return
            task()

    def _has_work(self) -> bool:
        if self._flow is _Flow.RUNNING:
            return bool(self._scheduler.running or self._scheduler.waiting)
        return self._flow is _Flow.DRAINING and bool(self._scheduler.running)

    def _fail_all(self, error: Exception) -> None:
        _log.error("a generation step failed", exc_info=error)
        failure = (
            error
            if isinstance(error, InferenceError)
            else EngineFailure(f"a generation step failed: {error}")
        )
        for request in self._scheduler.drop_all():
            if not request.future.done():
                request.future.set_exception(failure)

    def _deliver(self, request: GenerationRequest) -> None:
        if request.future.cancelled() or request.future.done():
            return
        try:
            completions = [self._rules.completion(sequence) for sequence in request.sequences]
        except Exception as error:  # noqa: BLE001 - it concerns this request only, and somebody waits for it
            request.future.set_exception(error)
            return
        request.future.set_result(
            Generation(
                request.prompt_ids,
                completions,
                request.prompt_scores,
                weight_version=self._weight_version,
                weight_version_start=request.weight_version_start,
            )
        )
