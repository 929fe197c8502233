"Pictures of every kind through detectors of every kind, as files and from memory, readable and damaged."

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from filelock import FileLock
from golden.golden import load_case
from PIL import Image
from test_notebooks import papermill, texts
from torchvision import tv_tensors

from msad.data.annotations import read_annotations
from msad.data.images import read_image
from msad.data.transforms import EvalTransform
from msad.data.windows import has_place, has_rasterio
from msad.deploy.export import ExportSettings
from msad.deploy.predict import PredictSettings, image_files, predict, results_text
from msad.deploy.predictor import BATCH_SIZE, Prediction, Predictor
from msad.deploy.winograd import WinogradConv
from msad.engine.weights import save_model
from msad.evaluation.coco_metrics import evaluate_coco
from msad.evaluation.inference import scale_back
from msad.models.detector import ModelConfig, build_model
from msad.models.transform import CAFFE

SIZES = {"short_side": 64, "max_side": 101, "neck_channels": 64, "head_convs": 1}


def save_detector(path, role="student", bias=0.0, **changes):
    "Write an untrained detector; with a bias of 0 it sees something everywhere, with -99 nothing."
    torch.manual_seed(0)
    model = build_model(ModelConfig(role, 0.25, ("ash", "oak"), (7, 90), **SIZES, **changes)).eval()
    with torch.no_grad():  # scores that differ, and boxes that reach out of the picture
        model.head.cls_logits.weight.mul_(30)
        model.head.cls_logits.bias.fill_(bias)
        model.head.bbox_pred.weight.mul_(30)
    save_model(path, model)
    return model


def noise(height, width, seed=0):
    "A smooth random picture, H×W×3."
    small = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with the file of a student."
    folder = tmp_path_factory.mktemp("predict")
    save_detector(folder / "student.pth")
    return folder


@pytest.fixture(scope="module")
def student(place):
    return Predictor(place / "student.pth")


@pytest.fixture
def album(tmp_path):
    "A folder with three photographs and three files that are none."
    folder = tmp_path / "album"
    folder.mkdir()
    for seed, name in enumerate(("a.jpg", "a.png", "b.jpg")): Image.fromarray(noise(60, 80, seed)).save(folder / name)
    content = (folder / "b.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(content[: len(content) * 3 // 4])
    (folder / "text.JPG").write_text("no image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.txt").write_text("not even called an image")
    return folder


def settings(album, place, out, **changes):
    "Settings of a prediction for `album` with the student of `place`."
    return PredictSettings(**{"images": str(album), "model": str(place / "student.pth"), "out": str(out), **changes})


def same(one, other, pixels=0.01, score=1e-4):
    "Two predictions agree."
    assert one["labels"].tolist() == other["labels"].tolist() and len(one["labels"]) > 0
    assert (one["boxes"] - other["boxes"]).abs().max() < pixels
    assert (one["scores"] - other["scores"]).abs().max() < score


# --- the same as the plain model


@pytest.mark.parametrize("role", ("teacher", "student"))
@pytest.mark.parametrize("pad", (None, 256))
@pytest.mark.parametrize("normalization", ({}, {"normalization": CAFFE}), ids=("imagenet", "caffe"))
def test_equals_the_plain_model(tmp_path, role, pad, normalization):
    model = save_detector(tmp_path / "model.pth", role, bias=-2.5, **normalization)
    if pad: model.transform.pad = pad
    sizes = [(61, 83), (83, 61), (64, 64), (30, 200), (255, 254)] * 2 + [(65, 99)]
    photographs = [Image.fromarray(noise(*size, seed)) for seed, size in enumerate(sizes)]
    assert len(photographs) > BATCH_SIZE
    for photograph, found in zip(photographs, Predictor(tmp_path / "model.pth", pad=pad)(photographs), strict=True):
        none = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=found.size)
        view, _ = EvalTransform(64, 101)(photograph, {"boxes": none, "size": found.size})
        with torch.no_grad(): (plain,) = model([view])
        same(found, scale_back(plain, tuple(view.shape[-2:]), (photograph.height, photograph.width)))


