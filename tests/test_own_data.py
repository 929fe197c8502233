"From photographs to a student: how samples vary, what follows from the data, minutes, patience, one command."

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_coco
from PIL import Image
from torchvision import tv_tensors

from msad.cli import main
from msad.data.images import CocoImages
from msad.data.loaders import TrainImages
from msad.data.transforms import TrainTransform, Variety, make_mosaic, needed_size
from msad.engine.recipe import adapt
from msad.engine.trainer import make_transform
from msad.engine.weights import load_model
from msad.evaluation.coco_metrics import evaluate_coco
from msad.evaluation.evaluator import evaluate_model
from msad.runs.auto import auto_recipe, images_to_show, smallest_class
from msad.runs.folders import default_folder
from msad.runs.plan import TEACHER_SHARE, prepare
from msad.runs.settings import TrainSettings
from msad.runs.train import main as train_main
from msad.runs.train import train

CELLS, TREES = Path(__file__).parent / "layouts", Path(__file__).parents[1] / "data/trees"
VARIED = Variety(scale_jitter=0.5, photometric=0.5, iou_crop=0.5, mosaic=0.5)


def dark_blocks(width=240, height=160, seed=0):
    "A white picture with dark blocks that do not touch, and a target whose boxes are the blocks."
    rng, pixels, boxes = np.random.default_rng(seed), np.full((height, width, 3), 255, dtype=np.uint8), []
    for x in range(10, width - 40, 50):
        for y in range(10, height - 40, 50):
            w, h = rng.integers(15, 35, size=2)
            pixels[y : y + h, x : x + w] = 0
            boxes.append([x, y, x + w, y + h])
    boxes = tv_tensors.BoundingBoxes(np.array(boxes, dtype=np.float32), format="XYXY", canvas_size=(height, width))
    target = dict(boxes=boxes, labels=torch.arange(len(boxes)), iscrowd=torch.zeros(len(boxes), dtype=torch.bool))
    return Image.fromarray(pixels), {**target, "image_id": seed, "size": (height, width)}


def assert_boxes_are_dark(image, target):
    "Each box is on its block: dark inside, and bright just outside wherever there is a picture outside."
    grey = image.float().mean(0)
    assert len(target["boxes"]) == len(target["labels"])
    for x1, y1, x2, y2 in target["boxes"].round().int().tolist():
        if min(x2 - x1, y2 - y1) < 6: continue
        assert grey[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].max() < 60


@pytest.mark.parametrize("variety", [
    Variety(scale_jitter=0.6), Variety(iou_crop=1.0), Variety(scale_jitter=0.3, iou_crop=1.0), Variety(photometric=1.0),
])
def test_boxes_follow_their_objects(variety):
    image, target = dark_blocks()
    transform = TrainTransform(100, 300, "all", seed=3, variety=variety)
    shapes, counts = set(), set()
    for epoch in range(30):
        sample, out = transform(image, target, epoch)
        if not variety.photometric: assert_boxes_are_dark(sample, out)
        assert len(out["boxes"]) == len(out["labels"]) and out["size"] == (160, 240)
        shapes.add(tuple(sample.shape[1:]))
        counts.add(len(out["boxes"]))
    assert (shapes == {(100, 150)}) == bool(variety.scale_jitter)
    assert (len(counts) > 1) == bool(variety.scale_jitter or variety.iou_crop)


def test_colours_change():
    image, target = dark_blocks()
    plain, varied = (TrainTransform(100, 300, seed=3, variety=Variety(photometric=part)) for part in (0.0, 1.0))
    for epoch in range(5):
        (one, boxes), (other, same) = plain(image, target, epoch), varied(image, target, epoch)
        assert not torch.equal(one, other) and torch.equal(boxes["boxes"], same["boxes"])


def test_a_window_of_a_large_scale_and_of_a_small_one():
    image, target = dark_blocks()
    sizes = []
    for epoch in range(60):
        _, out = TrainTransform(160, 400, variety=Variety(scale_jitter=1.0))(image, target, epoch)
        inside = [(x2 - x1) for x1, _, x2, _ in out["boxes"].tolist() if x1 > 0 and x2 < 240]
        sizes.append(np.mean(inside) if inside else np.nan)
    assert np.nanmin(sizes) < 0.6 * 25 and np.nanmax(sizes) > 1.7 * 25


def test_mosaics_are_of_four_and_end():
    samples = []
    transform = TrainTransform(160, 400, "all", variety=Variety(scale_jitter=0.3, mosaic=1.0, mosaic_epochs=2))
    for seed in range(4): samples.append(transform(*dark_blocks(seed=seed), epoch=0))
    for number in range(20):
        image, target = make_mosaic(samples, np.random.default_rng(number))
        assert image.shape == samples[0][0].shape and image.dtype == torch.uint8
        assert_boxes_are_dark(image, target)
        assert (target["image_id"], target["size"]) == (0, (160, 240))
        assert target["boxes"].canvas_size == tuple(image.shape[1:])
    assert [transform.mosaic_rng(epoch, 5) is None for epoch in range(4)] == [False, False, True, True]


