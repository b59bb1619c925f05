"""docker-compose.yml: accepted by docker-compose, closed to the outside, and true to the tested commands."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from local_stack.commands import Address, api_command, inference_command, serve_command, train_command
from tests.compose import ROOT, compose_program, read_defaults, read_services
from trainer.config import load_config

SERVICES = read_services()
CPU = ("atropos-api", "inference", "environment", "trainer")
GPU = ("atropos-api", "inference-gpu", "environment-gpu", "trainer-gpu")
ANYWHERE = "0.0.0.0"  # noqa: S104 - inside a container; what is published is tested below
RUN = Path("/data/run")
STEPS, SEED = int(read_defaults()["STEPS"]), int(read_defaults()["SEED"])
API = Address(host="atropos-api", port=8000)


def active(profile: str) -> set[str]:
    return {name for name, service in SERVICES.items() if profile in service.get("profiles", [profile])}


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_docker_compose_accepts_the_file(profile: str) -> None:
    program = compose_program()
    if program is None:
        message = "docker-compose is not installed (Debian: apt-get install docker-compose)"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(message)
    done = subprocess.run(
        [*program, "--profile", profile, "config"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    assert active(profile) <= set(services)
    assert "not set" not in done.stderr, "a variable has no default in .env"


def test_each_profile_is_one_whole_stack() -> None:
    assert active("cpu") == set(CPU)
    assert active("gpu") == set(GPU)
    assert read_defaults()["COMPOSE_PROFILES"] == "cpu"


@pytest.mark.parametrize("name", SERVICES)
def test_every_published_port_is_on_loopback_only(name: str) -> None:
    for port in SERVICES[name].get("ports", []):
        assert str(port).startswith("127.0.0.1:"), port
    assert SERVICES[name].get("network_mode") != "host"


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_has_a_health_check(name: str) -> None:
    check = SERVICES[name]["healthcheck"]
    assert check["test"][0] == "CMD"
    assert {"interval", "timeout", "retries", "start_period"} <= set(check)


@pytest.mark.parametrize("name", ["trainer", "trainer-gpu"])
def test_a_trainer_that_is_stuck_is_not_healthy(name: str) -> None:
    environment = SERVICES[name]["environment"]
    config = load_config(None, ["--model.path", "m"], environment=environment)
    assert f"http://{config.health.host}:{config.health.port}/health" in SERVICES[name]["healthcheck"]["test"]


@pytest.mark.parametrize("name", SERVICES)
def test_no_service_runs_as_root_or_can_gain_rights(name: str) -> None:
    service = SERVICES[name]
    assert int(service["user"].split(":")[0]) > 0
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert not service.get("privileged")


@pytest.mark.parametrize(("names", "suffix"), [(CPU, ""), (GPU, "-gpu")])
def test_services_start_when_those_they_need_are_healthy(names: tuple[str, ...], suffix: str) -> None:
    for name in (f"environment{suffix}", f"trainer{suffix}"):
        needs = SERVICES[name]["depends_on"]
        assert needs == {
            "atropos-api": {"condition": "service_healthy"},
            f"inference{suffix}": {"condition": "service_healthy"},
        }
        assert set(needs) <= set(names)


@pytest.mark.parametrize("name", SERVICES)
def test_weights_and_checkpoints_lie_in_the_volume(name: str) -> None:
    assert "data:/data" in SERVICES[name]["volumes"]


@pytest.mark.parametrize("name", ["trainer", "trainer-gpu"])
def test_the_trainer_gets_time_to_write_its_checkpoint(name: str) -> None:
    assert SERVICES[name]["stop_signal"] == "SIGINT"
    assert SERVICES[name]["stop_grace_period"] == "5m"


def test_the_api_runs_the_command_that_is_tested() -> None:
    assert SERVICES["atropos-api"]["command"] == api_command(
        Address(host=ANYWHERE, port=8000), python="python"
    )


def test_the_inference_server_runs_the_command_that_is_tested() -> None:
    listen = Address(host=ANYWHERE, port=9001)
    model = read_defaults()["MODEL"]
    assert SERVICES["inference"]["command"] == inference_command(
        listen, model=model, seed=SEED, python="python"
    )


def stack(suffix: str) -> dict[str, Any]:
    model = read_defaults()["GPU_MODEL" if suffix else "MODEL"]
    inference = Address(host=f"inference{suffix}", port=9001)
    return {"api": API, "inference": inference, "model": model, "seed": SEED, "python": "python"}


@pytest.mark.parametrize("suffix", ["", "-gpu"])
def test_the_environment_runs_the_command_that_is_tested(suffix: str) -> None:
    command = serve_command(**stack(suffix), evaluations=RUN / "evaluations" / "before")
    assert SERVICES[f"environment{suffix}"]["command"] == command


@pytest.mark.parametrize(("suffix", "config"), [("", "local_stack/demo.yaml"), ("-gpu", "configs/gpu.yaml")])
def test_the_trainer_runs_the_command_that_is_tested(suffix: str, config: str) -> None:
    path = Path(config)
    command = train_command(**stack(suffix), config=path, steps=STEPS, output_dir=RUN)
    assert SERVICES[f"trainer{suffix}"]["command"] == command


@pytest.mark.parametrize("name", ["trainer", "trainer-gpu"])
def test_the_trainer_accepts_its_configuration(name: str) -> None:
    command = SERVICES[name]["command"]
    words = command[command.index("run") + 1 :]
    config = load_config(ROOT / words[1], words[2:], environment={})
    assert config.publish.transport == "disk"
    assert config.train.output_dir == RUN
    assert config.atropos.batch_size % 8 == 0


def test_vllm_is_started_with_the_routes_that_publishing_needs() -> None:
    service = SERVICES["inference-gpu"]
    assert service["image"].startswith("vllm/vllm-openai:v")
    assert service["environment"]["VLLM_SERVER_DEV_MODE"] == "1"
    assert service["command"][service["command"].index("--served-model-name") + 1] == "policy"


@pytest.mark.parametrize(
    "needed", ["README.md", "LICENSE", "pyproject.toml", "configs", "local_stack", "trainer"]
)
def test_the_image_build_sees_what_it_copies(needed: str) -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert f"!{needed}" in ignore


def test_the_image_is_made_of_every_package() -> None:
    """One package imports another, so an image without one of them starts nothing."""
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    packages = {name.rstrip("*") for name in found["include"]}
    copied = set(re.findall(r"^COPY (\w+) \1$", (ROOT / "docker/Dockerfile").read_text(), re.MULTILINE))
    assert packages <= copied
    assert packages <= set(re.findall(r"^!(\w+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
