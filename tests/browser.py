"""The page of `msad export --format web` in headless Chromium. `python tests/browser.py` draws nbs/images/page.png."""

import contextlib
import io
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from msad.deploy.export import ExportSettings, export
from msad.deploy.web import make_server

ROOT = Path(__file__).resolve().parents[1]
PHOTOGRAPHS = sorted((ROOT / "data/trees/val2017").glob("*.jpg"))
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--use-fake-device-for-media-stream",
)


@contextlib.contextmanager
def browser(*flags: str) -> Iterator:
    "Start Chromium with a fresh profile; its frames of the camera are drawn."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, *flags])
        yield chromium
        chromium.close()


@contextlib.contextmanager
def served(server) -> Iterator[str]:
    "Run a server in the background; its address."
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def open_page(page, address: str) -> None:
    "Load the page and wait for the network."
    page.goto(address)
    page.wait_for_selector("#choose:enabled", timeout=300_000)


def give(page, files: list) -> None:
    "Choose files and wait until all are answered, by a thumbnail or a sentence."
    answered = "document.querySelectorAll('#strip button, #problems li').length"
    before = page.evaluate("document.querySelectorAll('#strip button').length")
    page.set_input_files("#files", files)
    page.wait_for_function(f"{answered} == {before + len(files)}", timeout=300_000)
    page.wait_for_selector("#progress", state="hidden")


def set_score(page, score: float) -> None:
    "Move the threshold."
    page.evaluate("score => { const s = document.getElementById('score'); s.value = score; s.oninput(); }", score)


def draw_picture(path: Path) -> None:
    "Draw the page with five photographs."
    with tempfile.TemporaryDirectory() as folder, browser() as chromium:
        export(ExportSettings(format="web", out=f"{folder}/page"))
        with served(make_server(f"{folder}/page")) as address:
            page = chromium.new_page(viewport={"width": 940, "height": 600})
            open_page(page, address)
            give(page, PHOTOGRAPHS[:5])
            page.click("#strip button:nth-child(5)")
            picture = Image.open(io.BytesIO(page.screenshot(full_page=True)))
    picture.convert("RGB").quantize(200).save(path, optimize=True)


if __name__ == "__main__":
    draw_picture(ROOT / "nbs/images/page.png")
