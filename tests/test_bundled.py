"The student that ships with the repository: its size, its record, and a picture with boxes from one command."

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

from msad import Predictor
from msad.runs.evaluate import EvaluateSettings, evaluate

PHOTOGRAPH = ROOT / "data" / "trees" / "val2017" / "000000001001.jpg"


@pytest.mark.parametrize("devices", ["cpu", pytest.param(2, marks=pytest.mark.slow)])
def test_record_is_reproduced(tmp_path, devices):
    record = json.loads((ROOT / "models" / "trees.json").read_text())
    folder = evaluate(EvaluateSettings(model="trees", out=str(tmp_path / "run"), devices=devices, workers=0))
    metrics = json.loads((folder / "metrics.json").read_text())
    # Processors round differently, which moves AP by hundredths.
    assert metrics["AP"] == pytest.approx(record["AP"], abs=0.1) and record["AP50"] >= 50
    assert (ROOT / "models" / "trees.pth").stat().st_size < 9e6


def test_a_picture_with_boxes_from_one_command(tmp_path):
    msad = Path(sys.executable).with_name("msad")
    command = [msad, "predict", "--images", PHOTOGRAPH, "--out", tmp_path / "found"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "found" / "results.json").read_text())
    assert len(results["annotations"]) > 5 and {box["score"] >= 0.45 for box in results["annotations"]} == {True}
    path = tmp_path / "found" / "pictures" / f"{PHOTOGRAPH.name}.jpg"
    with Image.open(path) as picture: assert max(picture.size) > 500


def test_prediction_by_name():
    prediction = Predictor("trees")(PHOTOGRAPH)
    assert set(prediction["names"]) == {"tree"} and prediction["scores"][0] > 0.5
    with pytest.raises(ValueError, match="path is found.png: let it end in .jpg"): prediction.save("found.png")
