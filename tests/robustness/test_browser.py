"""The dashboard's page in a real browser: every window is drawn, and the page has no errors.

Needs Debian's chromium, playwright, and visdom's page assets (tests/tools/visdom-assets.sh); skips without them. The
screenshot is kept in .cache/dashboard.png.
"""

import shutil
from pathlib import Path

import pytest

pytest.importorskip("visdom", reason="visdom is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from test_dashboard import TINY, WINDOWS, Server  # noqa: E402

import train  # noqa: E402
from aig import dashboard, runs  # noqa: E402

pytestmark = [pytest.mark.slow]
ROOT = Path(__file__).parent.parent.parent
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
PLOTS = len(WINDOWS) - 1  # all but the text


def assets():
    """Whether the installed visdom has the scripts that its page loads."""
    import visdom

    return (Path(visdom.__file__).parent / "static" / "version.built").exists()


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
@pytest.mark.skipif(not assets(), reason="visdom's page assets are missing: bash tests/tools/visdom-assets.sh")
def test_the_page_shows_every_window_without_errors(run, tmp_path):
    home = tmp_path / "visdom"
    home.mkdir()
    server = Server(home).start()
    try:
        command = [*TINY, *server.flags, "--save", tmp_path, "--expname", "seen", "--epochs", 3]
        assert run(train.main, *command)[::2] == (0, "")
        errors = []
        with playwright.sync_playwright() as play:
            browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
            page = browser.new_page(viewport={"width": 1560, "height": 1500})
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("response", lambda response: errors.append(response.url) if response.status >= 400 else None)
            page.goto(f"http://127.0.0.1:{server.port}/env/seen", wait_until="load", timeout=60_000)
            drawn = "n => document.querySelectorAll('.js-plotly-plot .plot-container').length >= n"
            page.wait_for_function(drawn, arg=PLOTS, timeout=60_000)
            page.wait_for_timeout(1000)  # the grid settles
            text = page.inner_text("body")
            screenshot = ROOT / ".cache" / "dashboard.png"
            screenshot.parent.mkdir(exist_ok=True)
            page.screenshot(path=screenshot)
            curves = page.locator(".js-plotly-plot .scatterlayer .trace").count()
            browser.close()
        assert errors == []
        assert "best top-1" in text
        shown = dashboard.windows_in(tmp_path / "seen", runs.read_records(tmp_path / "seen"))
        traces = [trace for window in shown.values() for trace in window["data"]]
        assert curves == sum(trace["type"] == "scatter" for trace in traces)
        assert screenshot.stat().st_size > 10_000
    finally:
        server.kill()
