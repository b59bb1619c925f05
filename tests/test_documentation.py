"""What the documents say is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from trainer.config import config_fields
from trainer.config.__main__ import configuration_page

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_configuration_page_is_up_to_date() -> None:
    assert (ROOT / "docs/configuration.md").read_text() == configuration_page(), (
        "run: python -m trainer.config > docs/configuration.md"
    )


def test_the_readme_names_settings_with_their_defaults() -> None:
    fields = {field.name: field.default for field in config_fields()}
    rows = re.findall(
        r"^\| `([a-z]+\.[a-z_]+)` \| `([^`]*)` \|", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert len(rows) >= 12
    for name, default in rows:
        assert fields[name] == default, name


def test_every_setting_that_a_page_mentions_exists() -> None:
    names = {field.name for field in config_fields()}
    sections = {name.partition(".")[0] for name in names}
    for page in PAGES:
        for section, key in re.findall(r"(?<![\w./])--([a-z]+)\.([a-z_]+)", page.read_text()):
            if section in sections:
                assert any(name.startswith(f"{section}.{key}") for name in names), (
                    f"{page.name}: {section}.{key}"
                )


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


def test_every_local_link_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
