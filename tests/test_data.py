"The data pipeline on small files of every kind, good and bad."

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from msad.data.annotations import read_annotations, usable_boxes
from msad.data.files import data_defaults
from msad.data.images import CocoImages, read_image, resized_size
from msad.data.loaders import EvalImages, TrainImages, TrainSampler, eval_loader, train_loader, training_indices
from msad.data.summary import check_data
from msad.data.transforms import EvalTransform, TrainTransform
from msad.runs.plan import read_defaults

SIZES = ((40, 60), (60, 40), (48, 48), (30, 90), (50, 70), (64, 32))  # height, width
CATEGORIES = ((7, "cat"), (-3, "dog"), (90, "owl"))


def make_data(root, n_images=6):
    "A data set of smooth random JPEGs; ids have gaps, one file lies in a folder of its own."
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i, (height, width) in zip(range(n_images), itertools.cycle(SIZES)):
        name = f"deep/er/{i}.jpg" if i == 1 else f"{i}.jpg"
        path = root / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        small.resize((width, height), Image.Resampling.BICUBIC).save(path, quality=95)
        images.append({"id": 100 - 10 * i, "file_name": name, "height": height, "width": width})
        for k in range(3):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 100 - 10 * i,
                    "category_id": CATEGORIES[k][0],
                    "bbox": [2.5 + 4 * k, 3, 10, 8.25],
                    "area": 82.5,
                    "iscrowd": int(k == 2),
                    "segmentation": [[0, 0, 1, 1, 2, 2]],
                }
            )
    categories = [{"id": i, "name": name} for i, name in CATEGORIES]
    dataset = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations").mkdir()
    write(root, dataset)
    return dataset


def write(root, dataset):
    text = dataset if isinstance(dataset, str) else json.dumps(dataset)
    (root / "annotations/instances_train.json").write_text(text)


@pytest.fixture
def data(tmp_path):
    return tmp_path, make_data(tmp_path)


# --- sizes and boxes


@pytest.mark.parametrize(
    ("size", "short", "limit", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),  # 1066.67
        ((640, 480), 800, 1333, (1067, 800)),
        ((427, 640), 800, 1333, (800, 1199)),  # 1199.06
        ((500, 375), 640, 1333, (853, 640)),  # 853.33
        ((300, 1000), 800, 1333, (400, 1333)),  # 399.9
        ((1000, 300), 800, 1333, (1333, 400)),
        ((400, 401), 200, 1333, (200, 201)),  # 200.5 goes up
        ((400, 403), 200, 1333, (200, 202)),  # 201.5 goes up, where round() and even numbers would agree
        ((400, 405), 200, 1333, (200, 203)),  # 202.5 goes up, where round() would go to 202
        ((256, 256), 256, 256, (256, 256)),
        ((256, 256), 800, 600, (600, 600)),
        ((1, 5000), 800, 1333, (1, 1333)),
    ],
)
def test_resized_size(size, short, limit, expected):
    assert resized_size(*size, short, limit) == expected


def test_usable_boxes():
    nan, inf = float("nan"), float("inf")
    good = {(0, 0, 20, 10): (0, 0, 20, 10), (-5, -5, 10, 10): (0, 0, 5, 5), (15, 5, 100, 100): (15, 5, 20, 10)}
    bad = [(5, 5, 0, 3), (5, 5, 3, -1), (nan, 5, 3, 3), (5, 5, inf, 3), (-inf, 0, inf, 5), (20, 5, 3, 3), (-3, 0, 3, 3)]
    clipped, usable = usable_boxes(np.array([*good, *bad]), (10, 20))
    assert usable.tolist() == [True] * len(good) + [False] * len(bad)
    assert clipped[usable].tolist() == [list(map(float, box)) for box in good.values()]
    assert usable_boxes(np.zeros((0, 4)), (10, 20))[0].shape == (0, 4)
    each_its_own = usable_boxes(np.array([[5, 5, 9, 9], [5, 5, 9, 9]]), np.array([[10, 20], [20, 10]]))[0]
    assert each_its_own.tolist() == [[5, 5, 14, 10], [5, 5, 10, 14]]