def test_a_wide_head_in_its_fast_form_equals_the_plain_model(tmp_path):
    torch.manual_seed(0)
    config = ModelConfig("student", 0.25, ("ash", "oak"), (7, 90), 128, 2, 400, 666)
    model = build_model(config).eval()
    torch.nn.init.normal_(model.head.bbox_pred.weight, std=0.3)
    torch.nn.init.normal_(model.head.cls_logits.weight, std=0.3)
    save_model(tmp_path / "model.pth", model)
    photographs = [Image.fromarray(noise(400, 500, seed)) for seed in range(3)]
    predictor = Predictor(tmp_path / "model.pth")
    assert any(isinstance(module, WinogradConv) for module in predictor.model.modules())
    for photograph, found in zip(photographs, predictor(photographs), strict=True):
        with torch.no_grad(): (plain,) = model([torch.tensor(np.asarray(photograph)).permute(2, 0, 1)])
        same(found, plain)


def test_reduced_decoding_gives_boxes_in_the_photographs_pixels(place, student, tmp_path):
    Image.fromarray(noise(512, 768)).save(tmp_path / "large.jpg", quality=95)
    reduced = Predictor(place / "student.pth", reduced_decoding=True)
    found, full = reduced(tmp_path / "large.jpg"), student(tmp_path / "large.jpg")
    assert found.size == full.size == (512, 768) and found["boxes"][:, 2].max() > 700
    assert abs(found["scores"][0] - full["scores"][0]) < 0.02
    (tmp_path / "half.jpg").write_bytes((tmp_path / "large.jpg").read_bytes()[:5000])
    with pytest.raises(ValueError, match="half.jpg does not decode"): reduced(tmp_path / "half.jpg")


def test_the_low_view_is_not_the_photograph_at_half_size(student):
    photograph = noise(128, 128)
    half = np.asarray(Image.fromarray(photograph).resize((32, 32), Image.Resampling.BILINEAR))
    with torch.no_grad(): (wrong,) = student.model([torch.tensor(half).permute(2, 0, 1)], view="low")
    found = student(photograph)
    assert len(found["scores"]) != len(wrong["scores"]) or not torch.equal(found["scores"], wrong["scores"])


@pytest.mark.parametrize("precision", ("bf16", "fp16"))
def test_lower_precision_finds_nearly_the_same(place, student, precision):
    photograph = noise(64, 64)
    best = Predictor(place / "student.pth", precision=precision)(photograph)
    assert best["boxes"].dtype == best["scores"].dtype == torch.float32
    assert abs(best["scores"][0] - student(photograph)["scores"][0]) < 0.02


def test_published_files_come_with_their_classes_and_padding(tmp_path):
    weights = load_case(str(Path(__file__).parent / "golden" / "cases" / "student_w0.25"))[0]
    torch.save({"model": weights}, tmp_path / "model_final.pth")
    predictor = Predictor(tmp_path)
    assert predictor.model.transform.pad == 256 and predictor.model.view == "low"
    found = predictor(noise(4, 200))
    assert found.size == (4, 200) and set(found["names"]) <= set(predictor.model.config.class_names)


# --- pictures of every kind


def test_files_of_every_kind(tmp_path, student):
    grey = Image.fromarray(noise(40, 60)).convert("L")
    pictures = {mode: grey.convert("RGB").convert(mode) for mode in ("RGB", "L", "1", "P", "LA", "RGBA", "CMYK")}
    pictures["16"] = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    paths = [tmp_path / ("CMYK.tif" if mode == "CMYK" else f"{mode}.png") for mode in pictures]
    for path, picture in zip(paths, pictures.values(), strict=True): picture.save(path)
    by_path = student(paths)
    opened = student([Image.open(path) for path in paths])
    pixels = student([np.asarray(read_image(path)) for path in paths])
    for path, *kinds in zip(paths, by_path, opened, pixels, strict=True):
        assert kinds[0].size == (40, 60), path.name
        for other in kinds[1:]: same(kinds[0], other, 1e-3, 1e-5)
    names = list(pictures)
    for name in ("L", "LA", "RGBA", "16"): same(by_path[names.index(name)], by_path[names.index("RGB")], 1e-3, 1e-5)


