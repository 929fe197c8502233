"""Random damage: whatever a user hands over is taken, or refused in one sentence of ours that names file or parameter.

`MSAD_DAMAGE=20 pytest tests/test_damage.py` tries twenty times as many seeds; one seed again:
`pytest tests/test_damage.py -k "annotations and 17-"`.
"""

import copy
import json
import math
import os
import random
import shutil
import warnings
from dataclasses import fields

import numpy as np
import pytest
import torch
from conftest import write_coco
from PIL import Image

from msad.data.images import CocoImages
from msad.data.summary import check_data
from msad.deploy.export import ExportSettings
from msad.deploy.predict import PredictSettings
from msad.deploy.predictor import as_photograph
from msad.engine.weights import load_model, load_weights, read_weights, save_model
from msad.evaluation.coco_metrics import evaluate_coco
from msad.models.detector import ModelConfig, build_model
from msad.runs.comparison import AnalysisSettings
from msad.runs.evaluate import EvaluateSettings
from msad.runs.folders import FolderInUse
from msad.runs.plan import prepare
from msad.runs.settings import TrainSettings

pytestmark = pytest.mark.slow

TIMES = int(os.environ.get("MSAD_DAMAGE", "1"))
GROUP = 25  # seeds a test

ODD_NUMBERS = (
    0, -1, 1, 2, 0.5, 159.6, -0.0, 1e300, -1e300, 10**30, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 2**64, 10**400,
    math.nan, math.inf, -math.inf, 1e-320,
)
ODD_VALUES = (
    *ODD_NUMBERS, None, True, False, "", " ", "5", "nan", "a\0b", "a" * 300, "a/" * 3000, "$_$", "\ud800", "猫",
    "../../x", "~", "[", "**", [], [[]], [1, 2, 3], [1, 2, 3, 4, 5], {}, {"id": 1}, [None], "C:\\x", "1e400",
)


def seeds(count):
    "Groups of seeds, `count` in all or so."
    groups = range(max(1, TIMES * count // GROUP))
    return pytest.mark.parametrize("first", [group * GROUP for group in groups], ids=lambda first: f"{first}-")


def answers(call, names):
    "Call, and check that an error is one sentence of ours that names one of `names`. Returns whether there was none."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except (ValueError, OSError) as error:
        text = str(error)
        assert type(error) in (ValueError, FileNotFoundError, OSError, FolderInUse), repr(error)
        assert "\n" not in text and 10 < len(text) < 2000 and " " in text, text
        assert any(name in text for name in names), (names, text)
        return False
    return True


def places(value, path=()):
    "The paths to all values in a tree of dictionaries and lists."
    found = [path] if path else []
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return found + [place for key, inner in entries for place in places(inner, (*path, key))]


def damage_tree(rng, tree):
    "Replace, remove, copy or exchange a value somewhere in a tree, once or a few times."
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        path = rng.choice(places(tree))
        parent = tree
        for key in path[:-1]: parent = parent[key]
        if not isinstance(parent, dict | list): continue
        kind = rng.choice(("replace", "replace", "replace", "remove", "copy", "rename"))
        if kind == "replace": parent[path[-1]] = copy.deepcopy(rng.choice(ODD_VALUES))
        elif kind == "remove": del parent[path[-1]]
        elif kind == "copy" and isinstance(parent, list): parent.append(copy.deepcopy(parent[path[-1]]))
        elif kind == "rename" and isinstance(parent, dict): parent[str(rng.choice(ODD_VALUES))] = parent.pop(path[-1])
        if not places(tree): return


def damage_bytes(rng, data):
    "Cut bytes off, change some, leave some out, or put others before them."
    data = bytearray(data)
    kind = rng.choice(("cut", "change", "change", "remove", "before", "empty"))
    if kind == "cut": del data[rng.randrange(len(data)) :]
    elif kind == "change":
        for _ in range(rng.choice((1, 3, 20))): data[int(len(data) * rng.random() ** 3)] = rng.randrange(256)
    elif kind == "remove":
        start = rng.randrange(len(data))
        del data[start : start + rng.choice((1, 10, 1000))]
    elif kind == "before": data[:0] = rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b" ", b"\r\n"))
    else: data.clear()
    return bytes(data)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A data set, a student's file and pictures, all sound."
    root = tmp_path_factory.mktemp("damage")
    for split in ("train2017", "val2017"): write_coco(root / "data", split, images=2, size=(72, 64))
    torch.manual_seed(0)
    config = ModelConfig("student", 0.25, ("pine", "oak"), (7, 90), 64, 1, short_side=64, max_side=107)
    save_model(root / "student.pth", build_model(config))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    (root / "pictures").mkdir()
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    for ending in ("gif", "bmp"): Image.fromarray(pixels).save(root / f"pictures/a.{ending}")
    for ending in ("jpg", "png", "webp", "tif"): Image.fromarray(pixels).save(root / f"pictures/a.{ending}", exif=exif)
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(root / "pictures/16.png")
    Image.fromarray(pixels[..., 0].astype(np.int32)).save(root / "pictures/32.tif", compression="tiff_lzw")
    return root