# --- images


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "I;16", "RGB"])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode):
    grey = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (16, 1))
    if mode == "I;16": image = Image.fromarray(grey.astype(np.uint16) * 257)
    else: image = Image.fromarray(grey).convert("RGB").convert(mode)
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(path)
    read = read_image(path)
    assert read.mode == "RGB" and read.size == (64, 16)
    # Two colours, or a palette, can only be right on average.
    error = np.asarray(read).astype(int) - grey[..., None]
    assert np.abs(error).max() <= {"1": 255, "P": 60}.get(mode, 1) and abs(error.mean()) < 15


def test_exif_rotation(data):
    root, dataset = data
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise for display
    for name, height, width in (("0.jpg", 20, 30), ("deep/er/1.jpg", 40, 60)):
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        pixels[:, : width // 3] = 255
        Image.fromarray(pixels).save(root / "train" / name, exif=exif, quality=95)
    dataset["annotations"][0]["bbox"] = [2, 17.25, 8, 10]  # fits the upright image alone
    dataset["annotations"][2]["bbox"] = [10, 3, 10, 8.25]
    for sizes in (((30, 20), (60, 40)), ((20, 30), (40, 60))):  # annotation files come with either
        for entry, (height, width) in zip(dataset["images"], sizes, strict=False):
            entry.update(height=height, width=width)
        write(root, dataset)
        images = CocoImages(root, "train")
        image, target = images[images.image_ids.index(100)]
        assert image.size == (20, 30) and target["size"] == (30, 20)
        assert np.asarray(image)[:8].min() > 200 and np.asarray(image)[12:].max() < 50
        assert target["boxes"][0].tolist() == [2, 17.25, 10, 27.25]
        assert images.sizes.tolist() == [list(images[i][1]["size"]) for i in range(6)]
        summary = check_data(root, "train")
        assert (summary.dropped, summary.clipped, summary.boxes) == (0, 0, 12)
        assert (summary.smallest, summary.largest) == ((30, 20), (64, 90))
        for views, _ in itertools.islice(train_loader(images, TrainTransform(32, 64), 2), 12):
            assert len({view.shape[2] > view.shape[1] for view in views}) == 1


def test_boxes_of_the_unturned_pixels_are_refused(data):
    root, dataset = data
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(root / "train/0.jpg", exif=exif)  # shown as 30 high, 20 wide
    dataset["images"][0].update(height=20, width=30)
    number = dataset["images"][0]["id"]
    for box in (box for box in dataset["annotations"] if box["image_id"] == number): box["bbox"] = [2, 2, 8, 8]
    write(root, dataset)
    check_data(root, "train", decode=False)  # they fit either way
    next(box for box in dataset["annotations"] if box["image_id"] == number)["bbox"] = [15, 2, 14, 8]
    write(root, dataset)
    for decode in (False, True):
        with pytest.raises(ValueError, match="1 of 6 images are turned by their header and their boxes are not: "):
            check_data(root, "train", decode=decode)


@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_size_by_the_header(data, kind, orientation):
    root, dataset = data
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(root / f"train/0.{kind}", exif=exif)
    width, height = read_image(root / f"train/0.{kind}").size
    dataset["images"][0].update(file_name=f"0.{kind}", height=width, width=height)  # the wrong way round
    dataset["annotations"][0]["bbox"] = [0, 0, width, height]
    write(root, dataset)
    images = CocoImages(root, "train")
    assert images.sizes[5].tolist() == [height, width] and images[5][1]["boxes"][0].tolist() == [0, 0, width, height]
    Image.new("RGB", (31, 20)).save(root / f"train/0.{kind}")
    with pytest.raises(ValueError, match=rf"has \[20, 31\] as .* states \[{width}, {height}\]"):
        CocoImages(root, "train")[5]
    (root / f"train/0.{kind}").write_text("no image")
    with pytest.raises(ValueError, match="1 of 6 images do not decode"): check_data(root, "train")
    (root / f"train/0.{kind}").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 6 images do not exist"): check_data(root, "train")


def test_images_that_do_not_decode(data):
    root, _ = data
    half = (root / "train/2.jpg").read_bytes()
    (root / "train/2.jpg").write_bytes(half[: len(half) // 2])
    (root / "train/3.jpg").write_text("no image")
    Image.fromarray(np.full((50, 70), 1e6, dtype=np.float32)).save(root / "train/4.tif")
    (root / "train/4.tif").rename(root / "train/4.jpg")
    images = CocoImages(root, "train")
    for number in (2, 3, 4):
        with pytest.raises(ValueError, match=rf"{number}\.jpg does not decode .*replace it or remove it from"):
            images[images.image_ids.index(100 - 10 * number)]
    Image.new("RGB", (33, 44)).save(root / "train/5.jpg")
    with pytest.raises(ValueError, match="3 of 6 images do not decode") as error: check_data(root, "train", workers=2)
    for part in ("2.jpg", "3.jpg", "4.jpg", "remove them from", "5.jpg is [44, 33], stated [64, 32]"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match=r"1 of 6 images do not .*3\.jpg .*5\.jpg is \[44, 33\]"):
        check_data(root, "train", decode=False)
    for number, size in ((3, (90, 30)), (5, (32, 64))): Image.new("RGB", size).save(root / f"train/{number}.jpg")
    assert check_data(root, "train", decode=False).images == 6


def test_at_most_ten_undecodable_images_are_named(tmp_path):
    make_data(tmp_path, n_images=10)
    dataset = json.loads((tmp_path / "annotations/instances_train.json").read_text())
    for i in range(13):
        (tmp_path / f"train/bad{i}.jpg").write_text("")
        dataset["images"].append({"id": 1000 + i, "file_name": f"bad{i}.jpg", "height": 5, "width": 5})
    write(tmp_path, dataset)
    with pytest.raises(ValueError, match="13 of 23 images do not decode.* and 3 more") as error:
        check_data(tmp_path, "train")
    assert "bad9.jpg" in str(error.value) and "bad10.jpg" not in str(error.value)


# --- data sets


def test_coco_images(data):
    root, dataset = data
    images = CocoImages(str(root), "train")
    assert images.image_ids == [50, 60, 70, 80, 90, 100] and len(images) == 6
    assert images.category_ids == [-3, 7, 90] and images.class_names == ["dog", "cat", "owl"]
    image, target = images[5]
    assert image.mode == "RGB" and image.size == (60, 40)
    assert isinstance(target["boxes"], tv_tensors.BoundingBoxes) and target["boxes"].dtype == torch.float32
    assert target["boxes"].tolist() == [[2.5, 3, 12.5, 11.25], [6.5, 3, 16.5, 11.25], [10.5, 3, 20.5, 11.25]]
    assert target["labels"].tolist() == [1, 0, 2] and target["labels"].dtype == torch.int64
    assert target["iscrowd"].tolist() == [0, 0, 1]
    assert torch.equal(images[-1][1]["boxes"], target["boxes"])
    with pytest.raises(IndexError): images[6]
    assert target["image_id"] == 100 and type(target["image_id"]) is int and target["size"] == (40, 60)

    shared = CocoImages(root, "train", coco=read_annotations(root / "annotations/instances_train.json"))
    assert shared.image_ids == images.image_ids
    dataset["annotations"] = [a for a in dataset["annotations"] if a["image_id"] != 100]
    write(root, dataset)
    image, target = CocoImages(root, "train")[5]
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)
    for sample in (TrainTransform(64, 100)(image, target | {}, 0), EvalTransform(64, 100)(image, target)):
        assert sample[1]["boxes"].shape == (0, 4)


def test_bad_boxes_are_dropped_and_counted(data):
    root, dataset = data
    boxes = dataset["annotations"]
    boxes[0]["bbox"] = [float("nan"), 1, 5, 5]
    boxes[3]["bbox"] = [1, 1, float("inf"), 5]
    boxes[4]["bbox"] = [1, 1, 0, 5]
    boxes[6]["bbox"] = [500, 1, 5, 5]
    boxes[7]["bbox"] = [-4, 1, 10, 5]
    del boxes[8]["iscrowd"]
    boxes[9]["bbox"] = [85.0, 1, 5.01, 5]  # by a hundredth, as rounding does
    write(root, dataset)
    summary = check_data(root, "train", training=True)
    assert (summary.dropped, summary.clipped, summary.crowd, summary.empty) == (4, 1, 5, 0)
    assert summary.boxes == 18 - 5 - 4 and summary.boxes_per_class == {"dog": 5, "cat": 3, "owl": 1}
    assert summary.images == 6 and summary.smallest == (30, 32) and summary.largest == (64, 90)
    assert "drops as unusable: 4, or cuts at the border: 1" in repr(summary) and "dog 5" in repr(summary)
    images = CocoImages(root, "train")
    assert sum(len(images[i][1]["labels"]) for i in range(6)) == 18 - 4
    _, target = images[images.image_ids.index(80)]
    assert target["boxes"][0].tolist() == [0, 1, 6, 6] and torch.isfinite(target["boxes"]).all()


def test_images_without_a_box(data):
    root, dataset = data
    crowd_only, none = 100, 90
    dataset["annotations"] = [a for a in dataset["annotations"] if a["image_id"] != none]
    for a in dataset["annotations"]:
        if a["image_id"] == crowd_only: a["iscrowd"] = 1
    write(root, dataset)
    images = CocoImages(root, "train")
    assert [images.image_ids[i] for i in training_indices(images)] == [50, 60, 70, 80]
    assert check_data(root, "train").empty == 2
    for a in dataset["annotations"]: a["iscrowd"] = 1
    write(root, dataset)
    assert check_data(root, "train").boxes == 0
    with pytest.raises(ValueError, match="instances_train.json has no usable box that is no crowd"):
        check_data(root, "train", training=True)
    with pytest.raises(ValueError, match="no image to learn from"):
        train_loader(CocoImages(root, "train"), TrainTransform(64, 100), 2)


def entry(section, number, **changes):
    "A change of one entry; the value None removes the field."

    def change(dataset):
        for field, value in changes.items():
            if value is None: del dataset[section][number][field]
            else: dataset[section][number][field] = value

    return change


BAD_ANNOTATIONS = {
    "no images": (lambda d: d.pop("images"), "no list 'images'"),
    "no annotations": (lambda d: d.pop("annotations"), "no list 'annotations'"),
    "no categories": (lambda d: d.pop("categories"), "no list 'categories'"),
    "empty images": (lambda d: d.update(images=[], annotations=[]), "'images' is empty"),
    "empty categories": (lambda d: d.update(categories=[], annotations=[]), "'categories' is empty"),
    "images no list": (lambda d: d.update(images={}), "no list 'images'"),
    "entry no object": (lambda d: d["annotations"].append(5), "'annotations' has the entry 5"),
    "no bbox": (entry("annotations", 3, bbox=None), "'annotations' with id 4 has no 'bbox'"),
    "no annotation id": (entry("annotations", 3, id=None), "position 3 .* has no 'id'"),
    "no image_id": (entry("annotations", 3, image_id=None), "id 4 has no 'image_id'"),
    "no category_id": (entry("annotations", 3, category_id=None), "id 4 has no 'category_id'"),
    "no file_name": (entry("images", 1, file_name=None), "id 90 has no 'file_name'"),
    "no width": (entry("images", 1, width=None), "id 90 has no 'width'"),
    "no category name": (entry("categories", 0, name=None), "id 7 has no 'name'"),
    "zero height": (entry("images", 1, height=0), "image 90 has 'height' 0"),
    "number as name": (entry("images", 1, file_name=5), "image 90 has a 'file_name'"),
    "unknown image": (entry("annotations", 3, image_id=5), "annotation 4 has 'image_id' 5"),
    "unknown category": (entry("annotations", 3, category_id=1), "annotation 4 has 'category_id' 1"),
    "image twice": (entry("images", 1, id=100), "'images' has the id 100 more than once"),
    "annotation twice": (entry("annotations", 3, id=1), "'annotations' has the id 1 more than once"),
    "category twice": (entry("categories", 1, id=7), "'categories' has the id 7 more than once"),
    "text id": (entry("images", 1, id="90"), "'images' has the id '90'"),
    "three numbers": (entry("annotations", 3, bbox=[1, 2, 3]), r"annotation 4 has 'bbox' \[1, 2, 3\]"),
    "text in box": (entry("annotations", 3, bbox=[1, 2, 3, "4"]), "annotation 4 has 'bbox'"),
    "bad crowd": (entry("annotations", 3, iscrowd=2), "annotation 4 has 'iscrowd' 2"),
}


@pytest.mark.parametrize("case", BAD_ANNOTATIONS)
def test_bad_annotations(data, case):
    root, dataset = data
    change, message = BAD_ANNOTATIONS[case]
    change(dataset)
    write(root, dataset)
    with pytest.raises(ValueError, match=message) as error: check_data(root, "train")
    assert "instances_train.json" in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize("text", ['{"images": [', "", "[1]", '{"images": [], "images": []}', '{"images": 3}', "\x00"])
def test_bad_json(data, text):
    root, _ = data
    write(root, text)
    with pytest.raises(ValueError, match="instances_train.json") as error: CocoImages(root, "train")
    assert "again" in str(error.value)


def test_missing_files(data):
    root, _ = data
    with pytest.raises(FileNotFoundError, match="data folder .*nowhere"): check_data(root / "nowhere", "train")
    with pytest.raises(FileNotFoundError, match="has no split 'val': name one of train"): check_data(root, "val")
    shutil.rmtree(root / "train/deep")
    with pytest.raises(FileNotFoundError, match=r"1 of 6 images .*deep/er/1\.jpg.*instances_train.json"):
        check_data(root, "train", decode=False)
    images = CocoImages(root, "train")
    with pytest.raises(FileNotFoundError, match=r"1\.jpg does not exist"): images[images.image_ids.index(90)]


def test_defaults_of_a_data_folder(data):
    root, _ = data
    assert data_defaults(root) == {}
    (root / "msad.json").write_text('{"recipe": "small", "short_side": 192}')
    assert data_defaults(root) == {"recipe": "small", "short_side": 192}
    for text, message in (("[1]", "msad.json holds a JSON list"), ("{", "msad.json is not valid JSON")):
        (root / "msad.json").write_text(text)
        with pytest.raises(ValueError, match=message): data_defaults(root)
    (root / "msad.json").write_text('{"recipe": "mine.json"}')
    (root / "mine.json").write_text("{}")
    assert read_defaults(root) == {"recipe": str(root / "mine.json")}


def test_names_used_twice(data):
    root, dataset = data
    for category in dataset["categories"][:2]: category["name"] = "pet"
    write(root, dataset)
    assert check_data(root, "train").boxes_per_class == {"pet (id -3)": 6, "pet (id 7)": 6, "owl": 0}


# --- transforms


def test_train_transform_drops_crowds_and_scales_boxes(data):
    images = CocoImages(data[0], "train")
    image, target = images[5]
    sizes = set()
    for epoch in range(40):
        pixels, out = TrainTransform(100, 1000, seed=3)(image, target, epoch)
        height, width = pixels.shape[1:]
        sizes.add(height)
        assert pixels.dtype == torch.uint8 and isinstance(pixels, tv_tensors.Image)
        assert (height, width) == resized_size(40, 60, height, 1000)
        assert out["labels"].tolist() == [1, 0] and set(out) == {"boxes", "labels", "image_id", "size"}
        assert out["size"] == (40, 60) and out["image_id"] == 100
        expected = target["boxes"][:2].as_subclass(torch.Tensor) * torch.tensor([width / 60, height / 40] * 2)
        upright = out["boxes"][0, 0] < width / 2
        if not upright: expected[:, [0, 2]] = width - expected[:, [2, 0]]
        torch.testing.assert_close(out["boxes"].as_subclass(torch.Tensor), expected)
        plain = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
        apart = pixels.permute(1, 2, 0).numpy() - (plain if upright else plain[:, ::-1]).astype(int)
        assert np.abs(apart).max() <= 2 and np.abs(apart).mean() < 0.1  # of noise; of photographs 1
    assert sizes == {80, 84, 88, 92, 96, 100}


def test_six_sizes_and_unknown_flips():
    assert TrainTransform(800, 1333).short_sides == [640, 672, 704, 736, 768, 800]
    assert TrainTransform(256, 1333).short_sides == [205, 215, 225, 236, 246, 256]
    with pytest.raises(ValueError, match="flips is 'vertical'"): TrainTransform(800, 1333, flips="vertical")


def test_emptied_image_stays_as_background(data):
    images = CocoImages(data[0], "train")
    image, target = images[5]
    thin_outside_and_crowd = torch.tensor([[5, 5, 5 + 1e-6, 9], [70, 5, 80, 9], [0, 0, 9, 9]])
    target["boxes"] = tv_tensors.wrap(thin_outside_and_crowd, like=target["boxes"])
    pixels, out = TrainTransform(40, 1000)(image, target, 0)
    assert out["boxes"].shape == (0, 4) and out["labels"].shape == (0,) and pixels.shape[0] == 3


def test_a_sample_depends_on_seed_epoch_and_image_alone(data):
    images = CocoImages(data[0], "train")

    def sample(seed, epoch, index):
        return TrainImages(images, TrainTransform(64, 107, "all", seed), range(len(images)))[epoch, index][0]

    before = sample(1, 4, 3)
    for epoch, index in ((0, 0), (9, 5), (4, 1)): sample(1, epoch, index)
    torch.rand(3), np.random.rand(3)
    assert torch.equal(sample(1, 4, 3), before)
    looks = {sample(seed, epoch, 3).numpy().tobytes() for seed in range(4) for epoch in range(4)}
    assert len(looks) > 8


def test_eval_transform(data):
    images = CocoImages(data[0], "train")
    image, target = images[5]
    pixels, out = EvalImages(images, EvalTransform(100, 120))[5]
    assert tuple(pixels.shape) == (3, 80, 120) and pixels.dtype == torch.uint8
    torch.testing.assert_close(torch.as_tensor(out["boxes"]), torch.as_tensor(target["boxes"]) * 2)
    assert out["size"] == (40, 60) and out["iscrowd"].tolist() == [0, 0, 1] and len(EvalImages(images, None)) == 6
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), image.resize((120, 80), Image.Resampling.BILINEAR))