def test_tensors_are_pictures_too(student):
    batch = np.stack([noise(40, 60, 1), noise(40, 60, 2)])
    expected = student(list(batch))
    tensors = torch.tensor(batch).permute(0, 3, 1, 2)
    for many in (batch, tensors, tensors / 255, (tensors / 255).double(), iter(tensors), list(tensors)):
        for one, other in zip(student(many), expected, strict=True): same(one, other, 1e-3, 1e-5)
    same(student(tensors[0]), expected[0])
    same(student(batch[0][:, ::-1][:, ::-1]), expected[0])


def test_boxes_are_those_of_the_upright_picture(tmp_path, student):
    stored, exif = noise(40, 90), Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise for display
    Image.fromarray(stored).save(tmp_path / "turned.png", exif=exif)
    upright = student(np.rot90(stored, -1))
    for found in (student(tmp_path / "turned.png"), student(Image.open(tmp_path / "turned.png"))):
        assert found.size == (90, 40)
        same(found, upright)
    assert upright["boxes"][:, 3].max() > 45 and upright["boxes"][:, 2].max() <= 40


@pytest.mark.parametrize("ending", ("gif", "png", "webp"))
def test_the_first_picture_of_an_animation_counts(tmp_path, student, ending):
    first, second = (Image.fromarray(noise(40, 60, seed)) for seed in (1, 2))
    more = {"lossless": True} if ending == "webp" else {}
    first.save(tmp_path / f"a.{ending}", save_all=True, append_images=[second], duration=100, **more)
    alone = read_image(tmp_path / "a.gif") if ending == "gif" else first  # a GIF has a palette
    same(student(tmp_path / f"a.{ending}"), student(alone))


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 2)])
@pytest.mark.parametrize("role", ("teacher", "student"))
def test_pictures_of_odd_shape(tmp_path, role, size):
    save_detector(tmp_path / "model.pth", role)
    found = Predictor(tmp_path / "model.pth")(np.full((*size, 3), 99, dtype=np.uint8))
    boxes = found["boxes"]
    assert found.size == size and boxes.isfinite().all()
    assert (boxes >= 0).all() and (boxes[:, 0::2] <= size[1]).all() and (boxes[:, 1::2] <= size[0]).all()
    assert found._repr_jpeg_()[:2] == b"\xff\xd8"


def test_none_many_and_nothing_found(place):
    save_detector(place / "blind.pth", bias=-99.0)
    blind = Predictor(place / "blind.pth")
    assert blind([]) == [] and blind(np.zeros((0, 40, 40, 3), np.uint8)) == [] and list(blind.stream([])) == []
    found = blind(noise(40, 40))
    assert found["boxes"].shape == (0, 4) and found["names"] == [] and found.to_coco(3) == []
    assert repr(found) == "Prediction: 0 boxes" and found.above(0.5)["scores"].shape == (0,)
    assert found._repr_jpeg_()[:2] == b"\xff\xd8"
    assert isinstance(blind([noise(40, 40)]), list) and isinstance(found, Prediction)


# --- what is no picture


