"""The audit's report in a real browser: on a phone and on a desk, light and dark, on paper, without JavaScript."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from report_document import HOSTILE, LONG, document
from unmergeable.audit.report import render

pytestmark = pytest.mark.browser

NAMES = ("chromium", "chromium-browser", "google-chrome")
PHONE, DESK = {"width": 400, "height": 800}, {"width": 1280, "height": 900}
# The least width at which tables no longer scroll in frames of their own.
OPEN = {"width": 1408, "height": 900}
# What is left of A4 between the margins, in CSS pixels: upright, and across for wide tables.
UPRIGHT, ACROSS = {"width": 688, "height": 1000}, {"width": 1032, "height": 700}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.fail("these tests need Chromium: install it (Debian: apt-get install chromium)", pytrace=False)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("these tests need playwright: pip install '.[browser]'", pytrace=False)
    # Chromium's sandbox refuses to run as root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=arguments)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return document()


@pytest.fixture(scope="module")
def reports(found: dict[str, Any], tmp_path_factory: Any) -> dict[str, str]:
    """Addresses of reports: of an ordinary audit, and of one with names that nobody would want."""
    folder = tmp_path_factory.mktemp("report")
    documents = {"plain": found, "hostile": document(name=HOSTILE + LONG, task=HOSTILE + LONG)}
    for name, one in documents.items():
        (folder / f"{name}.html").write_text(render(one), encoding="utf-8")
    return {name: (folder / f"{name}.html").as_uri() for name in documents}


@pytest.fixture(scope="module")
def report(reports: dict[str, str]) -> str:
    return reports["plain"]


def unfolded(page: Any) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")


@pytest.mark.parametrize(
    ("name", "size", "scheme"),
    [
        ("plain", PHONE, "light"),
        ("plain", PHONE, "dark"),
        ("plain", DESK, "light"),
        ("plain", DESK, "dark"),
        ("plain", OPEN, "light"),
        ("hostile", PHONE, "light"),
    ],
)
def test_fits_passes_axe_and_asks_for_nothing(
    browser: Any, reports: dict[str, str], name: str, size: Any, scheme: str, tmp_path: Path
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    asked, said = [], []
    report = reports[name]
    page = browser.new_page(viewport=size, color_scheme=scheme)
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(report)
    page.screenshot(path=tmp_path / f"{scheme}-{size['width']}.png", full_page=True)
    unfolded(page)
    wide = page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]")
    assert max(wide) <= size["width"]
    outside = page.evaluate(
        """[...document.querySelectorAll('main *')].filter(one => !one.closest('.frame, svg')
             && one.getBoundingClientRect().right > innerWidth + 0.5).map(one => one.outerHTML.slice(0, 120))"""
    )
    assert outside == []  # nor is anything cut off
    assert [url for url in asked if url != report and not url.startswith("data:")] == []
    assert said == []
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(part) for part in ground[4:-1].split(",")) < 150) == (scheme == "dark")
    result = Axe().run(page)
    assert result.violations_count == 0, result.generate_report()
    assert len(result.response["passes"]) > 20  # it did look
    page.close()


def test_everything_is_there_without_javascript(browser: Any, report: str, found: dict[str, Any]) -> None:
    context = browser.new_context(java_script_enabled=False, viewport=PHONE)
    page = context.new_page()
    page.goto(report)
    text = " ".join(
        page.locator("body").inner_text().split()
    )  # what can be seen: nothing that is folded away
    for level in found["levels"]:
        assert f"Level {level['level']} ({level['name']})" in text
    for row in found["rows"]:
        if row["side"] == "protected":
            assert row["attack"] in text
            assert row["reason"] is None or row["reason"] in text
    page.get_by_text("The points of the curve").click()
    assert page.get_by_text("Mean gain over the floors").is_visible()
    context.close()


def test_the_keyboard_reaches_wide_tables(browser: Any, report: str) -> None:
    page = browser.new_page(viewport=PHONE)
    page.goto(report)
    frame = page.locator(".frame:has(table.attacks)").first
    frame.focus()
    before = frame.evaluate("one => one.scrollLeft")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("one => one.scrollLeft > 0", arg=frame.element_handle())
    assert before == 0
    page.close()


@pytest.mark.parametrize("name", ["plain", "hostile"])
def test_paper(browser: Any, reports: dict[str, str], name: str, tmp_path: Path) -> None:
    page = browser.new_page(viewport=ACROSS, color_scheme="dark")
    page.goto(reports[name])
    page.emulate_media(media="print", color_scheme="dark")
    ink, heat = page.evaluate(
        "['body', '.heat td.best'].map(one => getComputedStyle(document.querySelector(one)).color)"
    )
    assert ink == heat == "rgb(27, 31, 38)"  # light, whatever the screen is
    folded = "[...document.querySelectorAll('details .frame')].map(one => one.getBoundingClientRect().height)"
    assert min(page.evaluate(folded)) > 50
    cut = """[...document.querySelectorAll('.frame')].filter(one => one.scrollWidth > one.clientWidth + 1
             && (!upright || !one.querySelector('.wide'))).map(one => one.getAttribute('aria-label'))"""
    assert page.evaluate(f"() => {{ const upright = false; return {cut} }}") == []
    page.set_viewport_size(UPRIGHT)
    assert page.evaluate(f"() => {{ const upright = true; return {cut} }}") == []
    written = page.pdf(path=tmp_path / "report.pdf", prefer_css_page_size=True)
    assert written.startswith(b"%PDF")
    assert written.count(b"/Type /Page\n") >= 8
    page.close()