def test_reduced_decoding(tmp_path):
    make_data(tmp_path)
    path = tmp_path / "train/0.jpg"
    exif = Image.Exif()
    exif[0x0112] = 8  # stored lying on its side
    pixels = np.full((1203, 802, 3), 230, dtype=np.uint8)
    pixels[201:801, 300:702] = 20  # upright, the object
    Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_270).save(path, exif=exif, quality=95)
    dataset = json.loads((tmp_path / "annotations/instances_train.json").read_text())
    dataset["images"][0].update(height=1203, width=802)
    dataset["annotations"] = [
        {"id": 1, "image_id": 100, "category_id": 7, "bbox": [300, 201, 402, 600], "iscrowd": 0},
        {"id": 2, "image_id": 100, "category_id": 7, "bbox": [700, 1000, 500, 500], "iscrowd": 0},  # sticks out
    ]
    write(tmp_path, dataset)
    whole = CocoImages(tmp_path, "train")
    for sizes, decoded in (((100, 167), (101, 151)), ((200, 333), (201, 301)), ((400, 667), (401, 602))):
        part = CocoImages(tmp_path, "train", decode_for=sizes)
        assert part[5][0].size == decoded and whole[5][0].size == (802, 1203) and whole[4][0].size == part[4][0].size
        assert part[5][1]["size"] == whole[5][1]["size"] == (1203, 802)
        assert np.array_equal(part.sizes, whole.sizes)
        x1, y1, x2, y2 = part[5][1]["boxes"][0].round().int().tolist()
        grey = np.asarray(part[5][0].convert("L"))
        assert grey[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].max() < 40
        assert (grey < 125).sum() == pytest.approx((x2 - x1) * (y2 - y1), rel=0.03)
        for epoch in range(8):
            transform = TrainTransform(*sizes, "all")
            one, other = (TrainImages(images, transform, range(9))[epoch, 5] for images in (whole, part))
            assert one[0].shape == other[0].shape and (one[0].float() - other[0].float()).abs().mean() < 3
            torch.testing.assert_close(torch.as_tensor(one[1]["boxes"]), torch.as_tensor(other[1]["boxes"]))
        (views, targets), *_ = [
            batch for batch in eval_loader(part, EvalTransform(*sizes), workers=1) if batch[1][0]["image_id"] == 100
        ]
        assert tuple(views[0].shape[1:]) == resized_size(1203, 802, *sizes) and targets[0]["size"] == (1203, 802)
    same = part.decoded_for(None)
    assert same.coco is part.coco and same[5][0].size == (802, 1203) and part[5][0].size == (401, 602)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"0\.jpg does not decode"): part[5]


