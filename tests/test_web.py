"The page in headless Chromium: what it finds, what it answers, what it asks for, how fast it is."

import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import CHROMIUM, PHOTOGRAPHS, ROOT, browser, give, open_page, served, set_score
from conftest import write_coco
from PIL import Image

from msad.data.images import resize
from msad.deploy.export import ExportSettings, export
from msad.deploy.predictor import Predictor
from msad.deploy.web import INTEGRITY, PACKED, make_server, read_runtime
from msad.engine.weights import save_model
from msad.models.detector import ModelConfig, build_model

pytestmark = pytest.mark.slow
RATIO = 4  # of the milliseconds of the page and of ONNX Runtime in Python, with as many threads


@pytest.fixture(scope="module")
def runtime():
    "Skip where the package can neither be fetched nor is in the cache."
    try: return read_runtime()
    except ValueError as error: pytest.skip(f"onnxruntime-web is not there: {error}")


@pytest.fixture(scope="module")
def chromium():
    "A browser that lets pages use its camera, which is not a real one."
    pytest.importorskip("playwright", reason="playwright drives the browser")
    if not CHROMIUM: pytest.skip("no Chromium: apt-get install chromium")
    with browser("--use-fake-ui-for-media-stream") as started: yield started


@pytest.fixture(scope="module")
def folder(runtime, tmp_path_factory):
    "The page of the bundled student."
    return export(ExportSettings(format="web", out=str(tmp_path_factory.mktemp("web") / "page"), num_images=2))


@pytest.fixture(scope="module")
def address(folder):
    with served(make_server(folder)) as where: yield where


@pytest.fixture
def page(chromium, address):
    "The page, loaded; errors of its code fail the test."
    context, errors = chromium.new_context(permissions=["clipboard-read", "clipboard-write"]), []
    opened = context.new_page()
    opened.on("pageerror", lambda error: errors.append(error))
    open_page(opened, address)
    yield opened
    context.close()
    assert errors == []


def copied(page):
    "What the button copies."
    page.click("#copy")
    page.wait_for_function("document.getElementById('copy').textContent == 'Copied'")
    return json.loads(page.evaluate("navigator.clipboard.readText()"))


def check_found(coco, photographs, model, least):
    "Compare the copied JSON with what the predictor finds."
    assert [image["file_name"] for image in coco["images"]] == [Path(path).name for path in photographs]
    for image, found in zip(coco["images"], Predictor(model, threads=1)(photographs), strict=True):
        found, theirs = found.above(least), [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        assert (image["height"], image["width"]) == tuple(found.size) and len(theirs) == len(found["scores"]) > 0
        corners = torch.tensor([a["bbox"] for a in theirs])
        corners[:, 2:] += corners[:, :2]
        torch.testing.assert_close(corners, found["boxes"], atol=0.5, rtol=0)
        torch.testing.assert_close(torch.tensor([a["score"] for a in theirs]), found["scores"], atol=1e-3, rtol=0)
        ids = {category["id"]: category["name"] for category in coco["categories"]}
        assert [ids[a["category_id"]] for a in theirs] == found["names"]


def test_it_finds_what_the_predictor_finds(page):
    give(page, PHOTOGRAPHS[:5])
    for least in (0.3, 0.5):
        set_score(page, least)
        check_found(copied(page), PHOTOGRAPHS[:5], "trees", least)
    assert page.inner_text("#count").endswith("× tree") and " ms" in page.inner_text("#total")


@pytest.mark.parametrize(
    ("size", "to", "step"), [((256, 256), (192, 192), 2), ((97, 131), (192, 259), 1), ((700, 511), (97, 71), 2)]
)
def test_it_resizes_as_pytorch(page, size, to, step):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, *size), np.uint8))
    rgba = torch.cat([pixels, pixels.new_full((1, *size), 255)]).permute(1, 2, 0)
    theirs = page.evaluate(
        """async ([rgba, size, to, step]) => {
          const { Resizer } = await import("./resize.js");
          const resizer = new Resizer(size, to, step);
          for (let i = 0; i < rgba.length; i += 4 * 50 * size[1]) resizer.add(rgba.slice(i, i + 4 * 50 * size[1]));
          return [...resizer.finish()];
        }""",
        [rgba.flatten().tolist(), size, to, step],
    )
    ours = resize(pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1), to)[:, ::step, ::step]
    assert theirs == ours.flatten().tolist()


