"""What can be said about GPUs without one: where tensors are made, how much a step asks for, what happens when memory
is short, how cards share a batch.
"""

import itertools
import json
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from conftest import ROOT, write_coco
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from msad.data.images import CocoImages
from msad.data.loaders import train_loader
from msad.data.transforms import TrainTransform
from msad.engine.hooks import read_log
from msad.engine.recipe import Recipe, make_optimizer
from msad.engine.trainer import LossModule, loader_options, make_scaler, set_training, train_step
from msad.models.batch import Batch
from msad.models.detector import ModelConfig, build_model, student_of
from msad.models.distillation import Distillation
from msad.models.postprocess import Thresholds, postprocess
from msad.models.targets import HeadOutputs, assign_boxes, batch_locations
from msad.runs.auto import choose_precision
from msad.runs.plan import even_devices, prepare
from msad.runs.settings import TrainSettings
from msad.runs.train import train

SMALL = dict(neck_channels=32, head_convs=1, short_side=64, max_side=96)
ROLES = ("teacher", "student")


def make_model(role, width=0.25, classes=2, **looks):
    "A teacher, or a student beside its teacher, with weights from nothing."
    names, ids = tuple(map(str, range(classes))), tuple(range(classes))
    teacher = build_model(ModelConfig("teacher", width, names, ids, **looks))
    return teacher if role == "teacher" else Distillation(student_of(teacher), teacher)


def make_batch(images=4, size=(64, 128), boxes=3):
    "Stacked pictures of which the last is smaller, with boxes; a tensor of its own for everything."
    height, width = size
    sizes = [size] * (images - 1) + [(height - 7, width - 9)]
    corners = torch.tensor([[8.0, 8, 40, 40], [20, 16, 30, 60], [4, 30, 60, 50]]).repeat(images, 1, 1)
    pixels = torch.randint(0, 256, (images, 3, height, width), dtype=torch.uint8)
    return Batch(pixels, sizes, corners[:, :boxes], torch.ones(images, boxes, dtype=torch.int64), [*range(images)])


def step_of(model, batch, recipe=None):
    "A function that learns from a batch once."
    recipe = recipe or Recipe(2, len(batch.sizes), 0.01, max_grad_norm=1.0)
    set_training(model, recipe)
    state = make_optimizer(recipe, model), make_scaler(recipe, torch.device("cpu"))
    return lambda: train_step(model, *state, recipe, 1, batch)


# --- where tensors are made


@pytest.mark.parametrize("role", ROLES)
def test_nothing_is_made_on_another_device(role):
    # What is made without a device lands on the default one. Where that is "meta", it does not go together with others.
    model, batch = make_model(role, **SMALL), make_batch()
    step = step_of(model, batch)
    with torch.device("meta"): losses = step()
    assert all(loss.device.type == "cpu" and loss.isfinite() for loss in losses.values())
    pictures = [picture[:, :48, :80] for picture in batch.images]
    with torch.device("meta"), torch.no_grad(): found = model.eval()(pictures)
    assert {value.device.type for value in found[0].values()} == {"cpu"}


def test_that_would_be_noticed():
    with torch.device("meta"), pytest.raises(RuntimeError, match="meta"): torch.ones(2).to("cpu")
    with torch.device("meta"): made = torch.zeros(2)
    assert made.is_meta


@pytest.mark.parametrize("kind", ("cuda", "meta"))
def test_targets_and_their_locations_stay_on_the_device(kind):
    with FakeTensorMode() if kind == "cuda" else nullcontext(), torch.device(kind):
        batch = make_batch()
        targets = assign_boxes(batch_locations(batch.images), batch.boxes, batch.labels)
    assert {value.device.type for value in targets} == {kind}


# --- how much a step asks for


class Count(TorchDispatchMode):
    "Counts the operations that compute something, or make a tensor."

    VIEWS = (
        "view", "detach", "alias", "expand", "transpose", "unsqueeze", "squeeze", "slice", "select", "unbind", "split",
        "permute", "aten.t.", "as_strided", "is_same_size", "prim.",
    )

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not any(word in str(function) for word in self.VIEWS)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("role", "most"), [("teacher", 2400), ("student", 1900)])
def test_operations_of_a_step(role, most):
    # On a GPU each is a launch, which the processor has to keep up with. Before batches were stacked, the targets of
    # all images assigned at once and the optimiser fused, there were 3,115 and 2,577.
    with FakeTensorMode():
        model, counts = make_model(role, classes=80), []
        for images in (2, 8):
            step = step_of(model, make_batch(images, (832, 1344)), Recipe(2, images, 0.01))
            step()
            with Count() as counter: step()
            counts.append(counter.count)
    assert counts[1] <= most
    assert counts[1] - counts[0] < 10  # images cost no operations of their own


