"An exported detector in each format and precision, against the model it was made of, and where there is no PyTorch."

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_coco
from test_notebooks import papermill, texts

from msad.data.images import CocoImages
from msad.data.layouts import read_split
from msad.deploy.export import FORMATS, PRECISIONS, ExportSettings, calibration_photographs, export, with_places
from msad.deploy.onnx import compare_file, export_onnx, nearest_differences
from msad.deploy.predict import PredictSettings, predict
from msad.deploy.predictor import Prediction, Predictor
from msad.deploy.quantize import CalibrationViews
from msad.engine.published import coco_classes
from msad.engine.weights import load_model, save_model
from msad.models.detector import ModelConfig, build_model
from msad.runs.evaluate import EvaluateSettings, evaluate
from msad.runs.folders import detector_file
from msad.runs.settings import val_path

ROOT = Path(__file__).parent.parent
TREES = ROOT / "models" / "trees.pth"
PHOTOGRAPHS = sorted((ROOT / "data/trees/val2017").glob("*.jpg"))

# None of them has the size or the number that the export was made with.
SIZES = ((1, 96, 128), (3, 97, 61), (2, 1, 1), (1, 33, 300), (4, 64, 64))

WITHOUT_TORCH = """
import sys

sys.modules.update(torch=None, torchvision=None, msad=None)  # importing them fails
import numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
file, pictures, results = sys.argv[1:]
session = onnxruntime.InferenceSession(file, options)
outputs = {}
for name, images in np.load(pictures).items():
    for output, value in zip(("boxes", "scores", "labels"), session.run(None, {"images": images})):
        outputs[f"{name} {output}"] = value
np.savez(results, **outputs)
print(session.get_modelmeta().custom_metadata_map["class_names"])
"""


def make_model(path, **options):
    "Write an untrained student of COCO's classes whose scores are higher than usual."
    names, ids = coco_classes()
    torch.manual_seed(0)
    model = build_model(ModelConfig("student", 0.25, names, ids, short_side=64, max_side=107, **options))
    torch.nn.init.constant_(model.head.cls_logits.bias, -2.8)
    torch.nn.init.normal_(model.head.bbox_pred.weight, std=0.1)
    save_model(path, model)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A folder with a student as large as the paper's, and with its ONNX file, made by the notebook."
    folder = tmp_path_factory.mktemp("export")
    make_model(folder / "model_final.pth")
    write_coco(folder / "data", "val2017")
    files = ("-p", "model", folder, "-p", "out", folder / "new" / "student.onnx", "-p", "data", folder / "data")
    done = papermill("nbs/export.ipynb", *files)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "boxes differ by at most" in texts(json.loads(done.stdout))
    return folder


@pytest.mark.slow
def test_one_small_file(exported):
    (file,) = (exported / "new").iterdir()
    assert file.name == "student.onnx" and file.stat().st_size < 42e6


@pytest.mark.slow
def test_the_file_alone_finds_what_the_model_finds(exported, tmp_path):
    rng = np.random.default_rng(0)
    pictures = {"x".join(map(str, s)): rng.integers(0, 256, (s[0], 3, *s[1:]), np.uint8) for s in SIZES}
    np.savez(tmp_path / "pictures.npz", **pictures)
    files = (exported / "new" / "student.onnx", tmp_path / "pictures.npz", tmp_path / "results.npz")
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == list(coco_classes()[0])

    model, results, total = load_model(exported), np.load(tmp_path / "results.npz"), 0
    for name, images in pictures.items():
        boxes, scores, labels = (torch.from_numpy(results[f"{name} {what}"]) for what in ("boxes", "scores", "labels"))
        count = len(images)
        assert (boxes.shape, scores.shape, labels.shape) == ((count, 100, 4), (count, 100), (count, 100))
        with torch.inference_mode(): detections = model(list(torch.from_numpy(images)), view="low")
        for i, found in enumerate(detections):
            n = len(found["scores"])
            total += n
            assert n <= 100 and (scores[i] > 0).sum() == n
            assert (labels[i, n:] == -1).all() and (boxes[i, n:] == 0).all()
            assert torch.equal(labels[i, :n], found["labels"])
            torch.testing.assert_close(scores[i, :n], found["scores"], atol=1e-4, rtol=0)
            torch.testing.assert_close(boxes[i, :n], found["boxes"], atol=0.01, rtol=0)
    assert total > 100


def test_what_cannot_be_exported_is_refused(tmp_path):
    make_model(tmp_path / "model_final.pth", neck_channels=64, head_convs=1)
    with pytest.raises(ValueError, match="path is .* give a file whose name ends in .onnx"):
        export_onnx(tmp_path, tmp_path / "model_final.pth")
    with pytest.raises(FileNotFoundError, match="model: there is no file"):
        export_onnx(tmp_path / "nothing", tmp_path / "student.onnx")
    with pytest.raises(ValueError, match="precision is 'int8': choose"):
        export_onnx(tmp_path, tmp_path / "student.onnx", precision="int8")


# --- formats and precisions

