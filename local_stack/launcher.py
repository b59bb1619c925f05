"""The whole loop on one machine: API, inference server, environment and trainer, started, watched, reported.

::

    model -> API, inference server, environment, trainer     all started at once, each waits for the others
          -> held-out score of the untrained model           by the environment, before its first rollout
          -> training                                        until the trainer has done its steps
          -> held-out score again, from the served weights
          -> report.json, report.png

The trainer is the same `atropos-train run` that anyone else runs. The launcher only looks at processes and
at files in the run directory. Whatever happens, it ends with no process left behind.
"""

from __future__ import annotations

import math
import shlex
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from signal import SIGINT
from typing import Literal

from rich.console import Console

from atropos_client.private_files import replace_private
from local_stack.commands import (
    Address,
    api_command,
    evaluate_command,
    free_addresses,
    inference_command,
    prepare_model_command,
    serve_command,
    train_command,
    vllm_command,
    vllm_environment,
)
from local_stack.display import Display
from local_stack.errors import LocalStackError, RunDirectoryError, StoppedByUserError
from local_stack.health import answers
from local_stack.picture import draw_picture
from local_stack.processes import ChildProcess, Services, wait_until
from local_stack.records import RunRecords, before_training, newest_checkpoint, read_accuracy
from local_stack.report import Report, describe_machine, draw_report
from local_stack.signals import StopRequests
from local_stack.vllm import DEFAULT_PYTHON, require_vllm, starting_part
from trainer.config import TrainerConfig, describe_preset, load_config

BUILT_IN_MODELS = ("demo", "tiny")

_API = "Atropos API"
_INFERENCE = "inference server"
_ENVIRONMENT = "environment"
_TRAINER = "trainer"
_EVALUATION = "evaluation"
_MODEL = "model preparation"
_SAVERS = {_TRAINER: 120.0, _ENVIRONMENT: 5.0, _EVALUATION: 5.0, _MODEL: 5.0}
"""Seconds to end after being asked. The trainer finishes its step and writes a checkpoint."""
_SERVERS = {_INFERENCE: 10.0, _API: 10.0}
"""The same for those that the others may need for that."""

_MODEL_TIMEOUT = 600.0
"""Reading the packaged model and writing it as a checkpoint takes half a minute; a slow disk more."""
_READY_TIMEOUT = 600.0
"""Importing torch in four processes at once and loading a small model takes 20 s on two cores; vLLM's own
start adds a minute."""
_EVALUATION_TIMEOUT = 900.0
_WAITING = "waiting for the first step"
_EXIT_STOPPED = 130
"""Exit status that a shell reports for a program that Ctrl-C ended."""


@dataclass(frozen=True, kw_only=True)
class LocalOptions:
    """The user's choices."""

    model: str
    """demo, tiny, a directory, or a hub id."""
    steps: int
    seed: int
    run_dir: Path
    config: Path
    """YAML file with the trainer's settings."""
    settings: tuple[str, ...] = ()
    """Further settings for the trainer, e.g. `("--optimizer.learning_rate", "1e-5")`."""
    engine: Literal["embedded", "vllm"] = "embedded"
    """Inference server."""
    vllm_python: Path = DEFAULT_PYTHON
    """Interpreter of the environment with vLLM."""


def check_settings(options: LocalOptions) -> TrainerConfig:
    """Refuse wrong settings before anything is started; returns the trainer's configuration.

    Raises:
        trainer.errors.ConfigurationError: As `atropos-train run` would.
    """
    # Addresses are found later; any will do for a check.
    words = ["--model.path", options.model, "--publish.servers", Address(port=1).url]
    return load_config(options.config, [*words, *options.settings])


def run_local(options: LocalOptions, console: Console) -> int:
    """Run the whole loop; returns the exit status of the command (0 done, 1 failed, 130 stopped)."""
    trainer = check_settings(options)
    preset = trainer.loss.preset
    if preset is not None:
        told = f"loss.preset {preset}: {describe_preset(preset, trainer)}"
        console.print(told, markup=False, highlight=False, soft_wrap=True)
    with StopRequests() as stop:
        try:
            if options.engine == "vllm":
                require_vllm(options.vllm_python)
            if (options.run_dir / "report.json").exists():
                raise RunDirectoryError(
                    f"{options.run_dir} holds a finished run already; choose another --run-dir"
                )
            options.run_dir.mkdir(parents=True, exist_ok=True)
            with Display(console, steps=options.steps) as display:
                report = _LocalRun(options, display, stop).run()
        except StoppedByUserError:
            console.print("[bold]Stopped.[/] No process is left.", highlight=False)
            status = _EXIT_STOPPED
        except LocalStackError as error:
            console.print("[bold red]The run failed:[/]", end=" ")
            console.print(f"{error}", markup=False, highlight=False, soft_wrap=True)
            status = 1
        else:
            console.print(draw_report(report, picture=options.run_dir / "report.png"))
            return 0
    console.print(_how_to_go_on(options), markup=False, highlight=False, soft_wrap=True)
    return status