def test_files_that_do_not_decode(album, student):
    readable = album / "a.jpg"
    bad = [album / name for name in ("half.jpg", "text.JPG", "empty.png", "notes.txt", "nowhere.jpg", "..")]
    for path in bad:
        with pytest.raises((ValueError, FileNotFoundError)) as error: student([readable, path])
        message = str(error.value)
        assert str(path) in message and "leave it out" in message
        assert "\n" not in message and "annotation" not in message
    mixed = list(student.stream([*bad, readable, *bad, readable] * 2))
    assert [isinstance(found, Prediction) for found in mixed] == ([False] * 6 + [True] + [False] * 6 + [True]) * 2
    same(mixed[6], student(readable))
    half = Image.open(album / "half.jpg")
    with pytest.raises(ValueError, match=r"half\.jpg does not decode.*truncated"): student(half)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "NoneType is no picture"),
        (7, "int is no picture"),
        ([7], "int is no picture"),
        (np.zeros((4, 4), np.uint8), "an array is of uint8 and shape (4, 4)"),
        (np.zeros((4, 4, 4), np.uint8), "shape (4, 4, 4)"),
        (np.zeros((4, 4, 3)), "float64"),
        (torch.zeros(4, 4, 3), "a tensor is of torch.float32 and shape (4, 4, 3)"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "torch.int64"),
        (torch.full((3, 4, 4), 1.5), "outside 0 to 1"),
        (torch.full((3, 4, 4), float("nan")), "outside 0 to 1"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (Image.new("RGB", (4, 0)), "no pixels"),
        (Image.new("F", (4, 4)), "mode F does not decode"),
    ],
)
def test_what_is_no_picture(student, wrong, message):
    with pytest.raises(ValueError) as error: student(wrong)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"precision": "int8"}, 'precision is .int8.: choose "fp32", "bf16" or "fp16"'),
        ({"device": "gpu"}, 'device is .gpu.: choose "cpu" or "cuda"'),
        ({"device": f"cuda:{torch.cuda.device_count()}"}, "device is .cuda:[0-9]+. and this machine has"),
        ({"pad": 50}, "pad is 50: choose a multiple of 64"),
    ],
)
def test_wrong_settings(place, student, wrong, message):
    with pytest.raises(ValueError, match=message): Predictor(place / "student.pth", **wrong)


# --- files of results


def test_a_folder(album, place, student, capsys):
    out = album.parent / "out"
    assert predict(settings(album, place, out, min_score=0.2)) == out
    results = json.loads((out / "results.json").read_text())
    assert [image["file_name"] for image in results["images"]] == ["a.jpg", "a.png", "b.jpg"]
    assert {skipped["file_name"] for skipped in results["skipped"]} == {"half.jpg", "text.JPG", "empty.png"}
    pictures = sorted(path.name for path in (out / "pictures").iterdir())
    assert pictures == ["a.jpg.jpg", "a.png.jpg", "b.jpg.jpg"]
    for name in pictures: assert max(Image.open(out / "pictures" / name).size) == 1000
    assert sorted(path.name for path in out.iterdir()) == ["pictures", "results.json", "settings.json"]

    found = student(album / "a.png").above(0.2)
    of_a = [annotation for annotation in results["annotations"] if annotation["image_id"] == 2]
    assert [annotation["score"] for annotation in of_a] == pytest.approx(found["scores"].tolist(), abs=1e-4)
    assert {annotation["category_id"] for annotation in of_a} <= {7, 90} and min(found["scores"]) >= 0.2
    # It is a COCO data set, and its annotations are COCO results.
    assert evaluate_coco(read_annotations(out / "results.json"), results["annotations"])["AP50"] > 99

    text = results_text(out)
    assert "3 photographs" in text and " × oak" in text and "half.jpg does not decode" in text
    capsys.readouterr()


