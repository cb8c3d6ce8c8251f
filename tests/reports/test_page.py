"""The page is looked at in a real browser: it draws, says what it must, and asks for nothing."""

import os
import shutil
from dataclasses import replace

import pytest

from laconic.reports import page


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium from the system's packages."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        message = "no chromium on this machine (Debian: apt-get install chromium)"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        held = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield held
        held.close()


@pytest.mark.browser
def test_opens_offline_without_errors(result, browser, tmp_path):
    file = page.write(result, tmp_path / "report.html")
    tab = browser.new_page()
    complaints, asked = [], []
    tab.on(
        "console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None
    )
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(file.as_uri())
    tab.wait_for_selector("#chart-latency .bars path")
    for chart in ("chart-candidates", "chart-macs", "chart-bytes"):
        assert tab.locator(f"#{chart} svg").count() > 0, chart
    shown = tab.inner_text("main")
    tab.screenshot(path=str(tmp_path / "report.png"), full_page=True)
    tab.close()
    assert complaints == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert "tiny </script> net" in shown
    for piece in ("4.00x faster", "10.00x smaller", "-0.20 %", "three quarters", "provenance"):
        assert piece.lower() in shown.lower(), piece
    assert "undone: int8 was not faster than bf16" in shown


def test_the_page_needs_no_other_file(result):
    text = page.render(result, "/* script */")
    assert 'src="' not in text
    assert 'href="http' not in text
    assert "<head> is frozen" not in text  # notes are escaped
    assert "&lt;head&gt; is frozen: it is an output" in text  # and stand in the page
    assert "&lt;head&gt; is frozen" in text


def test_figures_of_steps_are_told(result):
    history = [{"step": n, "divergence": 0.25 / (n + 1), "score": None} for n in range(60)]
    figures = {"best_step": 7, "bound": 0.29999, "limits": [0.5, -1.0], "history": history}
    step = replace(result.steps[0], figures=figures)
    text = page.render(replace(result, steps=[step]), "")
    for piece in ("best_step: 7", "bound: 0.3", "limits: 0.5, -1", "divergence", "0.125",
                  "the first 50 of 60"):  # fmt: skip
        assert piece in text, piece
