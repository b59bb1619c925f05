"""`python -m trainer.config`: every setting as a Markdown page; `docs/configuration.md` is its output."""

from __future__ import annotations

import sys
from itertools import groupby

from trainer.config import ENVIRONMENT_PREFIX, TrainerConfig, config_fields


def configuration_page() -> str:
    """The page, section by section."""
    lines = [
        "# Configuration",
        "",
        (
            f"Command line `--train.steps 20`, environment `{ENVIRONMENT_PREFIX}TRAIN__STEPS=20`, file "
            "`train: {steps: 20}`; the first of them that names a setting wins. Written by "
            "`python -m trainer.config`."
        ),
    ]
    for section, fields in groupby(config_fields(), key=lambda field: field.name.partition(".")[0]):
        lines += ["", f"## {section}", "", f"{TrainerConfig.model_fields[section].description}", ""]
        lines += ["| setting | type | default | meaning |", "|---|---|---|---|"]
        for field in fields:
            kind = field.type_name.replace("|", " \\| ")
            lines.append(f"| `{field.name}` | {kind} | `{field.default}` | {field.help} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(configuration_page())
