"Whole runs in small: real training, real evaluation, real files, and every wrong input before any of it starts."

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import write_coco, write_teacher
from PIL import Image

from msad.data.files import write_json
from msad.data.images import read_image_and_size
from msad.data.loaders import training_indices
from msad.engine.checkpoint import list_checkpoints
from msad.engine.hooks import read_log
from msad.engine.weights import load_model, read_weights, save_model
from msad.models.detector import ModelConfig, build_model
from msad.models.transform import CAFFE
from msad.runs import evaluate as evaluate_program
from msad.runs import train as train_program
from msad.runs.evaluate import EvaluateSettings, evaluate
from msad.runs.folders import default_folder, detector_file, finished_runs, run_images, weights_file
from msad.runs.plan import prepare
from msad.runs.settings import TrainSettings
from msad.runs.train import initial_model, train

SIZES = dict(recipe="published", neck_channels=64, iterations=3, batch_size=2, short_side=128, max_side=213)
SMALL = dict(**SIZES, workers=0, devices="cpu", checkpoint_every=2)


def teacher_settings(coco, out, **changes):
    return TrainSettings(role="teacher", data=str(coco), out=str(out), **{**SMALL, **changes})


def student_settings(root, out, **changes):
    "Settings of a student that finds something from the start."
    weights = write_teacher(root / "weights.pth")
    places = dict(data=str(root / "data"), teacher=str(root / "teacher-w0.25"), out=str(out), weights=str(weights))
    return TrainSettings(role="student", **{**places, **SMALL, **changes})


def same_weights(ours, theirs):
    "Whether two models are the same to the last bit."
    ours, theirs = load_model(ours).state_dict(), load_model(theirs).state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A data set with a finished teacher and a finished student, which finds something."
    root = tmp_path_factory.mktemp("finished")
    for split in ("train2017", "val2017"): write_coco(root / "data", split)
    train(teacher_settings(root / "data", root / "teacher-w0.25"))
    train(student_settings(root, root / "student-w0.25"))
    return root


@pytest.mark.slow
def test_run_folder_holds_everything(finished):
    for role in ("teacher", "student"):
        folder = finished / f"{role}-w0.25"
        rows = read_log(folder)
        assert [row["iteration"] for row in rows] == [1, 2, 3]
        assert all({"loss", "lr", "seconds"} <= set(row) for row in rows)
        metrics = json.loads((folder / "metrics.json").read_text())
        assert list(metrics)[:12] == "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()
        assert set(metrics["classes"]) == {"pine", "oak"} and metrics["seconds_per_image"] > 0
        assert {p.name for p in (folder / "figures").iterdir()} == {"losses.png", "detections.png"}
        detections = json.loads((folder / "detections.json").read_text())
        assert {d["category_id"] for d in detections} == ({7, 90} if role == "student" else set())
    assert "loss_kd" in read_log(finished / "student-w0.25")[0]


@pytest.mark.slow
def test_student_without_distillation(finished, tmp_path, capsys):
    train(student_settings(finished, tmp_path / "low", distillation="none"))
    assert ", and learns without it" in capsys.readouterr().out
    _, text = initial_model(prepare(student_settings(finished, tmp_path / "plain", distillation="none", weights=None)))
    assert text == "The student starts from its teacher, and learns without it"
    distilled, alone = read_log(finished / "student-w0.25"), read_log(tmp_path / "low")
    assert "loss_kd" not in alone[0] and alone[0]["loss_fcos_cls_st"] == pytest.approx(distilled[0]["loss_fcos_cls_st"])
    assert load_model(tmp_path / "low").config == load_model(finished / "student-w0.25").config


@pytest.mark.slow
def test_student_without_a_teacher(finished, tmp_path, capsys):
    settings = student_settings(finished, tmp_path / "plain", teacher="without")
    folder = train(settings)
    text = capsys.readouterr().out
    assert "no teacher: it learns from the labels alone" in text and "loaded" in text
    assert "loss_kd" not in read_log(folder)[0]
    assert json.loads((folder / "settings.json").read_text())["teacher"] is None
    assert json.loads((folder / "train.json").read_text())["teacher"] == "without"
    assert load_model(folder).config == load_model(finished / "student-w0.25").config
    assert prepare(settings).state == "finished"
    with pytest.raises(ValueError, match="teacher"): prepare(replace(settings, teacher=str(finished / "teacher-w0.25")))


@pytest.mark.slow
def test_student_of_every_width_without_a_teacher(coco, tmp_path):
    changes = dict(data=str(coco), teacher="without", weights=None, all_widths=True)
    settings = student_settings(tmp_path, tmp_path / "all", **changes)
    metrics = json.loads((train(settings) / "metrics.json").read_text())
    assert set(metrics["widths"]) == {"0.25", "0.5", "0.75", "1"}
    assert "loss_wide" in read_log(tmp_path / "all")[0] and "loss_kd" not in read_log(tmp_path / "all")[0]


@pytest.mark.slow
def test_model_rebuilds_from_its_file_alone(finished):
    config = load_model(finished / "student-w0.25").config
    assert (config.role, config.width, config.neck_channels) == ("student", 0.25, 64)
    assert (config.class_names, config.category_ids) == (("pine", "oak"), (7, 90))
    assert (config.short_side, config.max_side, config.pad) == (128, 213, 64)


