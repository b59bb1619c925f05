"""A run of which one process fails: `... MODEL OUTPUT RANK WHERE HOW [settings]`, under a launcher.

After two steps the process RANK fails where it enters the phase WHERE, in the middle of a step ("step"), or,
before all steps, where it loads the model ("starting"). From that moment on there is a file "failing". HOW is
"raise" or "kill"; with "kill while" it dies while process 0 is there.

Where weights are spread, WHERE may be in the midst of collectives in which the others wait: "gather" weights,
"forward" or "backward", with the phase: "gather checkpointing"; "send copies" is in the thread that sends
them, "send changes" where that is what has changed. In a publish it fails in the first one. With "write" and
"refuse" the disk refuses a weight. With `publish.transport nccl` process 0 is the server as well.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import trainer.monitoring.monitor
import trainer.run.build
import trainer.run.train_state
from tests.trainer import stoppable_run
from tests.trainer.transfer_stand_in import served_by_process_0
from trainer.export.tensor_file import TensorFile
from trainer.launch import launched_rank
from trainer.model.load import Policy
from trainer.model.sharding import Spread
from trainer.monitoring import Progress, RunPhase
from trainer.run.optimizer_step import StepRunner

_BEFORE = 2
"""Steps that all processes have done."""

IN_A_THREAD = ("send copies", "send changes")

_GATHERED = 3
"""Weights that are gathered before the process fails."""

trained = 0
failed = False
phase_now = ""
gathered = 0


def fail_if_due(where: str) -> None:
    """Fail here, if it is time and the place; once."""
    global failed
    _, output, rank, failing_where, how = sys.argv[1:6]
    if failed or where != failing_where:
        return
    within_a_publish = " " in where and (phase_now == RunPhase.PUBLISHING or where in IN_A_THREAD)
    if trained < _BEFORE and not within_a_publish and where != RunPhase.STARTING:
        return
    failed = True
    ours = launched_rank() == int(rank)
    if ours:
        Path(output, "failing").touch()
    if ours and how == "refuse":
        raise OSError(errno.ENOSPC, "No space left on device")
    if ours and how == "raise":
        if where in IN_A_THREAD:  # then process 0 waits for what this thread sends, and announces nothing
            time.sleep(3)
        raise RuntimeError("nothing works")
    if ours and how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if not ours and how == "kill while":
        Path(output, "now").touch()
        time.sleep(2)


class FailingProgress(Progress):
    """Fails where a phase is entered."""

    def begin(self, phase: RunPhase, party: str) -> None:
        """Enter a phase that nothing is outside of."""
        global phase_now
        super().begin(phase, party)
        phase_now = phase
        if phase is RunPhase.STOPPING:
            fail_if_due(phase)

    @contextmanager
    def phase(self, phase: RunPhase, party: str, details: Callable[[], str] | None = None) -> Iterator[None]:
        """Enter a phase."""
        global trained, phase_now, gathered
        with super().phase(phase, party, details):
            before, phase_now, gathered = phase_now, phase, 0
            fail_if_due(phase)
            yield
            phase_now = before
        trained += phase is RunPhase.TRAINING


class FailingSteps(StepRunner):
    """Fails in the middle of a step."""

    def _backward(self, *words: Any) -> Any:
        fail_if_due("step")
        return super()._backward(*words)


def fail_while_loading() -> None:
    """Let the model not be loaded."""
    load = trainer.run.train_state.load_trained_policy

    def failing(*words: Any, **named: Any) -> Policy:
        fail_if_due(RunPhase.STARTING)
        return load(*words, **named)

    trainer.run.train_state.load_trained_policy = failing


def fail_while_gathering() -> None:
    """Let the collective of a weight fail, after some that did not."""
    gather = Spread._gather

    def failing(spread: Spread, *words: Any) -> Tensor | None:
        global gathered
        gathered += 1
        if gathered > _GATHERED:
            fail_if_due(f"gather {phase_now}")
        return gather(spread, *words)

    hand_over = Spread.hand_over

    def failing_to_hand_over(*words: Any) -> None:
        for each in IN_A_THREAD:
            fail_if_due(each)
        hand_over(*words)

    Spread._gather = failing  # type: ignore[method-assign]
    Spread.hand_over = failing_to_hand_over  # type: ignore[method-assign]


def fail_while_writing() -> None:
    """Let the disk refuse."""
    write = TensorFile.write

    def failing(file: TensorFile, name: str, tensor: Tensor) -> None:
        fail_if_due(f"write {phase_now}")
        write(file, name, tensor)

    TensorFile.write = failing  # type: ignore[method-assign]


def fail_in_layer(module: nn.Module, _: Any, output: Any) -> None:
    """Let the first layer fail, forward or backward; the others wait for weights or gradients of its like."""
    if getattr(module, "layer_idx", None) != 0:
        return
    fail_if_due(f"forward {phase_now}")
    hidden = output if isinstance(output, Tensor) else output[0]
    if hidden.requires_grad:
        hidden.register_hook(lambda _: fail_if_due(f"backward {phase_now}"))


def die_at_a_sign(sign: Path) -> None:
    """End this process when the file is there."""
    while not sign.exists():
        time.sleep(0.01)
    sign.with_name("failing").touch()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    model, output, rank, where, how, *others = sys.argv[1:]
    trainer.monitoring.monitor.Progress = FailingProgress  # type: ignore[misc]
    trainer.run.build.StepRunner = FailingSteps  # type: ignore[misc]
    fail_while_loading()
    if " " in where:
        fail_while_gathering()
        fail_while_writing()
        register_module_forward_hook(fail_in_layer)
    if launched_rank() == int(rank) and how == "kill while":
        threading.Thread(target=die_at_a_sign, args=(Path(output, "now"),), daemon=True).start()
    with contextlib.ExitStack() as stack:
        if "nccl" in others:
            url, _ = stack.enter_context(served_by_process_0(Path(model), Path(output, "url")))
            others += ["--publish.servers", url, "--publish.group_port", os.environ["MASTER_PORT"]]
        code = stoppable_run.main(model, output, "steps", *others)
    sys.exit(code)