def test_a_mosaic_of_photographs_of_other_shapes_and_without_objects(tmp_path):
    write_coco(tmp_path, "train2017")
    images = CocoImages(tmp_path, "train2017")
    for box in (images.owner == 1).nonzero(): images.iscrowd[box] = True
    wide, tall = (TrainTransform(64, 96, variety=Variety(mosaic=1.0))(*images[0], epoch) for epoch in (0, 1))
    tall = (tv_tensors.Image(torch.zeros(3, 90, 20, dtype=torch.uint8)), {**tall[1], "boxes": tall[1]["boxes"][:0]})
    tall[1]["labels"] = tall[1]["labels"][:0]
    mixed, target = make_mosaic([wide, tall, tall, tall], np.random.default_rng(0))
    assert mixed.shape == wide[0].shape and len(target["boxes"]) == len(target["labels"])


def test_varied_samples_depend_on_seed_epoch_and_image_alone():
    images = CocoImages(TREES, "train2017")
    samples = [TrainImages(images, TrainTransform(64, 107, "all", 4, VARIED), range(len(images))) for _ in range(2)]
    for epoch, index in ((0, 3), (0, 4), (7, 3), (1, 120)):
        (one, target), state = samples[0][epoch, index], torch.get_rng_state()
        torch.rand(17)
        other, other_target = samples[1][epoch, index]
        assert torch.equal(one, other) and torch.equal(target["boxes"], other_target["boxes"])
        torch.set_rng_state(state)
        samples[0][epoch + 1, index]
        assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(samples[0][0, 3][0], samples[0][1, 3][0])


def test_the_published_samples_are_as_they_were():
    "Sizes, sums of pixels and of box sides were taken before samples could vary in other ways."
    published = (((3, 192, 192), 16063865, 214.5), ((3, 192, 192), 15559665, 5703.8), ((3, 177, 177), 11523362, 2040.3))
    images = CocoImages(TREES, "train2017")
    transform = TrainTransform(192, 320, "all", seed=1)
    for (epoch, index), (shape, pixels, sides) in zip(((0, 0), (3, 7), (11, 100)), published, strict=True):
        sample, out = transform(*images[index], epoch)
        assert tuple(sample.shape) == shape and float(out["boxes"].sum()) == pytest.approx(sides, abs=0.1)
        assert int(sample.sum()) == pytest.approx(pixels, rel=1e-4)  # what decodes a JPEG may round in another way


# --- what follows from the data


def plan_of(data, out, **given):
    return prepare(TrainSettings(role="teacher", data=str(data), out=str(out), devices="cpu", **given))


def test_every_choice_stands_in_the_plan_with_its_reason(tmp_path):
    plan = plan_of(CELLS, tmp_path / "run")
    lines = str(plan).splitlines()
    start = lines.index("what follows from the data and the device (a parameter of that name changes it):")
    told = [line.split(":")[0].split() for line in lines[start + 1 :] if line.startswith("  ")]
    values = {**vars(plan.config), **vars(plan.recipe)}
    assert {name for name, _ in told} >= {"short_side", "finest_stride", "iterations", "batch_size", "lr", "warmup"}
    assert all(float(value) == pytest.approx(values[name], rel=1e-4) for name, value in told)
    assert (plan.config.short_side, plan.config.neck_channels) == (192, plan.config.neck_channels)


@pytest.mark.parametrize("name, value", [
    ("short_side", 256), ("finest_stride", 8), ("iterations", 7), ("batch_size", 2), ("lr", 0.5), ("warmup", 3),
])
def test_what_is_given_is_taken_and_needs_no_reason(tmp_path, name, value):
    plan = plan_of(CELLS, tmp_path / "run", **{name: value})
    assert {**vars(plan.config), **vars(plan.recipe)}[name] == value and name not in plan.reasons


def test_the_size_of_the_data_names_the_recipe(tmp_path):
    assert plan_of(CELLS, tmp_path / "run").recipe.optimizer == "adamw"
    assert plan_of(CELLS, tmp_path / "run", recipe="published").recipe.iterations == 90_000
    assert plan_of(CELLS, tmp_path / "run", recipe="small").recipe.iterations == 600
    assert plan_of("trees", tmp_path / "run").recipe.iterations == 600


