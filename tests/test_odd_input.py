"What users hand over, odd but common: it is read right, or refused in one sentence before any work."

import json
import struct
import time
import warnings
import zlib
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import write_coco, write_teacher
from PIL import Image, ImageOps

from msad.data.files import read_json
from msad.data.images import CocoImages, read_image
from msad.data.summary import check_data
from msad.deploy.predict import PredictSettings, image_files, predict
from msad.deploy.predictor import Predictor
from msad.engine.hooks import LogFile, TensorBoard
from msad.engine.weights import load_model, read_weights, save_file, save_model
from msad.evaluation.coco_metrics import evaluate_coco
from msad.evaluation.evaluator import Evaluation, write_evaluation
from msad.evaluation.pictures import plain_text, plot_detections, save_figure
from msad.models.detector import ModelConfig, build_model, student_of
from msad.models.distillation import Distillation
from msad.runs.comparison import AnalysisSettings
from msad.runs.plan import prepare, read_defaults
from msad.runs.settings import TrainSettings
from msad.runs.train import Pictures, train

# --- photographs


def exif(**types):
    "EXIF data with orientation 6 and a resolution, whose entries have other types than they should."
    data = Image.Exif()
    data[0x0112], data[0x011A] = 6, 72.0
    data = data.tobytes()
    for tag, kind in types.items():
        head = bytes.fromhex(tag.removeprefix("tag"))
        place = data.index(head + (b"\x00\x03" if head == b"\x01\x12" else b"\x00\x05"))
        data = data[: place + 2] + bytes([0, kind]) + data[place + 4 :]
    return data


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize("kind", [2, 7], ids=("text", "bytes"))
def test_a_broken_resolution_costs_neither_photograph_nor_orientation(tmp_path, ending, kind):
    pixels = np.zeros((20, 30, 3), dtype=np.uint8)
    pixels[:, :10] = 255
    path = tmp_path / f"a.{ending}"
    Image.fromarray(pixels).save(path, exif=exif(tag011a=kind))
    with pytest.raises(TypeError), Image.open(path) as file: ImageOps.exif_transpose(file)
    read = read_image(path)
    assert read.size == (20, 30)
    assert np.asarray(read)[:8].mean() > 200 and np.asarray(read)[12:].mean() < 50
    assert np.array_equal(Predictor("trees")(read).size, (30, 20))  # and not turned once more


@pytest.mark.parametrize("ending, data", [
    ("png", b"Exif\0\0??" + exif()[8:]), ("webp", b"Exif\0\0??" + exif()[8:]), ("jpg", exif(tag0112=2)),
])
def test_a_note_that_cannot_be_read_is_a_warning(tmp_path, ending, data):
    Image.new("RGB", (30, 20)).save(tmp_path / f"a.{ending}", exif=data)
    with pytest.warns(UserWarning, match=rf"a\.{ending} has EXIF data that cannot be read .* taken as upright"):
        assert read_image(tmp_path / f"a.{ending}").size == (30, 20)


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
@pytest.mark.parametrize("mode", ["I;16", "I", "RGB"])
def test_few_bits_in_sixteen_are_refused_with_the_brightest_value(tmp_path, bits, mode):
    ramp = np.tile(np.linspace(0, 2**bits - 1, 64).astype(np.uint16), (8, 1))
    path = tmp_path / ("a.tif" if mode == "I" else "a.png")
    if mode == "RGB": path.write_bytes(deep_png(ramp))
    else: Image.fromarray(ramp.astype(np.int32) if mode == "I" else ramp).save(path)
    brightest = f"{2**bits - 1:,}"
    if mode == "RGB": brightest = "at most 255" if bits == 8 else "about [0-9,]+"  # Pillow drops the lower 8
    with pytest.raises(ValueError, match=rf"brightest value is {brightest} of 65,535.*multiply .* or save 8 bits"):
        read_image(path)