@pytest.mark.slow
def test_finished_run_is_shown_and_not_repeated(finished):
    settings = teacher_settings(finished / "data", finished / "teacher-w0.25", workers=1, checkpoint_every=7)
    before = {p: p.stat().st_mtime_ns for p in (finished / "teacher-w0.25").rglob("*")}
    plan = prepare(settings)
    assert plan.state == "finished" and train(settings) == finished / "teacher-w0.25"
    assert before == {p: p.stat().st_mtime_ns for p in (finished / "teacher-w0.25").rglob("*")}


@pytest.mark.slow
@pytest.mark.parametrize("change, message", [
    (dict(seed=5), "seed: 0 there, 5 now"),
    (dict(iterations=2), "recipe.iterations: 3 there, 2 now"),
    (dict(width=0.5), "width: 0.25 there, 0.5 now"),
    (dict(neck_channels=96), "model.neck_channels: 64 there, 96 now"),
    (dict(precision="bf16"), "recipe.precision: fp32 there, bf16 now"),
    (dict(short_side=64, max_side=64), "model.short_side: 128 there, 64 now"),
    (dict(reduced_decoding=True), "reduced_decoding: False there, True now"),
    (dict(resume=False), "resume is false"),
])
def test_folder_of_another_run_is_refused_and_untouched(finished, change, message):
    before = {p: p.read_bytes() for p in (finished / "teacher-w0.25").rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=message):
        prepare(teacher_settings(finished / "data", finished / "teacher-w0.25", **change))
    assert before == {p: p.read_bytes() for p in (finished / "teacher-w0.25").rglob("*") if p.is_file()}


@pytest.mark.slow
def test_folder_of_an_earlier_version_is_known(finished, tmp_path):
    shutil.copytree(finished / "teacher-w0.25", tmp_path / "teacher-w0.25")
    path = tmp_path / "teacher-w0.25" / "settings.json"
    content = json.loads(path.read_text())
    assert content.pop("reduced_decoding") is False
    path.write_text(json.dumps(content))
    settings = teacher_settings(finished / "data", tmp_path / "teacher-w0.25")
    assert prepare(settings).state == "finished"
    with pytest.raises(ValueError, match="reduced_decoding: False there, True now"):
        prepare(replace(settings, reduced_decoding=True))


@pytest.mark.slow
def test_weights_and_teacher_may_be_moved(finished, tmp_path):
    settings = student_settings(finished, finished / "student-w0.25")
    for name in ("weights", "teacher"):
        moved = tmp_path / f"{name}.pth"
        shutil.copy(weights_file(getattr(settings, name)), moved)
        assert prepare(replace(settings, **{name: str(moved)})).state == "finished"
        other = load_model(moved)
        torch.nn.init.zeros_(other.head.cls_logits.bias)
        save_model(moved, other)
        with pytest.raises(ValueError, match=rf"{name}.file: .* now; {name}.sha256: \w+ there, \w+ now"):
            prepare(replace(settings, **{name: str(moved)}))


