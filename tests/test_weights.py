"Files of weights as they come: ours, the published ones, and those that are none or are broken."

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden.golden import load_case

from msad.data.files import write_atomically
from msad.engine.weights import load_model, load_weights, read_weights, save_model
from msad.models.backbone import WIDTHS
from msad.models.detector import ModelConfig, Student, Teacher, build_model
from msad.models.distillation import Distillation
from msad.models.transform import CAFFE

SMALL = ModelConfig(
    "student", width=0.25, class_names=("ash", "oak", "elm"), category_ids=(2, 3, 5), neck_channels=64, head_convs=1
)


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    "The weights of a published student, its teacher's included."
    return load_case(str(Path(__file__).parent / "golden" / "cases" / "student_w0.25"))[0]


@pytest.fixture(scope="module")
def published_teacher(published) -> dict[str, torch.Tensor]:
    return {name: value for name, value in published.items() if not name.startswith("S_")}


@pytest.fixture
def folder():
    "A folder for large files, which goes with the test."
    with tempfile.TemporaryDirectory() as name: yield Path(name)


def save(path: Path, contents: object) -> Path:
    torch.save(contents, path)
    return path


def lively(config: ModelConfig) -> Teacher | Student:
    "A fresh model that detects something everywhere, with BatchNorm statistics of its own."
    torch.manual_seed(0)
    model = build_model(config).eval()
    torch.nn.init.zeros_(model.head.cls_logits.bias)
    for name, buffer in model.backbone.named_buffers():
        if name.endswith(("running_mean", "running_var")): buffer.uniform_(0.5, 1.5)
    return model


def photograph() -> torch.Tensor:
    return torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def detect(model) -> dict[str, torch.Tensor]:
    with torch.no_grad(): return model([photograph()])[0]


def assert_refused(path: Path, *words: str, read=load_model) -> None:
    "Reading `path` fails with one `ValueError` that names the file and says all of `words`."
    with pytest.raises(ValueError) as error: read(path)
    for word in (str(path), *words): assert word in str(error.value)
    assert not error.value.__cause__


# Files that are no checkpoints


def test_missing_path(tmp_path):
    path = tmp_path / "nowhere.pth"
    for read in (load_model, read_weights):
        with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"): read(path)
    with pytest.raises(FileNotFoundError, match=r"^teacher: .*model_final\.pth"):
        load_model(tmp_path, parameter="teacher")


@pytest.mark.parametrize("kept", (0.0, 0.1, 0.5, 0.999))
def test_truncated_file(tmp_path, kept):
    path = tmp_path / "model_final.pth"
    save_model(path, build_model(SMALL))
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert_refused(path, "damaged")


@pytest.mark.parametrize(
    "text",
    (b"The weights are elsewhere.\n", b"<!DOCTYPE html>\n<html></html>\n", b'{"model": {}}\n', b"\x89PNG\r\n\x1a\n"),
    ids=("prose", "html", "json", "png"),
)
def test_file_that_torch_did_not_write(tmp_path, text):
    path = tmp_path / "model_final.pth"
    path.write_bytes(text)
    assert_refused(path, "is not a checkpoint")


def test_file_that_wants_full_unpickling(tmp_path):
    weights = {"conv.weight": torch.zeros(2)}
    path = save(tmp_path / "objects.pth", {"model": weights, "arguments": argparse.Namespace(lr=1)})
    assert_refused(path, "Python objects", "model.state_dict()")
    assert_refused(save(tmp_path / "module.pth", torch.nn.Linear(2, 2)), "Python objects")


@pytest.mark.parametrize(
    "contents",
    ({"conv.weight": torch.zeros(2)}, {"model": torch.zeros(2)}, [torch.zeros(2)], torch.zeros(2)),
    ids=("flat", "tensor under model", "list", "tensor"),
)
def test_file_without_weights_under_model(tmp_path, contents):
    assert_refused(save(tmp_path / "other.pth", contents), 'no weights under "model"')


