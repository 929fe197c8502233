"One student for every width: from the settings to a file that is cut, switched, evaluated and exported."

import json
from dataclasses import replace

import pytest
import torch
from conftest import write_coco
from PIL import Image

from msad.deploy.export import ExportSettings, export
from msad.deploy.predictor import Predictor
from msad.engine.weights import load_model, load_weights, read_weights, save_model
from msad.models.backbone import BACKBONES
from msad.models.detector import ModelConfig, build_model, cut_detector, set_detector_width, student_of
from msad.models.mobilenet import MobileNetV2
from msad.runs.evaluate import EvaluateSettings, evaluate
from msad.runs.plan import prepare
from msad.runs.settings import TrainSettings
from msad.runs.train import train

SHAPE = dict(neck_channels=32, head_convs=1)
SLIMMABLE = {name: family.widths for name, family in BACKBONES.items() if family.slimmable}


def training(tmp_path, name, **others):
    "Describe a training of two steps on four pictures."
    for split in ("train2017", "val2017"): write_coco(tmp_path / "data", split)
    given = dict(data=str(tmp_path / "data"), devices="cpu", workers=0, recipe="small", batch_size=2, iterations=2)
    teacher = dict(role="teacher", backbone=name, width=1.0, short_side=64, out=str(tmp_path / "teacher"))
    student = dict(role="student", all_widths=True, teacher=str(tmp_path / "teacher"), out=str(tmp_path / "student"))
    return TrainSettings(**given, **teacher, **SHAPE), TrainSettings(**{**given, **student, **others})


@pytest.mark.slow
@pytest.mark.parametrize("name", SLIMMABLE)
def test_from_a_teacher_to_every_width(tmp_path, name):
    for settings in training(tmp_path, name): train(settings)
    run, widths = tmp_path / "student", SLIMMABLE[name]
    metrics = json.loads((run / "metrics.json").read_text())
    assert {float(width) for width in metrics["widths"]} == set(widths)
    assert metrics["widths"]["1"]["AP"] == metrics["AP"]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert log[0]["loss_wide"] == 0 < log[-1]["loss_wide"] and log[-1]["loss_kd"] > 0  # their weight rises

    predictor = Predictor(run)
    picture = Image.open(next((tmp_path / "data").glob("**/*.jpg")))
    for width in widths:
        predictor.width = width
        assert predictor.model.config.width == width and not predictor.model.config.all_widths
        save_model(tmp_path / "cut.pth", cut_detector(load_model(run), width))
        torch.testing.assert_close(Predictor(tmp_path / "cut.pth")(picture)["boxes"], predictor(picture)["boxes"])
    asked = dict(model=str(run), data=str(tmp_path / "data"), devices="cpu", workers=0, width=widths[0])
    folder = evaluate(EvaluateSettings(**asked, out=str(tmp_path / "evaluation")))
    found = json.loads((folder / "metrics.json").read_text())
    assert found["AP"] == pytest.approx(metrics["widths"][f"{widths[0]:g}"]["AP"])
    asked = dict(model=str(run), data=str(tmp_path / "data"), width=widths[1], out=str(tmp_path / "half.onnx"))
    assert export(ExportSettings(**asked, num_images=2)).stat().st_size < (run / "model_final.pth").stat().st_size


@pytest.mark.slow
def test_an_interrupted_training_goes_on_with_the_width_whose_turn_it_is(tmp_path):
    teacher, student = training(tmp_path, "slimmable_resnet50", iterations=4, checkpoint_every=1)
    train(teacher)
    whole = train(student)
    lines = [json.loads(line)["loss"] for line in (whole / "log.jsonl").read_text().splitlines()]
    for name in ("00000002.pth", "00000003.pth", "00000004.pth"): (whole / "checkpoints" / name).unlink(missing_ok=True)
    again = train(replace(student, out=str(tmp_path / "again"), keep_checkpoints=9))
    for name in ("00000002.pth", "00000003.pth", "00000004.pth"): (again / "checkpoints" / name).unlink()
    (again / "metrics.json").unlink()
    train(replace(student, out=str(again), keep_checkpoints=9))
    assert [json.loads(line)["loss"] for line in (again / "log.jsonl").read_text().splitlines()] == pytest.approx(lines)


@pytest.mark.parametrize("name", SLIMMABLE)
def test_a_cut_out_width_is_the_switched_one(tmp_path, name):
    torch.manual_seed(0)
    model = build_model(ModelConfig("student", 1.0, backbone=name, all_widths=True, **SHAPE)).eval()
    save_model(tmp_path / "all.pth", model)
    loaded, x = load_model(tmp_path / "all.pth"), torch.randn(1, 3, 64, 128)
    for width in SLIMMABLE[name]:
        set_detector_width(model, width)
        plain = cut_detector(loaded, width)
        with torch.no_grad(): torch.testing.assert_close(plain.features(x), model.features(x))


