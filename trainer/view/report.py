"""Writes the page of a run as one HTML file that needs no server: the curves, and a choice of its groups."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from typing import Any, Final

from trainer.view.run_reader import NotThere, RunReader
from trainer.view.site import SCRIPTS, STYLES, joined, read_asset

GROUPS: Final = 60
"""Groups of a report, if no other number is asked for."""
LARGEST_GROUPS: Final = 24 << 20
"""Bytes of JSON that the groups may take together."""
_POINTS: Final = 600
_BATCHES: Final = 200
_TOKENS: Final = 2048
_SCRIPTS_BEGIN: Final = "<!-- scripts -->"
_LINK: Final = '<link rel="stylesheet" href="/assets/page.css">'


def write_report(readers: Sequence[RunReader], *, groups: int = GROUPS) -> str:
    """Return the HTML of a report.

    Args:
        readers: The runs; the first is the one whose rollouts and state are shown.
        groups: How many groups to take along: the newest, the best, the worst and those with the largest
            spread of the newest batches, a quarter each.
    """
    first = readers[0]
    state = {
        **first.state(),
        "runs": [each.directory.absolute().name for each in readers],
        "made_at": time.time(),
        "live": False,
    }
    batches, details = _rollouts(first, groups)
    data = {
        "state": state,
        "curves": [{kind: _curves(reader, kind) for kind in ("step", "publish")} for reader in readers],
        "batches": batches,
        "groups": details,
    }
    return _page(json.dumps(data, allow_nan=False, separators=(",", ":")))


def _curves(reader: RunReader, kind: str) -> dict[str, Any]:
    """All columns; the range of each is left out where it is the mean itself."""
    curves = reader.curves(kind, [], points=_POINTS)
    for name, column in curves["columns"].items():
        if column["low"] == column["mean"] == column["high"]:
            curves["columns"][name] = {"mean": column["mean"]}
    return curves


def _rollouts(reader: RunReader, count: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Choose groups; returns the batches with the records of these, and the groups by `batch/place`."""
    batches: list[dict[str, Any]] = []
    before: int | None = None
    try:
        while len(batches) < _BATCHES:
            found = reader.batches(before=before, limit=20)
            batches += found["batches"]
            before = found["next"]
            if before is None:
                break
    except NotThere:
        return [], {}
    details: dict[str, Any] = {}
    size = 0
    for batch, place in _chosen(batches, count):
        try:
            detail = reader.group(batch, place, most_tokens=_TOKENS)
        except NotThere:
            continue
        size += len(json.dumps(detail))
        if size > LARGEST_GROUPS:
            break
        details[f"{batch}/{place}"] = detail
    for record in batches:
        record["groups"] = [
            each for each in record["groups"] if f"{record['batch']}/{each['group']}" in details
        ]
    return [record for record in batches if record["groups"]], details


def _chosen(batches: Iterable[dict[str, Any]], count: int) -> list[tuple[int, int]]:
    """A quarter each of the newest, the best, the worst and the widest, in the order of their batches."""
    groups = [(record["batch"], each) for record in batches for each in record["groups"]]
    scored = [pair for pair in groups if "mean" in pair[1]]
    orders = [
        groups,
        sorted(scored, key=lambda pair: -pair[1]["mean"]),
        sorted(scored, key=lambda pair: pair[1]["mean"]),
        sorted(scored, key=lambda pair: -pair[1]["spread"]),
    ]
    chosen: dict[tuple[int, int], None] = {}
    for position in range(len(groups)):
        for order in orders:
            if position < len(order) and len(chosen) < count:
                batch, each = order[position]
                chosen[batch, each["group"]] = None
        if len(chosen) >= count:
            break
    return sorted(chosen, key=lambda place: (-place[0], place[1]))


def _page(data: str) -> str:
    """Put styles, data and scripts into the page, under a policy that lets only these scripts run."""
    page, style, script = read_asset("index.html"), joined(STYLES), joined(SCRIPTS)
    policy = (
        f"default-src 'none'; script-src {_hash_of(script)}; style-src {_hash_of(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{style}</style>'
    page = page.replace(_LINK, head)
    # No text of the run can end the element that it stands in.
    shown = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    data_part = f'<script type="application/json" id="report-data">{shown}</script>'
    return f"{page[: page.index(_SCRIPTS_BEGIN)]}{data_part}\n<script>{script}</script>\n</body>\n</html>\n"


def _hash_of(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
