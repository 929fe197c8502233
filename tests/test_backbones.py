"Every family of backbones at every width: its cost, and a detector on it from the first step to the exported file."

import json
import shutil

import pytest
import torch
from conftest import write_coco

from msad.data.images import CocoImages
from msad.deploy.onnx import compare_file, export_onnx
from msad.engine.distributed import synchronize_norms
from msad.engine.recipe import Recipe, make_optimizer
from msad.engine.trainer import make_scaler, set_training, train_step
from msad.engine.weights import load_model, load_weights, pretrained_weights, save_model
from msad.evaluation.capacity import backbone_flops
from msad.evaluation.evaluator import evaluate_model
from msad.models.backbone import BACKBONES, backbone_family
from msad.models.batch import make_batch
from msad.models.detector import ModelConfig, build_model, student_of
from msad.models.distillation import Distillation
from msad.models.mobilenet import MobileNetV2
from msad.runs.plan import prepare
from msad.runs.settings import TrainSettings
from msad.runs.train import train

FAMILIES = (*BACKBONES, "tf_efficientnet_lite0", "convnext_atto")
NETWORKS = [(name, width) for name in FAMILIES for width in backbone_family(name).widths]

# Published multiply-adds at 224×224, with the classifier (Yu et al., ICLR 2019).
FLOPS = {
    "slimmable_resnet50": ({1.0: 4.1e9, 0.75: 2.3e9, 0.5: 1.1e9, 0.25: 278e6}, lambda width: 2048 * width * 1000),
    "slimmable_mobilenet_v2": ({1.0: 301e6, 0.75: 209e6, 0.5: 97e6, 0.35: 59e6}, lambda width: 1280 * 1000),
}


@pytest.mark.parametrize(("name", "width"), [(name, width) for name, (costs, _) in FLOPS.items() for width in costs])
def test_cost_is_the_published_one(name, width):
    costs, classifier = FLOPS[name]
    precision = 0.05 if costs[width] > 1e9 else 0.01  # of two digits
    assert backbone_flops(width, (224, 224), name) + classifier(width) == pytest.approx(costs[width], rel=precision)


def lively(config):
    "Build an untrained model whose detections are many."
    torch.manual_seed(0)
    model = build_model(config)
    torch.nn.init.constant_(model.head.cls_logits.bias, -2.8)
    torch.nn.init.normal_(model.head.cls_logits.weight, std=0.1)  # no two scores are the same
    torch.nn.init.normal_(model.head.bbox_pred.weight, std=0.1)
    with torch.no_grad():  # statistics of BatchNorm as training leaves them
        for _ in range(30): model.train().head(model.features(torch.randn(4, 3, 64, 96)))
    return model.eval()


CLASSES = dict(class_names=("pine", "oak"), category_ids=(7, 90))
SHAPE = dict(neck_channels=32, head_convs=1, short_side=64, max_side=96, **CLASSES)
LIGHT = dict(head_norm="batch", separable=True)
GRIDS = [("slimmable_resnet50", 0.25, dict(finest_stride=stride)) for stride in (2, 8)]
LOOKS = [(*network, looks) for network in NETWORKS for looks in ({}, LIGHT)]


@pytest.mark.parametrize(("name", "width", "looks"), [*LOOKS, *GRIDS])
def test_from_the_first_step_to_the_evaluation(tmp_path, name, width, looks):
    write_coco(tmp_path / "data", "val2017")
    images = CocoImages(tmp_path / "data", "val2017")
    model, recipe = lively(ModelConfig("student", width, backbone=name, **SHAPE, **looks)), Recipe(2, 2, 0.01, warmup=1)
    before = {name: value.clone() for name, value in model.named_parameters()}
    set_training(model, recipe)
    target = dict(boxes=torch.tensor([[8.0, 8, 40, 40]]), labels=torch.tensor([1]), image_id=1)
    pictures = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    batch = make_batch([(picture, target) for picture in pictures])
    state = make_optimizer(recipe, model), make_scaler(recipe, torch.device("cpu"))
    losses = train_step(model, *state, recipe, 1, batch)
    assert all(loss.isfinite() for loss in losses.values())
    moved = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
    assert len(moved) > 0.9 * len(before)

    assert evaluate_model(model.eval(), images, 64, 96).metrics["AP"] >= 0
    save_model(tmp_path / "model.pth", model)
    picture = torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8)
    with torch.no_grad(): torch.testing.assert_close(load_model(tmp_path / "model.pth")([picture]), model([picture]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "looks"),
    [
        ("slimmable_mobilenet_v2", LIGHT), ("resnet50", {}), ("tf_efficientnet_lite0", LIGHT), ("convnext_atto", {}),
        *((name, looks) for name, _, looks in GRIDS),
    ],
)
def test_the_file_finds_the_same(tmp_path, name, looks):
    model = lively(ModelConfig("student", backbone_family(name).widths[0], backbone=name, **SHAPE, **looks))
    save_model(tmp_path / "model.pth", model)
    file = export_onnx(tmp_path / "model.pth", tmp_path / "model.onnx")
    pictures = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((48, 64), (33, 50))]
    agreement = compare_file(file, model, pictures)
    assert agreement.model == agreement.file > 0
    assert agreement.boxes < 0.01 and agreement.scores < 1e-4