def test_upright_phone_photographs_and_other_kinds(page, tmp_path):
    picture, turned = Image.open(PHOTOGRAPHS[3]).convert("RGB").resize((300, 200)), Image.Exif()
    turned[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=turned, quality=95)
    picture.convert("L").save(tmp_path / "grey.png")
    picture.save(tmp_path / "lossless.webp", lossless=True)
    files = [tmp_path / name for name in ("turned.jpg", "grey.png", "lossless.webp")]
    give(page, files)
    set_score(page, 0.3)
    check_found(copied(page), files, "trees", 0.3)


def test_what_is_no_photograph_is_answered_with_a_sentence(page, tmp_path):
    content = PHOTOGRAPHS[0].read_bytes()
    (tmp_path / "notes.txt").write_text("no photograph")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "broken.jpg").write_bytes(content[:20] + bytes(len(content)))
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    Image.new("RGB", (12_000, 9_000), "green").save(tmp_path / "large.jpg")
    files = [tmp_path / name for name in ("notes.txt", "empty.jpg", "broken.jpg", "cut.jpg", "large.jpg")]
    give(page, [*files, PHOTOGRAPHS[0]])
    damaged = "does not decode: the file is damaged or cut off, so choose another copy."
    assert [item.splitlines()[0] for item in page.locator("#problems li").all_inner_texts()] == [
        "notes.txt is no photograph: choose a JPEG, PNG or WebP file.",
        "empty.jpg is no photograph: choose a JPEG, PNG or WebP file.",
        f"broken.jpg {damaged}",
        f"cut.jpg {damaged}",
        "large.jpg has 12,000 × 9,000 pixels and this page takes 10,000 a side: "
        'cut it into parts, or use "msad predict".',
    ]
    assert page.locator("#strip button").count() == 1  # the good one
    page.click("#problems li:first-child button")
    assert page.locator("#problems li").count() == 4
    give(page, [PHOTOGRAPHS[1]])
    assert page.locator("#problems li").count() == 0


def test_threshold_keyboard_and_drop(page):
    give(page, PHOTOGRAPHS[:2])
    set_score(page, 0.05)
    many = page.locator(".box").count()
    page.focus("#score")
    for _ in range(40): page.keyboard.press("ArrowRight")
    assert page.inner_text("#least") == "0.45" and 0 < page.locator(".box").count() < many
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("ArrowRight")
    assert PHOTOGRAPHS[1].name in page.inner_text("#caption")
    data = page.evaluate_handle(
        """bytes => { const data = new DataTransfer();
          data.items.add(new File([new Uint8Array(bytes)], "dropped.jpg", { type: "image/jpeg" })); return data; }""",
        list(PHOTOGRAPHS[2].read_bytes()),
    )
    page.dispatch_event("#stage", "drop", {"dataTransfer": data})
    page.wait_for_selector("#strip button[aria-label='dropped.jpg']")


def test_it_asks_nobody_else(chromium, address):
    context, asked = chromium.new_context(), []
    context.on("request", lambda request: asked.append(request.url.removeprefix("blob:")))
    page = context.new_page()
    open_page(page, address)
    give(page, PHOTOGRAPHS[:1])
    context.close()
    assert len(asked) > 8 and [url for url in asked if not url.startswith((address, "data:"))] == []


