"""What the documents say is what the code does."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

from schemas import BatchReply, ScoredGroup
from tests.test_architecture import FLOORS
from trainer.cli._main import _commands
from trainer.config import DataSettings, DistillationSettings, LossSettings, config_fields, option_fields
from trainer.config.__main__ import configuration_page
from trainer.extensions import BUILT_IN_ESTIMATORS, BUILT_IN_LOSSES
from trainer.samples.advantages import AdvantageNormalizer
from trainer.samples.prepare import prepare_batch
from trainer.samples.validation import ModelLimits

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks/results").glob("*.md")),
]
GENERATED = {"configuration.md", "hostile-input.md", "step.md"}


def test_the_configuration_page_is_up_to_date() -> None:
    assert (ROOT / "docs/configuration.md").read_text() == configuration_page(), (
        "run: python -m trainer.config > docs/configuration.md"
    )


def test_pages_name_settings_with_their_defaults() -> None:
    fields = {field.name: field.default for field in (*config_fields(), *option_fields())}
    rows = re.findall(
        r"^\| `([a-z]+\.[a-z_]+)` \| `([^`]*)` \|",
        (ROOT / "docs/your-own-stack.md").read_text(),
        re.MULTILINE,
    )
    assert len(rows) >= 12
    for name, default in rows:
        assert fields[name] == default, name


def test_every_setting_that_a_page_mentions_exists() -> None:
    names = {field.name for field in (*config_fields(), *option_fields())}
    sections = {name.partition(".")[0] for name in names}
    for page in PAGES:
        for section, key in re.findall(r"(?<![\w./])--([a-z]+)\.([a-z_]+)", page.read_text()):
            if section in sections:
                assert any(name.startswith(f"{section}.{key}") for name in names), (
                    f"{page.name}: {section}.{key}"
                )


def test_every_setting_in_code_marks_exists() -> None:
    names = {field.name for field in (*config_fields(), *option_fields())}
    sections = {name.partition(".")[0] for name in names}
    files = {"health.json", "journal.marks"}
    for page in PAGES:
        for name in re.findall(r"`([a-z]+\.[a-z_.]+)", page.read_text()):
            if name.partition(".")[0] in sections and name not in files:
                assert any(known.startswith(name.rstrip(".")) for known in names), f"{page.name}: {name}"


def test_every_page_is_in_the_list_of_pages() -> None:
    listed = set(re.findall(r"\]\(([^)#]+)", (ROOT / "docs/README.md").read_text()))
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert pages - listed == {"README.md"}


def test_the_table_of_waits_names_every_deadline_with_its_default() -> None:
    page = (ROOT / "docs/operations.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line[:1] == "|"]
    cells = {row[1]: row[2] for row in rows if len(row) > 2}
    deadlines = [field for field in config_fields() if field.name.endswith("_timeout")]
    assert len(deadlines) >= 16
    for field in deadlines:
        assert f"`{field.name}`" in cells, f"docs/operations.md: no row for {field.name}"
        if field.default != "none":
            assert cells[f"`{field.name}`"] == f"{float(field.default):g} s", field.name
    for field in config_fields():
        if field.name.startswith(("watchdog.", "health.")):
            assert field.name in page, f"docs/operations.md does not speak of {field.name}"


def test_the_example_of_a_group_has_all_that_any_objective_needs() -> None:
    page = (ROOT / "docs/environments.md").read_text()
    text = page[page.index("## What a group holds") : page.index("## Which loss for")]
    group = json.loads(text[text.index("```json") + len("```json") : text.rindex("```")])
    explained = [name for line in re.findall(r"^- (.+?):", text, re.MULTILINE) for name in line.split("`")]
    assert [name for name in explained if name in ScoredGroup.model_fields] == list(group)
    loss = LossSettings.model_validate({"name": "ppo_clip", "kl_coefficient": 0.1})
    for without in ("advantages", None):
        sent = {name: value for name, value in group.items() if name != without}
        prepared = prepare_batch(
            BatchReply.model_validate({"batch": [sent]}),
            limits=ModelLimits(vocabulary_size=64, max_sequence_length=8),
            data=DataSettings(),
            loss=loss,
            normalizer=AdvantageNormalizer("none"),
            distillation=DistillationSettings(mode="sampled_token"),
        )
        assert not prepared.set_aside
        assert prepared.trained_tokens == 3


def test_pages_that_compare_objectives_name_all_of_them() -> None:
    objectives = (ROOT / "docs/objectives.md").read_text()
    assert {name for name in BUILT_IN_LOSSES if f"\n| `{name}` | " not in objectives} == set()
    advantages = (ROOT / "docs/advantages.md").read_text()
    assert {name for name in BUILT_IN_ESTIMATORS if f"`{name}`" not in advantages} == set()
    watched = objectives[objectives.index("## Numbers to watch") :]
    for name in ("kl_ref", "kl_teacher", "entropy", "entropy_coefficient", "ratio", "clipped"):
        assert f"`{name}`" in watched, name


def test_the_architecture_page_names_every_command() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    (named,) = re.findall(r"^\| \d+ \| `cli` \| `atropos-train`: (.+) \|$", page, re.MULTILINE)
    assert set(named.split(", ")) == set(_commands())


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_local_link_leads_somewhere() -> None:
    for page in PAGES:
        for target, anchor in re.findall(r"\]\((?!https?://)([^)#]*)(?:#([^)]+))?\)", page.read_text()):
            found = page.parent / target if target else page
            assert found.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors_of(found), f"{page.name} links to {target}#{anchor}"


def test_no_page_is_too_long_to_be_read() -> None:
    lengths = {page: len(page.read_text().splitlines()) for page in PAGES if page.name not in GENERATED}
    assert lengths.pop(ROOT / "README.md") <= 150
    assert {page.name: length for page, length in lengths.items() if length > 200} == {}


def test_the_architecture_page_has_the_floors_of_the_import_test() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (`[a-z_`, ]+`) \|", page, re.MULTILINE)
    floors = {int(number): tuple(re.findall(r"[a-z_]+", rooms)) for number, rooms in rows}
    assert floors == dict(enumerate(FLOORS, start=1))


def threads_and_processes() -> Iterator[str]:
    """The name of each thread that the code starts; the file where there is none, and of each process."""
    for package in ("atropos_client", "trainer", "local_stack", "inference_plugins"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
                if called.startswith("subprocess."):
                    yield str(path.relative_to(ROOT))
                if called in ("threading.Thread", "ThreadPoolExecutor"):
                    assert isinstance(node, ast.Call)
                    names = [
                        each.value for each in node.keywords if each.arg in ("name", "thread_name_prefix")
                    ]
                    name = names[0] if names else None
                    known = isinstance(name, ast.Constant)
                    yield str(name.value) if known else str(path.relative_to(ROOT))


def test_the_architecture_page_names_every_thread_and_process() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    started = set(threads_and_processes())
    assert len(started) > 15
    assert {name for name in started if f"`{name}`" not in page} == set()
    tables = page[page.index("## Processes") :]
    named = {name for name in re.findall(r"`([^`]+)`", tables) if name.endswith(".py")}
    named |= set(re.findall(r"^\| `([^`]+)`", tables, re.MULTILINE))
    assert {name for name in named if name not in started} == set()