@pytest.mark.parametrize("state", ({"conv1.weight": torch.zeros(2)}, {}), ids=("foreign", "empty"))
def test_weights_of_an_unknown_kind(tmp_path, state):
    assert_refused(save(tmp_path / "foreign.pth", {"model": state}), "unknown kind", next(iter(state), "none"))


def test_file_of_another_format(tmp_path):
    path = tmp_path / "model_final.pth"
    assert_refused(save(path, {"format": "msad 99", "config": {}, "model": {}}), "'msad 99'", "'msad 1'")
    config = {**SMALL.to_dict(), "width": 0.3}
    assert_refused(save(path, {"format": "msad 1", "config": config, "model": {}}), "width")


# Our own files


@pytest.mark.parametrize("role", ("teacher", "student"))
def test_round_trip_is_exact(tmp_path, role):
    model = lively(replace(SMALL, role=role, normalization=CAFFE, pad=128, short_side=96, max_side=160))
    save_model(tmp_path / "model_final.pth", model)
    for path in (tmp_path, tmp_path / "model_final.pth", str(tmp_path)):
        loaded = load_model(path, role=role)
        assert type(loaded) is type(model) and not loaded.training
        assert loaded.config == model.config
        state = loaded.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    found, expected = detect(loaded), detect(model)
    assert len(expected["boxes"]) > 0
    assert all(torch.equal(found[kind], expected[kind]) for kind in expected)


def test_a_file_has_no_unused_weights(tmp_path):
    model = build_model(ModelConfig("student", width=0.25))
    path = tmp_path / "model_final.pth"
    save_model(path, model)
    bytes_of_parameters = 4 * sum(p.numel() for p in model.parameters())
    assert bytes_of_parameters < path.stat().st_size < 1.05 * bytes_of_parameters


def test_role_is_checked(tmp_path):
    save_model(tmp_path / "model_final.pth", build_model(SMALL))
    assert_refused(tmp_path, "holds a student", read=lambda path: load_model(path, parameter="teacher", role="teacher"))
    assert_refused(tmp_path, "no teacher beside a student", read=lambda path: load_model(path, with_teacher=True))


def test_missing_and_misshapen_weights_of_ours(tmp_path):
    model = build_model(SMALL)
    path, state = tmp_path / "model_final.pth", model.state_dict()
    contents = {"format": "msad 1", "config": SMALL.to_dict()}
    short = {name: value for name, value in state.items() if name != "neck.p6.bias"}
    assert_refused(save(path, {**contents, "model": short}), "neck.p6.bias")
    assert_refused(save(path, {**contents, "model": {**state, "neck.p6.bias": torch.zeros(3)}}), "neck.p6.bias")