def deep_png(grey):
    "A PNG of three colours with 16 bits each, which Pillow reads and cannot write."
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = grey.shape
    rows = np.repeat(grey.astype(">u2")[..., None], 3, axis=2).tobytes()
    lines = b"".join(b"\0" + rows[6 * width * i : 6 * width * (i + 1)] for i in range(height))
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def test_a_data_set_of_few_bits_is_refused_before_work_starts(tmp_path):
    for split in ("train2017", "val2017"): write_coco(tmp_path / "data", split)
    for path in (tmp_path / "data/val2017").iterdir():
        grey = np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 16
        Image.fromarray(grey).save(path, format="PNG")
    settings = TrainSettings(role="teacher", data=str(tmp_path / "data"), out=str(tmp_path / "run"), recipe="small")
    with pytest.raises(ValueError, match=r"val2017/1\.jpg .*brightest value is [0-9,]+ of 65,535"): train(settings)
    assert not (tmp_path / "run").exists()


def test_sixteen_bits_keep_their_upper_eight(tmp_path):
    ramp = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (8, 1))
    (tmp_path / "rgb.png").write_bytes(deep_png(ramp))
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "32.tif")
    for name in ("rgb.png", "grey.png", "32.tif"):
        assert np.array_equal(np.asarray(read_image(tmp_path / name))[0, :, 1], ramp[0] >> 8)


def test_more_pixels_than_pillow_decodes(tmp_path, monkeypatch):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(ValueError, match=r"a\.png has more than 1,000 pixels.*cut it into tiles"):
        read_image(tmp_path / "a.png")


# --- annotation files


