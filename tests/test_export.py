"An exported detector, run where there is no PyTorch, against the model it was made of."

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import write_coco
from test_notebooks import papermill, texts

from msad.deploy.onnx import export_onnx
from msad.engine.published import coco_classes
from msad.engine.weights import load_model, save_model
from msad.models.detector import ModelConfig, build_model

pytestmark = pytest.mark.slow

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


def test_one_small_file(exported):
    (file,) = (exported / "new").iterdir()
    assert file.name == "student.onnx" and file.stat().st_size < 42e6


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
