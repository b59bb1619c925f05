"""The inside of the SGLang stand-in: a real model with a real prefix cache, pauses, and a process group.

What a pause does to requests in flight, when the cache can be emptied, and what loading waits for follow
SGLang 0.5.23's source; the model, its keys and values, and the group are real. No HTTP here.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from transformers import AutoModelForCausalLM

LONGEST_WAIT = 30.0


@dataclass
class Running:
    """One request in flight."""

    prompt: list[int]
    max_new_tokens: int
    temperature: float
    scores_prompt: bool
    output: list[int] = field(default_factory=list)
    logprobs: list[torch.Tensor] = field(default_factory=list)
    """For each generated token the log-probs of the whole vocabulary, as they are told."""
    prompt_logprobs: torch.Tensor | None = None
    """[T, V]: row `t` speaks of what comes after token `t`."""
    versions: list[str] = field(default_factory=list)
    """For each generated token the label of the weights."""
    cache: Any = None
    """Keys and values of everything up to the last token; None before, and after a retraction."""
    cached_tokens: int = 0
    retractions: int = 0
    aborted: bool = False


class Engine:
    """Generates with a model, and gets new weights.

    `lies` names what it does wrong: `stale weights` (says that it has loaded), `half an update`,
    `corrupted tensor`, `stale cache` (says that it has emptied it), `wrong label`, `raw` (log-probs before
    the temperature).
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.lies: set[str] = set()
        self.label = "default"
        self.model_path = "base"
        self.token_seconds = 0.0
        self.idle_after = 0.0
        """Seconds that the scheduler stays busy after its last request has ended."""
        self.in_session = False
        self.groups: dict[str, Any] = {}
        self.refused_weight: str | None = None
        self.never_joins = False
        self.changed = threading.Condition()
        self.held_back = False
        """New requests wait."""
        self.frozen = ""
        """The pause mode in which the scheduler stands still."""
        self.running: list[Running] = []
        self.writers = 0
        self.busy_until = 0.0
        self.cache: list[tuple[tuple[int, ...], Any]] = []
        self.random = torch.Generator().manual_seed(0)

    # --- generation -------------------------------------------------------------------------------

    def generate(self, request: Running) -> Running:
        with self.changed:
            self._wait(lambda: not self.held_back)
            self._wait(lambda: not self.writers)
            self.running.append(request)
        try:
            while len(request.output) < request.max_new_tokens and not request.aborted:
                with self.changed:
                    self._wait(lambda: not self.frozen or request.aborted)
                    if not request.aborted:
                        self._step(request)
                time.sleep(self.token_seconds)
        finally:
            with self.changed:
                self.running.remove(request)
                self.busy_until = time.monotonic() + self.idle_after
                if request.cache is not None:
                    self.cache.append((tuple((request.prompt + request.output)[:-1]), request.cache))
                self.changed.notify_all()
        return request

    def _step(self, request: Running) -> None:
        tokens = request.prompt + request.output
        if request.cache is None:
            known, request.cache = self._longest_prefix(tokens, usable=not request.scores_prompt)
            if not request.retractions:
                request.cached_tokens = known
        else:
            known = len(tokens) - 1
        with torch.no_grad():
            reply = self.model(torch.tensor([tokens[known:]]), past_key_values=request.cache, use_cache=True)
        request.cache = reply.past_key_values
        logits = reply.logits[0].double()
        if request.scores_prompt and request.prompt_logprobs is None:
            request.prompt_logprobs = torch.log_softmax(logits, dim=-1)
        scaled = torch.log_softmax(logits[-1] / request.temperature, dim=-1)
        told = torch.log_softmax(logits[-1], dim=-1) if "raw" in self.lies else scaled
        request.output.append(int(torch.multinomial(scaled.exp(), 1, generator=self.random)))
        request.logprobs.append(told)
        request.versions.append(self.label)

    def _longest_prefix(self, tokens: list[int], *, usable: bool) -> tuple[int, Any]:
        best, found = 0, None
        for cached, keys_and_values in self.cache if usable else []:
            same = next((n for n, (a, b) in enumerate(zip(cached, tokens, strict=False)) if a != b), None)
            length = min(len(cached), len(tokens) - 1) if same is None else min(same, len(tokens) - 1)
            if length > best:
                best, found = length, keys_and_values
        if found is None:
            return 0, None
        found = copy.deepcopy(found)
        if (surplus := found.get_seq_length() - best) > 0:
            found.crop(-surplus)
        return best, found

    # --- pauses and the cache ---------------------------------------------------------------------

    def pause(self, mode: str) -> None:
        with self.changed:
            self.held_back = True
            if mode == "abort":
                for request in self.running:
                    request.aborted = True
                self.changed.notify_all()
                self._wait(lambda: not self.running)
                return
            self.frozen = mode
            if mode == "retract":
                for request in self.running:
                    request.cache = None
                    request.retractions += 1

    def resume(self) -> None:
        with self.changed:
            self.held_back, self.frozen = False, ""
            self.changed.notify_all()

    def flush(self, timeout: float = 0.0) -> str | None:
        """Empty the cache; returns why not."""
        with self.changed:
            if timeout > 0:
                # The retracted ones count here: they are in the queue.
                ends = time.monotonic() + timeout
                while self.running or time.monotonic() < self.busy_until:
                    if time.monotonic() >= ends:
                        return "Timed out waiting for idle state."
                    self.changed.wait(0.02)
            elif (self.running and self.frozen != "retract") or time.monotonic() < self.busy_until:
                return "Flush cache failed.\n"
            if "stale cache" not in self.lies:
                self.cache.clear()
        return None

    # --- weights ----------------------------------------------------------------------------------

    def set_label(self, label: str | None) -> None:
        if label is not None:
            self.label = "someone else's" if "wrong label" in self.lies else label

    def load_directory(self, path: Path, *, flush: bool, label: str | None) -> str | None:
        """Load; returns why not."""
        with self._updating():
            try:
                found = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            except (OSError, ValueError) as error:
                return f"Failed to get weights iterator: {error}."
            self._take(dict(found.named_parameters()))
            self.model_path = str(path)
            self.set_label(label)
            if flush and self.flush() is not None:
                return (
                    "Weights were updated, but the cache was not flushed because requests are still running"
                )
        return None

    def join(self, *, address: str, port: int, world_size: int, rank: int, name: str, backend: str) -> None:
        if self.never_joins:
            time.sleep(LONGEST_WAIT)
        self.groups[name] = init_group(
            backend=backend,
            init_method=f"tcp://{address}:{port}",
            world_size=world_size,
            rank=rank,
            group_name=name,
            timeout=timedelta(seconds=LONGEST_WAIT),
        )

    def leave(self, name: str) -> bool:
        group = self.groups.pop(name, None)
        if group is not None:
            dist.destroy_process_group(group)
        return group is not None

    def receive(self, names: list[str], dtypes: list[str], shapes: list[list[int]], group: str) -> str | None:
        """Take what rank 0 broadcasts; returns why not."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        received: dict[str, torch.Tensor] = {}
        with self._updating():
            try:
                for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
                    received[name] = torch.empty(shape, dtype=getattr(torch, dtype))
                    self.groups[group].broadcast([received[name]], options).wait()
            except RuntimeError as error:
                return f"Failed to receive weights: {error}"
            if self.refused_weight in received:
                return f"Failed to update parameter online: {self.refused_weight}"
            self._take(received)
        return None

    def _take(self, weights: Mapping[str, torch.Tensor]) -> None:
        if "stale weights" in self.lies:
            return
        own = dict(self.model.named_parameters())
        taken = list(weights.items())
        if "half an update" in self.lies:
            taken = taken[: len(taken) // 2]
        with torch.no_grad():
            for name, tensor in taken:
                own[name].copy_(tensor)
            if "corrupted tensor" in self.lies:
                last = own[max(own)]
                last.copy_(last.flip(0))

    @contextmanager
    def _updating(self) -> Iterator[None]:
        """Without a pause an update waits for all requests, and holds back new ones."""
        with self.changed:
            if self.held_back:
                yield
                return
            self.writers += 1
            try:
                self._wait(lambda: not self.running)
                yield
            finally:
                self.writers -= 1
                self.changed.notify_all()

    def _wait(self, condition: Any) -> None:
        if not self.changed.wait_for(condition, LONGEST_WAIT):
            raise TimeoutError("the stand-in waited too long")


def init_group(
    *, backend: str, init_method: str, world_size: int, rank: int, group_name: str, timeout: timedelta
) -> Any:
    """A process group beside the default one, or without any; what SGLang's function of that kind gives."""
    store, _, _ = next(c10d.rendezvous(init_method, rank, world_size, timeout=timeout))
    group, _ = c10d._new_process_group_helper(
        world_size,
        rank,
        [],
        dist.Backend(backend),
        dist.PrefixStore(group_name, store),
        group_name=group_name,
        timeout=timeout,
    )
    c10d._world.pg_group_ranks[group] = {number: number for number in range(world_size)}
    return group