@pytest.mark.parametrize("old", (None, b"the old file"))
@pytest.mark.parametrize("interruption", (KeyboardInterrupt, OSError))
def test_interrupted_writing_leaves_no_trace(tmp_path, old, interruption):
    path = tmp_path / "model_final.pth"
    if old: path.write_bytes(old)

    def write(file):
        file.write(b"half of the new file")
        assert (path.read_bytes() == old) if old else not path.exists()
        raise interruption

    with pytest.raises(interruption): write_atomically(path, write)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([old] if old else [])


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    message = r"cannot write \S+file/model.pth \(.*\); make sure that the folder can be written"
    with pytest.raises(OSError, match=message): write_atomically(tmp_path / "file" / "model.pth", lambda file: None)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_writing_replaces_the_old_file(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    for content in (b"old", b"new"): write_atomically(path, lambda file, content=content: file.write(content))
    assert [(p.name, p.read_bytes()) for p in path.parent.iterdir()] == [("file", b"new")]


# Published detectors


def test_published_teacher(folder, published_teacher):
    others = {"optimizer": {"state": {}}, "scheduler": {"base_lrs": [0.01]}, "iteration": 89999}
    path = save(folder / "model_final.pth", {"model": published_teacher, **others})
    model = load_model(folder)
    assert isinstance(model, Teacher)
    assert_refused(path, "no teacher beside a student", read=lambda path: load_model(path, with_teacher=True))
    assert (model.config.role, model.config.width, model.config.normalization) == ("teacher", 0.25, CAFFE)
    assert torch.equal(model.neck.p7.weight, published_teacher["T_backbone.top_block.p7.weight"])
    assert torch.equal(model.fusion.score[2].weight, published_teacher["SE.fc.2.weight"])
    with pytest.raises(ValueError, match="holds a teacher"): load_model(path, role="student")


def test_published_student_is_the_student_alone(folder, published):
    path = save(folder / "model_final.pth", {"model": published})
    student, pair = load_model(path), load_model(path, with_teacher=True)
    assert type(student) is Student and type(pair) is Distillation
    assert (student.config.role, student.config.width) == ("student", 0.25)
    assert not any("teacher" in name or "fusion" in name or "p7" in name for name in student.state_dict())
    assert torch.equal(student.neck.p6.weight, published["S_backbone.top_block.p6.weight"])
    assert torch.equal(pair.teacher.neck.p6.weight, published["T_backbone.top_block.p6.weight"])
    found, expected = detect(student), detect(pair)
    assert len(expected["boxes"]) > 0
    assert all(torch.equal(found[kind], expected[kind]) for kind in expected)
    save_model(folder / "ours.pth", student)
    assert (folder / "ours.pth").stat().st_size < 0.2 * path.stat().st_size


BREAKABLE = {
    "T_backbone.bottom_up.features.3.body.3.weight": "stages.0.2.body.3.weight",
    "T_backbone.fpn_lateral2.weight": "",
    "T_backbone.fpn_output4.bias": "neck.output.2.bias",
    "T_fcos_head.scales.3.scale": "scale",
    "T_fcos_head.cls_logits.weight": "cls_logits",
    "SE.fc.0.weight": "fusion.score.0.weight",
}


@pytest.mark.parametrize("name", BREAKABLE)
@pytest.mark.parametrize("fault", ("missing", "misshapen"))
def test_broken_published_teacher(folder, published_teacher, name, fault):
    state = {**published_teacher, name: torch.zeros([side + 1 for side in published_teacher[name].shape])}
    if fault == "missing": del state[name]
    path = save(folder / "model_final.pth", {"model": state})
    assert_refused(path, BREAKABLE[name])


# Starting from other weights


@pytest.fixture(scope="module")
def imagenet(published) -> dict[str, torch.Tensor]:
    "Slimmable ImageNet weights as published."
    prefix = "T_backbone.bottom_up."
    state = {f"module.{k.removeprefix(prefix)}": v for k, v in published.items() if k.startswith(prefix)}
    classifier = {"weight": torch.zeros(1000, 2048), "bias": torch.zeros(1000)}
    return {**state, **{f"module.classifier.0.{name}": value for name, value in classifier.items()}}


@pytest.fixture(scope="module")
def imagenet_file(imagenet):
    with tempfile.TemporaryDirectory() as name: yield save(Path(name) / "s_resnet50.pt", {"model": imagenet})


@pytest.mark.parametrize("width", (0.25, 1.0))
def test_slimmable_weights_fill_the_backbone(imagenet, imagenet_file, width):
    model = build_model(replace(SMALL, width=width))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    text = load_weights(model, read_weights(imagenet_file))
    blocks = [(stage, block) for stage, depth in enumerate((3, 4, 6, 3)) for block in range(depth)]
    modules = {"stem": 0, **{f"stages.{stage}.{block}": i for i, (stage, block) in enumerate(blocks, start=1)}}
    read = 0
    for module, i in modules.items():
        for name, value in model.backbone.get_submodule(module).state_dict().items():
            layer, tensor = name.rsplit(".", 1)
            source = imagenet.get(f"module.features.{i}.{name}")  # of a convolution
            if source is None: source = imagenet[f"module.features.{i}.{layer}.bn.{WIDTHS.index(width)}.{tensor}"]
            assert torch.equal(value, source[tuple(slice(side) for side in value.shape)]), f"{module}.{name}"
            read += 1
    assert read == len(model.backbone.state_dict())
    for name, value in model.state_dict().items():
        if not name.startswith("backbone."): assert torch.equal(value, before[name])
    assert f"loaded {read} of {len(before)} tensors (backbone)" in text
    assert "started anew: neck.lateral, neck.output, neck.p6, head." in text


def test_slimmable_weights_are_no_detector(imagenet_file):
    assert_refused(imagenet_file, "not a detector", "`weights`")


@pytest.mark.parametrize("fault", ("missing", "misshapen"))
def test_broken_slimmable_weights(folder, imagenet, fault):
    name = "module.features.5.body.4.bn.0.running_var"
    state = {**imagenet, name: torch.zeros(3)}
    if fault == "missing": del state[name]
    path = save(folder / "s_resnet50.pt", {"model": state})
    model = build_model(SMALL)
    assert_refused(path, "running_var", read=lambda path: load_weights(model, read_weights(path)))


def test_other_classes_start_the_class_layer_anew(tmp_path):
    save_model(tmp_path / "model_final.pth", lively(SMALL))
    loaded = load_model(tmp_path).state_dict()
    for names in (("pine",), ("elm", "oak", "ash")):
        model = build_model(replace(SMALL, class_names=names, category_ids=tuple(range(len(names)))))
        fresh = {name: value.clone() for name, value in model.state_dict().items()}
        text = load_weights(model, read_weights(tmp_path))
        for name, value in model.state_dict().items():
            source = fresh if name.startswith("head.cls_logits.") else loaded
            assert torch.equal(value, source[name]), name
        assert f"loaded {len(fresh) - 2} of {len(fresh)} tensors" in text
        assert text.endswith("started anew: head.cls_logits")


def test_nameless_classes_are_taken_for_as_many_of_the_data(tmp_path):
    nameless = lively(replace(SMALL, class_names=("class 0", "class 1", "class 2")))
    save_model(tmp_path / "model_final.pth", nameless)
    for names, expected in ((("pine", "yew", "fir"), "loaded {0} of {0}"), (("pine", "yew"), "started anew: head.cls")):
        model = build_model(replace(SMALL, class_names=names, category_ids=tuple(range(len(names)))))
        assert expected.format(len(model.state_dict())) in load_weights(model, read_weights(tmp_path))
        kept = torch.equal(model.head.cls_logits.weight, nameless.head.cls_logits.weight)
        assert kept == (len(names) == 3)


def test_a_student_starts_from_a_teacher_but_for_its_own_needs(tmp_path):
    teacher = lively(replace(SMALL, role="teacher"))
    save_model(tmp_path / "model_final.pth", teacher)
    student = build_model(SMALL)
    text = load_weights(student, read_weights(tmp_path))
    weights = teacher.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in student.state_dict().items())
    assert "started anew" not in text and "not used: neck.p7, fusion.score" in text


@pytest.mark.parametrize(("field", "other"), (("width", 0.5), ("neck_channels", 128), ("head_convs", 2)))
def test_other_sizes_are_refused(tmp_path, field, other):
    save_model(tmp_path / "model_final.pth", build_model(SMALL))
    model = build_model(replace(SMALL, **{field: other}))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    theirs = getattr(SMALL, field)
    words = (f"{field} {theirs}", f"the model {other}", f"set {field} to {theirs}")
    assert_refused(tmp_path, *words, read=lambda path: load_weights(model, read_weights(path)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_misshapen_weights_to_start_from(tmp_path):
    model = build_model(SMALL)
    state = {**model.state_dict(), "neck.p6.bias": torch.zeros(3)}
    save(tmp_path / "model_final.pth", {"format": "msad 1", "config": SMALL.to_dict(), "model": state})
    assert_refused(tmp_path, "neck.p6.bias", read=lambda path: load_weights(model, read_weights(path)))