# Of detections of a score from 0.3, nine in ten differ by at most so many pixels of the photograph, and so much score.
NEAR = {
    ("onnx", "fp32"): (0.05, 1e-4), ("onnx", "fp16"): (0.5, 5e-3), ("onnx", "int8"): (8, 0.06),
    ("openvino", "fp32"): (0.05, 1e-4), ("openvino", "fp16"): (4, 0.03), ("openvino", "int8"): (8, 0.06),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "A file of the bundled student by format and precision, written when it is asked for; and what was printed."
    folder, made = tmp_path_factory.mktemp("formats"), {}

    def file(form, precision, capsys):
        if (form, precision) not in made:
            path = folder / f"{precision}{FORMATS[form]}"
            asked = dict(format=form, precision=precision, out=str(path), calibration=16, num_images=4, compare=False)
            capsys.readouterr()
            made[form, precision] = export(ExportSettings(**asked)), capsys.readouterr().out
        return made[form, precision]

    return file


def apart(found, others):
    "How far detections of one class are from the nearest others: sides, and scores."
    pairs = (found["boxes"][:, None] - others["boxes"]).abs().amax(2)
    nearest = pairs.argmin(1)
    return pairs.amin(1), (found["scores"] - others["scores"][nearest]).abs()


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("form", FORMATS)
def test_each_format_and_precision_finds_the_same(files, form, precision, capsys):
    path, printed = files(form, precision, capsys)
    assert "MB" in printed and "boxes differ by at most" in printed
    weights, exported = Predictor("trees"), Predictor(path, threads=1)
    assert (exported.precision, exported.model.config) == (precision, weights.model.config)
    theirs, ours = weights(PHOTOGRAPHS[:6]), exported(PHOTOGRAPHS[:6])
    assert all(type(found) is Prediction for found in ours)
    sides, scores = zip(*(apart(one.above(0.3), other) for one, other in zip(theirs, ours, strict=True)), strict=True)
    sides, scores = torch.cat(sides).sort().values, torch.cat(scores).sort().values
    assert len(sides) > 10
    most, difference = NEAR[form, precision]
    place = int(0.9 * (len(sides) - 1))
    assert sides[place] < most and scores[place] < difference


@pytest.mark.slow
def test_sizes_of_files(files, capsys):
    size = {key: sum(p.stat().st_size for p in {files(*key, capsys)[0], files(*key, capsys)[0].with_suffix(".bin")}
                     if p.is_file()) for key in NEAR}
    for form in FORMATS:
        assert size[form, "fp16"] < 0.6 * size[form, "fp32"] and size[form, "int8"] < 0.4 * size[form, "fp32"]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_exported_files_are_evaluated_and_predict(files, form, capsys, tmp_path):
    path, _ = files(form, "fp32", capsys)
    asked = dict(devices="cpu", workers=0)
    folders = [evaluate(EvaluateSettings(model=str(m), out=str(tmp_path / name), **asked))
               for name, m in (("weights", TREES), ("file", path))]
    ours, theirs = (json.loads((folder / "metrics.json").read_text())["AP"] for folder in folders)
    assert theirs == pytest.approx(ours, abs=0.05)
    with pytest.raises(ValueError, match="nms_thresh is 0.5 and .* has 0.6 inside"):
        evaluate(EvaluateSettings(model=str(path), nms_thresh=0.5, out=str(tmp_path / "other"), **asked))
    out = predict(PredictSettings(model=str(path), images=str(PHOTOGRAPHS[1]), out=str(tmp_path / "predictions")))
    assert json.loads((out / "results.json").read_text())["categories"] == [{"id": 1, "name": "tree"}]


@pytest.mark.slow
def test_a_layer_that_eight_bits_spoil_is_named_and_left_out(tmp_path, capsys):
    model = load_model(TREES)
    (first, *_), (second, *_), *_ = model.backbone.network.blocks
    with torch.no_grad():  # the same network, but one channel leaves the others few of the 256 steps
        for values in (first.bn2.weight, first.bn2.bias): values[0] *= 3000
        second.conv_pw.weight[:, 0] /= 3000
    save_model(tmp_path / "model.pth", model)
    asked = dict(model=str(tmp_path / "model.pth"), precision="int8", data="trees", calibration=16)
    export(ExportSettings(**asked))
    printed = capsys.readouterr().out
    assert re.search(r"AP \d+\.\d of the model, \d+\.\d of the file, on 30 photographs", printed)
    assert "warning: int8 costs" in printed
    exclude = tuple(printed.split("with exclude ")[1].split())
    assert exclude[0] == "backbone.network.blocks.1.0.conv_pw"
    export(ExportSettings(**asked, exclude=exclude[0]))
    assert "warning" not in capsys.readouterr().out


def test_eight_bits_are_calibrated_on_training_photographs():
    settings = with_places(ExportSettings(precision="int8"), detector_file("trees"))
    checked = CocoImages(read_split(val_path(settings)))
    images = calibration_photographs(settings, checked)
    views = CalibrationViews(load_model(TREES), images, settings.calibration)
    paths = views.images.paths
    assert len(views) == len(set(paths)) == 64 and {Path(path).parent.name for path in paths} == {"train2017"}
    assert (paths[0], paths[-1]) == (images.paths[0], images.paths[-1])  # spread over all of them
    with pytest.raises(ValueError, match="train_split: 30 photographs of val2017 are in val2017, too"):
        calibration_photographs(replace(settings, train_split="val2017", val_split="val2017"), checked)


def test_a_run_knows_its_data(tmp_path):
    shutil.copy(TREES, tmp_path / "model_final.pth")
    settings = ExportSettings(model=str(tmp_path), precision="int8")
    with pytest.raises(ValueError, match="data is missing: int8 is calibrated on photographs"): export(settings)
    run = {"data": str(ROOT / "tests/layouts"), "train_split": "train", "val_split": "val"}
    (tmp_path / "settings.json").write_text(json.dumps(run))
    found = with_places(settings, tmp_path / "model_final.pth")
    assert {name: getattr(found, name) for name in run} == run
    assert with_places(replace(settings, data="trees"), tmp_path / "model_final.pth").train_split is None
    run |= {"val_annotations": str(ROOT / "tests/layouts/Annotations"), "train_annotations": None}
    (tmp_path / "settings.json").write_text(json.dumps(run))
    other = with_places(replace(settings, val_split="train"), tmp_path / "model_final.pth")
    assert (other.val_split, other.val_annotations, other.train_split) == ("train", None, "train")


def test_a_detection_that_only_the_file_has_counts():
    one = {"boxes": torch.tensor([[0.0, 0, 9, 9]]), "scores": torch.tensor([0.5]), "labels": torch.tensor([0])}
    two = {name: torch.cat([value, value]) for name, value in one.items()}
    two["boxes"][1] += 50
    assert nearest_differences(one, two).max() == 0 and nearest_differences(two, one).max() == 50


@pytest.mark.slow
def test_a_file_with_boxes_too_many_is_told(exported):
    file, model = exported / "new" / "student.onnx", load_model(exported)
    images = [torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 64, 96), np.uint8))]
    assert compare_file(file, model, images).boxes < 0.01
    model.head.thresholds = model.head.thresholds._replace(detections_per_img=1)
    assert compare_file(file, model, images).boxes > 1
    assert compare_file(file, model, images, part=0.97).boxes < 0.01  # asks the other way alone


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"format": "caffe"}, 'format is \'caffe\': choose one of "onnx", "openvino", "web"'),
        ({"precision": "int4"}, 'precision is \'int4\': choose one of "fp32", "fp16", "int8"'),
        ({"exclude": ["head"]}, "exclude is given and precision is fp32: it is of int8"),
        ({"symmetric": True}, "symmetric is given and precision is fp32: it is of int8"),
        ({"calibration": 0}, "calibration is 0: choose a whole number from 1 on"),
        ({"runtime": "packed.tgz"}, "runtime is given and format is onnx: it is of web"),
        ({"format": "web", "precision": "fp16"}, 'it is for GPUs, so choose "fp32" or "int8"'),
        ({"format": "web", "runtime": "/nowhere.tgz"}, "there is no file /nowhere.tgz: write it with `npm pack"),
        ({"format": "openvino", "out": "student.onnx"}, "give a file whose name ends in .xml, or another format"),
        ({"precision": "int8", "exclude": ["hed.cls_logits"]}, "is no layer of the model; there are head.cls_logits"),
        ({"precision": "int8", "data": "/nowhere"}, "/nowhere"),
    ],
)
def test_odd_settings_are_answered_with_a_sentence(asked, sentence, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        export(ExportSettings(**{"out": str(tmp_path / "student.onnx"), **asked}))
    assert sentence in str(raised.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("package", "asked", "extra"),
    [
        ("onnxruntime", {}, "export"), ("onnxscript", {"format": "openvino"}, "export"),
        ("platformdirs", {"format": "web"}, "export"),
        ("openvino", {"format": "openvino"}, "openvino"),
        ("nncf", {"format": "openvino", "precision": "int8"}, "openvino"),
    ],
)
def test_a_missing_package_is_one_sentence(package, asked, extra, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError) as raised: export(ExportSettings(out=str(tmp_path / "student.onnx"), **asked))
    assert str(raised.value) == f'the export needs {package}: pip install ".[{extra}]" in the clone'


@pytest.mark.parametrize("name", ["file.onnx", "file.xml"])
def test_files_that_are_not_ours_are_refused(name, tmp_path, monkeypatch):
    (tmp_path / name).write_text("no network")
    with pytest.raises(ValueError, match=f"model: .*{name} does not open"): Predictor(tmp_path / name)
    with pytest.raises(ValueError, match='device is "cuda"|has 0 GPUs'): Predictor(tmp_path / name, device="cuda")
    with pytest.raises(ValueError, match="threads is 0: choose a whole number"): Predictor(tmp_path / name, threads=0)
    with pytest.raises(ValueError, match="is exported already; give the weights"):
        export(ExportSettings(model=str(tmp_path / name), out=str(tmp_path / "student.onnx")))
    package = {"file.onnx": "onnxruntime", "file.xml": "openvino"}[name]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"{name} needs {package}: pip install"): Predictor(tmp_path / name)
