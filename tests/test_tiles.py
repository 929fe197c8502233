"Large photographs: windows, tiles, each object once, on the way to results, and within a fixed memory."

import json
import os
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import rasterio
import torch
from conftest import ROOT
from PIL import Image
from rasterio.transform import from_origin

from msad.data.files import read_json
from msad.data.images import CocoImages, read_image, subsample
from msad.data.windows import open_windows, picture_size
from msad.deploy.predict import PredictSettings, predict
from msad.deploy.predictor import Predictor
from msad.deploy.tiles import kept_tiles
from msad.engine.weights import load_model
from msad.evaluation.coco_metrics import evaluate_coco
from msad.evaluation.inference import detect_dataset_tiled
from msad.evaluation.tiles import Tiling, make_grid
from msad.runs.evaluate import EvaluateSettings, evaluate
from msad.runs.folders import detector_file
from msad.runs.settings import TrainSettings

SIDE = 256  # of the bundled photographs
PLACE = dict(crs="EPSG:32617", transform=from_origin(500000, 4e6, 0.1, 0.1))


def write_tiff(path, pixels, **options):
    "Write H×W×C pixels as a tiled TIFF with a place on the earth."
    height, width, count = pixels.shape
    options = dict(driver="GTiff", height=height, width=width, count=count, dtype=pixels.dtype, tiled=True, **options)
    with rasterio.open(path, "w", **{**PLACE, **options}) as file: file.write(pixels.transpose(2, 0, 1))
    return path


@pytest.fixture(scope="module")
def sixteen():
    return subsample(CocoImages(ROOT / "data" / "trees", "val2017"), 16)


