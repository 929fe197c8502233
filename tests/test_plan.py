"The plan of a run, line by line: what is trained, from what, how often it evaluates, what is worth knowing."

import json
import shutil
from dataclasses import replace

import pytest
from conftest import write_coco, write_teacher

from msad.runs.plan import prepare, recipe_name
from msad.runs.settings import TrainSettings
from msad.runs.train import train

TINY = dict(neck_channels=64, head_convs=1, short_side=64, max_side=96)


def plan_lines(data, out, role="teacher", **given):
    given = {"devices": "cpu", "workers": 0, "recipe": "small", **TINY, **given}
    return str(prepare(TrainSettings(role=role, data=str(data), out=str(out), **given))).splitlines()


def test_what_is_trained_on_what(coco, tmp_path):
    file = coco / "annotations/instances_train2017.json"
    dataset = json.loads(file.read_text())
    dataset["annotations"][0]["iscrowd"] = 1
    file.write_text(json.dumps(dataset))
    lines = plan_lines(coco, tmp_path / "run")
    assert lines[0] == (
        "teacher on slimmable_resnet50 of width 0.25: 64 neck channels, towers of 1, 2 classes, test size 64 "
        "(at most 96), padded to 64"
    )
    assert lines[1:3] == [
        "train2017: 4 images, 64 to 64 pixels high, 96 to 96 wide", "7 boxes in 2 classes: oak 4, pine 3",
    ]
    assert "crowd boxes: 1, images without a box to learn from: 0" in lines
    assert "600 iterations of 8 images, adamw at learning rate 0.002 on cpu" in lines
    assert lines[-1].endswith("/run (new)")
    lines = plan_lines(coco, tmp_path / "run", separable=True, head_norm="batch", backbone="slimmable_mobilenet_v2")
    assert lines[0].startswith(
        "teacher on slimmable_mobilenet_v2 of width 0.35: 64 neck channels, towers of 1, depthwise-separable, "
        "a BatchNorm for each level, "
    )


def test_how_often_it_evaluates_and_saves(coco, tmp_path):
    few = " (ten at most, which look at a tenth of the images that are learned from)"
    often = " (a twentieth of the run, from 20 to 500)"
    for given, line in (
        ({}, f"an evaluation every 120 iterations{few}, a checkpoint every 30{often}"),
        (dict(eval_every=7), f"an evaluation every 7 iterations, a checkpoint every 30{often}"),
        (dict(checkpoint_every=9), f"an evaluation every 120 iterations{few}, a checkpoint every 9"),
    ):
        assert line in plan_lines(coco, tmp_path / "run", **given)


def test_what_it_starts_from(coco, tmp_path):
    file = write_teacher(tmp_path / "teacher.pth", head_convs=1, short_side=64, max_side=96)
    lines = plan_lines(coco, tmp_path / "run", "student", teacher=str(file))
    assert f"teacher: {file}" in lines
    assert f"weights: {file} (msad)" in plan_lines(coco, tmp_path / "run", weights=str(file))
    known = dict(backbone="tf_efficientnet_lite0", width=1.0)
    cure = 'tf_efficientnet_lite0 starts from nothing; weights "pretrained" would start it from ImageNet'
    assert cure in plan_lines(coco, tmp_path / "run", **known)
    lines = plan_lines(coco, tmp_path / "run", **known, weights="pretrained")
    assert cure not in lines and any(line.endswith("tf_efficientnet_lite0 (pretrained)") for line in lines)


def test_what_is_worth_knowing(coco, tmp_path):
    file = write_teacher(tmp_path / "teacher.pth", head_convs=1, short_side=64, max_side=96)
    fixed = "BatchNorm of the backbone is fixed: its statistics stay those of the weights"
    seen = "BatchNorm sees 2 images at a time, so the result is not quite that of the whole batch (with batch_norm "
    for given, line in (
        (dict(precision="bf16"), "the network computes in bf16"),
        (dict(batch_norm="fixed", weights=str(file)), fixed),
        (dict(accumulate=4), f'{seen}"fixed" it is)'),
        (dict(accumulate=4, head_norm="batch"), f'{seen}"fixed" and head_norm "group" it is)'),
        (dict(batch_size=16), "the learning rate is the recipe's 0.002, scaled with the batch size"),
    ):
        assert line in plan_lines(coco, tmp_path / "run", **given)
        assert line not in plan_lines(coco, tmp_path / "run")


