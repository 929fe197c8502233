"The run notebooks through papermill as a person starts them: real kernels, real files, any working directory."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, write_coco, write_teacher

pytestmark = pytest.mark.slow

SIZES = {"recipe": "published", "iterations": 2, "batch_size": 2, "short_side": 64, "max_side": 96, "neck_channels": 64}
SMALL = [word for name, value in SIZES.items() for word in ("-p", name, value)]


def papermill(*arguments, cwd=ROOT):
    "Run papermill with its output redirected; the finished process."
    command = [str(Path(sys.executable).with_name("papermill")), *map(str, arguments)]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def texts(notebook):
    "All text that an executed notebook printed."
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return "".join("".join(output.get("text", "")) for output in outputs if output["output_type"] == "stream")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("notebooks")
    for split in ("train2017", "val2017"): write_coco(root / "data", split)
    return root


def test_from_teacher_to_analysis(place):
    common = ["-p", "data", place / "data", "-p", "devices", "cpu", "-p", "workers", "0"]
    teacher, student = place / "teacher-w0.25", place / "student-w0.25"

    weights = write_teacher(place / "untrained.pth")
    done = papermill("nbs/train_teacher.ipynb", *common, *SMALL, "-p", "out", teacher, "-p", "weights", weights)
    assert done.returncode == 0, done.stderr[-2000:]
    printed = texts(json.loads(done.stdout))
    assert "2 iterations of 2 images" in printed and "4 images" in printed and str(teacher) in printed

    # From another folder, and with paths that are relative to it.
    done = papermill(
        "../nbs/train_student.ipynb", *common, *SMALL, "-p", "teacher", os.path.relpath(teacher, ROOT / "tests"),
        "-p", "out", student, cwd=ROOT / "tests",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"model_final.pth", "metrics.json", "detections.json", "log.jsonl"} <= {p.name for p in student.iterdir()}

    done = papermill("nbs/evaluate.ipynb", *common, "-p", "model", student, "-p", "out", place / "evaluation")
    assert done.returncode == 0, done.stderr[-2000:]
    ours, theirs = (json.loads((f / "metrics.json").read_text()) for f in (place / "evaluation", student))
    assert ours["AP"] == theirs["AP"] and len(json.loads((student / "detections.json").read_text())) > 10

    done = papermill("nbs/analysis.ipynb", "-y", f"runs: [{teacher}, {student}]", "-p", "out", place / "analysis")
    assert done.returncode == 0, done.stderr[-2000:]
    summary = (place / "analysis" / "summary.txt").read_text()
    pictures = [line.strip() for line in summary.splitlines() if line.endswith(".png")]
    assert all(Path(picture).is_file() for picture in pictures)
    of_all = {"cost", "detections", "sizes", "classes", "precision_recall", "resolutions", "errors"}
    of_teacher = {f"{kind}_teacher-w0.25" for kind in ("losses", "fusion", "fusion_sizes")}
    of_student = {f"{kind}_student-w0.25" for kind in ("losses", "distillation")}
    assert {Path(picture).stem for picture in pictures} == of_all | of_teacher | of_student
    assert "teacher" in summary and "student" in summary


def test_unknown_parameter_is_refused_with_the_nearest(place):
    done = papermill("nbs/train_teacher.ipynb", "-p", "itertions", 500, "-p", "out", place / "never")
    assert done.returncode != 0
    assert "'itertions' is no parameter: did you mean iterations?" in done.stderr
    assert not (place / "never").exists()


def test_wrong_input_ends_with_its_sentence(place):
    done = papermill("nbs/train_teacher.ipynb", "-p", "data", place / "nowhere", "-p", "out", place / "never")
    assert done.returncode != 0
    assert "The data folder" in done.stderr and "does not exist" in done.stderr
    assert not (place / "never").exists()