@pytest.fixture(scope="module")
def field(tmp_path_factory, sixteen):
    "A data set of one photograph: sixteen of the bundled ones side by side, as a GeoTIFF."
    root = tmp_path_factory.mktemp("field")
    for folder in ("annotations", "val2017"): (root / folder).mkdir()
    corners = [(SIDE * (i % 4), SIDE * (i // 4)) for i in range(16)]
    pixels = np.zeros((4 * SIDE, 4 * SIDE, 3), np.uint8)
    corner_of = dict(zip(sixteen.image_ids, corners, strict=True))
    for path, (x, y) in zip(sixteen.paths, corners, strict=True): pixels[y : y + SIDE, x : x + SIDE] = read_image(path)
    write_tiff(root / "val2017" / "field.tif", pixels, compress="deflate")
    dataset = sixteen.coco.dataset
    annotations = []
    for annotation in dataset["annotations"]:
        (left, top), (x, y, w, h) = corner_of[annotation["image_id"]], annotation["bbox"]
        annotations.append({**annotation, "image_id": 1, "bbox": [x + left, y + top, w, h]})
    image = {"id": 1, "file_name": "field.tif", "width": 4 * SIDE, "height": 4 * SIDE}
    content = {"images": [image], "categories": dataset["categories"], "annotations": annotations}
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return root


def run_evaluation(data, out, **settings):
    return read_json(evaluate(EvaluateSettings(data=str(data), val_split="val2017", out=str(out), **settings)) /
                     "metrics.json")


# --- evaluation


def test_sixteen_photographs_side_by_side_have_the_ap_of_the_sixteen(field, sixteen, tmp_path):
    predictor = Predictor("trees")
    alone = [r for i, path in zip(sixteen.image_ids, sixteen.paths, strict=True) for r in predictor(path).to_coco(i)]
    expected = evaluate_coco(sixteen.coco, alone)
    metrics = run_evaluation(field, tmp_path / "tiled", tile=SIDE, overlap=0, workers=0)
    for name in ("AP", "AP50", "AR100"): assert abs(metrics[name] - expected[name]) < 0.5, name
    whole = run_evaluation(field, tmp_path / "whole", workers=0)
    assert whole["AP"] < 1 < metrics["AP"]


def write_tiles(field, root, tiles):
    "Make a data set of the field's tiles, each a photograph; objects that a tile cuts do not count."
    for folder in ("annotations", "val2017"): (root / folder).mkdir(parents=True)
    content = read_json(field / "annotations" / "instances_val2017.json")
    picture, images, annotations = read_image(field / "val2017" / "field.tif"), [], []
    for number, (x1, y1, x2, y2) in enumerate(tiles.tolist(), 1):
        name = f"{number}.png"
        picture.crop((x1, y1, x2, y2)).save(root / "val2017" / name)
        images.append({"id": number, "file_name": name, "width": x2 - x1, "height": y2 - y1})
        for annotation in content["annotations"]:
            x, y, w, h = annotation["bbox"]
            left, top, right, bottom = max(x, x1), max(y, y1), min(x + w, x2), min(y + h, y2)
            if left >= right or top >= bottom: continue
            cut = int(x < x1 or y < y1 or x + w > x2 or y + h > y2)
            place = {"id": len(annotations) + 1, "image_id": number, "iscrowd": cut}
            annotations.append({**annotation, **place, "bbox": [left - x1, top - y1, right - left, bottom - top]})
    content |= {"images": images, "annotations": annotations}
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return root


def test_overlapping_tiles_count_each_object_once(field, tmp_path):
    "The field has seams, where trees look unlike trees; so it is compared with the same tiles one by one."
    tiles = make_grid((4 * SIDE, 4 * SIDE), Tiling(SIDE, 80, 0, True)).tiles
    alone = run_evaluation(write_tiles(field, tmp_path / "data", tiles), tmp_path / "alone", tile=0, workers=0)
    run_evaluation(field, tmp_path / "aligned", tile=SIDE, overlap=0, workers=0)
    merged = run_evaluation(field, tmp_path / "merged", tile=SIDE, overlap=80, workers=0)
    counts = [len(read_json(tmp_path / name / "detections.json")) for name in ("aligned", "merged", "alone")]
    assert len(tiles) == 36 and counts[1] < 1.2 * counts[0] < counts[2]  # up to 100 detections in each tile
    assert merged["AP"] > alone["AP"] - 0.5 and merged["AR100"] > alone["AR100"] - 2


def test_photographs_that_are_not_large_are_evaluated_as_ever(tmp_path):
    data = ROOT / "data" / "trees"
    metrics = [run_evaluation(data, tmp_path / str(tile), tile=tile, workers=0)["AP"] for tile in (0, "auto")]
    assert metrics[0] == metrics[1]
    assert read_json(tmp_path / "auto" / "settings.json")["tiles"] is None


# --- prediction


def run_prediction(images, out, **settings):
    return predict(PredictSettings(images=str(images), out=str(out), **settings))


def test_a_geotiff_is_predicted_as_the_same_pixels_in_a_png(field, tmp_path):
    tiff = field / "val2017" / "field.tif"
    read_image(tiff).save(tmp_path / "field.png")
    found = []
    for path in (tiff, tmp_path / "field.png"):
        folder = run_prediction(path, tmp_path / path.suffix[1:], tile=SIDE, overlap=64)
        found.append(read_json(folder / "results.json")["annotations"])
        assert (folder / "pictures" / f"{path.name}.jpg").is_file() and not (folder / "tiles").exists()
    assert found[0] == found[1] and len(found[0]) > 50
    features = read_json(tmp_path / "tif" / "geojson" / "field.tif.geojson")["features"]
    assert len(features) == len(found[0]) and not (tmp_path / "png" / "geojson").exists()
    for feature, annotation in zip(features, found[0], strict=True):
        (x, y, _, h), ring = annotation["bbox"], np.array(feature["geometry"]["coordinates"][0])
        east, north = rasterio.warp.transform("EPSG:4326", "EPSG:32617", *ring.T)
        assert abs(east[0] - 500000 - 0.1 * x) < 0.01 and abs(4e6 - north[0] - 0.1 * (y + h)) < 0.01
        assert feature["properties"] == {"class": "tree", "score": annotation["score"]}


def test_small_and_large_photographs_of_a_folder_keep_their_order(field, sixteen, tmp_path):
    album = tmp_path / "album"
    album.mkdir()
    for name, path in zip("ace", sixteen.paths, strict=False): Image.open(path).save(album / f"{name}.png")
    for name in "bd": (album / f"{name}.tif").symlink_to(field / "val2017" / "field.tif")
    results = read_json(run_prediction(album, tmp_path / "out", tile=SIDE) / "results.json")
    assert [image["file_name"] for image in results["images"]] == ["a.png", "b.tif", "c.png", "d.tif", "e.png"]
    per_image = [sum(a["image_id"] == i for a in results["annotations"]) for i in range(1, 6)]
    assert per_image[1] == per_image[3] > 5 * max(per_image[0], per_image[2], per_image[4])


def test_a_killed_prediction_goes_on_with_the_next_tile(field, tmp_path):
    tiff = field / "val2017" / "field.tif"
    whole = read_json(run_prediction(tiff, tmp_path / "whole", tile=SIDE) / "results.json")["annotations"]
    code = (
        "import os, sys\nfrom msad.deploy import predict, tiles\ntiles.PAUSE = 0\nkeep = tiles.keep_tiles\n"
        "def keep_and_die(folder, fresh):\n"
        "    keep(folder, fresh)\n"
        "    if len(list(folder.glob('*.pth'))) == 9: os.kill(os.getpid(), 9)\n"
        "tiles.keep_tiles = keep_and_die\n"
        "predict.predict(predict.PredictSettings(images=sys.argv[1], out=sys.argv[2], tile=256))\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, tiff, tmp_path / "killed"], cwd=ROOT, capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()[-2000:]
    (place,) = (tmp_path / "killed" / "tiles").iterdir()
    assert len(kept_tiles(place)) == 9
    first = sorted(place.iterdir())[0]
    content = torch.load(first, weights_only=True)
    content["tiles"][0] = {name: value[:0] for name, value in content["tiles"][0].items()}
    torch.save(content, first)  # so that a tile that is done again would be noticed
    changed = read_json(run_prediction(tiff, tmp_path / "killed", tile=SIDE) / "results.json")["annotations"]
    assert len(changed) < len(whole) and not (tmp_path / "killed" / "tiles").exists()
    assert [a["bbox"] for a in changed if min(a["bbox"][:2]) > SIDE] == \
        [a["bbox"] for a in whole if min(a["bbox"][:2]) > SIDE]
    with pytest.raises(ValueError, match="holds something else .tiles: 256"):
        run_prediction(tiff, tmp_path / "killed", tile=SIDE, overlap=30)


def test_auto_follows_the_photographs_that_the_model_learned_from(field, tmp_path, capsys):
    config = load_model(ROOT / "models" / "trees.pth").config
    assert config.photo_sides == (SIDE, SIDE) and 30 < config.object_side < 50
    run_prediction(field / "val2017" / "field.tif", tmp_path / "out")
    assert "longer than 512 pixels: tiles of 256 pixels, overlap" in capsys.readouterr().out


def test_photographs_that_are_not_large_are_decoded_reduced(sixteen):
    images, model = subsample(sixteen, 4), load_model(detector_file("trees"))
    full, reduced = (
        detect_dataset_tiled(model, given, 128, 128, Tiling(512, 0, 512, True), leave_bar=False)[0]
        for given in (images, images.decoded_for((128, 128)))
    )
    assert full != reduced  # since JPEG's own reduction gives other pixels
    for found in (full, reduced): assert 128 < max(result["bbox"][0] for result in found) < 256  # of whole photographs


# --- bad input is one sentence


@pytest.mark.parametrize(("given", "message"), (
    ({"tile": -1}, "tile is -1: choose"), ({"tile": "large"}, "tile is 'large': choose"),
    ({"tile": 100, "overlap": 90}, "overlap is 90 and tile 100: choose at most half of the tile, 50"),
    ({"tile": 0, "overlap": 50}, "overlap is 50 and there are no tiles: leave it out"),
    ({"overlap": -3}, "overlap is -3: choose a whole number from 0 on"), ({"tile": 2.5}, "tile is 2.5: choose"),
))
def test_wrong_tiles_are_told(given, message):
    for kind in (PredictSettings, EvaluateSettings):
        with pytest.raises(ValueError, match=message): kind(**given)


def test_an_overlap_too_large_for_the_models_tile_is_told(field, tmp_path):
    with pytest.raises(ValueError, match="overlap is 200 and tile 256"):
        run_prediction(field / "val2017" / "field.tif", tmp_path / "out", overlap=200)
    assert not (tmp_path / "out").exists()


def test_without_rasterio_a_large_tiff_is_one_sentence(field, tmp_path):
    code = "import sys; sys.modules['rasterio'] = None; from msad.cli import main; main(sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    options = ["predict", "--images", field / "val2017" / "field.tif", "--out", tmp_path / "out", "--tile", "256"]
    run = [subprocess.run([sys.executable, "-c", code, *options, *more], cwd=ROOT, env=environment, capture_output=True,
                          text=True) for more in ([], ["--tile", "0"])]
    assert run[0].returncode == 1 and "needs rasterio: pip install" in run[0].stderr
    assert "Traceback" not in run[0].stderr
    assert run[1].returncode == 0 and "no GeoJSON, since rasterio is missing" in run[1].stdout


def bands(count, kind=np.uint8, most=255):
    rng = np.random.default_rng(count)
    return rng.integers(0, most + 1, (600, 700, count)).astype(kind)


@pytest.mark.parametrize(("pixels", "options", "message"), (
    (bands(4), {"photometric": "RGB"}, None), (bands(1), {}, None),
    (bands(3, np.uint16, 65535), {"photometric": "RGB"}, None),
    (bands(5), {}, "its 5 bands are gray, undefined"), (bands(3, np.float32), {}, "its pixels are float32"),
    (bands(1, np.uint16, 4095), {}, "its brightest value is 4,095"),
), ids=("four bands", "grey", "16 bits", "five bands", "float", "12 bits"))
def test_pixels_of_other_kinds(pixels, options, message, tmp_path):
    path = write_tiff(tmp_path / "odd.tif", pixels, **options)
    with pytest.raises(ValueError, match="no file of .* could be read") if message else nullcontext():
        run_prediction(path, tmp_path / "out", tile=SIDE)
    results = read_json(tmp_path / "out/results.json")
    if message:
        (skipped,) = results["skipped"]
        assert message in skipped["reason"] and "odd.tif" in skipped["reason"] and "\n" not in skipped["reason"]
        return
    assert not results["skipped"]
    with open_windows(path) as picture: window = np.asarray(picture.read((100, 50, 300, 250)))
    assert (window == np.asarray(read_image(path))[50:250, 100:300]).all()


def test_a_damaged_window_and_a_turned_picture_are_skipped_with_a_sentence(tmp_path):
    album = tmp_path / "album"
    album.mkdir()
    path = write_tiff(album / "half.tif", bands(3), compress="deflate", blockxsize=64, blockysize=64)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    Image.fromarray(bands(3)).save(album / "turned.tif", tiffinfo={274: 6})
    assert picture_size(album / "turned.tif") == (600, 700)
    with pytest.raises(ValueError, match="no file of .* could be read"):
        run_prediction(album, tmp_path / "out", tile=SIDE)
    skipped = read_json(tmp_path / "out/results.json")["skipped"]
    assert "does not decode in columns" in skipped[0]["reason"] and "half.tif" in skipped[0]["reason"]
    assert "save it upright" in skipped[1]["reason"]


# --- what a training tells


@pytest.mark.slow
def test_a_trained_model_tells_the_sides_of_its_photographs_and_objects(tmp_path):
    from msad.runs.train import train

    settings = TrainSettings(role="teacher", width=0.25, iterations=2, batch_size=2, workers=0, devices="cpu",
                             short_side=64, out=str(tmp_path / "teacher"), eval_every=2)
    config = load_model(train(settings)).config
    assert config.photo_sides == (SIDE, SIDE) and 30 < config.object_side < 50
    assert read_json(tmp_path / "teacher" / "settings.json")["model"]["photo_sides"] is None


# --- the bar


MEASURE = """
import sys
from contextlib import nullcontext
from msad.deploy.predictor import Predictor
from msad.deploy.tiles import detect_file
from msad.evaluation.tiles import choose_tiling
from PIL import Image
from pathlib import Path

def resident(name): return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

predictor = Predictor("trees")
predictor([Image.new("RGB", (256, 256))] * 8)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = resident("VmRSS")
tiling = choose_tiling(512, 80, predictor.model.config)
result = detect_file(predictor, sys.argv[1], tiling, Path(sys.argv[2]), 0.3)
print(result.size, len(result.found["scores"]), (resident("VmHWM") - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("side", (5_000, 10_000))
def test_the_memory_does_not_grow_with_the_picture(side, sixteen, tmp_path):
    row = np.hstack([np.asarray(Image.open(path)) for path in sixteen.paths])
    row = np.tile(row, (1, side // row.shape[1] + 1, 1))[:, :side].transpose(2, 0, 1)
    options = dict(driver="GTiff", height=side, width=side, count=3, dtype="uint8", tiled=True)
    with rasterio.open(tmp_path / "large.tif", "w", **options, **PLACE) as file:
        for top in range(0, side, SIDE):
            height = min(SIDE, side - top)
            file.write(row[:, :height], window=rasterio.windows.Window(0, top, side, height))
    run = subprocess.run([sys.executable, "-c", MEASURE, tmp_path / "large.tif", tmp_path / "tiles"], cwd=ROOT,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert float(run.stdout.split()[-1]) < 400, run.stdout  # megabytes; the picture of 10,000 alone has 300