def test_the_camera(page):
    page.click("#camera")
    page.wait_for_function("document.getElementById('network').textContent.endsWith('ms')", timeout=300_000)
    assert page.inner_text("#camera") == "Stop the camera" and page.inner_text("#caption") == "Camera"
    assert copied(page)["images"][0]["file_name"] == "camera"
    page.click("#camera")
    assert page.is_visible("#empty") and page.inner_text("#camera") == "Use the camera"


def test_a_refused_camera_is_a_sentence(address, chromium):
    context = chromium.new_context()
    context.add_init_script(
        "navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('', window.refusal); }"
    )
    page = context.new_page()
    open_page(page, address)
    for name, sentence in (("NotAllowedError", "The camera was refused"), ("NotFoundError", "There is no camera")):
        page.evaluate("name => { window.refusal = name; }", name)
        page.click("#camera")
        page.wait_for_function(f"document.getElementById('problems').textContent.includes('{sentence}')")
    context.close()


def test_several_classes_in_eight_bits(runtime, chromium, tmp_path):
    torch.manual_seed(0)
    model = build_model(ModelConfig("teacher", 0.25, ("pine", "oak"), (7, 90), 32, 1, short_side=96, max_side=160))
    torch.nn.init.constant_(model.head.cls_logits.bias, -1.5)
    torch.nn.init.normal_(model.head.cls_logits.weight, std=0.3)
    save_model(tmp_path / "forest.pth", model)
    for split in ("train2017", "val2017"): write_coco(tmp_path / "data", split, size=(150, 110))
    asked = dict(model=str(tmp_path / "forest.pth"), data=str(tmp_path / "data"), compare=False, num_images=2)
    for precision in ("fp32", "int8"):
        made = export(ExportSettings(**asked, format="web", precision=precision, out=str(tmp_path / precision)))
        with served(make_server(made)) as where:
            context = chromium.new_context(permissions=["clipboard-read", "clipboard-write"])
            page = context.new_page()
            open_page(page, where)
            pictures = sorted((tmp_path / "data/val2017").iterdir())[:2]
            give(page, pictures)
            set_score(page, 0.3)
            everything = copied(page)
            if precision == "fp32": check_found(everything, pictures, made / "model.onnx", 0.3)
            assert {annotation["category_id"] for annotation in everything["annotations"]} == {7, 90}
            assert page.inner_text("#title") == "forest" and precision in page.inner_text("#model")
            page.uncheck("#names li:nth-child(1) input")
            assert {annotation["category_id"] for annotation in copied(page)["annotations"]} == {90}
            page.click("#none")
            assert copied(page)["annotations"] == [] and page.inner_text("#count") == "0 detections"
            context.close()


class Plain(http.server.SimpleHTTPRequestHandler):
    "As `python -m http.server` answers."

    def log_message(self, *args): pass


@pytest.fixture(scope="module")
def demo_folder(runtime, tmp_path_factory):
    "The page of a student as `make demo` builds it, without what it learned."
    root = tmp_path_factory.mktemp("demo")
    config = ModelConfig("student", 0.25, ("tree",), (1,), 64, 1, short_side=192, max_side=320)
    save_model(root / "demo.pth", build_model(config).eval())
    asked = dict(model=str(root / "demo.pth"), data="trees", num_images=2)
    return export(ExportSettings(format="web", out=str(root / "page"), **asked))


