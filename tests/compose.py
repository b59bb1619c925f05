"""Reading docker-compose.yml in tests: what a service runs, with the defaults of .env filled in."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
COMPOSE_FILE = ROOT / "docker-compose.yml"

_VARIABLE = re.compile(r"\$\{(\w+)\}")


def read_services(**overrides: str) -> dict[str, dict[str, Any]]:
    """Return the services by name, `${NAME}` replaced by `overrides` or the default in .env."""
    values = {**read_defaults(), **overrides}
    services: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE_FILE.read_text(encoding="utf-8"))["services"]
    return {name: _filled_in(service, values) for name, service in services.items()}


def compose_program() -> list[str] | None:
    """The installed docker-compose, of either generation; None without one."""
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    if shutil.which("docker"):
        plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
        if plugin.returncode == 0:
            return ["docker", "compose"]
    return None


def read_defaults() -> dict[str, str]:
    """Return the variables of .env."""
    lines = (ROOT / ".env").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def _filled_in(node: Any, values: dict[str, str]) -> Any:
    """Replace variables in every string below `node`, as docker-compose does: after reading the YAML."""
    if isinstance(node, str):
        return _VARIABLE.sub(lambda match: values[match.group(1)], node)
    if isinstance(node, list):
        return [_filled_in(item, values) for item in node]
    if isinstance(node, dict):
        return {key: _filled_in(value, values) for key, value in node.items()}
    return node
