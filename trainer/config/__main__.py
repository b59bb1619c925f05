"""`python -m trainer.config`: every setting as a Markdown page; `docs/configuration.md` is its output."""

from __future__ import annotations

import sys

from trainer.config import (
    ENVIRONMENT_PREFIX,
    ON_RESUME,
    OnResume,
    fields_by_section,
    option_fields,
)

_ON_RESUME = "What happens to a setting that differs from the checkpoint's; a name goes before a pattern:"


def configuration_page() -> str:
    """The page, section by section."""
    lines = [
        "# Configuration",
        "",
        (
            f"Command line `--train.steps 20`, environment `{ENVIRONMENT_PREFIX}TRAIN__STEPS=20`, file "
            "`train: {steps: 20}`; the first of them that names a setting wins. A value is read as it is "
            "written: in the file, too, `no` is a word and 0123 no number. Lists may be written with commas, "
            "and `~` is the home directory. Written by `python -m trainer.config`."
        ),
    ]
    for section, description, fields in fields_by_section(option_fields()):
        lines += ["", f"## {section}", "", description, ""]
        lines += ["| setting | type | default | meaning |", "|---|---|---|---|"]
        for field in fields:
            kind = field.type_name.replace("|", " \\| ")
            lines.append(f"| `{field.name}` | {kind} | `{field.default}` | {field.help} |")
    lines += ["", "## On resume", "", _ON_RESUME, ""]
    for kind_of_change in OnResume:
        names = [f"`{row}`" for row, found in ON_RESUME.items() if found is kind_of_change]
        lines.append(f"- {kind_of_change.value}: {', '.join(names)}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(configuration_page())