def test_pretrained_weights_start_the_backbone():
    model = build_model(ModelConfig("teacher", neck_channels=32, head_convs=1, backbone="tf_efficientnet_lite1"))
    weights = pretrained_weights("tf_efficientnet_lite1")
    assert "pretrained" in load_weights(model, weights)
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, weights.state[f"backbone.{name}"]), name


def test_a_student_unlike_its_teacher_starts_with_what_both_have():
    shape = dict(neck_channels=64, head_convs=2)
    teacher = build_model(ModelConfig("teacher", 0.5, **shape))
    student = student_of(teacher, ModelConfig("student", 0.25, **shape))
    torch.testing.assert_close(student.head.state_dict(), teacher.head.state_dict())
    assert student.backbone.stem[0].weight.shape[0] == 16
    narrow = Distillation(student_of(teacher, ModelConfig("student", 0.5, neck_channels=32, head_convs=2)), teacher)
    torch.testing.assert_close(narrow.student.backbone.state_dict(), teacher.backbone.state_dict())
    assert narrow.projection.weight.shape == (64, 32, 1, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(backbone="tf_eficientnet_lite0"), "backbone is 'tf_eficientnet_lite0'.*near are tf_eff"),
        (dict(backbone="vit_tiny_patch16_224"), "backbone is 'vit_tiny_patch16_224'.*choose another"),
        (dict(backbone="convnext_atto", finest_stride=2), "finest_stride is 2: convnext_atto has no map of"),
        (dict(backbone="tf_efficientnet_lite0", width=0.5), "width is 0.5: choose one of 1.0"),
        (dict(backbone="slimmable_mobilenet_v2", width=0.25), "width is 0.25: choose one of 0.35"),
        (dict(weights="pretrained"), 'weights is "pretrained": nobody offers weights of slimmable_resnet50'),
        (dict(backbone="mobilenetv2_035", weights="pretrained"), "weights: timm cannot get pretrained weights"),
        (dict(head_norm="layer"), "head_norm is 'layer': choose one of group, batch"),
        (dict(head_norm="batch", neck_channels=20), "neck_channels is 20: choose a multiple of 8"),
    ],
)
def test_what_cannot_work_is_one_sentence(tmp_path, given, message):
    write_coco(tmp_path, "train2017")
    write_coco(tmp_path, "val2017")
    with pytest.raises(ValueError, match=message) as error:
        prepare(TrainSettings(role="teacher", data=str(tmp_path), devices="cpu", **given))
    assert "\n" not in str(error.value)


def test_pretrained_weights_bring_their_pixels(tmp_path):
    write_coco(tmp_path, "train2017")
    write_coco(tmp_path, "val2017")
    given = dict(data=str(tmp_path), devices="cpu", backbone="tf_efficientnet_lite0", weights="pretrained")
    plan = prepare(TrainSettings(role="student", **given))
    assert plan.config.normalization.mean == (127.0,) * 3
    assert plan.teacher_plan.weights.kind == "pretrained" and plan.teacher_plan.config.backbone == plan.config.backbone
    assert plan.settings.folder.name == "student-tf_efficientnet_lite0"
    assert plan.base.lr == plan.teacher_plan.base.lr  # neither starts from nothing


def test_synchronized_norms_keep_the_activations():
    backbone = backbone_family("tf_efficientnet_lite0").build(1.0).eval()
    picture = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = backbone(picture)
        synchronize_norms(backbone)
        torch.testing.assert_close(backbone(picture), expected)
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in backbone.modules())


@pytest.fixture
def folder(tmp_path):
    for split in ("train2017", "val2017"): write_coco(tmp_path / "data", split)
    return tmp_path


def settings_of(folder, **given):
    given = dict(role="student", data=str(folder / "data"), devices="cpu", neck_channels=32, head_convs=1) | given
    return TrainSettings(**given)


