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
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from signal import SIGINT
from typing import Literal

from rich.console import Console

from local_stack.commands import (
    Address,
    api_command,
    evaluate_command,
    generation_check_command,
    inference_command,
    prepare_model_command,
    serve_command,
    train_command,
    vllm_command,
    vllm_environment,
)
from local_stack.display import Display, make_display
from local_stack.errors import LocalStackError, RunDirectoryError, StoppedByUserError
from local_stack.picture import draw_picture
from local_stack.processes import ChildProcess, wait_until
from local_stack.records import MetricsReader, newest_checkpoint, read_accuracy
from local_stack.report import Report, draw_report, make_report
from local_stack.services import Services, answers, free_addresses
from local_stack.signals import StopRequests
from local_stack.state import RunState
from local_stack.vllm import DEFAULT_PYTHON, require_vllm, starting_part
from trainer.config import TrainerConfig, load_config

Watch = Callable[[], None]
"""Called ten times a second, whatever is waited for: reads progress, shows it, raises what ends the run."""

BUILT_IN_MODELS = ("demo", "tiny")

API = "Atropos API"
INFERENCE = "inference server"
ENVIRONMENT = "environment"
TRAINER = "trainer"
_EVALUATION = "evaluation"
_FIRST_TOKENS = "first tokens"
_MODEL = "model preparation"

_MODEL_TIMEOUT = 600.0
"""Reading the packaged model and writing it as a checkpoint takes half a minute; a slow disk more."""
_READY_TIMEOUT = 600.0
"""Importing torch in four processes at once and loading a small model takes 20 s on two cores; vLLM's own
start adds a minute."""
_FIRST_TOKENS_TIMEOUT = 240.0
_EVALUATION_TIMEOUT = 900.0
_PATIENCE = {
    TRAINER: 120.0,
    ENVIRONMENT: 5.0,
    INFERENCE: 10.0,
    API: 10.0,
    _EVALUATION: 5.0,
    _MODEL: 5.0,
    _FIRST_TOKENS: 0.0,
}
"""Seconds to end after being asked. The trainer finishes its step and writes a checkpoint."""
_WAITING = "waiting for the first step"
_EXIT_STOPPED = 130
"""What a shell reports for a program that Ctrl-C ended."""


@dataclass(frozen=True, kw_only=True)
class LocalOptions:
    """What the user chose."""

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
    run = _LocalRun(options)
    with StopRequests() as stop:
        try:
            run.check_engine()
            run.check_directory()
            with make_display(console) as display:
                report = run.run(display, stop)
        except StoppedByUserError:
            console.print("[bold]Stopped.[/] No process is left.", highlight=False)
            console.print(run.how_to_go_on(), markup=False, highlight=False, soft_wrap=True)
            return _EXIT_STOPPED
        except LocalStackError as error:
            console.print("[bold red]The run failed:[/]", end=" ")
            console.print(f"{error}", markup=False, highlight=False, soft_wrap=True)
            console.print(run.how_to_go_on(), markup=False, highlight=False, soft_wrap=True)
            return 1
    console.print(draw_report(report, picture=run.picture_path))
    return 0


