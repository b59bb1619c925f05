"""The page of a run in a real browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect
from tokenizers import Tokenizer

from tests.view.browser import WatchedPage, started_browser
from tests.view.made_run import (
    body_of,
    group_of,
    make_run,
    step_row,
    write_configuration,
    write_journal,
    write_metrics,
)
from tests.view.test_site import served
from trainer.cli import main

pytestmark = pytest.mark.slow

expect.set_options(timeout=60_000)  # what a page does follows a click or a key; the machine may be busy

HOSTILE = (
    "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>\u202e\x1b[31m"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started_browser() as running:
        yield running


@pytest.fixture
def watched(browser: Browser) -> Iterator[WatchedPage]:
    """A wide window; the test fails if anything went wrong in it."""
    each = WatchedPage(browser)
    yield each
    each.context.close()
    assert each.problems == []


@pytest.fixture(scope="module")
def run(tiny_model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five steps, and a batch of its own with four answers to one question."""
    model = {"path": str(tiny_model_directory), "tokenizer_path": None}
    directory = make_run(tmp_path_factory.mktemp("browser") / "run", model=model)
    tokenizer = Tokenizer.from_file(str(tiny_model_directory / "tokenizer.json"))
    prompt, *answers = [tokenizer.encode(text).ids for text in ("What is 2+2? ", "4", "5!", "four", "(4)")]
    group = group_of(prompt, answers, [1.0, 0.0, 1.0, 1.0], env_id=7)
    write_journal(directory, [body_of(group)])
    return directory


def drawn(page: Page, chart: str, series: int = 1) -> Any:
    """The numbers that a chart draws, and whether its canvas has ink."""
    return page.evaluate(
        """([title, series]) => {
            const chart = Charts.shown().find((each) => each.define.title === title);
            const canvas = chart.element.querySelector("canvas");
            const [steps, values] = [chart.plot.data[0], chart.plot.data[series]];
            return { steps: [...steps], values: [...values], ink: canvas.toDataURL().length };
        }""",
        [chart, series],
    )


def test_charts_show_the_numbers_of_the_run_and_what_comes_meanwhile(watched: WatchedPage, run: Path) -> None:
    page = watched.page
    with served(run) as server:
        page.goto(server.url)
        page.wait_for_selector("figure[data-chart=Reward] canvas")
        reward = drawn(page, "Reward")
        assert reward["steps"] == [1, 2, 3, 4, 5]
        assert reward["values"] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
        assert reward["ink"] > 3000  # a canvas without ink is shorter
        page.wait_for_selector("table.numbers td")
        expect(page.locator("table.numbers tbody tr")).to_have_count(5)
        expect(page.locator("table.numbers tbody tr").first).to_contain_text("✓ proven")
        page.locator("figure[data-chart=Reward] .u-over").hover()
        expect(page.locator("figure[data-chart=Reward] .values")).to_contain_text("step")
        write_metrics(run, [step_row(6, reward_mean=0.5)])
        page.wait_for_function("() => Charts.shown()[0].plot.data[0].length === 6")
        expect(page.locator(".tile b").first).to_contain_text("6")


def test_zoom_log_and_smoothing_change_the_chart(watched: WatchedPage, run: Path) -> None:
    page = watched.page
    with served(run) as server:
        page.goto(server.url)
        page.wait_for_selector("figure[data-chart=Loss] canvas")
        box = page.locator("figure[data-chart=Loss] .u-over").bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + 50)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + 50, steps=4)
        page.mouse.up()
        page.wait_for_function("() => Charts.shown()[0].plot.data[0].length < 5")
        page.get_by_role("button", name="Whole run").click()
        page.wait_for_function("() => Charts.shown()[0].plot.data[0].length >= 5")
        page.locator("figure[data-chart=Reward] button").click()
        expect(page.locator("figure[data-chart=Reward] button")).to_have_attribute("aria-pressed", "true")
        page.locator("#smoothing").fill("0.5")
        raw, smooth = drawn(page, "Reward")["values"], drawn(page, "Reward", 2)["values"]
        assert smooth[1] == pytest.approx((0.5 * raw[0] + raw[1]) / 1.5)
        page.get_by_label("Add a chart").select_option("intake_counter_3")
        page.wait_for_selector("figure[data-chart=intake_counter_3] canvas")


def test_a_rollout_opens_with_its_tokens_and_their_numbers_and_is_copied(
    watched: WatchedPage, run: Path
) -> None:
    page = watched.page
    with served(run) as server:
        page.goto(f"{server.url}/#/rollouts")
        page.get_by_label("Filter the groups").fill("environment 7")
        page.wait_for_function("() => document.querySelectorAll('.group').length === 1")
        page.locator(".group").click()
        page.wait_for_selector(".answer")
        assert page.locator(".answer").count() == 4
        assert page.locator(".prompt .tokens").inner_text().strip() == "What is 2+2?"
        texts = [each.inner_text() for each in page.locator(".answer .tokens").all()]
        assert texts == ["4", "four", "(4)", "5!"]  # the best first
        assert page.locator(".answer").last.locator(".t").first.get_attribute("class") == "t down5"
        page.locator(".answer").last.locator(".t").nth(1).hover()
        for number in ("−0.75", "−2", "13.5 %"):
            expect(page.locator("#token-card")).to_contain_text(number)
        page.get_by_role("button", name="Log-prob").click()
        expect(page.locator(".answer .t").first).to_have_class(re.compile("rare"))
        page.get_by_role("button", name="Copy text").click()
        page.wait_for_selector("#notice:visible")
        copied = page.evaluate("navigator.clipboard.readText()")
        assert "What is 2+2? \n--- answer 0, score 1, advantage 0.25\n4\n" in copied
        page.get_by_role("button", name="Copy JSON").click()
        page.wait_for_function("() => document.getElementById('notice').textContent.startsWith('The JSON')")
        assert json.loads(page.evaluate("navigator.clipboard.readText()"))["sequences"][1]["score"] == 0.0


