"""docs/security.md names tests that exist, and all of those here."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from schemas import MAX_CONTAINERS, MAX_GROUPS
from tests.test_architecture import ROOT

PAGE = (ROOT / "docs/security.md").read_text(encoding="utf-8")
HERE = Path(__file__)
ROW = re.compile(r"^\| (?P<attack>[^|]+) \| (?P<measure>[^|]+) \| (?P<tests>[^|]+) \|$", re.MULTILINE)
TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


def functions_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def rows() -> list[re.Match[str]]:
    return [row for row in ROW.finditer(PAGE) if row["attack"] != "attack" and set(row["attack"]) != {"-"}]


def test_every_row_names_tests_that_exist() -> None:
    assert len(rows()) > 20
    for row in rows():
        named = TEST.findall(row["tests"])
        assert len(named) == row["tests"].count("`") / 2 > 0, row["attack"]
        for file, function in named:
            assert (ROOT / file).is_file(), file
            assert not function or function in functions_of(file), f"{file}::{function}"


def test_every_test_of_this_directory_is_in_the_table() -> None:
    named = {(file, function) for row in rows() for file, function in TEST.findall(row["tests"])}
    files = [path for path in HERE.parent.glob("test_*.py") if path != HERE]
    assert len(files) >= 6
    for path in files:
        file = path.relative_to(ROOT).as_posix()
        tests = {name for name in functions_of(file) if name.startswith("test_")}
        assert {name for name in tests if (file, name) not in named} == set(), file


def test_each_part_says_what_is_not_defended_against() -> None:
    parts = PAGE.split("\n## ")[1:]
    assert len(parts) == 6
    assert all("Not defended against:" in part for part in parts)


def test_the_numbers_are_those_of_the_source() -> None:
    assert f"{MAX_CONTAINERS:,} lists and objects" in PAGE
    assert f"and {MAX_GROUPS:,} groups" in PAGE