def write_teacher(folder, name="teacher.pth", **given):
    given = dict(neck_channels=32, head_convs=1, class_names=("pine", "oak"), category_ids=(7, 90)) | given
    save_model(folder / name, build_model(ModelConfig("teacher", 0.25, **given)))
    return str(folder / name)


def test_weights_that_would_not_be_used_are_refused(folder):
    torch.save({"model": {f"module.{k}": v for k, v in MobileNetV2().state_dict().items()}}, folder / "slimmable.pt")
    given = dict(weights=str(folder / "slimmable.pt"), backbone="slimmable_mobilenet_v2", width=0.35)
    config = ModelConfig("teacher", 0.35, **SHAPE, backbone="slimmable_mobilenet_v2")
    save_model(folder / "teacher.pth", build_model(config))
    with pytest.raises(ValueError, match="is of a backbone, and the student starts from that of its teacher: leave"):
        prepare(settings_of(folder, teacher=str(folder / "teacher.pth"), **given))
    plan = prepare(settings_of(folder, **given))  # they are for the teacher, which is trained first
    assert plan.weights is None and plan.teacher_plan.weights.kind == "slimmable"
    assert not plan.from_nothing and not plan.teacher_plan.from_nothing


def test_a_teacher_in_the_default_place_is_what_was_asked_for(folder, monkeypatch):
    (folder / "data" / "trees" / "annotations").mkdir(parents=True)  # as a repository has it
    monkeypatch.chdir(folder)
    train(settings_of(folder, role="teacher", width=0.25, recipe="small", iterations=1, short_side=64))
    assert prepare(settings_of(folder)).teacher.is_file()
    with pytest.raises(ValueError, match="the one in the default place has neck_channels 32 and this run 64; give it"):
        prepare(settings_of(folder, neck_channels=64))
    there = str(folder / "runs" / "data" / "teacher-w0.25")
    assert prepare(settings_of(folder, neck_channels=64, teacher=there)).config.neck_channels == 64
    known = dict(backbone="tf_efficientnet_lite0", weights="pretrained")
    train(settings_of(folder, role="teacher", recipe="small", iterations=1, short_side=64, **known | {"weights": None}))
    with pytest.raises(ValueError, match=r"did not start from pretrained/tf_efficientnet_lite0; leave weights out"):
        prepare(settings_of(folder, **known))
    train(settings_of(folder, role="teacher", recipe="small", iterations=1, short_side=64, out="known", **known))
    shutil.rmtree(folder / "runs" / "data" / "teacher-tf_efficientnet_lite0")
    shutil.move("known", folder / "runs" / "data" / "teacher-tf_efficientnet_lite0")
    assert prepare(settings_of(folder, **known)).teacher.is_file()


def test_fixed_statistics_need_some(folder):
    given = dict(teacher=write_teacher(folder), backbone="slimmable_mobilenet_v2", batch_norm="fixed")
    with pytest.raises(ValueError, match='batch_norm is "fixed" and there are no weights to take it from'):
        prepare(settings_of(folder, **given))
    assert prepare(settings_of(folder, teacher=given["teacher"], batch_norm="fixed")).recipe.batch_norm == "fixed"


def test_a_head_with_batchnorm_needs_more_than_one_value(folder):
    given = dict(teacher=write_teacher(folder, head_norm="batch"), short_side=128, batch_size=1)
    with pytest.raises(ValueError, match='single images of 128 by 128 pixels.* or head_norm "group"'):
        prepare(settings_of(folder, **given))
    assert prepare(settings_of(folder, **{**given, "short_side": 192})).config.head_norm == "batch"


def test_norms_of_layers_are_not_decayed():
    model = build_model(ModelConfig("student", 1.0, backbone="convnext_atto", **SHAPE))
    _, affine = make_optimizer(Recipe(2, 2, 0.01), model).param_groups
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm | torch.nn.GroupNorm)]
    assert {id(p) for norm in norms for p in norm.parameters()} <= {id(p) for p in affine["params"]}


@pytest.mark.slow
def test_several_processes_find_pretrained_weights(folder):
    given = dict(role="teacher", backbone="tf_efficientnet_lite0", weights="pretrained", devices=2, workers=0)
    given |= dict(recipe="small", batch_size=2, iterations=1, short_side=128, out=str(folder / "run"))
    run = train(settings_of(folder, **given))
    assert load_model(run).config.normalization.mean == (127.0,) * 3
    assert TrainSettings(**json.loads((run / "train.json").read_text())).weights == "pretrained"