def test_missing_teacher_is_not_taken_for_another(tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    for split in ("train2017", "val2017"): write_coco(repository / "data" / "trees", split)
    monkeypatch.chdir(repository)
    teacher = write_teacher(tmp_path / "teacher.pth", head_convs=2)
    settings = TrainSettings(role="student", teacher=str(teacher), **SMALL)
    write_json(settings.folder / "settings.json", prepare(settings).description)
    assert prepare(settings).state == "unfinished"
    with pytest.raises(ValueError, match="teacher.file: .* there, runs/trees/teacher-w0.25/.* now"):
        prepare(replace(settings, teacher=None))


@pytest.mark.slow
def test_reduced_decoding(tmp_path, monkeypatch):
    for split in ("train2017", "val2017"): write_coco(tmp_path / "data", split, size=(640, 512))
    asked = []

    def read(*arguments, at_least=None):
        asked.append(at_least)
        return read_image_and_size(*arguments, at_least=at_least)

    monkeypatch.setattr("msad.data.images.read_image_and_size", read)
    settings = teacher_settings(tmp_path / "data", tmp_path / "run", iterations=1, reduced_decoding=True)
    assert "JPEGs are decoded no larger than needed" in str(prepare(settings))
    train(settings)
    assert set(asked[:-4]) == {(128, 213)} and asked[-4:] == [None] * 4  # the last are for the picture of detections
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["reduced_decoding"] is True
    assert prepare(settings).state == "finished"

    student = build_model(ModelConfig("student", 0.25, ("pine", "oak"), (7, 90), 64, 1, 64, 107))
    torch.nn.init.constant_(student.head.cls_logits.bias, -2.9)
    save_model(tmp_path / "student.pth", student)
    common = dict(model=str(tmp_path / "student.pth"), data=str(tmp_path / "data"), workers=0, devices="cpu")
    whole = EvaluateSettings(**common, out=str(tmp_path / "whole"))
    reduced = EvaluateSettings(**common, out=str(tmp_path / "reduced"), reduced_decoding=True)
    ones, others = (json.loads((evaluate(s) / "detections.json").read_text()) for s in (whole, reduced))
    assert ones != others
    for found in (ones, others): assert 560 < max(d["bbox"][0] + d["bbox"][2] for d in found) <= 640
    with pytest.raises(ValueError, match="reduced_decoding: True there, False now"):
        evaluate(replace(whole, out=reduced.out))


@pytest.mark.slow
def test_same_seed_gives_the_same_log_and_another_seed_another(coco, tmp_path):
    logs = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(teacher_settings(coco, tmp_path / name, seed=seed))
        logs[name] = [{k: v for k, v in row.items() if "seconds" not in k} for row in read_log(tmp_path / name)]
    assert logs["a"] == logs["b"] != logs["c"]


@pytest.mark.slow
def test_worker_processes_change_nothing(coco, tmp_path):
    for name, workers in (("here", 0), ("there", 2)):
        train(teacher_settings(coco, tmp_path / name, workers=workers))
    here, there = (load_model(tmp_path / name).state_dict() for name in ("here", "there"))
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_image_of_another_size_than_stated_stops_the_run(coco, tmp_path):
    path = coco / "train2017" / "3.jpg"
    with Image.open(path) as image: image.resize((48, 32)).save(path)
    with pytest.raises(ValueError, match=r"3\.jpg is \[32, 48\], stated \[64, 96\]; correct its 'height' and 'width'"):
        train(teacher_settings(coco, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_image_that_does_not_decode_stops_the_run_and_loses_nothing(coco, tmp_path, workers):
    good = (coco / "train2017" / "3.jpg").read_bytes()
    (coco / "train2017" / "3.jpg").write_bytes(good[: len(good) // 2])
    settings = teacher_settings(coco, tmp_path / "run", iterations=6, workers=workers)
    with pytest.raises(ValueError, match=r"^\S+3\.jpg does not decode") as error: train(settings)
    assert "\n" not in str(error.value)
    # The estimate looks at the first batches too, so the run may stop before its first iteration.
    done = len(read_log(tmp_path / "run"))
    assert done < 2
    (coco / "train2017" / "3.jpg").write_bytes(good)
    train(settings)
    train(replace(settings, out=str(tmp_path / "undisturbed")))
    resumed, undisturbed = (load_model(tmp_path / name).state_dict() for name in ("run", "undisturbed"))
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in resumed)


@pytest.mark.slow
def test_interrupt_within_a_step_leaves_the_last_checkpoint(coco, tmp_path, monkeypatch):
    settings = teacher_settings(coco, tmp_path / "run", iterations=5)
    step = torch.optim.SGD.step
    counted = []

    def interrupted(self, *arguments):
        counted.append(1)
        if len(counted) == 6 + 4: raise KeyboardInterrupt  # after six steps of the estimate, the fourth
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", interrupted)
    with pytest.raises(KeyboardInterrupt): train(settings)
    monkeypatch.undo()
    assert len(read_log(tmp_path / "run")) == 3
    train(settings)
    train(replace(settings, out=str(tmp_path / "undisturbed")))
    resumed, undisturbed = (load_model(tmp_path / name).state_dict() for name in ("run", "undisturbed"))
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in resumed)
    assert [row["iteration"] for row in read_log(tmp_path / "run")] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(coco, tmp_path, capsys):
    settings = teacher_settings(coco, tmp_path / "run", iterations=6, keep_checkpoints=2)
    train(settings)
    before = load_model(tmp_path / "run").state_dict()
    newest, second = list_checkpoints(tmp_path / "run")
    assert (newest.stem, second.stem) == ("00000006", "00000004")
    (tmp_path / "run" / "metrics.json").unlink()
    newest.write_bytes(newest.read_bytes()[:5000])
    capsys.readouterr()
    train(settings)
    assert f"{newest} is damaged; going on from iteration 4" in capsys.readouterr().out
    after = load_model(tmp_path / "run").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    (tmp_path / "run" / "metrics.json").unlink()
    for path in list_checkpoints(tmp_path / "run"): path.write_bytes(b"")
    with pytest.raises(ValueError, match="out: all checkpoints in .*checkpoints are damaged"): train(settings)


@pytest.mark.slow
def test_finished_run_can_be_made_longer(coco, tmp_path):
    settings = teacher_settings(coco, tmp_path / "run", iterations=2)
    train(settings)
    longer = replace(settings, iterations=4, checkpoint_every=1, workers=1)
    assert prepare(longer).state == "unfinished"
    train(longer)
    assert [row["iteration"] for row in read_log(tmp_path / "run")] == [1, 2, 3, 4]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["iterations"] == 4
    assert prepare(longer).state == "finished"


@pytest.mark.slow
def test_evaluations_keep_the_best(coco, tmp_path):
    train(teacher_settings(coco, tmp_path / "plain", iterations=4))
    folder = train(teacher_settings(coco, tmp_path / "run", iterations=4, eval_every=2))
    rows = read_log(folder, "evaluations.jsonl")
    assert [row["iteration"] for row in rows] == [2, 4] and "seconds_per_image" in rows[0]
    assert same_weights(folder, tmp_path / "plain")  # evaluating changes nothing
    assert same_weights(folder, folder / "model_best.pth") == (rows[1]["AP"] > rows[0]["AP"])
    assert list((folder / "tensorboard").iterdir())

    # The record decides: what comes after better ones does not take their place, and what comes after worse ones does.
    for earlier, best in ((101, folder / "model_best.pth"), (-1, tmp_path / "-1")):
        longer = shutil.copytree(folder, tmp_path / str(earlier))
        text = "".join(json.dumps({**row, "AP": earlier}) + "\n" for row in rows)
        (longer / "evaluations.jsonl").write_text(text)
        train(teacher_settings(coco, longer, iterations=6, eval_every=2))
        assert not same_weights(longer, folder) and same_weights(longer / "model_best.pth", best)


@pytest.mark.slow
def test_half_precision_trains_alike(finished, tmp_path):
    weights = str(finished / "teacher-w0.25")
    common = dict(weights=weights, iterations=6, batch_norm="fixed")
    full = train(teacher_settings(finished / "data", tmp_path / "fp32", **common))
    half = train(teacher_settings(finished / "data", tmp_path / "bf16", **common, precision="bf16"))
    losses = [[row["loss"] for row in read_log(folder)] for folder in (full, half)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_unusable_boxes_are_counted_aloud(coco, tmp_path):
    path = coco / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    for i, box in enumerate(([1, 1, float("nan"), 5], [1, 1, 0, 5], [500, 1, 5, 5], [90, 1, 50, 5])):
        content["annotations"].append({"id": 100 + i, "image_id": 1, "category_id": 7, "bbox": box, "iscrowd": 0})
    path.write_text(json.dumps(content))
    plan = prepare(teacher_settings(coco, tmp_path / "run"))
    assert "boxes that training drops as unusable: 3, or cuts at the border: 1" in str(plan)


# A run belongs to the content of its data, and not to their path.


def change_box(root, split):
    path = root / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"][0] += 1
    path.write_text(json.dumps(content))


def add_image(root, split):
    write_coco(root, split, images=5)


def replace_image(root, split):
    path = root / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    content["images"][0]["width"] = 98
    path.write_text(json.dumps(content))
    Image.new("RGB", (98, 64)).save(root / split / "1.jpg")


@pytest.mark.slow
@pytest.mark.parametrize("change, split, message", [
    (change_box, "train2017", "the annotations of train2017 changed since"),
    (change_box, "val2017", "the annotations of val2017 changed since"),
    (add_image, "train2017", "the annotations and image names and image sizes of train2017 changed since"),
    (replace_image, "val2017", "the image sizes of val2017 changed since"),
])
def test_changed_data_are_another_run(finished, tmp_path, change, split, message):
    data = shutil.copytree(finished / "data", tmp_path / "data")
    folders = [shutil.copytree(finished / name, tmp_path / name) for name in ("teacher-w0.25", "student-w0.25")]
    settings = teacher_settings(data, folders[0])
    assert prepare(settings).state == "finished"  # the data moved and are the same
    change(data, split)
    for changed in (settings, replace(settings, iterations=6)):
        with pytest.raises(ValueError, match=f"out: .*teacher-w0.25 holds another run .*{message}.*give another out"):
            prepare(changed)
    described = json.loads((folders[0] / "settings.json").read_text())
    write_json(folders[0] / "settings.json", {name: described[name] for name in described if "content" not in name})
    with pytest.raises(ValueError, match="holds another run .data: .*finished.* there, .* now"): prepare(settings)
    earlier = {name: described[name] for name in described if "content" not in name}
    write_json(folders[0] / "settings.json", {**earlier, "data": str(data)})
    assert "an earlier version recorded the run without fingerprints of its data" in str(prepare(settings))
    write_json(folders[0] / "settings.json", {**described, "data": str(data)})
    if split == "train2017": return
    with pytest.raises(ValueError, match=f"runs: {message} .*was evaluated"): run_images(folders[0])
    assert len(finished_runs(folders)) == 2
    write_json(folders[0] / "settings.json", prepare(replace(settings, out=str(tmp_path / "new"))).description)
    with pytest.raises(ValueError, match=f"different photographs .*{message}"):
        finished_runs(folders[::-1])


def test_a_run_is_evaluated_on_its_own_data(coco, tmp_path):
    file = write_teacher(tmp_path / "run" / "model_final.pth")
    assert EvaluateSettings(model=str(file)).data == "trees"
    run = {"data": str(coco), "train_split": "val2017", "val_split": "train2017", "val_images": str(coco / "train2017")}
    (tmp_path / "run" / "settings.json").write_text(json.dumps(run))
    for model in (file, file.parent):
        settings = EvaluateSettings(model=str(model))
        assert {name: getattr(settings, name) for name in run if name != "train_split"} == {
            name: value for name, value in run.items() if name != "train_split"
        }
    other = EvaluateSettings(model=str(file), val_split="val2017")
    assert (other.data, other.val_split, other.val_images) == (str(coco), "val2017", None)
    assert EvaluateSettings(model=str(file), data="trees").val_split is None
    named = EvaluateSettings(model=str(file), val_annotations=str(coco / "annotations/instances_val2017.json"))
    assert (named.data, named.val_split) == (str(coco), None)


def test_a_model_that_is_not_there_yet(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/settings.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="run is not finished: the command that began it goes on"):
        detector_file(tmp_path / "run")
    with pytest.raises(ValueError, match="model is a Linear: give a run folder, a file, or a bundled name"):
        detector_file(torch.nn.Linear(1, 1))


@pytest.mark.slow
def test_evaluation_of_changed_data(finished, tmp_path):
    data = shutil.copytree(finished / "data", tmp_path / "data")
    size = dict(short_side=128, max_side=213, workers=0, devices="cpu")
    settings = EvaluateSettings(model=str(finished / "student-w0.25"), data=str(data), out=str(tmp_path / "e"), **size)
    evaluate(settings)
    evaluate(settings)
    change_box(data, "train2017")
    evaluate(settings)  # not of these
    change_box(data, "val2017")
    with pytest.raises(ValueError, match="the annotations of val2017 changed since"): evaluate(settings)


@pytest.mark.slow
def test_default_teacher_of_data_that_changed(finished, tmp_path, monkeypatch):
    (tmp_path / "data" / "trees" / "annotations").mkdir(parents=True)  # as a repository has it
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished / "teacher-w0.25", tmp_path / "runs" / "data" / "teacher-w0.25")
    data = shutil.copytree(finished / "data", tmp_path / "moved" / "data")
    settings = TrainSettings(role="student", data=str(data), **SMALL)
    assert prepare(settings).teacher == tmp_path / "runs" / "data" / "teacher-w0.25" / "model_final.pth"
    change_box(data, "val2017")
    prepare(settings)
    described = json.loads((tmp_path / "runs/data/teacher-w0.25/settings.json").read_text())
    write_json(tmp_path / "runs/data/teacher-w0.25/settings.json", {**described, "data": str(data)})
    change_box(data, "train2017")
    with pytest.raises(ValueError, match="was trained on other data: the annotations of train2017 changed since; give"):
        prepare(settings)


# Photographs without objects.


def add_empty_images(root, split, count):
    path = root / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    for i in range(101, 101 + count):
        content["images"].append({"id": i, "file_name": f"{i}.jpg", "width": 96, "height": 64})
        Image.new("RGB", (96, 64), (0, i, 0)).save(root / split / f"{i}.jpg")
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("count, change, learned", [
    (3, {}, 3), (9, {}, 4), (3, dict(empty_images=False), 0), (3, dict(recipe="published", lr=1e-3), 0),
    (3, dict(recipe="published", empty_images=True), 3),
])
def test_photographs_without_objects(coco, tmp_path, count, change, learned):
    add_empty_images(coco, "train2017", count)
    plan = prepare(teacher_settings(coco, tmp_path / "run", **{"recipe": "small", **change}))
    assert f"photographs without objects (empty_images): {learned} of {count} are learned from" in str(plan)
    assert len(training_indices(plan.images, plan.recipe.empty_images)) == 4 + learned
    assert plan.recipe.empty_images == (learned > 0)


def test_without_such_photographs_nothing_differs(coco, tmp_path):
    plans = [prepare(teacher_settings(coco, tmp_path / "run", empty_images=empty)) for empty in (True, False)]
    assert plans[0].description == plans[1].description and "photographs without objects" not in str(plans[0])
    with pytest.raises(ValueError, match="empty_images is 1: write True or False"):
        teacher_settings(coco, tmp_path / "run", empty_images=1)


@pytest.mark.slow
def test_batches_without_any_object_are_learned_from(finished, tmp_path):
    data = shutil.copytree(finished / "data", tmp_path / "data")
    add_empty_images(data, "train2017", 4)
    common = dict(empty_images=True, batch_size=1, iterations=8, short_side=160, max_side=213)
    teacher = train(teacher_settings(data, tmp_path / "teacher", **common))
    places = dict(data=str(data), teacher=str(teacher), weights=None)
    student = train(replace(student_settings(finished, tmp_path / "student", **common), **places))
    for folder in (teacher, student):
        rows = read_log(folder)
        assert len(rows) == 8 and all(0 < row["loss"] < 100 for row in rows)
        without = [all(value == 0 for name, value in row.items() if name.startswith("loss_fcos_loc")) for row in rows]
        assert sum(without) == 4


# Bad input: each is a sentence before any work, and nothing is written.


@pytest.mark.parametrize("change, message", [
    (dict(width=0.3), "width is 0.3: choose one of 0.25, 0.35, 0.5, 0.75, 1.0"),
    (dict(neck_channels=100), "neck_channels is 100"),
    (dict(iterations=0), "iterations is 0"),
    (dict(batch_size=2.5), "batch_size is 2.5"),
    (dict(lr=float("nan")), "lr is nan"),
    (dict(lr=0), "lr is 0: choose a number above 0"),
    (dict(alpha=0.1), "alpha is 0.1: only a student has a distillation"),
    (dict(devices="gpu"), "devices is 'gpu'"),
    (dict(devices=0), "devices is 0"),
    (dict(devices=3), "batch_size is 2, to be shared by processes .3.*choose a multiple of 3"),
    (dict(accumulate=4), "choose a multiple of 4"),
    (dict(precision="fp8"), "precision is 'fp8': choose one of fp32, bf16, fp16"),
    (dict(batch_norm="frozen"), "batch_norm is 'frozen': choose one of trained, fixed"),
    (dict(eval_every=0), "eval_every is 0"),
    (dict(nnodes=2), "rdzv_endpoint is missing: write HOST:PORT"),
    (dict(nnodes=2, node_rank=2, rdzv_endpoint="a:1"), "node_rank is 2 of 2 nnodes"),
    (dict(short_side=64, max_side=64, accumulate=2), "one value a channel"),
    (dict(short_side=80, max_side=80, accumulate=2), "one value a channel"),
    (dict(workers=-1), "workers is -1"),
    (dict(resume="false"), "resume is 'false': write True or False"),
    (dict(train_split=2017), "train_split is 2017"),
    (dict(short_side=200, max_side=100), "short_side is 200 and max_side 100"),
    (dict(data="nowhere"), "data folder .*nowhere does not exist"),
    (dict(train_split="train2016"), "train2016"),
    (dict(weights="nowhere.pth"), "weights: there is no file .*nowhere.pth"),
])
def test_wrong_setting(coco, tmp_path, change, message):
    changed = {**SMALL, "data": str(coco), **change}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(TrainSettings(role="teacher", out=str(tmp_path / "run"), **changed))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change, message", [
    (dict(role="pupil"), "role is 'pupil': choose one of teacher, student"),
    (dict(width=-1), "width is -1: choose one of 0.25, 0.35, 0.5, 0.75, 1.0"),
    (dict(finest_stride=3), "finest_stride is 3: choose one of 2, 4, 8"),
    (dict(precision="fp8"), "precision is 'fp8': choose one of fp32, bf16, fp16"),
    (dict(batch_norm="frozen"), "batch_norm is 'frozen': choose one of trained, fixed"),
])
def test_wrong_choice_is_refused_before_any_file_is_read(change, message):
    with pytest.raises(ValueError, match=message): TrainSettings(**{"role": "teacher", **change})


@pytest.mark.parametrize("program", [train_program, evaluate_program])
def test_programs_refuse_with_a_sentence(program, tmp_path, monkeypatch):
    (tmp_path / "settings.json").write_text('{"widht": 0.5}')
    for file, message in (("nowhere", "nowhere.json does not exist"), ("settings", "'widht' is no parameter")):
        monkeypatch.setattr("sys.argv", ["program", str(tmp_path / f"{file}.json")])
        with pytest.raises(SystemExit, match=message): program.main()


def test_splits_with_other_categories(coco, tmp_path):
    write_coco(coco, "val2017", ids=(7, 91))
    message = "val_split: .* has the categories 7 pine, 91 oak and .* has 7 pine, 90 oak; give both"
    with pytest.raises(ValueError, match=message):
        prepare(teacher_settings(coco, tmp_path / "run"))


@pytest.mark.slow
def test_out_is_a_file_or_holds_something_else(coco, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"): prepare(teacher_settings(coco, tmp_path / "file"))
    with pytest.raises(ValueError, match="out: .*file/run cannot be written .*; give another out"):
        train(teacher_settings(coco, tmp_path / "file" / "run"))
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "model_best.pth").write_text("")
    with pytest.raises(ValueError, match="holds model_best.pth but no settings.json"):
        prepare(teacher_settings(coco, tmp_path / "best"))
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match="holds metrics.json but no settings.json"):
        prepare(teacher_settings(coco, tmp_path / "else"))
    (tmp_path / "else" / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"): prepare(teacher_settings(coco, tmp_path / "else"))


def test_missing_teacher_is_trained_first(coco, tmp_path):
    given = dict(SMALL, recipe="auto", flips="all", lr=0.5, distillation="published", alpha=0.1)
    plan = prepare(TrainSettings(role="student", data=str(coco), out=str(tmp_path / "run"), **given))
    theirs = plan.teacher_plan
    assert plan.teacher == default_folder(coco, "teacher", 0.25) / "model_final.pth"
    assert theirs.settings.folder == plan.teacher.parent and theirs.recipe.flips == "all"
    assert (theirs.config.neck_channels, theirs.config.short_side) == (64, 128)
    assert theirs.recipe.lr != 0.5 and theirs.recipe.iterations != 3
    assert "it is trained first" in str(plan) and not (tmp_path / "run").exists()


def test_missing_teacher_on_the_bundled_photographs_is_trained_first(tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    write_coco(repository / "data" / "trees", "train2017")
    write_coco(repository / "data" / "trees", "val2017")
    monkeypatch.chdir(repository)
    plan = prepare(TrainSettings(role="student", **{**SMALL, "neck_channels": 96}))
    assert plan.teacher == default_folder("trees", "teacher", 0.25) / "model_final.pth"
    assert plan.teacher_plan.config.neck_channels == plan.config.neck_channels == 96
    assert "it is trained first" in str(plan) and not (repository / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("change, message", [
    (dict(finest_stride=8), "its finest_stride is 4 and the student's 8"),
    (dict(teacher="student-w0.25"), "holds a student; give the file of a teacher"),
    (dict(teacher="nowhere"), "teacher: there is no file"),
])
def test_teacher_that_does_not_fit(finished, tmp_path, change, message):
    change = {**change, **({"teacher": str(finished / change["teacher"])} if "teacher" in change else {})}
    changed = {**SMALL, "data": str(finished / "data"), "teacher": str(finished / "teacher-w0.25"), **change}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare(TrainSettings(role="student", out=str(tmp_path / "run"), **changed))


@pytest.mark.slow
def test_default_teacher_of_other_data_with_the_same_name(finished, tmp_path, monkeypatch):
    (tmp_path / "data" / "trees" / "annotations").mkdir(parents=True)  # as a repository has it
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished / "teacher-w0.25", tmp_path / "runs" / "data" / "teacher-w0.25")
    settings = TrainSettings(role="student", data=str(finished / "data"), **SMALL)
    assert prepare(settings).teacher == tmp_path / "runs" / "data" / "teacher-w0.25" / "model_final.pth"
    for split in ("train2017", "val2017"): write_coco(tmp_path / "other" / "data", split, images=5)
    with pytest.raises(ValueError, match="teacher: .*was trained on .*finished.*/data and not on .*other/data; give"):
        prepare(replace(settings, data=str(tmp_path / "other" / "data")))


@pytest.mark.slow
def test_weights_of_another_kind_than_the_teacher(finished, tmp_path):
    weights = write_teacher(tmp_path / "weights.pth", normalization=CAFFE)
    places = dict(data=str(finished / "data"), teacher=str(finished / "teacher-w0.25"), weights=str(weights))
    run = train(TrainSettings(role="student", out=str(tmp_path / "run"), **{**SMALL, **places, "iterations": 2}))
    assert load_model(run).config.normalization == CAFFE  # each sees the pixels that it was trained with
    assert load_model(finished / "teacher-w0.25").config.normalization != CAFFE


@pytest.mark.slow
def test_teacher_of_other_classes(finished, tmp_path):
    for split in ("train2017", "val2017"): write_coco(tmp_path / "data", split, names=("pine", "elm"))
    with pytest.raises(ValueError, match="its class_names is pine, oak and the student's pine, elm"):
        places = dict(data=str(tmp_path / "data"), teacher=str(finished / "teacher-w0.25"))
        prepare(TrainSettings(role="student", **places, **SMALL))


@pytest.mark.slow
def test_fine_tuning_prints_what_was_loaded(finished, tmp_path, capsys):
    for split in ("train2017", "val2017"): write_coco(tmp_path / "data", split, ids=(1,), names=("elm",))
    settings = teacher_settings(tmp_path / "data", tmp_path / "run", weights=str(finished / "student-w0.25"))
    train(settings)
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("started anew", "head.cls_logits", "fusion.score"))
    assert read_weights(tmp_path / "run").config.class_names == ("elm",)


@pytest.mark.slow
def test_evaluation_of_a_file(finished, tmp_path):
    shutil.copy(finished / "student-w0.25" / "model_final.pth", tmp_path / "student.pth")
    places = dict(model=str(tmp_path / "student.pth"), data=str(finished / "data"), out=str(tmp_path / "run"))
    settings = EvaluateSettings(**places, workers=0, devices="cpu")
    folder = evaluate(settings)
    theirs, ours = (json.loads((f / "metrics.json").read_text()) for f in (finished / "student-w0.25", folder))
    for metrics in (theirs, ours): metrics.pop("seconds_per_image")
    assert theirs == {**ours, "iterations": 3} and 0 < theirs["AR100"] < 100
    larger = evaluate(replace(settings, short_side=192, out=str(tmp_path / "larger")))
    assert json.loads((larger / "settings.json").read_text())["model"]["max_side"] == round(213 * 192 / 128)
    with pytest.raises(ValueError, match="model.short_side: 128 there, 192 now"):
        evaluate(replace(settings, short_side=192))


def test_evaluation_of_the_bundled_student(tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    for split in ("train2017", "val2017"): write_coco(repository / "data" / "trees", split)
    monkeypatch.chdir(repository)
    with pytest.raises(FileNotFoundError, match="model: there is no file .*trees"): evaluate(EvaluateSettings())
    config = ModelConfig("student", 0.25, ("pine", "oak"), (7, 90), 64, 1, 128, 213)
    save_model(repository / "models" / "trees.pth", build_model(config))
    folder = evaluate(EvaluateSettings(workers=0))
    assert folder == default_folder("trees", "evaluate-student", 0.25) and (folder / "metrics.json").exists()
    with pytest.raises(FileNotFoundError, match="bundled are trees"): evaluate(EvaluateSettings(model="oaks"))


@pytest.mark.slow
def test_labels_are_ranks_whatever_the_ids_of_another_split(finished, tmp_path):
    write_coco(tmp_path / "data", "val2017", ids=(1, 3))
    settings = EvaluateSettings(
        model=str(finished / "student-w0.25"), data=str(tmp_path / "data"), out=str(tmp_path / "run"), workers=0
    )
    folder = evaluate(settings)
    assert {d["category_id"] for d in json.loads((folder / "detections.json").read_text())} == {1, 3}


@pytest.mark.slow
def test_evaluation_on_other_classes(finished, tmp_path):
    write_coco(tmp_path / "data", "val2017", ids=(1,), names=("elm",))
    places = dict(model=str(finished / "student-w0.25"), data=str(tmp_path / "data"), out=str(tmp_path / "run"))
    settings = EvaluateSettings(**places)
    with pytest.raises(ValueError, match="has the classes pine, oak and .* has elm"): evaluate(settings)


def test_the_order_of_the_classes_is_told_from_other_classes(tmp_path):
    config = ModelConfig("teacher", 0.25, ("pine", "oak"), (1, 2), 64, 1, 128, 213)
    save_model(tmp_path / "teacher.pth", build_model(config))
    for split in ("train2017", "val2017"): write_coco(tmp_path / "data", split, 10, ids=(1, 2), names=("oak", "pine"))
    data, file = str(tmp_path / "data"), str(tmp_path / "teacher.pth")
    with pytest.raises(ValueError, match="has the classes pine, oak and .* has oak, pine; only their order differs"):
        evaluate(EvaluateSettings(model=file, data=data))
    with pytest.raises(ValueError, match="class_names is pine, oak and the student's oak, pine; only their order"):
        prepare(TrainSettings(role="student", data=data, teacher=file, out=str(tmp_path / "run")))
    write_coco(tmp_path / "data", "val2017", 10, ids=(2, 1), names=("oak", "pine"))
    with pytest.raises(ValueError, match="has the categories 1 pine, 2 oak and .* has 1 oak, 2 pine; give both"):
        prepare(TrainSettings(role="teacher", data=data, out=str(tmp_path / "run"), **SMALL))


def test_long_lists_of_classes_are_told_apart(tmp_path):
    names = [f"species {i}" for i in range(20)]
    config = ModelConfig("teacher", 0.25, tuple(names), tuple(range(20)), 64, 1, 128, 213)
    save_model(tmp_path / "teacher.pth", build_model(config))
    renamed = [*names[:12], "oak", *names[13:]]
    for split in ("train2017", "val2017"): write_coco(tmp_path / "data", split, 10, ids=range(20), names=renamed)
    data, file = str(tmp_path / "data"), str(tmp_path / "teacher.pth")
    theirs, ours = r"… 'species 12' \(number 13 of 20\)", r"… 'oak' \(number 13 of 20\)"
    with pytest.raises(ValueError, match=f"has the classes {theirs} and .*val2017.json has {ours}; give a model"):
        evaluate(EvaluateSettings(model=file, data=data))
    with pytest.raises(ValueError, match=f"its class_names is {theirs} and the student's {ours}; they must be"):
        prepare(TrainSettings(role="student", data=data, teacher=file, out=str(tmp_path / "run")))
    settings = TrainSettings(role="teacher", data=data, out=str(tmp_path / "run"), **SMALL)
    description = prepare(settings).description
    description["model"]["class_names"] = names
    write_json(settings.folder / "settings.json", description)
    with pytest.raises(ValueError, match=f"model.class_names: {theirs} there, {ours} now"): prepare(settings)


@pytest.mark.slow
def test_validation_without_objects_gives_null(coco, tmp_path):
    path = coco / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": []}))
    folder = train(teacher_settings(coco, tmp_path / "run"))
    assert json.loads((folder / "metrics.json").read_text())["AP"] is None


@pytest.mark.slow
def test_runs_to_compare(finished, coco, tmp_path):
    assert len(finished_runs([finished / "teacher-w0.25", finished / "student-w0.25"])) == 2
    write_coco(coco, "val2017", images=5)
    train(teacher_settings(coco, tmp_path / "other"))
    with pytest.raises(ValueError, match=r"different photographs \(val_split|different photographs \(data: .*finished"):
        finished_runs([finished / "teacher-w0.25", tmp_path / "other"])
    with pytest.raises(FileNotFoundError, match="no settings.json"): finished_runs([tmp_path])


def test_published_teacher_size_is_kept(tmp_path):
    classes = dict(class_names=("pine", "oak"), category_ids=(7, 90))
    config = ModelConfig("teacher", 0.25, neck_channels=64, head_convs=1, pad=256, **classes)
    save_model(tmp_path / "teacher.pth", build_model(config))
    for split in ("train2017", "val2017"): write_coco(tmp_path / "data", split)
    places = dict(data=str(tmp_path / "data"), teacher=str(tmp_path / "teacher.pth"))
    config = prepare(TrainSettings(role="student", **places)).config
    assert (config.pad, config.head_convs, config.short_side, config.max_side) == (256, 1, 800, 1333)


def test_published_teacher_of_other_data_has_classes_without_names(tmp_path):
    classes = dict(class_names=("class 0", "class 1"), category_ids=(1, 2))
    config = ModelConfig("teacher", 0.25, neck_channels=64, head_convs=1, short_side=128, max_side=213, **classes)
    save_model(tmp_path / "teacher.pth", build_model(config))
    for split in ("train2017", "val2017"): write_coco(tmp_path / "data", split)
    places = dict(data=str(tmp_path / "data"), teacher=str(tmp_path / "teacher.pth"))
    assert prepare(TrainSettings(role="student", **places)).config.class_names == ("pine", "oak")