class _LocalRun:
    def __init__(self, options: LocalOptions) -> None:
        self._options = options
        self._directory = options.run_dir.absolute()
        self._metrics = MetricsReader(self._directory / "metrics.jsonl")
        self._before = self._directory / "evaluations" / "before"
        self._after = self._directory / "evaluations" / "after"
        self._state = RunState(
            model=options.model, steps=options.steps, seed=options.seed, run_dir=options.run_dir
        )
        self.picture_path = options.run_dir / "report.png"

    def check_directory(self) -> None:
        """Make the run directory, or take up an unfinished run's; refuse one whose run is complete."""
        if (self._directory / "report.json").exists():
            raise RunDirectoryError(
                f"{self._options.run_dir} holds a finished run already; choose another --run-dir"
            )
        self._directory.mkdir(parents=True, exist_ok=True)
        self._read_progress()

    def check_engine(self) -> None:
        """Refuse an inference engine that is not installed."""
        if self._options.engine == "vllm":
            require_vllm(self._options.vllm_python)

    def how_to_go_on(self) -> str:
        """Say where the newest checkpoint is and how to go on from it."""
        checkpoint = newest_checkpoint(self._options.run_dir)
        if checkpoint is None:
            return f"There is no checkpoint yet. Logs: {self._options.run_dir / 'logs'}"
        again = [
            "atropos-train",
            "local",
            "--model",
            self._options.model,
            "--steps",
            str(self._options.steps),
        ]
        again += ["--seed", str(self._options.seed), "--run-dir", str(self._options.run_dir)]
        if self._options.engine != "embedded":
            again += ["--engine", self._options.engine, "--vllm-python", str(self._options.vllm_python)]
        return (
            f"The newest checkpoint is {checkpoint}\n"
            f"  as a model: {checkpoint / 'model'}\n"
            f"  go on from it: {shlex.join(again)}\n"
            f"  logs: {self._options.run_dir / 'logs'}"
        )

    def run(self, display: Display, stop: StopRequests) -> Report:
        """Do everything; raises `LocalStackError` if it cannot be finished."""
        services = Services(self._directory / "logs", environment=self._environment())

        def watch() -> None:
            self._read_progress()
            display.update(self._state)
            stop.raise_if_requested()
            services.require_all_healthy()

        try:
            model = self._prepare_model(services, watch)
            inference = self._start_services(services, model, watch)
            self._train(services, watch)
            score = self._evaluate(services, inference, model, watch)
        finally:
            self._stop_services(services, display, stop)
        report = make_report(self._state, model=model, heldout_after=score)
        draw_picture(report, self._directory / "report.png")
        report.write(self._directory / "report.json")
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

    def _read_progress(self) -> None:
        state = self._state
        if self._metrics.read_new() and state.phase == _WAITING:
            state.phase = "training"
            state.services |= {ENVIRONMENT: "ready", TRAINER: "ready"}
            state.training_since = (time.monotonic(), self._metrics.rows[-1].step)
        state.rows = self._metrics.rows
        state.publishes = self._metrics.publishes
        if state.heldout_before is None:
            state.heldout_before = read_accuracy(self._before)

    def _prepare_model(self, services: Services, watch: Watch) -> str:
        """Return the directory or hub id of the model, made ready if it is a built-in one."""
        name = self._options.model
        if name not in BUILT_IN_MODELS:
            return str(Path(name).resolve()) if Path(name).is_dir() else name
        self._state.phase = "preparing the model"
        link = self._directory / "base-model"
        cache = self._directory if name == "tiny" else None
        command = prepare_model_command(name, link=link, cache_dir=cache)
        child = services.start(_MODEL, command, may_finish=True)
        wait_until(child, _finished(child), timeout=_MODEL_TIMEOUT, what="finish", watch=watch)
        return str(link.resolve())

    def _start_services(self, services: Services, model: str, watch: Watch) -> Address:
        """Start everything, wait for the two servers, and return the inference server's address."""
        self._state.phase = "starting"
        api, inference = free_addresses(2)
        api_child = services.start(API, api_command(api))
        inference_child = self._start_inference(services, inference, model)
        services.start(ENVIRONMENT, self._serve_command(api, inference, model))
        services.start(
            TRAINER, self._train_command(api, inference, model), stop_signal=SIGINT, may_finish=True
        )
        self._state.services = dict.fromkeys((API, INFERENCE, ENVIRONMENT, TRAINER), "starting")
        for child, url in ((api_child, f"{api.url}/status"), (inference_child, f"{inference.url}/health")):
            wait_until(
                child,
                partial(answers, url),
                timeout=_READY_TIMEOUT,
                what=f"answer at {url}",
                watch=self._watch_start(child, watch),
            )
            if child is inference_child:
                self._wait_for_first_tokens(services, inference, watch)
            self._state.services[child.name] = "ready"
        return inference

    def _start_inference(self, services: Services, listen: Address, model: str) -> ChildProcess:
        seed = self._options.seed
        if self._options.engine == "embedded":
            return services.start(INFERENCE, inference_command(listen, model=model, seed=seed))
        settings = check_settings(self._options)
        lora = settings.model.lora if settings.publish.transport == "lora" else None
        command = vllm_command(
            listen,
            model=model,
            seed=seed,
            # Not resolved: through its symbolic link an interpreter would not find its environment.
            python=str(self._options.vllm_python.absolute()),
            lora_rank=lora.rank if lora is not None else None,
        )
        return services.start(INFERENCE, command, environment=vllm_environment(), has_children=True)

    def _watch_start(self, child: ChildProcess, watch: Watch) -> Watch:
        """Like `watch`, and where vLLM is what is waited for, show how far it is."""
        if child.name != INFERENCE or self._options.engine != "vllm":
            return watch

        def watch_vllm() -> None:
            self._state.phase = f"starting · vLLM is {starting_part(child.log_path)}"
            watch()

        return watch_vllm

    def _wait_for_first_tokens(self, services: Services, inference: Address, watch: Watch) -> None:
        """Let a healthy server generate something: its first reply can take long, and no run should wait."""
        self._state.phase = "starting · first tokens"
        child = services.start(_FIRST_TOKENS, generation_check_command(inference), may_finish=True)
        wait_until(child, _finished(child), timeout=_FIRST_TOKENS_TIMEOUT, what="arrive", watch=watch)

    def _serve_command(self, api: Address, inference: Address, model: str) -> list[str]:
        # A run that goes on from a checkpoint has been measured, and its weights are no longer untrained.
        measured = read_accuracy(self._before) is not None or newest_checkpoint(self._directory) is not None
        return serve_command(
            api=api,
            inference=inference,
            model=model,
            seed=self._options.seed,
            evaluations=None if measured else self._before,
        )

    def _train_command(self, api: Address, inference: Address, model: str) -> list[str]:
        command = train_command(
            config=self._options.config,
            api=api,
            inference=inference,
            model=model,
            steps=self._options.steps,
            seed=self._options.seed,
            output_dir=self._directory,
        )
        return [*command, *self._options.settings]

    def _train(self, services: Services, watch: Watch) -> None:
        """Wait until the trainer has done its steps, then end the environment."""
        self._state.phase = _WAITING
        trainer = services[TRAINER]
        wait_until(trainer, _finished(trainer), timeout=math.inf, what="finish", watch=watch)
        watch()  # its last rows
        if not (self._directory / "final").is_dir():
            raise LocalStackError(f"the trainer ended without a final model.\n{trainer.log_tail()}")
        self._state.services[TRAINER] = "stopped"
        services.stop([ENVIRONMENT], patience=_PATIENCE, hurry=lambda: False)
        self._state.services[ENVIRONMENT] = "stopped"

    def _evaluate(self, services: Services, inference: Address, model: str, watch: Watch) -> float:
        """Measure the held-out score of what the inference server serves now."""
        self._state.phase = "measuring the trained model"
        shutil.rmtree(self._after, ignore_errors=True)  # of an earlier attempt
        command = evaluate_command(inference=inference, model=model, evaluations=self._after)
        child = services.start(_EVALUATION, command, may_finish=True)
        wait_until(child, _finished(child), timeout=_EVALUATION_TIMEOUT, what="finish", watch=watch)
        score = read_accuracy(self._after)
        if score is None:
            raise LocalStackError(f"the evaluation ended without a result.\n{child.log_tail()}")
        self._state.heldout_after = score
        self._state.phase = "done"
        return score

    def _stop_services(self, services: Services, display: Display, stop: StopRequests) -> None:
        """End everything: first who still has something to save, then those it may need for that."""
        try:
            if self._state.phase != "done":
                self._state.phase = "saving a checkpoint"
            for names in ((TRAINER, ENVIRONMENT, _EVALUATION, _MODEL, _FIRST_TOKENS), (INFERENCE, API)):
                self._state.services |= dict.fromkeys(set(names) & set(self._state.services), "stopping")
                display.update(self._state, final=True)
                services.stop(names, patience=_PATIENCE, hurry=lambda: stop.hurry)
                self._state.services |= dict.fromkeys(set(names) & set(self._state.services), "stopped")
            self._read_progress()
            if self._state.phase != "done":
                self._state.phase = "stopped"
            display.update(self._state, final=True)
        finally:
            services.kill_all()


def _finished(child: ChildProcess) -> Callable[[], bool]:
    return lambda: child.returncode == 0