def test_small_objects_ask_for_a_fine_grid(tmp_path):
    strides = []
    for part in (0.4, 0.15, 0.06):
        root = tmp_path / str(part)
        write_coco(root, "train2017", size=(200, 100), boxes_per_image=1)
        file = root / "annotations/instances_train2017.json"
        dataset = json.loads(file.read_text())
        for box in dataset["annotations"]: box["bbox"] = [20, 20, 100 * part, 100 * part]
        file.write_text(json.dumps(dataset))
        images = CocoImages(root, "train2017")
        assert smallest_class(images)[1] == pytest.approx(part, abs=1e-6)
        plan = plan_of(root, root / "run", train_split="train2017", val_split="train2017", short_side=192)
        strides.append(plan.config.finest_stride)
    assert strides == [8, 4, 2]


def test_crowded_objects_ask_for_a_fine_grid(tmp_path):
    "All are 32 pixels large in the low view, four cells of 8; their middles are 40 or 8 pixels apart."
    for gap, stride in ((40, 8), (8, 4)):
        root = tmp_path / str(gap)
        write_coco(root, "train2017", images=1, size=(192, 192))
        file = root / "annotations/instances_train2017.json"
        dataset = json.loads(file.read_text())
        corners = [(16 + 2 * gap * column, 16 + 2 * gap * row) for row in range(2) for column in range(2)]
        boxes = [[x, y, 64 - 2 * i, 64 - 2 * i] for i, (x, y) in enumerate(corners)]
        dataset["annotations"] = [{**dataset["annotations"][0], "id": i, "bbox": box} for i, box in enumerate(boxes)]
        file.write_text(json.dumps(dataset))
        plan = plan_of(root, root / "run", train_split="train2017", val_split="train2017", short_side=192)
        assert plan.config.finest_stride == stride


def test_fewer_photographs_are_seen_more_often():
    shown = [images_to_show(count) for count in (10, 100, 1000, 10_000, 117_266)]
    assert shown == sorted(shown)
    passes = [total / count for total, count in zip(shown, (10, 100, 1000, 10_000, 117_266), strict=True)]
    assert passes == sorted(passes, reverse=True) and passes[-1] == pytest.approx(12.3, abs=0.1)


def test_a_device_decides_the_batch_and_weights_the_rate():
    images = CocoImages(TREES, "train2017")
    on_cpu, _ = auto_recipe(images, "cpu", from_nothing=True)
    on_gpu, _ = auto_recipe(images, "cuda", from_nothing=True)
    known, _ = auto_recipe(images, "cpu", from_nothing=False)
    assert (on_cpu.batch_size, on_gpu.batch_size) == (8, 16) and on_gpu.lr > on_cpu.lr > known.lr


def test_mosaics_end_with_their_part_of_the_run():
    images = CocoImages(TREES, "train2017")
    recipe = adapt(auto_recipe(images, "cpu", from_nothing=True)[0], iterations=330, mosaic=0.5, mosaic_until=0.5)
    assert make_transform(recipe, (64, 64), images).variety.mosaic_epochs == 10


# --- minutes


def test_one_length_alone(tmp_path):
    for given in (dict(minutes=1.0, iterations=3), dict(epochs=1.0, minutes=2.0), dict(epochs=1.0, iterations=3)):
        with pytest.raises(ValueError, match="are given: leave all but one of them out"):
            TrainSettings(role="teacher", **given)
    for minutes in (0, -1, float("nan"), "10"):
        with pytest.raises(ValueError, match="minutes is"): TrainSettings(role="teacher", minutes=minutes)