def test_images_of_an_inference_cost_no_operations_of_their_own():
    outputs = [HeadOutputs(*([torch.rand(n, c, 64 // s, 64 // s) for s in (8, 16, 32, 64, 128)[:3]] for c in (2, 4, 1)))
               for n in (1, 6)]
    counts = []
    for batch in outputs:
        batch = batch._replace(logits=[level - 4 for level in batch.logits])  # nothing is found: no suppression
        with Count() as counter: found = postprocess(batch, [(64, 64)] * len(batch.logits[0]), Thresholds())
        counts.append(counter.count)
        assert all(len(detections["scores"]) == 0 for detections in found)
    assert counts[1] - counts[0] < 5


@pytest.mark.slow
def test_compilation(tmp_path):
    # Sizes change from batch to batch, and few graphs have to serve them all.
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = make_model("teacher", **SMALL)
    set_training(model, Recipe(2, 2, 0.01))
    compiled = torch.compile(LossModule(model), backend=count, dynamic=True)
    for height, width in itertools.product((64, 128, 192), (128, 192, 256)):
        batch = make_batch(2, (height, width))
        targets = assign_boxes(batch_locations(batch.images), batch.boxes, batch.labels)
        compiled(model.transform.normalize(batch.images, batch.sizes), targets)
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    print(f"{breaks} graph breaks, {len(graphs)} graphs for nine sizes")
    assert breaks == 0 and len(graphs) <= 6


@pytest.mark.slow
def test_the_check_for_gpus_runs_here_in_small(tmp_path):
    parts = ["waits", "precisions", "processes", "serving"]
    command = [sys.executable, str(ROOT / "tests/on_gpu.py"), "--out", str(tmp_path / "gpu.json"), "--only", *parts]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found["parts"]) == parts and found["torch"] == torch.__version__
    assert all(part["holds"] for name, part in found["parts"].items() if name != "waits")


# --- cards, precision, memory


def settings_for(data, **changes):
    return TrainSettings(role="teacher", data=str(data), **SMALL, workers=0, **changes)


@pytest.mark.parametrize(
    ("cards", "batch", "accumulate", "expected"),
    [(0, 8, 1, "auto"), (1, 8, 1, 1), (4, 8, 1, 4), (3, 8, 1, 2), (8, 8, 2, 4), (5, 7, 1, 1)],
)
def test_all_cards_that_can_share_a_batch_evenly(coco, monkeypatch, cards, batch, accumulate, expected):
    settings = settings_for(coco, accumulate=accumulate)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    assert even_devices(settings, batch) == expected


@pytest.mark.parametrize(("supported", "precision"), [(True, "bf16"), (False, "fp16")])
def test_precision_of_a_card(monkeypatch, supported, precision):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert choose_precision("cuda").value == precision


def test_precision_auto_is_chosen_and_said(coco):
    plan = prepare(settings_for(coco, precision="auto", iterations=2))
    precision, reason = choose_precision("cpu")
    assert plan.recipe.precision == precision and f"precision {precision}: {reason}" in str(plan)
    assert prepare(settings_for(coco, precision="bf16", iterations=2)).recipe.precision == "bf16"


@pytest.fixture
def room_for():
    "Makes memory short from some call of the first convolution on: there is room for so many images."
    handles, calls = [], itertools.count(1)

    def limit(images, after=0):
        def hook(module, inputs):
            if not isinstance(module, nn.Conv2d) or module.in_channels != 3 or len(inputs[0]) <= images: return
            if next(calls) > after: raise torch.OutOfMemoryError("CUDA out of memory")

        handles.append(nn.modules.module.register_module_forward_pre_hook(hook))

    yield limit
    for handle in handles: handle.remove()


def test_a_batch_that_is_too_large_is_told_with_the_parts_that_fit(coco, tmp_path, room_for):
    room_for(2)
    with pytest.raises(ValueError, match="memory is too short to learn from 4 images at once: 2 is enough"):
        train(settings_for(coco, batch_size=4, iterations=3, out=str(tmp_path / "run")))
    assert train(settings_for(coco, batch_size=4, iterations=3, accumulate=2, out=str(tmp_path / "run"))).is_dir()


def test_a_limit_of_minutes_tells_it_too(coco, tmp_path, room_for):
    room_for(0)
    with pytest.raises(ValueError, match="and for one at a time as well: choose a smaller short_side"):
        prepare(settings_for(coco, batch_size=4, minutes=1, out=str(tmp_path / "run")))


def test_what_is_trained_when_memory_gets_short_is_kept(coco, tmp_path, room_for):
    # The estimate takes six steps of two views each, the training itself two.
    room_for(2, after=2 * (6 + 2))
    folder = tmp_path / "run"
    run = dict(batch_size=4, iterations=6, recipe="small", checkpoint_every=100, out=str(folder))
    with pytest.raises(ValueError, match="2 is enough"): train(settings_for(coco, **run))
    learned = [row["iteration"] for row in read_log(folder)]
    assert learned and learned[-1] < 6
    train(settings_for(coco, **run, accumulate=2))
    assert [row["iteration"] for row in read_log(folder)] == [1, 2, 3, 4, 5, 6]
    assert json.loads((folder / "metrics.json").read_text())["iterations"] == 6


# --- batches


def test_batches_are_padded_as_the_model_asks(tmp_path):
    write_coco(tmp_path, "train2017", size=(90, 70))
    images, model = CocoImages(tmp_path, "train2017"), make_model("teacher", **SMALL, pad=128)
    loader = train_loader(images, TrainTransform(70, 90), 2, **loader_options(model, Recipe(1, 2, 0.1)))
    batch = next(iter(loader))
    assert batch.images.shape[2:] == (128, 128) and batch.images.dtype == torch.uint8
    for picture, (height, width) in zip(batch.images, batch.sizes, strict=True):
        assert not picture[:, height:].any() and not picture[:, :, width:].any()