# --- order


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_sampler(batch_size):
    sizes = np.random.default_rng(0).integers(1, 9, (23, 2))
    indices = [i for i in range(23) if i % 5]
    batches = list(itertools.islice(TrainSampler(sizes, indices, batch_size, seed=5), 200))
    assert all(len(batch) == batch_size for batch in batches)
    for batch in batches: assert len({sizes[i, 1] > sizes[i, 0] for _, i in batch}) == 1
    pairs = [pair for batch in batches for pair in batch]
    assert len(set(pairs)) == len(pairs)
    finished = max(epoch for epoch, _ in pairs) - 2 * batch_size
    assert {(epoch, i) for epoch in range(finished) for i in indices} <= set(pairs)
    orders = [[i for e, i in pairs if e == epoch] for epoch in (0, 1)]
    assert orders[0] != orders[1]
    for start in (0, 1, 77, 150):
        resumed = list(itertools.islice(TrainSampler(sizes, indices, batch_size, 5, start), 50))
        assert resumed == batches[start : start + 50]
    again = TrainSampler(sizes, indices, batch_size, 5, 3)
    assert next(iter(again)) == next(iter(again)) == batches[3]
    assert list(itertools.islice(TrainSampler(sizes, indices, batch_size, seed=6), 20)) != batches[:20]