@pytest.mark.parametrize("section, change, message", [
    ("images", {"id": 2**63}, "'images' has the id 9223372036854775808, beyond 64 bits"),
    ("annotations", {"id": -(10**30)}, "'annotations' has the id .*beyond 64 bits"),
    ("categories", {"id": 2**64}, "'categories' has the id .*beyond 64 bits"),
    ("annotations", {"bbox": [1, 2, 10**400, 4]}, "annotation 1 has 'bbox' .*write four numbers"),
    ("images", {"width": 10**300}, r"image 1 has 'width' about 10\^300: write the whole number"),
    ("images", {"height": 1e300}, r"image 1 has 'height' 1e\+300: write the whole number"),
    ("images", {"width": 159.6}, "image 1 has 'width' 159.6: write the whole number of its pixels"),
    ("annotations", {"iscrowd": 10**400}, r"'iscrowd' about 10\^400: write 0 or 1"),
    ("categories", {"name": "\ud800"}, "category 7 has a 'name' that is no valid text"),
])
def test_numbers_out_of_range(tmp_path, section, change, message):
    content = write_coco(tmp_path)
    content[section][0].update(change)
    (tmp_path / "annotations/instances_train2017.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"instances_train2017.json: .*{message}"): check_data(tmp_path, "train2017")


def test_the_largest_numbers_there_are(tmp_path):
    content = write_coco(tmp_path, ids=(2**63 - 1, -(2**63)))
    content["images"][0].update(id=2**63 - 1, width=96.0)
    content["annotations"][0].update(image_id=2**63 - 1, area=10**400)
    content["annotations"][1].update(image_id=2**63 - 1, bbox=[0, 0, 10**300, 10**300])
    content["annotations"][2].update(bbox=[float("nan"), 0, 1e308, 1e308])
    path = tmp_path / "annotations/instances_train2017.json"
    path.write_text(json.dumps(content))
    summary = check_data(tmp_path, "train2017")
    assert (summary.boxes, summary.dropped, summary.clipped) == (7, 1, 1)
    first = content["annotations"][0]
    result = {name: first[name] for name in ("image_id", "category_id", "bbox")}
    assert evaluate_coco(path, [{**result, "score": 1}])["AP50"] > 0
    for wrong in ({"score": 10**400}, {"bbox": [1, 2, 3, 10**400]}, {"image_id": 10**400}):
        with pytest.raises(ValueError, match=f"detection 0 .from 0. has '{next(iter(wrong))}'"):
            evaluate_coco(path, [{**result, "score": 1, **wrong}])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_json_in_the_encodings_of_editors(tmp_path, encoding):
    (tmp_path / "a.json").write_bytes('{"name": "Mädesüß"}'.encode(encoding))
    assert read_json(tmp_path / "a.json") == {"name": "Mädesüß"}


def test_json_in_an_older_encoding(tmp_path):
    (tmp_path / "a.json").write_bytes('{"name": "Mädesüß"}'.encode("cp1252"))
    with pytest.raises(ValueError, match=r"a\.json is not UTF-8 text .*in UTF-8"): read_json(tmp_path / "a.json")


def test_a_split_without_annotations(tmp_path):
    content = write_coco(tmp_path)
    del content["annotations"]
    path = tmp_path / "annotations/instances_train2017.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="no list 'annotations'.*an empty list will do"):
        CocoImages(tmp_path, "train2017")
    path.write_text(json.dumps({**content, "annotations": []}))
    assert len(CocoImages(tmp_path, "train2017")[0][1]["boxes"]) == 0


# --- images and targets for a model


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    config = ModelConfig("teacher", 0.25, ("a", "b"), (1, 2), neck_channels=64, head_convs=1)
    teacher = build_model(config)
    student = student_of(teacher)
    return {"teacher": teacher, "student": student, "distillation": Distillation(student_of(teacher), teacher)}


PICTURE = torch.zeros(3, 128, 128, dtype=torch.uint8)
BOX = torch.tensor([[8.0, 8, 40, 40]])


@pytest.mark.parametrize("name", ["teacher", "student", "distillation"])
@pytest.mark.parametrize("images, target, message", [
    ([PICTURE], {"boxes": BOX, "labels": torch.tensor([2])}, "the label 2: number the classes from 0 to 1"),
    ([PICTURE], {"boxes": BOX, "labels": torch.tensor([-1])}, "the label -1"),
    ([PICTURE], {"boxes": BOX, "labels": torch.tensor([0, 1])}, "1 boxes and 'labels' that are int64 of shape .2,."),
    ([PICTURE], {"boxes": BOX, "labels": torch.tensor([0.0])}, "'labels' that are float32"),
    ([PICTURE], {"boxes": BOX[:0], "labels": torch.zeros(0, 1).long()}, "'labels' that are int64 of shape .0, 1."),
    ([PICTURE], {"boxes": BOX.flip(1), "labels": torch.tensor([0])}, "the box .40.0, 40.0, 8.0, 8.0. .*x1 < x2"),
    ([PICTURE], {"boxes": BOX * float("nan"), "labels": torch.tensor([0])}, "the box .nan"),
    ([PICTURE], {"boxes": BOX + 200, "labels": torch.tensor([0])}, "the box .208.0.* image of 128 × 128 pixels"),
    ([PICTURE], {"boxes": BOX[0], "labels": torch.tensor([0])}, "'boxes' of shape .4,."),
    ([PICTURE], {"labels": torch.tensor([0])}, "no tensor 'boxes'"),
    ([PICTURE], [BOX], "no tensor 'boxes'"),
    ([PICTURE, PICTURE], {"boxes": BOX, "labels": torch.tensor([0])}, "1 for 2 images"),
    ([PICTURE.float() + 9], {"boxes": BOX, "labels": torch.tensor([0])}, "values from 9 to 9: give float from 0 to 1"),
    ([PICTURE.long()], {"boxes": BOX, "labels": torch.tensor([0])}, "int64 of shape .3, 128, 128.: give uint8"),
    ([PICTURE[[0, 1, 2, 2]]], {"boxes": BOX, "labels": torch.tensor([0])}, "uint8 of shape .4, 128, 128."),
    (PICTURE, {"boxes": BOX, "labels": torch.tensor([0])}, "images is uint8 of shape .3, 128, 128.: give a list"),
])
def test_what_a_model_cannot_learn_from(models, name, images, target, message):
    model = models[name].train()
    with pytest.raises(ValueError, match=message): model(images, [target])
    assert all(loss.isfinite() for loss in model([PICTURE], [{"boxes": BOX, "labels": torch.tensor([1])}]).values())


def test_what_a_model_cannot_detect_in(models):
    for images, message in (([PICTURE + 255.0], "values from 255"), ([PICTURE.int()], "int32"), ([b"a"], "bytes")):
        with pytest.raises(ValueError, match=message): models["student"].eval()(images)
    assert models["student"]([]) == []


# --- parameters


@pytest.mark.parametrize("kind, change, message", [
    (PredictSettings, {"images": 20.5}, "images is 20.5: write a text.*`-r images 20.5`"),
    (PredictSettings, {"model": 5}, "model is 5: .*`-r model 5`"),
    (PredictSettings, {"out": 5.5}, "out is 5.5: .*`-r out 5.5`"),
    (AnalysisSettings, {"runs": 5}, r"runs is 5: give a list; from papermill, -y \"runs: \[FOLDER, FOLDER\]\""),
    (AnalysisSettings, {"runs": [5]}, "runs is 5: write a text"),
    (TrainSettings, {"milestones": 5}, "milestones is 5: give a list"),
    (TrainSettings, {"milestones": ["60"]}, "milestones is '60': choose a whole number"),
    (TrainSettings, {"teacher": "runs"}, "teacher is 'runs': only a student has a distillation, so leave it out"),
    (TrainSettings, {"distillation_warmup": 5}, "distillation_warmup is 5: only a student has a distillation"),
    (TrainSettings, {"neck_channels": 100}, "neck_channels is 100: choose 16, 32, 48, 64, 96"),
    (TrainSettings, {"neck_channels": 10**30}, "neck_channels is 10{30}: choose a whole number from 1 to 4,096"),
    (TrainSettings, {"short_side": 200, "max_side": 100}, "short_side is 200 and max_side 100"),
    (TrainSettings, {"workers": 10**19}, "workers is 10{19}: choose at most 1,024"),
    (TrainSettings, {"seed": 2**64}, "seed is .*choose at most"),
    (TrainSettings, {"lr": 10**400}, r"lr is about 10\^400: choose a number above 0"),
    (TrainSettings, {"iterations": 10**19}, "iterations is 10{19}: choose at most"),
    (TrainSettings, {"data": "a\0b"}, "data is .*cannot hold the character NUL"),
    (TrainSettings, {"out": "a" * 300}, "out is .*each name in it 255"),
])
def test_parameters_before_any_file_is_read(kind, change, message):
    role = {"role": "teacher"} if kind is TrainSettings else {}
    with pytest.raises(ValueError, match=message): kind(**role, **change)


@pytest.mark.parametrize("content, message", [
    ({"recipe": 5}, "recipe is 5"), ({"lr": "fast"}, "lr is 'fast'"), ({"milestones": 5}, "milestones is 5"),
    ({"neck_channels": "64"}, "neck_channels is '64'"), ({"short_side": [3]}, "short_side is .3."),
    ({"epochs": 3}, "'epochs' is no parameter"), ({"minutes": 5}, "'minutes' is no parameter"),
])
def test_wrong_defaults_of_a_data_folder(tmp_path, content, message):
    (tmp_path / "msad.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"msad\.json: {message}"): read_defaults(tmp_path)


# --- files of models


@pytest.mark.parametrize("change", [{"neck_channels": [64]}, {"neck_channels": -1}, {"neck_channels": 10**30},
    {"head_convs": "2"}, {"pad": 64.0}, {"class_names": "ab"}, {"score_thresh": None}, {"normalization": {"std": 0}},
    {"short_side": 10**30}, {"width": [0.25]}, {"backbone": 5}, {"normalization": 3}])
def test_settings_of_another_type(tmp_path, change):
    path = write_teacher(tmp_path / "a.pth")
    contents = torch.load(path, weights_only=True)
    save_file(path, {**contents, "config": {**contents["config"], **change}})
    with pytest.raises(ValueError, match=r"model: .*a\.pth .*get the file once more"): load_model(path)


def test_weights_that_are_not_finite(tmp_path):
    model = load_model(write_teacher(tmp_path / "a.pth"))
    model.backbone.load_state_dict({k: v * float("inf") for k, v in model.backbone.state_dict().items()})
    save_model(tmp_path / "a.pth", model)
    with pytest.raises(ValueError, match=r"weights: .*a\.pth .*has backbone\..* with numbers that are not finite"):
        read_weights(tmp_path / "a.pth")


def test_paths_that_cannot_be():
    for path in ("a\0b", "a" * 300):
        with pytest.raises(ValueError, match="model is .*a path"): Predictor(path)


# --- predictions


@pytest.mark.parametrize("images, message", [
    (b"\xff\xd8", "bytes is no picture; open it with Image.open"), (bytearray(b"a"), "bytearray is no picture"),
    ({"image": "a.jpg"}, "dict is no picture; give a path"), ({"a.jpg"}, "set is no picture"),
])
def test_no_picture_and_no_list_of_them(images, message):
    predictor = Predictor("trees")
    with pytest.raises(ValueError, match=message): predictor(images)
    (found,) = predictor.stream(images)
    assert message.split(";")[0] in str(found)


def test_a_folder_with_brackets_and_files_of_a_telephone(tmp_path, capsys):
    album = tmp_path / "May [2023] *"
    album.mkdir()
    Image.new("RGB", (40, 30)).save(album / "a.jpg")
    for name in ("b.HEIC", "c.heic"): (album / name).write_text("")
    for images in (album, f"{album}/*.jpg", f"{tmp_path}/**/*.jpg"):
        assert image_files(str(images)) == ([album / "a.jpg"], album)
    predict(PredictSettings(images=str(album), out=str(tmp_path / "out")))
    assert "2 with .heic; convert pictures to JPEG" in capsys.readouterr().out
    (album / "a.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="2 with .heic"): image_files(album)


# --- drawing


@pytest.mark.parametrize("name", ["$_$", "$", "a$b$c", "_x", r"\frac{$}$", "猫", "⌒", "\U000f0000", "a\nb", "é" * 500])
def test_any_name_can_be_drawn(tmp_path, name):
    content = write_coco(tmp_path, names=(name, "oak"))
    images = CocoImages(tmp_path, "train2017")
    found = [{**box, "score": 1.0, "category_id": 90} for box in content["annotations"]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that of a missing glyph
        save_figure(plot_detections(images, {name: found}, [1]), tmp_path / "a.png")
    fig, ax = plt.subplots()
    ax.plot([0, 1], label=plain_text(name))
    assert len(ax.legend().texts) == 1
    plt.close(fig)


@pytest.mark.slow
def test_a_training_with_a_class_named_like_a_formula(tmp_path, capsys):
    for split in ("train2017", "val2017"): write_coco(tmp_path, split, names=("$_$", "$^"))
    small = dict(recipe="small", iterations=2, batch_size=2, short_side=96, max_side=96, neck_channels=64, head_convs=1)
    places = dict(data=str(tmp_path), out=str(tmp_path / "run"), devices="cpu", workers=0)
    settings = dict(role="teacher", **places, **small)
    folder = train(TrainSettings(**settings))
    assert "The weights start from nothing" in capsys.readouterr().out
    assert set(read_json(folder / "metrics.json")["classes"]) == {"$_$", "$^"}
    assert (folder / "figures/detections.png").is_file()
    train(TrainSettings(**{**settings, "iterations": 3}))
    printed = capsys.readouterr().out
    assert "The weights are those of the last checkpoint" in printed and "from nothing" not in printed
    (checkpoint,) = sorted((folder / "checkpoints").glob("*3.pth"))
    with pytest.raises(ValueError, match=r"weights: .*is a checkpoint, .*give that run's folder"):
        prepare(TrainSettings(**{**settings, "out": str(tmp_path / "other"), "weights": str(checkpoint)}))


def test_thousands_of_boxes_are_drawn_in_seconds(tmp_path):
    content = write_coco(tmp_path, boxes_per_image=2)
    box = content["annotations"][0]
    content["annotations"] = [{**box, "id": i + 1, "bbox": [i % 80, i % 50, 9, 9]} for i in range(3000)]
    (tmp_path / "annotations/instances_train2017.json").write_text(json.dumps(content))
    images = CocoImages(tmp_path, "train2017")
    start = time.perf_counter()
    save_figure(plot_detections(images, {"none": []}, [1]), tmp_path / "a.png")
    assert time.perf_counter() - start < 15


def test_a_picture_that_cannot_be_drawn_costs_no_result(tmp_path):
    figure = plt.figure()
    figure.text(0, 0, "$_$")
    with pytest.warns(UserWarning, match="detections.png cannot be drawn .ValueError.*all results are there"):
        write_evaluation(tmp_path, Evaluation({"AP": 1.0}, [], figure))
    assert read_json(tmp_path / "metrics.json") == {"AP": 1.0}
    with pytest.warns(UserWarning) as warned:
        run = SimpleNamespace(folder=tmp_path, iteration=1)
        for hook in (LogFile(), TensorBoard(), Pictures()):
            hook.before_training(run)
            hook.after_log(run, {"iteration": 1, "loss": 1.0, "lr": 0.1})
            hook.after_evaluation(run, {"AP": 1.0, "AP50": 2.0}, figure)
            hook.after_training(run)
    texts = [str(warning.message) for warning in warned]
    for picture in ("TensorBoard's detections", "detections.png"):
        assert any(text.startswith(f"{picture} cannot be drawn") for text in texts)
    assert (tmp_path / "figures/losses.png").is_file()
    plt.close("all")
