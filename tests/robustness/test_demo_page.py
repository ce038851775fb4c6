"""The demo page in a real browser: images, slider, what is no image; nothing is asked of another machine.

Needs gradio, Debian's chromium and playwright; skips without them. Screenshots are kept in .cache.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

import aig  # noqa: E402
from aig import demo  # noqa: E402
from aig.inference import count_macs  # noqa: E402

pytestmark = [
    pytest.mark.slow, pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")]
ROOT = Path(__file__).parent.parent.parent
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
PATIENCE = 60_000  # milliseconds


@contextmanager
def serving(folder, *argv):
    """The address of the page. The command is started from elsewhere, with nothing but its own folder on the path."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "aig.demo", *map(str, argv)]
    with (folder / "err").open("w") as errors, subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
    ) as process:
        started = time.monotonic()
        found = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
        assert found, (folder / "err").read_text()
        print(f"the page was there after {time.monotonic() - started:.1f} s")
        yield found[0]
        process.terminate()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("demo")) as address:
        yield address


@pytest.fixture
def opened(server):
    """Opens the page at a width, and checks at the end that it asked nobody else and had no errors."""
    asked, errors = [], []
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)

        def call(width=1280, server=server):
            page = browser.new_page(viewport={"width": width, "height": 1000})
            page.on("request", lambda request: asked.append(request.url))
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(server, wait_until="load", timeout=PATIENCE)
            page.wait_for_selector("#right-graph .block", timeout=PATIENCE)
            return page

        yield call
        browser.close()
    assert errors == []
    assert [url for url in asked if not url.startswith((server, "data:", "blob:"))] == []


def upload(page, side, path, shows):
    page.locator(f"#{side} button[aria-label='Remove Image']").click()
    page.locator(f"#{side}-graph").get_by_text("Choose an image").wait_for(timeout=PATIENCE)
    page.locator(f"#{side} input[type=file]").set_input_files(path)
    page.locator(f"#{side}-graph").get_by_text(shows).first.wait_for(timeout=PATIENCE)


def test_what_it_shows_is_what_the_network_does(opened):
    page, model = opened(), aig.load(demo.RELEASED)
    cost = count_macs(model, 32)
    for side, name in (("left", "truck"), ("right", "dog")):
        seen = demo.look(model, cost, demo.EXAMPLES / f"{name}.jpg", 0.5)
        text = page.inner_text(f"#{side}-graph")
        assert f"{sum(seen.opened)} of 9 blocks; {seen.macs / 1e6:.2f} MMACs" in text
        assert f"{100 * seen.probabilities[name]:.1f} %" in text
        assert page.locator(f"#{side}-graph .ran").count() == sum(seen.opened)
        assert re.search(rf"mean of test images of class {name} at 0\.5\s+\d+\.\d %", text)


@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_the_screen(opened, width):
    page = opened(width)
    page.wait_for_timeout(500)
    screenshot = ROOT / ".cache" / f"demo-{width}.png"
    screenshot.parent.mkdir(exist_ok=True)
    page.screenshot(path=screenshot, full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    left, right = (page.locator(f"#{side}").bounding_box() for side in ("left", "right"))
    assert (left["y"] == right["y"]) == (width == 1280)  # side by side, or below each other


def test_the_slider_redraws(opened):
    page = opened()
    seconds = []
    for threshold in ("0.1", "0.9", "0.1", "0.8", "0.1"):
        before = page.inner_text("#left-graph")
        started = time.monotonic()
        page.locator("#threshold input[type=number]").fill(threshold)
        page.locator("#threshold input[type=number]").press("Enter")
        changed = "t => document.querySelector('#left-graph').innerText != t"
        page.wait_for_function(changed, arg=before, timeout=PATIENCE)
        seconds.append(time.monotonic() - started)
    print(f"from slider to picture: {sorted(seconds)[2]:.3f} s (median of 5)")
    model = aig.load(demo.RELEASED)
    for side, name in (("left", "truck"), ("right", "dog")):
        seen = demo.look(model, count_macs(model, 32), demo.EXAMPLES / f"{name}.jpg", 0.1)
        page.locator(f"#{side}-graph").get_by_text(f"{sum(seen.opened)} of 9 blocks").wait_for(timeout=PATIENCE)


def test_an_upload_is_shown_and_what_is_no_image_is_said(opened, tmp_path):
    page = opened()
    Image.new("RGB", (300, 200), (120, 180, 240)).save(tmp_path / "sky.png")
    upload(page, "left", tmp_path / "sky.png", "MMACs")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 this is no image")
    upload(page, "left", tmp_path / "broken.jpg", "cannot read the image broken.jpg")
    assert str(tmp_path) not in page.content()
    Image.new("L", (20_000, 20_000)).save(tmp_path / "huge.png")  # Pillow takes it for an attack
    upload(page, "left", tmp_path / "huge.png", "cannot read the image huge.png")
    Image.new("L", (9_000, 9_000), 200).save(tmp_path / "large.png")
    upload(page, "left", tmp_path / "large.png", "MMACs")
    assert "MMACs" in page.inner_text("#right-graph")


def test_thresholds_of_its_own_are_shown_until_the_slider_is_to_decide(tmp_path):
    model = aig.load(demo.RELEASED)
    model.threshold = [0.001] * 9
    aig.save(model, tmp_path / "model")
    dog, cost = demo.EXAMPLES / "dog.jpg", count_macs(model, 32)
    own, usual = (sum(demo.look(model, cost, dog, threshold).opened) for threshold in (model.threshold, 0.5))
    assert own != usual
    with serving(tmp_path, tmp_path / "model") as address, playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page()
        page.goto(address, wait_until="load", timeout=PATIENCE)
        page.locator("#right-graph").get_by_text(f"{own} of 9 blocks").wait_for(timeout=PATIENCE)
        page.get_by_label("the network's own threshold").uncheck()
        page.locator("#right-graph").get_by_text(f"{usual} of 9 blocks").wait_for(timeout=PATIENCE)
        browser.close()


def test_a_path_that_was_not_uploaded_is_not_read(server):
    """As another program on this machine might send it, past Gradio's own check."""
    with urlopen(f"{server}config") as answer:
        config = json.load(answer)
    numbers = [each["id"] for each in config["dependencies"] if len(each["inputs"]) == 3]
    assert len(numbers) == 2
    for number in numbers[:1]:
        data = {"data": [{"path": "/etc/passwd"}, 0.5, False], "fn_index": number, "session_hash": "abc"}
        kind = {"Content-Type": "application/json"}
        request = Request(f"{server}gradio_api/queue/join", json.dumps(data).encode(), kind)
        with urlopen(request) as answer:
            assert answer.status == 200
        with urlopen(f"{server}gradio_api/queue/data?session_hash=abc", timeout=30) as answer:
            said = b""
            while b"process_completed" not in said:
                said += answer.readline()
        assert b"Choose an image" in said


def test_an_example_is_shown(opened):
    page = opened()
    page.locator("button.thumbnail-item, .gallery-item").last.click()
    page.locator("#right-graph").get_by_text("test images of class truck").wait_for(timeout=PATIENCE)