@seeds(1500)
def test_annotations(place, tmp_path, first):
    shutil.copytree(place / "data", tmp_path / "data")
    file = tmp_path / "data/annotations/instances_val2017.json"
    sound = json.loads(file.read_text())
    results = [{**box, "score": 0.5} for box in copy.deepcopy(sound["annotations"])]

    def use():
        check_data(tmp_path / "data", "val2017")
        images = CocoImages(tmp_path / "data", "val2017")
        for i in range(len(images)): assert np.isfinite(images[i][1]["boxes"].numpy()).all()
        evaluate_coco(file, [])

    assert answers(use, ())
    taken = 0
    for seed in range(first, first + GROUP):
        rng, content = random.Random(seed), copy.deepcopy(sound)
        if rng.random() < 0.8:
            damage_tree(rng, content)
            data = json.dumps(content).encode()
        else: data = damage_bytes(rng, json.dumps(content).encode())
        file.write_bytes(data)
        taken += answers(use, (str(file), str(tmp_path / "data" / "val2017")))
        file.write_text(json.dumps(sound))
        mistaken = copy.deepcopy(results)
        damage_tree(rng, mistaken)
        answers(lambda mistaken=mistaken: evaluate_coco(file, mistaken), ("detection", "The results"))
    assert taken < GROUP


@seeds(100)
def test_model_files(place, tmp_path, first):
    file, sound = tmp_path / "a.pth", torch.load(place / "student.pth", weights_only=True)
    data, picture = (place / "student.pth").read_bytes(), torch.zeros(3, 64, 64, dtype=torch.uint8)

    def use():
        with torch.no_grad(): load_model(file)([picture])
        model = build_model(ModelConfig("student", 0.25, ("oak",), (1,), 64, 1))
        load_weights(model, read_weights(file))

    def damage_weights(rng, weights):
        name = rng.choice(list(weights))
        value = weights[name]
        changed = (
            value.float() * math.nan, value[None], value.flatten()[:1], value.double(), value.bool(), value.to_sparse(),
            value + 1j, "text", 5, None, [1, 2], value.to("meta"),
        )
        if rng.random() < 0.2: del weights[name]
        elif rng.random() < 0.2: weights[rng.choice(("x", 5, "module.features.0", "T_fcos_head.x"))] = weights.pop(name)
        else: weights[name] = rng.choice(changed)

    for seed in range(first, first + GROUP):
        rng, kind = random.Random(seed), seed % 4
        if kind == 3: file.write_bytes(damage_bytes(rng, data))
        else:
            content = {**sound, "config": copy.deepcopy(sound["config"]), "model": dict(sound["model"])}
            if kind == 0: damage_tree(rng, content["config"])
            elif kind == 1: damage_weights(rng, content["model"])
            else: content[rng.choice(list(content))] = rng.choice(ODD_VALUES)
            torch.save(content, file)
        answers(use, (str(file),))


@seeds(1000)
def test_pictures_and_arrays(place, tmp_path, first):
    pictures = sorted((place / "pictures").iterdir())

    def use(picture):
        photograph = as_photograph(picture)
        assert photograph.mode == "RGB" and all(photograph.size)

    for seed in range(first, first + GROUP):
        rng = random.Random(seed)
        source = rng.choice(pictures)
        file = tmp_path / source.name
        file.write_bytes(damage_bytes(rng, source.read_bytes()))
        answers(lambda file=file: use(file), (str(file),))
        shape = [rng.choice((0, 1, 3, 4, 20, 30)) for _ in range(rng.choice((1, 2, 3, 3, 3, 4)))]
        dtype = rng.choice(("uint8", "uint16", "int64", "float32", "float64", "bool", "complex64", "float16"))
        with np.errstate(all="ignore"): array = np.full(shape, rng.choice((0, 1, 0.5, 255, -1, math.inf))).astype(dtype)
        answers(lambda array=array: use(array), ("images",))
        answers(lambda array=array: use(torch.from_numpy(array)), ("images",))
        answers(lambda rng=rng: use(rng.choice((None, 5, b"a", {}, [], ()))), ("images",))


@seeds(1500)
def test_run_parameters(place, tmp_path, first):
    kinds = (TrainSettings, TrainSettings, EvaluateSettings, PredictSettings, ExportSettings, AnalysisSettings)
    usual = dict(iterations=2, batch_size=2, short_side=96, max_side=96, neck_channels=64, head_convs=1, recipe="small")
    usual |= dict(role="teacher", data=str(place / "data"), out=str(tmp_path / "run"), devices="cpu")
    taken = 0
    for seed in range(first, first + GROUP):
        rng = random.Random(seed)
        kind = rng.choice(kinds)
        names = [field.name for field in fields(kind)]
        wrong = {name: copy.deepcopy(rng.choice(ODD_VALUES)) for name in rng.sample(names, rng.choice((1, 1, 2)))}

        def use(kind=kind, wrong=wrong):
            if kind is TrainSettings: prepare(kind(**{**usual, **wrong}))
            else: kind(**wrong)

        taken += answers(use, names)
    assert taken < GROUP and not (tmp_path / "run").exists()