def test_minutes_are_shared_with_a_missing_teacher(tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    write_coco(repository / "data" / "trees", "train2017")
    write_coco(repository / "data" / "trees", "val2017")
    monkeypatch.chdir(repository)
    plan = prepare(TrainSettings(role="student", recipe="auto", minutes=2.0, devices="cpu", short_side=64, max_side=96))
    assert plan.teacher_plan.settings.minutes == 2 * TEACHER_SHARE
    assert f"{2 * TEACHER_SHARE:.3g} minutes" in plan.teacher_plan.reasons["iterations"]
    assert f"{2 - 2 * TEACHER_SHARE:.3g} minutes" in plan.reasons["iterations"]
    assert plan.recipe.iterations > 10 and plan.recipe.warmup == min(plan.base.warmup, plan.recipe.iterations // 10)


@pytest.mark.slow
def test_a_run_of_minutes_keeps_its_iterations(coco, tmp_path):
    given = dict(data=str(coco), devices="cpu", workers=0, short_side=64, max_side=96, recipe="auto", batch_size=2)
    settings = TrainSettings(role="teacher", out=str(tmp_path / "run"), minutes=0.4, **given)
    folder = train(settings)
    recorded = json.loads((folder / "settings.json").read_text())["recipe"]["iterations"]
    metrics = (folder / "metrics.json").read_text()
    again = prepare(settings)
    assert (again.state, again.recipe.iterations) == ("finished", recorded)
    assert "as it was begun, for 0.4 minutes" in str(again)
    train_main_with(folder / "train.json")
    assert (folder / "metrics.json").read_text() == metrics
    other = prepare(replace(settings, out=str(tmp_path / "other"), minutes=0.5))
    assert other.state == "new" and "s each" in other.reasons["iterations"]


def train_main_with(file):
    "Run `python -m msad.runs.train FILE` here."
    arguments, sys.argv = sys.argv, ["msad.runs.train", str(file)]
    try: train_main()
    finally: sys.argv = arguments


# --- patience


@pytest.mark.slow
def test_without_patience_left_the_best_model_counts(coco, tmp_path):
    settings = TrainSettings(
        role="teacher", data=str(coco), out=str(tmp_path / "run"), devices="cpu", workers=0, short_side=64, max_side=96,
        neck_channels=64, head_convs=1, recipe="small", iterations=40, batch_size=2, eval_every=1, patience=2,
    )
    folder = train(settings)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["stopped"] < 40 == metrics["iterations"]
    evaluations = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert len(evaluations) == metrics["stopped"]
    best, final = (load_model(folder / f"model_{name}.pth").state_dict() for name in ("best", "final"))
    assert all(torch.equal(value, final[name]) for name, value in best.items())
    assert metrics["AP"] == pytest.approx(max(row["AP"] or 0 for row in evaluations))
    found = evaluate_coco(coco / "annotations/instances_val2017.json", folder / "detections.json")
    assert found["AP"] == pytest.approx(metrics["AP"])
    assert prepare(settings).state == "finished"


def test_patience_needs_something_to_find(coco, tmp_path):
    file = coco / "annotations/instances_val2017.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "annotations": []}))
    with pytest.raises(ValueError, match="patience is 2 and val2017 has no box to find: leave it out"):
        plan_of(coco, tmp_path / "run", patience=2)


# --- reduced decoding


def test_samples_are_decoded_as_large_as_they_get():
    large = TrainTransform(64, 96, variety=Variety(scale_jitter=0.25))
    assert (needed_size(TrainTransform(64, 96)), needed_size(large)) == ((64, 96), (80, 120))
    assert needed_size(TrainTransform(64, 96, variety=Variety(iou_crop=0.5))) is None


# --- the average of the weights


@pytest.mark.slow
def test_the_average_is_evaluated_and_kept(coco, tmp_path):
    folder = train(TrainSettings(
        role="teacher", data=str(coco), out=str(tmp_path / "run"), devices="cpu", workers=0, short_side=64, max_side=96,
        neck_channels=64, head_convs=1, recipe="small", iterations=6, batch_size=2, lr=0.01, ema=0.5,
        checkpoint_every=6,
    ))
    (file,) = (folder / "checkpoints").iterdir()
    checkpoint, kept = torch.load(file, weights_only=True), load_model(folder)
    last, average = checkpoint["model"], checkpoint["average"]
    assert all(torch.equal(value, average[name]) for name, value in kept.state_dict().items())
    assert not torch.equal(last["head.cls_logits.weight"], average["head.cls_logits.weight"])
    metrics = evaluate_model(kept, CocoImages(coco, "val2017"), 64, 96).metrics
    assert metrics["AP"] == pytest.approx(json.loads((folder / "metrics.json").read_text())["AP"])


# --- one command


@pytest.mark.slow
def test_one_command_from_data_to_a_file_that_ships(tmp_path, monkeypatch, capsys):
    import onnxruntime

    data, repository = tmp_path / "repository/cells", tmp_path / "repository"
    shutil.copytree(CELLS, data)
    lists = data / "ImageSets/Main"
    for name, own in (("train", "first"), ("val", "second")): (lists / f"{name}.txt").rename(lists / f"{own}.txt")
    (repository / "data/trees/annotations").mkdir(parents=True)
    monkeypatch.chdir(repository)
    command = ["train", "--role", "student", "--data", str(data), "--minutes", "0.5", "--devices", "cpu", "--export"]
    command += ["--train-split", "first"]
    main(command)
    told = capsys.readouterr().out
    teacher, student = (default_folder(str(data), role, 0.25) for role in ("teacher", "student"))
    assert teacher.is_relative_to(repository)
    assert "it is trained first" in told and "| class" in told and "Platelets" in told
    for name in ("model_final.pth", "metrics.json", "figures/losses.png", "figures/detections.png"):
        assert (teacher / name).is_file() and (student / name).is_file()
    session = onnxruntime.InferenceSession(str(student / "model.onnx"))
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"])[0] == "Platelets"
    before = (student / "model_final.pth").stat().st_mtime_ns
    main(command)
    assert (student / "model_final.pth").stat().st_mtime_ns == before