SLOW = pytest.mark.xfail(reason="WebAssembly is slow at depthwise convolutions: 4 to 5 times as long", strict=False)


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("student", ["demo_folder", pytest.param("folder", marks=SLOW)])
def test_milliseconds(student, chromium, isolated, request):
    "Page and Python take turns; the shortest times are compared, since other programs may run."
    if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1: pytest.skip("other tests run beside: run it alone")
    folder = request.getfixturevalue(student)
    plain = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Plain, directory=str(folder)))
    with served(make_server(folder) if isolated else plain) as where:
        page = chromium.new_page()
        open_page(page, where)
        threads = int(page.inner_text("#threads").split()[0])
        assert threads == (min(os.cpu_count(), 4) if isolated else 1)
        assert ("does not send the headers" in page.inner_text("#threads")) != isolated
        ours, theirs = [], []
        predictor, picture = Predictor(folder / "model.onnx", threads=threads), Image.open(PHOTOGRAPHS[0])
        size = (predictor.model.config.short_side,) * 2
        view = predictor.model.own_view(resize(torch.from_numpy(np.array(picture)).permute(2, 0, 1), size))
        for _ in range(60):
            give(page, PHOTOGRAPHS[:1])
            page.click("#strip button:last-child")
            theirs.append(float(page.inner_text("#network").split()[0]))
            started = time.perf_counter()
            predictor.model.run(view[None].numpy())
            ours.append(1e3 * (time.perf_counter() - started))
        page.close()
    ratio = min(theirs) / min(ours)
    print(f"{student}, threads {threads}: page {min(theirs):.1f} ms, Python {min(ours):.1f}, {ratio:.1f} times")
    assert ratio < RATIO


def test_below_a_cell_in_jupyterlab(folder, chromium, tmp_path):
    place = tmp_path / "a folder"
    place.mkdir()
    shutil.copytree(folder, place / "page")
    code = {"cell_type": "code", "id": "a", "metadata": {}, "outputs": [], "execution_count": None}
    code["source"] = "from msad.deploy.web import show_page\nshow_page('page')"
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    notebook = {"cells": [code], "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    (place / "shown.ipynb").write_text(json.dumps(notebook))
    log = tmp_path / "log.txt"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.root_dir={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JUPYTER_CONFIG_DIR": str(tmp_path / "config")}
    with open(log, "w") as out:
        server = subprocess.Popen([*command, "--port=0"], stdout=out, stderr=out, env=environment)
    try:
        lines = []
        for _ in range(300):
            lines = [line for line in log.read_text().splitlines() if "http://127.0.0.1:" in line and "token=" in line]
            if lines or server.poll() is not None: break
            time.sleep(1)
        assert lines, log.read_text()
        root, token = lines[0].split("http://")[1].split("/lab?token=")
        page = chromium.new_page(viewport={"width": 1300, "height": 1100})
        page.goto(f"http://{root}/lab/tree/a%20folder/shown.ipynb?token={token.strip()}")
        cell = page.locator(".jp-Notebook .jp-CodeCell").first
        for _ in range(30):  # what is run before the kernel is connected is lost
            cell.locator(".cm-content").click(timeout=300_000)
            page.keyboard.press("Shift+Enter")
            page.wait_for_timeout(3000)
            if cell.locator(".jp-InputPrompt").inner_text() != "[ ]:": break
        frame = page.wait_for_selector(".jp-OutputArea iframe", timeout=300_000).content_frame()
        frame.wait_for_selector("#choose:enabled", timeout=300_000)
        give(frame, PHOTOGRAPHS[:2])
        assert frame.locator(".box").count() > 0
        page.close()
    finally:
        server.terminate()
        server.wait(60)


def test_the_package_is_the_pinned_one(runtime, tmp_path):
    assert len(runtime) > 10e6 and INTEGRITY.startswith("sha512-")
    (tmp_path / "packed.tgz").write_bytes(runtime)
    assert read_runtime(str(tmp_path / "packed.tgz")) == runtime
    (tmp_path / "packed.tgz").write_bytes(runtime[:-1])
    with pytest.raises(ValueError, match=f"is another file than onnxruntime-web .*{PACKED}"):
        read_runtime(str(tmp_path / "packed.tgz"))


def test_other_files_of_a_folder_are_left_alone(runtime, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="which holds other files: give a new folder"):
        export(ExportSettings(format="web", out=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    for _ in range(2): export(ExportSettings(format="web", out=str(tmp_path / "page"), num_images=1))  # replaced