def test_resumed_loader_equals_undisturbed(data):
    images = CocoImages(data[0], "train")
    transform = TrainTransform(48, 80, "all", seed=2)
    whole = list(itertools.islice(train_loader(images, transform, batch_size=2), 9))
    for workers in (0, 2):
        rest = list(itertools.islice(train_loader(images, transform, 2, start=4, workers=workers), 5))
        for (a_images, a_targets), (b_images, b_targets) in zip(whole[4:], rest, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(a_images, b_images, strict=True))
            for a, b in zip(a_targets, b_targets, strict=True):
                assert torch.equal(a["boxes"], b["boxes"]) and torch.equal(a["labels"], b["labels"])
                assert (a["image_id"], a["size"]) == (b["image_id"], b["size"])


@pytest.mark.parametrize("workers", [0, 1])
def test_eval_loader(data, workers):
    images = CocoImages(data[0], "train")
    batches = list(eval_loader(images, EvalTransform(50, 200), batch_size=4, workers=workers, divisor=32))
    assert sorted(t["image_id"] for _, targets in batches for t in targets) == images.image_ids
    for pixels, targets in batches:
        assert isinstance(pixels, list) and isinstance(targets, list) and len(pixels) <= 4
        assert len({(-(-x.shape[1] // 32), -(-x.shape[2] // 32)) for x in pixels}) == 1
    assert len(batches) < len(images)