def test_the_keyboard_reaches_everything(watched: WatchedPage, run: Path) -> None:
    page = watched.page
    with served(run) as server:
        page.goto(server.url)
        page.wait_for_selector("figure canvas")
        page.keyboard.press("2")
        page.wait_for_selector(".group")
        page.keyboard.press("j")
        page.wait_for_selector(".answer")
        first = page.locator("h2").inner_text()
        page.keyboard.press("j")
        page.wait_for_function("before => document.querySelector('h2').textContent !== before", arg=first)
        page.keyboard.press("k")
        page.wait_for_function("before => document.querySelector('h2').textContent === before", arg=first)
        page.locator(".answer .tokens").first.focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        expect(page.locator("#token-card")).to_be_visible()
        expect(page.locator(".t.here")).to_have_count(1)
        page.keyboard.press("Escape")
        page.wait_for_function("() => location.hash === '#/rollouts'")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement !== document.body")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_window_shows_one_thing_after_the_other(browser: Browser, run: Path, scheme: str) -> None:
    watched = WatchedPage(browser, width=360, scheme=scheme)
    page = watched.page
    with served(run) as server:
        page.goto(server.url)
        page.wait_for_selector("figure canvas")
        assert page.evaluate("document.documentElement.dataset.theme") == scheme
        assert watched.overflow() == 0
        page.get_by_role("link", name="Rollouts").click()
        page.locator(".group").first.click()
        page.wait_for_selector(".answer")
        expect(page.locator(".side")).to_be_hidden()
        assert watched.overflow() == 0
        page.get_by_role("link", name="← All groups").click()
        expect(page.locator(".side")).to_be_visible()
    watched.context.close()
    assert watched.problems == []


def test_hostile_texts_are_shown_and_do_nothing(watched: WatchedPage, tmp_path: Path) -> None:
    directory = tmp_path / "<b>run<"
    group = group_of([1], [[2], [3]], [1.0, 0.0], messages=[[{"role": HOSTILE, "content": HOSTILE}], HOSTILE])
    write_metrics(directory, [step_row(1, **{HOSTILE: 1.0})])
    write_metrics(directory, [{"kind": "skipped", "step": 1, "batch": 2, "reason": HOSTILE}])
    write_configuration(directory, model={"path": "/nowhere/" + HOSTILE}, loss={"name": HOSTILE})
    write_journal(
        directory, [body_of({**group, "generation_params": {HOSTILE: HOSTILE}}, {"tokens": HOSTILE})]
    )
    (directory / "set_aside").mkdir()
    line = {"batch": 1, "group_index": 0, "env_id": 0, "reason": HOSTILE, "group": {}}
    (directory / "set_aside/groups.jsonl").write_text(json.dumps(line) + "\n")
    health = {"status": "ok", "phase": HOSTILE, "phase_seconds": 1, "waiting_for": HOSTILE, "time": 1e12}
    (directory / "health.json").write_text(json.dumps(health))
    page = watched.page
    with served(directory) as server:
        page.goto(server.url)
        page.wait_for_selector(".reasons li")
        assert HOSTILE[:40] in page.locator(".reasons li").first.inner_text()
        page.get_by_label("Add a chart").select_option(HOSTILE)
        for group_number in (0, 1):
            page.goto(f"{server.url}/#/rollouts/1/{group_number}")
            page.wait_for_function(
                "n => document.querySelector('h2')?.textContent.endsWith(n)", arg=str(group_number)
            )
            assert "<img" in (page.locator(".pane").text_content() or "")
        for evil in (f"{server.url}/#/rollouts/1/<img src=x onerror=alert(1)>", f"{server.url}/#/<script>"):
            page.goto(evil)
        page.wait_for_timeout(300)
        assert "owned" not in page.title()
        assert page.locator("main img, main script").count() == 0


def test_a_report_is_one_file_that_needs_no_server_and_lets_no_text_act(
    watched: WatchedPage, run: Path, tmp_path: Path
) -> None:
    write_metrics(run, [step_row(7, reward_mean=0.25, **{f"</script>{HOSTILE}": 1.0})])
    report = tmp_path / "report.html"
    assert main(["report", str(run), "--output", str(report), "--groups", "4"]) == 0
    assert report.stat().st_mode & 0o077 == 0
    page = watched.page
    page.goto(report.as_uri())
    page.wait_for_selector("figure[data-chart=Reward] canvas")
    assert drawn(page, "Reward")["values"][:3] == pytest.approx([0.2, 0.4, 0.6])
    expect(page.locator("#status")).to_contain_text("report of")
    page.get_by_role("link", name="Rollouts").click()
    page.wait_for_function("() => document.querySelectorAll('.group').length === 4")
    page.locator(".group").first.click()
    page.wait_for_selector(".answer .t")
    assert "owned" not in page.title()


def test_a_run_of_a_hundred_thousand_steps_is_drawn(watched: WatchedPage, tmp_path: Path) -> None:
    row = json.dumps(step_row(0))
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        for step in range(1, 100_001):
            file.write(row.replace('"step": 0', f'"step": {step}', 1) + "\n")
    page = watched.page
    with served(tmp_path) as server:
        page.goto(server.url)
        page.wait_for_selector("figure[data-chart=Reward] canvas")
        reward = drawn(page, "Reward")
        assert reward["steps"][-1] > 99_900
        assert len(reward["steps"]) <= 1600
        assert "one of 32 steps is drawn" in page.locator(".note").first.inner_text()