@pytest.mark.parametrize(("given", "warned"), [
    (dict(batch_size=4), True), (dict(batch_size=4, iterations=600), True), (dict(batch_size=4, lr=0.001), True),
    (dict(batch_size=4, iterations=1200), False), (dict(batch_size=4, epochs=10.0), False),
    (dict(batch_size=4, minutes=0.1), False), (dict(batch_size=16), False), ({}, False),
])
def test_smaller_batches_ask_for_more_iterations(coco, tmp_path, given, warned):
    warning = "the recipe's batches are of 8 images, so with these the network sees fewer in as many iterations"
    assert any(line.startswith(warning) for line in plan_lines(coco, tmp_path / "run", **given)) == warned


@pytest.mark.parametrize(("given", "message"), [
    (dict(milestones=(60, 80), schedule="cosine"), "milestones is given and schedule is cosine, which has none"),
    (dict(momentum=0.8, optimizer="adamw"), "momentum is given and optimizer is adamw, which has none"),
])
def test_what_a_schedule_or_an_optimizer_has_not(coco, tmp_path, given, message):
    with pytest.raises(ValueError, match=message): plan_lines(coco, tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_data_of_cocos_size_are_learned_as_published():
    settings = TrainSettings(role="teacher")
    assert [recipe_name(settings, {}, range(count)) for count in (4, 49_999, 50_000)] == ["auto", "auto", "published"]
    assert recipe_name(settings, {"recipe": "small"}, range(50_000)) == "small"


def test_a_test_size_is_at_most_twice_that_of_the_photographs(tmp_path):
    sides = []
    for size in ((60, 40), (96, 64), (400, 300)):
        for split in ("train2017", "val2017"): write_coco(tmp_path / str(size), split, size=size)
        given = dict(data=str(tmp_path / str(size)), out=str(tmp_path / "run"), devices="cpu")
        plan = prepare(TrainSettings(role="teacher", **given))
        sides.append(plan.config.short_side)
        assert ("twice the photographs' own" in plan.reasons["short_side"]) == (size[1] < 96)
    assert sides[:2] == [96, 128] and sides[2] >= 192


@pytest.mark.slow
def test_a_student_of_changed_data_is_another_run(coco, tmp_path):
    file = write_teacher(tmp_path / "teacher.pth", head_convs=1, short_side=64, max_side=96)
    settings = TrainSettings(
        role="student", data=str(coco), teacher=str(file), out=str(tmp_path / "run"), devices="cpu", workers=0,
        recipe="small", iterations=2, batch_size=2,
    )
    train(settings)
    assert str(prepare(settings)).endswith("/run (finished, is shown)")
    file = coco / "annotations/instances_train2017.json"
    dataset = json.loads(file.read_text())
    moved = [{**box, "bbox": [1, 1, 9, 9]} if box["id"] == 1 else box for box in dataset["annotations"]]
    cut = [box for box in dataset["annotations"] if box["image_id"] != 4]
    shutil.copy(coco / "train2017/1.jpg", coco / "train2017/5.jpg")
    files = [{**image, "file_name": "5.jpg"} if image["id"] == 1 else image for image in dataset["images"]]
    for change in (dict(annotations=moved), dict(images=dataset["images"][:3], annotations=cut), dict(images=files)):
        file.write_text(json.dumps({**dataset, **change}))
        for asked in (settings, replace(settings, iterations=3)):
            with pytest.raises(ValueError, match="out: .*train2017"): prepare(asked)
    file.write_text(json.dumps(dataset))
    assert prepare(settings).state == "finished"


@pytest.mark.slow
def test_an_unfinished_run_goes_on(coco, tmp_path):
    given = dict(iterations=3, batch_size=2, eval_every=1, checkpoint_every=1)
    folder = train(TrainSettings(role="teacher", data=str(coco), out=str(tmp_path / "run"), devices="cpu", workers=0,
                                 recipe="small", **TINY, **given))
    (folder / "metrics.json").unlink()
    assert plan_lines(coco, folder, **given)[-1].endswith("/run (unfinished, goes on)")