class _LocalRun:
    """One run, from its services to its report; raises `LocalStackError` if it cannot be finished."""

    def __init__(self, options: LocalOptions, display: Display, stop: StopRequests) -> None:
        self._options = options
        self._display = display
        self._stop = stop
        self._directory = options.run_dir.absolute()
        self._records = RunRecords(self._directory)
        self._records.read_new()  # of a run that is taken up again
        self._services = Services(self._directory / "logs", environment=self._environment())

    def run(self) -> Report:
        """Do everything."""
        try:
            model = self._prepare_model()
            inference = self._start_services(model)
            self._train()
            score = self._evaluate(inference, model)
        finally:
            self._stop_services()
        report = self._report(model, score)
        draw_picture(report, self._directory / "report.png")
        replace_private(self._directory / "report.json", report.model_dump_json(indent=2).encode() + b"\n")
        return report

    def _environment(self) -> dict[str, str]:
        variables = {
            "TOKENIZERS_PARALLELISM": "false",
            # Trainer and inference server share the cores. Threads that wait by spinning, OpenMP's default,
            # take them from each other: training steps took four times as long on two cores.
            "OMP_WAIT_POLICY": "passive",
        }
        if self._options.model in BUILT_IN_MODELS or Path(self._options.model).is_dir():
            variables["HF_HUB_OFFLINE"] = "1"  # everything is on this machine
        return variables

    def _watch(self) -> None:
        """Read progress, show it, raise what ends the run; called ten times a second while waiting."""
        if self._records.read_new() and self._display.phase == _WAITING:
            self._display.enter("training")
        self._display.update(self._records)
        self._stop.raise_if_requested()
        self._services.require_all_healthy()

    def _wait(self, child: ChildProcess, is_ready: Callable[[], bool], timeout: float, what: str) -> None:
        wait_until(child, is_ready, timeout=timeout, what=what, watch=self._watch)

    def _wait_for_end(self, child: ChildProcess, timeout: float) -> None:
        self._wait(child, lambda: child.returncode == 0, timeout, "finish")

    def _prepare_model(self) -> str:
        """Return the directory or hub id of the model, made ready if it is a built-in one."""
        name = self._options.model
        if name not in BUILT_IN_MODELS:
            return str(Path(name).resolve()) if Path(name).is_dir() else name
        self._display.enter("preparing the model")
        link = self._directory / "base-model"
        cache = self._directory if name == "tiny" else None
        command = prepare_model_command(name, link=link, cache_dir=cache)
        self._wait_for_end(self._services.start(_MODEL, command, may_finish=True), _MODEL_TIMEOUT)
        return str(link.resolve())

    def _start_services(self, model: str) -> Address:
        """Start everything, wait for the two servers, and return the inference server's address."""
        self._display.enter("starting")
        options = self._options
        api, inference, free = free_addresses(3)
        api_child = self._services.start(_API, api_command(api))
        inference_child = self._start_inference(inference, model)
        # A run that goes on from a checkpoint has been measured, and its weights are no longer untrained.
        measured = self._records.heldout_before is not None or newest_checkpoint(self._directory)
        evaluations = None if measured else before_training(self._directory)
        serve = serve_command(
            api=api, inference=inference, model=model, seed=options.seed, evaluations=evaluations
        )
        self._services.start(_ENVIRONMENT, serve)
        train = train_command(
            config=options.config,
            api=api,
            inference=inference,
            model=model,
            steps=options.steps,
            seed=options.seed,
            output_dir=self._directory,
            page=self._page(free),
        )
        self._trainer = self._services.start(
            _TRAINER, [*train, *options.settings], stop_signal=SIGINT, may_finish=True
        )
        for child, url in ((api_child, f"{api.url}/status"), (inference_child, f"{inference.url}/health")):
            self._wait(child, partial(self._has_started, child, url), _READY_TIMEOUT, f"answer at {url}")
        return inference

    def _page(self, free: Address) -> Address | None:
        """Say where the page of the run will be; returns the address that the trainer is to serve it at."""
        health = check_settings(self._options).health
        if health.port is not None:  # as the user wants it
            return None
        self._display.tell(f"the page of the run, while it trains: {free.url}/")
        return free

    def _start_inference(self, listen: Address, model: str) -> ChildProcess:
        seed = self._options.seed
        if self._options.engine == "embedded":
            return self._services.start(_INFERENCE, inference_command(listen, model=model, seed=seed))
        settings = check_settings(self._options)
        lora = settings.model.lora if settings.publish.transport == "lora" else None
        # Not resolved: through its symbolic link an interpreter would not find its environment.
        python = str(self._options.vllm_python.absolute())
        rank = lora.rank if lora is not None else None
        command = vllm_command(listen, model=model, seed=seed, python=python, lora_rank=rank)
        return self._services.start(_INFERENCE, command, vllm_environment(), has_children=True)

    def _has_started(self, child: ChildProcess, url: str) -> bool:
        """Whether a server answers; while vLLM does not, show how far it is."""
        if answers(url):
            return True
        if child.name == _INFERENCE and self._options.engine == "vllm":
            self._display.enter(f"starting · vLLM is {starting_part(child.log_path)}")
        return False

    def _train(self) -> None:
        """Wait until the trainer has done its steps, then end the environment."""
        self._display.enter(_WAITING)
        self._wait_for_end(self._trainer, math.inf)
        self._watch()  # its last rows
        if not (self._directory / "final").is_dir():
            raise LocalStackError(f"the trainer ended without a final model.\n{self._trainer.log_tail()}")
        self._services.stop({_ENVIRONMENT: _SAVERS[_ENVIRONMENT]})

    def _evaluate(self, inference: Address, model: str) -> float:
        """Measure the held-out score of what the inference server serves now."""
        self._display.enter("measuring the trained model")
        directory = self._directory / "evaluations" / "after"
        shutil.rmtree(directory, ignore_errors=True)  # of an earlier attempt
        command = evaluate_command(inference=inference, model=model, evaluations=directory)
        child = self._services.start(_EVALUATION, command, may_finish=True)
        self._wait_for_end(child, _EVALUATION_TIMEOUT)
        score = read_accuracy(directory)
        if score is None:
            raise LocalStackError(f"the evaluation ended without a result.\n{child.log_tail()}")
        self._display.enter("done")
        return score

    def _stop_services(self) -> None:
        """End everything: first who still has something to save, then those it may need for that."""
        try:
            is_done = self._display.phase == "done"
            if not is_done:
                self._display.enter("saving a checkpoint")
            for patience in (_SAVERS, _SERVERS):
                self._services.stop(patience, hurry=lambda: self._stop.hurry)
            self._records.read_new()
            self._display.update(self._records)
            if not is_done:
                self._display.enter("stopped")
        finally:
            self._services.kill_all()

    def _report(self, model: str, score: float) -> Report:
        steps, publishes = self._records.steps, self._records.publishes
        pauses = [row.publish_pause_seconds for row in publishes]
        return Report(
            heldout_before=self._records.heldout_before,
            heldout_after=score,
            publishes_made=len(publishes),
            publishes_verified=sum(row.publish_verified for row in publishes),
            publish_pause_seconds=statistics.median(pauses) if pauses else None,
            seconds=round(time.monotonic() - self._display.started_at, 1),
            seed=self._options.seed,
            model=model,
            steps=steps[-1].step if steps else 0,
            rewards=[row.reward_mean for row in steps if row.reward_mean is not None],
            final_model=self._options.run_dir / "final",
            machine=describe_machine(),
        )


def _how_to_go_on(options: LocalOptions) -> str:
    """Say where the newest checkpoint is and how to go on from it."""
    logs = options.run_dir / "logs"
    checkpoint = newest_checkpoint(options.run_dir)
    if checkpoint is None:
        return f"There is no checkpoint yet. Logs: {logs}"
    again = ["atropos-train", "local", "--model", options.model, "--steps", str(options.steps)]
    again += ["--seed", str(options.seed), "--run-dir", str(options.run_dir)]
    if options.engine != "embedded":
        again += ["--engine", options.engine, "--vllm-python", str(options.vllm_python)]
    return (
        f"The newest checkpoint is {checkpoint}\n"
        f"  as a model: {checkpoint / 'model'}\n"
        f"  go on from it: {shlex.join(again)}\n"
        f"  logs: {logs}"
    )