def test_slimmable_weights_start_every_width(tmp_path):
    network = MobileNetV2()
    for number, norm in enumerate(network.features[0][1].bn): torch.nn.init.constant_(norm.weight, number + 2)
    torch.nn.init.constant_(network.features[-1][1].weight, 7)
    weights = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({"model": weights}, tmp_path / "slimmable.pt")
    model = build_model(ModelConfig("student", 1.0, backbone="slimmable_mobilenet_v2", all_widths=True, **SHAPE))
    load_weights(model, read_weights(tmp_path / "slimmable.pt"))
    assert [norm.weight[0].item() for norm in model.backbone.features[0][1].bn] == [2, 3, 4, 5]
    assert [norm.weight[0].item() for norm in model.backbone.features[-1][1].bn] == [7, 7, 7, 7]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(role="teacher"), "all_widths is True: a teacher has one width"),
        (dict(role="student", width=0.5), "width is 0.5 and all_widths True: every width is trained"),
        (dict(role="student", backbone="resnet50"), "all_widths is True: resnet50 has one width; choose slimmable"),
        (dict(role="student", head_norm="batch"), 'all_widths is True and head_norm .batch.: all widths share "group"'),
        (dict(role="student", size="nano"), "all_widths is True: tf_efficientnet_lite0 has one width"),
        (dict(role="student", all_widths=3), "all_widths is 3: write True or False"),
    ],
)
def test_what_cannot_work_is_one_sentence(given, message):
    with pytest.raises(ValueError, match=message): TrainSettings(**{"all_widths": True, **given})


def test_a_width_that_is_not_there(tmp_path):
    whole = build_model(ModelConfig("student", 1.0, all_widths=True, **SHAPE))
    save_model(tmp_path / "all.pth", whole)
    save_model(tmp_path / "half.pth", cut_detector(whole, 0.5))
    with pytest.raises(ValueError, match="width is 0.3: choose one of 0.25, 0.5, 0.75, 1.0"):
        Predictor(tmp_path / "all.pth", width=0.3)
    with pytest.raises(ValueError, match="width is 0.25 and the model has width 0.5 alone"):
        Predictor(tmp_path / "half.pth", width=0.25)
    with pytest.raises(ValueError, match="has width 0.5 and the model 1.0; set width to 0.5"):
        load_weights(whole, read_weights(tmp_path / "half.pth"))
    half = build_model(ModelConfig("student", 0.5, **SHAPE))
    assert "loaded" in load_weights(half, read_weights(tmp_path / "all.pth"))  # a width is cut out
    torch.testing.assert_close(half.state_dict(), load_model(tmp_path / "half.pth").state_dict())
    narrow = build_model(ModelConfig("teacher", 0.5, **SHAPE))
    assert student_of(narrow, whole.config).backbone.stem[0].weight.shape[0] == 64  # has nothing of a narrow teacher's


def test_other_channels_are_not_inherited():
    teacher = build_model(ModelConfig("teacher", 1.0, neck_channels=64, head_convs=1))
    for weight in (teacher.neck.p6.weight, teacher.backbone.stem[1].weight): torch.nn.init.constant_(weight, 3.0)
    whole = student_of(teacher, ModelConfig("student", 1.0, all_widths=True, **SHAPE))
    assert all((norm.weight == 3).all() for norm in whole.backbone.stem[1].bn)
    assert not (whole.neck.p6.weight == 3).any()


def test_sizes_are_words_for_fields(tmp_path):
    nano = TrainSettings(role="teacher", size="nano")
    assert (nano.backbone, nano.neck_channels, nano.separable) == ("tf_efficientnet_lite0", 32, True)
    assert nano.folder.name == "teacher-nano"
    assert TrainSettings(role="student", size="paper", width=0.5).folder.name == "student-paper-w0.5"
    assert TrainSettings(role="student", size="small", neck_channels=32).neck_channels == 32  # what is given wins
    for wrong in ("tiny", 5):
        with pytest.raises(ValueError, match=f"size is {wrong!r}: choose one of nano, small, medium, paper"):
            TrainSettings(role="student", size=wrong)
    for split in ("train2017", "val2017"): write_coco(tmp_path, split)
    plan = prepare(TrainSettings(role="student", data=str(tmp_path), size="nano", devices="cpu"))
    assert plan.config.head_norm == plan.teacher_plan.config.head_norm == "batch"
    assert plan.teacher_plan.settings.folder.name == "teacher-nano"


def test_a_missing_teacher_has_the_full_width(tmp_path):
    for split in ("train2017", "val2017"): write_coco(tmp_path, split)
    given = dict(data=str(tmp_path), devices="cpu", all_widths=True)
    plan = prepare(TrainSettings(role="student", backbone="slimmable_mobilenet_v2", **given))
    assert (plan.teacher_plan.config.width, plan.teacher_plan.config.all_widths) == (1.0, False)
    assert plan.config.all_widths and "of all widths (0.35, 0.5, 0.75, 1)" in str(plan)
    assert plan.settings.folder.name == "student-all-slimmable_mobilenet_v2"
