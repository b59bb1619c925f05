"""The shape of the project: who may import whom, what each package exports, what stays free of torch."""

from __future__ import annotations

import ast
import graphlib
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.config import ON_RESUME, config_fields, row_of

ROOT = Path(__file__).parent.parent
ROOMS = ("schemas", "atropos_client", "trainer", "local_stack")
# Every room may import itself and the rooms before it.
MAY_IMPORT = {room: set(ROOMS[: position + 1]) for position, room in enumerate(ROOMS)}

# The same within the trainer, a floor a line: a room may import itself, and rooms of the floors before.
FLOORS = (
    ("errors", "options", "row_files"),
    ("extensions",),
    ("config", "launch", "losses"),
    ("monitoring", "samples"),
    ("packing",),
    ("model", "sources"),
    ("export",),
    ("checkpoints", "publish"),
    ("run",),
    ("check", "view"),
    ("cli",),
)


def imported_modules(source: str) -> Iterator[str]:
    """Yield the full name of every module that a source text imports, at any depth."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            assert node.module is not None
            yield node.module


def files_of(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def tops_of(room: str) -> dict[str, set[str]]:
    """Map every top-level package that a room imports to the files that do so."""
    tops: dict[str, set[str]] = {}
    for path in files_of(room):
        for module in imported_modules(path.read_text(encoding="utf-8")):
            tops.setdefault(module.partition(".")[0], set()).add(str(path.relative_to(ROOT)))
    return tops


@pytest.mark.parametrize("room", ROOMS)
def test_imports_between_rooms_point_one_way(room: str) -> None:
    assert files_of(room)
    forbidden = set(ROOMS) - MAY_IMPORT[room]
    assert {top: files for top, files in tops_of(room).items() if top in forbidden} == {}


def test_only_the_integration_imports_verl_and_it_does_not_import_the_demo() -> None:
    assert files_of("verl_integration")
    assert "local_stack" not in tops_of("verl_integration")
    for room in ROOMS:
        assert {"verl", "ray", "verl_integration"} & tops_of(room).keys() == set(), room


def room_of(module: str) -> str:
    """The room of a module of the trainer."""
    return module.split(".")[1]


def trainer_imports() -> Iterator[tuple[str, str]]:
    """Yield each import within the trainer: who imports, and what, as full names."""
    for path in files_of("trainer"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if module == "trainer":
            continue  # what the package gives by name, from any room
        for imported in imported_modules(path.read_text(encoding="utf-8")):
            if imported.startswith("trainer."):
                yield module, imported


def test_rooms_of_the_trainer_import_only_rooms_of_lower_floors() -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    imports = set(trainer_imports())
    assert {room_of(module) for pair in imports for module in pair} == floor.keys()
    upwards = {
        (module, imported)
        for module, imported in imports
        if room_of(module) != room_of(imported) and floor[room_of(imported)] >= floor[room_of(module)]
    }
    assert upwards == set()


def test_no_file_of_the_trainer_imports_itself_by_way_of_others() -> None:
    arrows: dict[str, set[str]] = {}
    for module, imported in trainer_imports():
        arrows.setdefault(module, set()).add(imported)
    tuple(graphlib.TopologicalSorter(arrows).static_order())  # raises CycleError, which names the circle


def test_schemas_imports_only_pydantic_and_the_standard_library() -> None:
    foreign = tops_of("schemas").keys() - sys.stdlib_module_names
    assert foreign <= {"schemas", "pydantic", "pydantic_core"}


def test_atropos_client_imports_only_schemas_httpx_and_pydantic_beyond_the_standard_library() -> None:
    foreign = tops_of("atropos_client").keys() - sys.stdlib_module_names
    assert foreign <= {"atropos_client", "schemas", "httpx", "pydantic"}


def test_the_direction_test_can_fail() -> None:
    assert list(imported_modules("def f():\n    from local_stack.models import x")) == ["local_stack.models"]


def test_importing_the_wire_and_the_client_does_not_load_torch() -> None:
    program = (
        "import sys, schemas, atropos_client; "
        "sys.exit(sorted({'torch', 'transformers', 'numpy'} & sys.modules.keys()) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("package", ["schemas", "atropos_client"])
def test_all_lists_exactly_what_the_package_imports_by_name_and_is_sorted(package: str) -> None:
    module = importlib.import_module(package)
    tree = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module != "__future__"
        for alias in node.names
    }
    assert set(module.__all__) == imported
    assert len(module.__all__) == len(set(module.__all__))
    assert list(module.__all__) == sorted(module.__all__, key=_ruff_order)
    assert all(hasattr(module, name) for name in module.__all__)


def test_every_setting_says_whether_it_may_change_on_resume() -> None:
    assert {row_of(field.name) for field in config_fields()} == set(ON_RESUME)  # of trainer.config._resume


def _ruff_order(name: str) -> tuple[int, str]:
    """CONSTANTS, then Classes, then functions, each alphabetically: the order that `ruff` keeps (RUF022)."""
    kind = 0 if name.isupper() else 1 if name[0].isupper() else 2
    return kind, name
