"""The commands of deploy/ start one run on two "nodes" of this machine; schedulers are stood in for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.trainer.batches import make_bodies
from tests.trainer.runs import rows

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent

SRUN = """#!/bin/sh
# Both nodes are this one.
[ "$2" = --cpus-per-task=3 ] || exit 9
shift 2
"$@" & first=$!
"$@" & second=$!
wait $first && wait $second
"""


def words_of_a_replay(model: Path, directory: Path) -> list[str]:
    recording = directory / "recording.jsonl"
    lines = [json.dumps({"reply": json.loads(body)}) for body in make_bodies(2)]
    recording.write_text("\n".join(lines))
    settings = {
        "replay.from": recording,
        "model.path": model,
        "train.output_dir": directory / "run",
        "train.mismatch_alarm": "null",
        "atropos.batch_size": 12,
    }
    return ["replay", *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]


@pytest.fixture
def environment(tmp_path: Path, free_port: int) -> dict[str, str]:
    """With the stand-ins for SLURM's commands before all others, and ours after them."""
    for name, script in (("srun", SRUN), ("scontrol", "#!/bin/sh\necho 127.0.0.1\n")):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = {
        "SLURM_JOB_NODELIST": "node-[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "3",
        "PORT": str(free_port),
    }
    no_gpu = {"CUDA_VISIBLE_DEVICES": ""}  # and nothing that says so: the commands are those of users
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", **no_gpu, **job}


def assert_trained_as_one_run(launchers: list[subprocess.Popen[str]], output: Path) -> None:
    try:
        said = "".join(launcher.communicate(timeout=200)[0] for launcher in launchers)
    finally:
        for launcher in launchers:
            launcher.terminate()
    assert "Training with 2 processes on 2 nodes" in said, said[-3000:]
    assert said.count("Done after 2 optimizer steps") == 1
    assert len(rows(output)) == 2


def launch(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_the_script_for_slurm_starts_one_run(
    tiny_model_directory: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    command = ["bash", "deploy/slurm.sh", *words_of_a_replay(tiny_model_directory, tmp_path)]
    assert_trained_as_one_run([launch(command, environment)], tmp_path / "run")


def test_the_job_for_kubernetes_starts_one_run(
    tiny_model_directory: Path, tmp_path: Path, free_port: int, environment: dict[str, str]
) -> None:
    service, job = yaml.safe_load_all((ROOT / "deploy/kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    first = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert f"USER {pod['securityContext']['fsGroup']}:" in (ROOT / "docker/Dockerfile").read_text()
    assert {mount["name"] for mount in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}
    assert f"--nnodes={job['spec']['completions']}" in container["command"]
    here = {f"--rdzv_endpoint={first}:29500": f"--rdzv_endpoint=127.0.0.1:{free_port}"}
    here |= {"--nproc_per_node=8": "--nproc_per_node=1"}
    assert here.keys() <= set(container["command"])
    command = [here.get(word, word) for word in container["command"]]
    command += words_of_a_replay(tiny_model_directory, tmp_path)
    launchers = [launch(command, environment) for _ in range(job["spec"]["parallelism"])]
    assert_trained_as_one_run(launchers, tmp_path / "run")
