"""`atropos-train local` on the command line, and what is refused before anything starts."""

from __future__ import annotations

import argparse
import io
import os
import signal
from datetime import UTC, datetime
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from rich.console import Console

from local_stack.command import LOCAL_COMMAND, new_run_directory
from local_stack.environment import ArithmeticConfig
from local_stack.errors import StoppedByUserError
from local_stack.launcher import LocalOptions, check_settings, run_local
from local_stack.signals import StopRequests
from trainer.config import load_config
from trainer.errors import ConfigurationError

DEMO_CONFIG = Path(__file__).parents[2] / "local_stack" / "demo.yaml"


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    LOCAL_COMMAND.add_arguments(parser)
    return parser.parse_args(words)


def options(run_dir: Path, **changes: object) -> LocalOptions:
    made = {"model": "tiny", "steps": 3, "seed": 0, "run_dir": run_dir, "config": DEMO_CONFIG, **changes}
    return LocalOptions(**made)  # type: ignore[arg-type]


def test_the_command_is_found_by_its_entry_point() -> None:
    (found,) = entry_points(group="atropos_trainer.commands", name="local")
    assert found.load() is LOCAL_COMMAND


def test_the_defaults_are_those_of_the_demonstration() -> None:
    args = parse()
    assert (args.model, args.steps, args.seed, args.run_dir) == ("demo", 25, 0, None)
    assert args.config == DEMO_CONFIG


@pytest.mark.parametrize("steps", ["0", "-1", "three"])
def test_a_number_of_steps_that_makes_no_sense_is_refused(steps: str) -> None:
    with pytest.raises(SystemExit):
        parse("--steps", steps)


def test_a_new_run_directory_says_when_the_run_began() -> None:
    assert new_run_directory(datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)) == Path("runs/local-20260304-050607")


def test_what_a_preset_came_to_is_shown_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")  # so that nothing is started
    shown = io.StringIO()
    run_local(options(tmp_path, settings=("--loss.preset", "dapo")), Console(file=shown, width=80))
    line = shown.getvalue().splitlines()[0]
    assert line.startswith("loss.preset dapo: loss.name ppo_clip (in place of the file's policy_gradient), ")


def test_the_demo_configuration_fits_the_environment_and_proves_every_publish(tmp_path: Path) -> None:
    check_settings(options(tmp_path))
    config = load_config(DEMO_CONFIG, ["--model.path", "m", "--publish.servers", "http://127.0.0.1:1"])
    assert config.atropos.batch_size == 12 * ArithmeticConfig().group_size == 96
    assert config.loss.name == "policy_gradient"
    assert (config.publish.transport, config.publish.every, config.publish.verify) == ("disk", 1, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": ("--optimizer.lr", "1")}, "optimizer.lr: there is no such setting"),
        ({"settings": ("--loss.name", "magic")}, "loss.name"),
        ({"config": Path("no/such/file.yaml")}, "no/such/file.yaml"),
    ],
)
def test_wrong_settings_are_refused_before_anything_starts(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check_settings(options(tmp_path, **changes))


def test_a_finished_run_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    console = Console(file=io.StringIO(), width=200)
    assert run_local(options(tmp_path), console) == 1
    assert isinstance(console.file, io.StringIO)
    assert "holds a finished run already; choose another --run-dir" in console.file.getvalue()
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_stop_is_noted_and_raised_where_it_is_asked_for(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequests() as stop:
        stop.raise_if_requested()
        os.kill(os.getpid(), number)
        assert not stop.hurry
        with pytest.raises(StoppedByUserError):
            stop.raise_if_requested()
        os.kill(os.getpid(), number)
        assert stop.hurry
    assert signal.getsignal(number) == before