def test_two_predictions_into_one_folder_wait_for_each_other(album, place, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    given = ["--images", str(album), "--model", str(place / "student.pth"), "--out", str(out)]
    command = [sys.executable, "-c", "from msad.cli import main; main()", "predict", *given]
    with FileLock(out / ".lock"):  # as the other one does
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert any("another process works in" in line for line in process.stdout)
        assert [path.name for path in out.iterdir()] == [".lock"]
    assert "3 photographs: " in process.communicate(timeout=120)[0] and process.returncode == 0
    assert sorted(path.name for path in out.iterdir()) == ["pictures", "results.json", "settings.json"]


def test_a_folder_whose_name_is_no_text(album, place, tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    album.rename(folder)
    out = predict(settings(folder, place, tmp_path / "out"))
    assert json.loads((out / "settings.json").read_text())["images"] == f"6 in {tmp_path}/\\udcff"
    assert all("\\udcff" in skipped["reason"] for skipped in json.loads((out / "results.json").read_text())["skipped"])


def test_nothing_found_names_the_score(album, place, tmp_path, capsys):
    predict(settings(album, place, tmp_path / "out", min_score=1))
    assert "nothing found\nno score reaches 1; a lower min_score" in capsys.readouterr().out


def test_nothing_is_overwritten(album, place, tmp_path, capsys):
    out, run = tmp_path / "out", settings(album, place, tmp_path / "out")
    predict(run)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    predict(run)
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"out holds something else \(min_score: 0.45 there, 0.3 now\)"):
        predict(settings(album, place, out, min_score=0.3))
    with pytest.raises(ValueError, match=r"out holds something else \(model.nms_thresh: 0.6 there, 0.3 now\)"):
        predict(settings(album, place, out, nms_thresh=0.3))
    shutil.copy(album / "a.jpg", album / "c.jpg")
    with pytest.raises(ValueError, match=r"out holds something else \(images: 6 in .* there, 7 in"): predict(run)
    (album / "c.jpg").unlink()
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before

    (out / "results.json").unlink()  # as if it had been interrupted
    predict(run)
    assert (out / "results.json").is_file()

    used = tmp_path / "used"
    used.mkdir()
    (used / "diary.txt").write_text("mine")
    for wrong in (used, used / "diary.txt"):
        with pytest.raises(ValueError, match="holds no predictions; give another out"):
            predict(settings(album, place, wrong))
    assert (used / "diary.txt").read_text() == "mine"


def test_patterns_keep_their_folders(album, place, tmp_path):
    for name in ("x", "y/z"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        shutil.copy(album / "a.jpg", tmp_path / "tree" / name / "same.jpg")
    files, root = image_files(tmp_path / "tree" / "**" / "*.jpg")
    assert root == tmp_path / "tree" and files == [root / "x/same.jpg", root / "y/z/same.jpg"]
    out = predict(settings(tmp_path / "tree" / "**" / "*.jpg", place, tmp_path / "out"))
    assert (out / "pictures/x/same.jpg.jpg").is_file() and (out / "pictures/y/z/same.jpg.jpg").is_file()
    odd = tmp_path / "[1].jpg"
    shutil.copy(album / "a.jpg", odd)
    assert image_files(odd) == ([odd], tmp_path)
    for nothing in (tmp_path / "nowhere", tmp_path / "*.tif", tmp_path / "tree"):
        with pytest.raises(FileNotFoundError, match="images: there is no image at"): image_files(nothing)


def test_long_names_and_names_that_are_not_unicode(album, place, tmp_path):
    names = [b"b" * 240 + b".jpg", "木".encode() * 80 + b".jpg", b"G\xe4rten.jpg", b"G\xf6rten.jpg"]
    for name in names: shutil.copy(album / "a.jpg", os.path.join(os.fsencode(album), name))
    out = predict(settings(album, place, tmp_path / "out"))
    found = [image["file_name"] for image in json.loads((out / "results.json").read_text())["images"]]
    assert len(found) == len(set(found)) == 7 and "b" * 240 + ".jpg" in found
    assert len(list((out / "pictures").iterdir())) == 7


@pytest.mark.skipif(not has_rasterio(), reason="needs the extra geo")
def test_places_of_a_building_site_and_of_a_picture_that_is_to_be_turned(place, tmp_path):
    import rasterio

    pixels = np.asarray(Image.open(ROOT / "data/trees/val2017/000000001001.jpg").convert("RGB")).transpose(2, 0, 1)
    _, height, width = pixels.shape
    options = dict(driver="GTiff", height=height, width=width, count=3, dtype="uint8")
    options["transform"] = rasterio.transform.from_origin(0, 100, 0.1, 0.1)
    (tmp_path / "geo").mkdir()
    for name, system in {"site": 'LOCAL_CS["unnamed",UNIT["metre",1]]', "earth": "EPSG:32617"}.items():
        options["crs"] = rasterio.crs.CRS.from_user_input(system)
        with rasterio.open(tmp_path / f"geo/{name}.tif", "w", **options) as file: file.write(pixels)
    turned = tmp_path / "geo/turned.tif"
    shutil.copy(tmp_path / "geo/earth.tif", turned)
    assert has_place(turned)
    with Image.open(turned) as picture: picture.save(turned, tiffinfo={**picture.tag_v2, 274: 6})
    assert not has_place(turned)
    out = predict(settings(tmp_path / "geo", place, tmp_path / "out", min_score=0, tile=0))
    assert [path.name for path in (out / "geojson").iterdir()] == ["earth.tif.geojson"]
    assert len(json.loads((out / "results.json").read_text())["images"]) == 3


def test_a_folder_without_one_good_file(album, place, tmp_path):
    for name in ("a.jpg", "a.png", "b.jpg"): (album / name).unlink()
    out = tmp_path / "out"
    for _ in range(2):
        with pytest.raises(ValueError, match="images: no file of .* could be"): predict(settings(album, place, out))
    assert json.loads((out / "results.json").read_text())["images"] == []
    assert results_text(out).startswith("skipped, since they cannot be read: 3\n")


def test_what_a_folder_has_besides_its_photographs(album, place, tmp_path, capsys):
    shutil.copy(album / "a.jpg", album / "._a.jpg")
    (album / "older").mkdir()
    shutil.copy(album / "a.jpg", album / "older")
    out = predict(settings(album, place, tmp_path / "out"))
    assert 'left out, since they are folders: older; give "' in capsys.readouterr().out
    assert "._a.jpg" not in (out / "results.json").read_text()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"min_score": 2}, "min_score is 2: choose a number from 0 to 1"),
        ({"min_score": "high"}, "min_score is 'high': choose a number"),
        ({"min_score": float("nan")}, "min_score is nan"),
        ({"images": 5.5}, "images is 5.5: write a text, such as a path"),
        ({"images": 97}, "images: camera 97 does not open"),
        ({"model": ""}, "model is '': write a text, such as a path"),
        ({"nms_thresh": 2.0}, "nms_thresh is 2.0: choose a number from 0 to 1"),
        ({"detections_per_img": 0}, "detections_per_img is 0: choose a whole number from 1 on"),
        ({"reduced_decoding": 1}, "reduced_decoding is 1: write True or False"),
        ({"model": "nowhere.pth"}, "model: there is no file"),
    ],
)
def test_wrong_parameters(album, tmp_path, place, wrong, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        predict(settings(album, place, tmp_path / "out", **wrong))
    assert not (tmp_path / "out").exists()


def test_an_image_keeps_no_more_detections_than_asked(album, place, tmp_path):
    counts = []
    for number, thresholds in enumerate(({}, {"detections_per_img": 5, "topk_candidates": 40})):
        out = predict(settings(album, place, tmp_path / str(number), min_score=0, **thresholds))
        results = json.loads((out / "results.json").read_text())
        counts += [sum(found["image_id"] == image for found in results["annotations"]) for image in (1, 2, 3)]
    assert min(counts) > 0 and min(counts[:3]) > 5 >= max(counts[3:])


@pytest.mark.parametrize(("name", "kind"), [("predict", PredictSettings), ("export", ExportSettings)])
def test_a_notebook_has_the_parameters_of_its_settings(name, kind):
    notebook = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text())
    (cell,) = (cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", []))
    namespace = {}
    exec("".join(cell["source"]), {}, namespace)
    assert namespace == {field.name: field.default for field in fields(kind)}
    assert list(namespace) == [field.name for field in fields(kind)]


@pytest.mark.slow
def test_the_notebook(album, place, tmp_path):
    out = tmp_path / "out"
    parameters = {"images": album, "model": place / "student.pth", "out": out, "min_score": 0.2}
    done = papermill("nbs/predict.ipynb", *(word for name, value in parameters.items() for word in ("-p", name, value)))
    assert done.returncode == 0, done.stderr[-2000:]
    notebook = json.loads(done.stdout)
    assert "3 photographs" in texts(notebook) and "skipped, since they cannot be read: 3" in texts(notebook)
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) == 3 and (out / "results.json").is_file()
