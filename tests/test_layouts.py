"Six photographs of blood smears in every layout that people have, and what is wrong with some of them."

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from msad.cli import main
from msad.data.images import CocoImages
from msad.data.layouts import SplitPath, find_layout, find_splits, groups_of_copies, read_split, read_splits
from msad.data.summary import check_data
from msad.runs.evaluate import EvaluateSettings, load_detector
from msad.runs.folders import finished_runs, run_images
from msad.runs.plan import prepare
from msad.runs.settings import TrainSettings, val_path
from msad.runs.train import train

SOURCE = Path(__file__).parent / "layouts"
SPLITS = {name: (SOURCE / f"ImageSets/Main/{name}.txt").read_text().split() for name in ("train", "val", "test")}
NAMES = ["Platelets", "RBC", "WBC"]


def true_boxes(stem):
    "Class and COCO box of each object of a photograph, sorted."
    text = (SOURCE / f"Annotations/{stem}.xml").read_text()
    objects = []
    for entry in re.findall("<object>.*?</object>", text, re.DOTALL):
        x1, y1, x2, y2 = (int(re.search(f"<{side}>(\\d+)<", entry)[1]) for side in ("xmin", "ymin", "xmax", "ymax"))
        objects.append((re.search("<name>(.*?)<", entry)[1], x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1))
    return sorted(objects)


def boxes_read(split, digits=2):
    "The same of a split that was read, by the stem of the photograph's file."
    names = {category["id"]: category["name"] for category in split.dataset["categories"]}
    found = {Path(path).stem: [] for path in split.paths.values()}
    for box in split.dataset["annotations"]:
        place = (round(side, digits) for side in box["bbox"])
        found[Path(split.paths[box["image_id"]]).stem].append((names[box["category_id"]], *place))
    return {stem: sorted(boxes) for stem, boxes in found.items()}


def coco_dataset(stems, folder=""):
    "The photographs as COCO's annotation file has them."
    images, annotations = [], []
    for i, stem in enumerate(stems, 1):
        images.append({"id": i, "file_name": f"{folder}{stem}.jpg", "width": 640, "height": 480})
        for name, *box in true_boxes(stem):
            entry = {"id": len(annotations) + 1, "image_id": i, "category_id": NAMES.index(name) + 1, "bbox": box}
            annotations.append(entry)
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def copy_images(folder, stems):
    folder.mkdir(parents=True, exist_ok=True)
    for stem in stems: shutil.copy(SOURCE / f"JPEGImages/{stem}.jpg", folder)


def write_coco(root, images="{split}", annotations="annotations/instances_{split}.json", splits=SPLITS):
    for split, stems in splits.items():
        write_json(root / annotations.format(split=split), coco_dataset(stems))
        copy_images(root / images.format(split=split), stems)


def write_roboflow(root, images="{split}"):
    splits = {"train": SPLITS["train"], "valid": SPLITS["val"], "test": SPLITS["test"]}
    write_coco(root, images, "{split}/_annotations.coco.json", splits)


def write_cvat(root):
    stems = [stem for part in SPLITS.values() for stem in part]
    write_json(root / "annotations/instances_default.json", coco_dataset(stems, "first/second/"))
    copy_images(root / "images/first/second", stems)


def write_yolo(root, images="images/{split}", outlines=False, path=None):
    for split, stems in SPLITS.items():
        folder = root / images.format(split=split)
        copy_images(folder, stems)
        labels = Path(str(folder).replace("images", "labels"))
        labels.mkdir(parents=True)
        for stem in stems:
            lines = []
            for name, x, y, w, h in true_boxes(stem):
                numbers = [(x + w / 2) / 640, (y + h / 2) / 480, w / 640, h / 480]
                if outlines:  # a diamond
                    corners = [(x + w / 2, y), (x + w, y + h / 2), (x + w / 2, y + h), (x, y + h / 2)]
                    numbers = [number for a, b in corners for number in (a / 640, b / 480)]
                lines.append(" ".join([str(NAMES.index(name)), *(f"{number:.6f}" for number in numbers)]))
            (labels / f"{stem}.txt").write_text("\n".join(lines))
    places = "".join(f"{split}: {images.format(split=split)}\n" for split in SPLITS)
    (root / "data.yaml").write_text(f"{places}nc: 3\nnames: {NAMES}\n" + (f"path: {path}\n" if path else ""))


LAYOUTS = {
    "COCO": write_coco,
    "COCO, images/SPLIT": lambda root: write_coco(root, "images/{split}"),
    "COCO, images": lambda root: write_coco(root, "images"),
    "COCO, beside the file": lambda root: write_coco(root, "annotations"),
    "COCO, annotations/NAME.json": lambda root: write_coco(root, annotations="annotations/{split}.json"),
    "COCO, one JSON a split": lambda root: write_coco(root, annotations="{split}.json"),
    "COCO, in the split's folder": lambda root: write_coco(root, annotations="{split}/boxes.json"),
    "Roboflow's COCO export": write_roboflow,
    "Roboflow's COCO export, SPLIT/images": lambda root: write_roboflow(root, "{split}/images"),
    "YOLO": write_yolo,
    "YOLO, Roboflow's": lambda root: write_yolo(root, "{split}/images"),
    "YOLO, outlines": lambda root: write_yolo(root, outlines=True),
    "Pascal VOC": lambda root: shutil.copytree(SOURCE, root, dirs_exist_ok=True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same(tmp_path, layout):
    root = tmp_path / "cells"
    LAYOUTS[layout](root)
    before = {path: path.stat().st_mtime_ns for path in sorted(root.rglob("*"))}
    paths = find_splits(root)
    assert [path.split for path in paths] == ["train", "valid" if "Roboflow's COCO" in layout else "val"]
    for path, stems in zip(paths, (SPLITS["train"], SPLITS["val"]), strict=True):
        split = read_split(path)
        assert split.layout == layout.partition(",")[0]
        found = boxes_read(split, 0 if "YOLO" in layout else 2)
        assert found == {stem: true_boxes(stem) for stem in stems}
        images = CocoImages(split)
        assert images.class_names == NAMES and images.sizes.tolist() == [[480, 640]] * len(stems)
        assert {image.size for image, _ in map(images.__getitem__, range(len(images)))} == {(640, 480)}
        summary = check_data(root, path.split)
        assert f"{path.split} is {split.layout}: " in str(summary)
    assert {path: path.stat().st_mtime_ns for path in sorted(root.rglob("*"))} == before


@pytest.mark.parametrize("there, found", [
    (("trainval", "test"), ("trainval", "test")), (("train", "trainval", "val", "test"), ("train", "val")),
    (("train2017", "val2017", "test"), ("train2017", "val2017")), (("train", "test"), ("train", "test")),
])
def test_splits_are_found_by_their_names(tmp_path, there, found):
    write_coco(tmp_path, splits=dict.fromkeys(there, SPLITS["train"]))
    assert tuple(path.split for path in find_splits(tmp_path)) == found


@pytest.mark.parametrize("layout, place", [
    ("COCO, images/SPLIT", "COCO: annotations/instances_train.json, images in images/train"),
    ("COCO, beside the file", "COCO: instances_train.json, images in annotations"),
    ("Roboflow's COCO export", "Roboflow's COCO export: _annotations.coco.json, images in train"),
    ("YOLO", "YOLO: data.yaml, images in cells"),
    ("Pascal VOC", "Pascal VOC: ImageSets/Main/train.txt, images in JPEGImages"),
])
def test_the_summary_tells_where_a_split_is(tmp_path, layout, place):
    LAYOUTS[layout](tmp_path / "cells")
    assert f"train is {place}\n" in f"{check_data(tmp_path / 'cells', 'train')}\n"


def test_cvat_has_one_file_of_which_a_share_is_held_out(tmp_path):
    write_cvat(tmp_path)
    train, val = find_splits(tmp_path)
    assert (train.split, val.split) == ("default:rest", "default:held-out")
    rest, held = read_splits(train, val)
    assert rest.layout == "CVAT's COCO export" and len(rest.paths) == 4 and len(held.paths) == 2
    assert boxes_read(rest) | boxes_read(held) == {stem: true_boxes(stem) for part in SPLITS.values() for stem in part}
    assert "2 of the 6 images of default are held out" in str(check_data(tmp_path, "default:held-out"))
    assert boxes_read(read_split(val)) == boxes_read(held)
    assert find_splits(tmp_path, val="default:held-out") == (train, val)


def test_the_share_depends_on_the_content_alone(tmp_path):
    stems = [stem for part in SPLITS.values() for stem in part]
    write_coco(tmp_path / "a", splits={"train": stems})
    write_coco(tmp_path / "b", splits={"train": stems[::-1]})
    for number, stem in enumerate(stems):  # copies under other names, and Roboflow's variants
        for name in (f"copy{number}.jpg", f"{number}_jpg.rf.0a{number}.jpg"):
            shutil.copy(SOURCE / f"JPEGImages/{stem}.jpg", tmp_path / "b/train" / name)
    variant = tmp_path / "b/train/0_jpg.rf.ff.jpg"
    Image.open(SOURCE / f"JPEGImages/{stems[0]}.jpg").rotate(90).save(variant)
    a, b = (read_splits(*find_splits(tmp_path / name)) for name in "ab")
    assert [boxes_read(part) for part in a] == [boxes_read(part) for part in b]
    groups = groups_of_copies(dict(enumerate(map(str, sorted((tmp_path / "b/train").iterdir())))))
    assert sorted(len(group) for group in groups) == [3, 3, 3, 3, 3, 4]


def test_copies_of_one_photograph_cannot_be_divided(tmp_path):
    write_coco(tmp_path, splits={"train": SPLITS["test"] * 2})
    with pytest.raises(ValueError, match="copies of a single photograph"): read_splits(*find_splits(tmp_path))


def test_explicit_paths_win(tmp_path):
    write_coco(tmp_path / "cells")
    write_json(tmp_path / "mine.json", coco_dataset(SPLITS["test"]))
    copy_images(tmp_path / "photographs", SPLITS["test"])
    explicit = dict(val_annotations=str(tmp_path / "mine.json"), val_images=str(tmp_path / "photographs"))
    train, val = find_splits(tmp_path / "cells", **explicit)
    assert (train.split, val.split) == ("train", "mine")
    split = read_split(val)
    assert split.folder == tmp_path / "photographs" and boxes_read(split) == {s: true_boxes(s) for s in SPLITS["test"]}
    for share in (dict(train="mine:rest"), dict(val="mine:held-out")):
        train, val = find_splits(tmp_path, train_annotations=str(tmp_path / "mine.json"), **share)
        assert (train.split, val.split, train.annotations) == ("mine:rest", "mine:held-out", val.annotations)
    train, val = find_splits(tmp_path, train_annotations=str(SOURCE / "Annotations"))
    assert (train.split, val.split) == ("Annotations:rest", "Annotations:held-out")
    assert [len(part.paths) for part in read_splits(train, val)] == [4, 2]
    with pytest.raises(FileNotFoundError, match="image folder .*nowhere does not exist"):
        read_split(SplitPath(tmp_path / "cells", "train", images=str(tmp_path / "nowhere")))
    with pytest.raises(FileNotFoundError, match="has no XML files: .*val_annotations"):
        read_split(SplitPath(tmp_path, "train", annotations=str(tmp_path / "photographs")))


def test_splits_that_have_to_be_named(tmp_path):
    write_coco(tmp_path, splits={"monday": SPLITS["train"], "tuesday": SPLITS["val"], "friday": SPLITS["test"]})
    with pytest.raises(ValueError, match="train_split: .* has the splits friday, monday, tuesday; name the one"):
        find_splits(tmp_path)
    with pytest.raises(ValueError, match="val_split: .* has the splits friday, tuesday; name the one to evaluate on"):
        find_splits(tmp_path, "monday")
    with pytest.raises(FileNotFoundError, match="has no split 'sunday': name one of friday, monday, tuesday"):
        read_split(SplitPath(tmp_path, "sunday"))
    assert [path.split for path in find_splits(tmp_path, "monday", "friday")] == ["monday", "friday"]


def test_a_split_to_learn_from_has_to_be_there(tmp_path):
    write_coco(tmp_path / "cells", splits={"val": SPLITS["val"]})
    with pytest.raises(ValueError, match="train_split: .* has no split but val"):
        find_splits(tmp_path / "cells", val="val")


def test_a_folder_of_nothing_known(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"no annotations of a known layout \(there is notes.txt\): put"):
        find_splits(tmp_path)


def test_images_in_no_folder(tmp_path):
    write_coco(tmp_path)
    for stem in SPLITS["val"]: (tmp_path / f"val/{stem}.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="the image folder of .*instances_val.json is not found: none of its"):
        check_data(tmp_path, "val")


@pytest.mark.parametrize("change", [str.upper, lambda name: name.replace("/", "\\"), lambda name: f"./{name}"])
def test_names_that_differ_in_case_or_slashes(tmp_path, change):
    dataset = coco_dataset(SPLITS["train"], "day/")
    for image in dataset["images"]: image["file_name"] = change(image["file_name"])
    write_json(tmp_path / "annotations/instances_train.json", dataset)
    copy_images(tmp_path / "train/day", SPLITS["train"])
    split = read_split(SplitPath(tmp_path, "train"))
    assert boxes_read(split) == {stem: true_boxes(stem) for stem in SPLITS["train"]}
    if change("a/b") != "./a/b": assert "used as they are in" in str(check_data(tmp_path, "train"))


def test_splits_whose_files_have_the_same_names(tmp_path):
    stems = SPLITS["train"]
    for split in ("train", "val"):
        write_json(tmp_path / f"annotations/{split}.json", coco_dataset(stems))
        copy_images(tmp_path / f"{split}_images", stems)
    assert [part.folder.name for part in read_splits(*find_splits(tmp_path))] == ["train_images", "val_images"]


def test_a_test_set_alone_is_evaluated_whole(tmp_path):
    write_coco(tmp_path, splits={"test": SPLITS["train"]})
    assert val_path(EvaluateSettings(data=str(tmp_path))).split == "test"
    assert [path.split for path in find_splits(tmp_path)] == ["test:rest", "test:held-out"]  # to learn from it


def test_photographs_of_no_split_are_refused(tmp_path):
    write_coco(tmp_path, splits={"all": [*SPLITS["train"], *SPLITS["val"]]})
    places = dict(data=str(tmp_path), val_images=str(tmp_path))
    with pytest.raises(ValueError, match="val_images is given, and no split"): val_path(EvaluateSettings(**places))
    with pytest.raises(ValueError, match="and no split to evaluate on: give its val_annotations or val_split"):
        prepare(TrainSettings(role="teacher", **places))


def test_a_name_that_two_files_have(tmp_path):
    dataset = coco_dataset(SPLITS["train"])
    write_json(tmp_path / "annotations/instances_train.json", dataset)
    copy_images(tmp_path / "train", SPLITS["train"])
    name = dataset["images"][0]["file_name"]
    for other in (name.lower(), name.upper()): shutil.copy(tmp_path / "train" / name, tmp_path / "train" / other)
    (tmp_path / "train" / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"1 of 3 images do not exist .*there is .*{name.upper()}"):
        check_data(tmp_path, "train")


# --- Pascal VOC


@pytest.fixture
def voc(tmp_path):
    return shutil.copytree(SOURCE, tmp_path / "voc")


def replace_in(path, *pairs):
    text = path.read_text()
    for old, new in pairs: text = text.replace(old, new, 1)
    path.write_text(text)


def test_voc_counted_from_zero(voc):
    file = voc / f"Annotations/{SPLITS['val'][0]}.xml"
    replace_in(file, *((f"<{side}>", f"<{side}>0</{side}><old>") for side in ("xmin",)))
    replace_in(file, ("</xmin>\n", "</old>\n"))
    train = read_split(SplitPath(voc, "train"))  # another file of the folder shows it
    moved = [(name, x + 1, y + 1, w - 1, h - 1) for name, x, y, w, h in true_boxes(SPLITS["train"][0])]
    assert boxes_read(train)[SPLITS["train"][0]] == moved
    assert train.notes == ("pixels are counted from 0, where objects begin (1)",)
    assert "pixels are counted from 1" in str(check_data(SOURCE, "train"))


def test_voc_difficult_objects_are_ignored(voc):
    replace_in(voc / f"Annotations/{SPLITS['train'][0]}.xml", ("<difficult>0", "<difficult>1"))
    images = CocoImages(voc, "train")
    assert images.iscrowd.sum() == 1 and images.owner[images.iscrowd].tolist() == [0]


def test_voc_without_lists_sizes_or_right_names(voc):
    shutil.rmtree(voc / "ImageSets")
    for file in (voc / "Annotations").iterdir():
        replace_in(file, ("<width>640", "<width>0"), ("<filename>", "<filename>other-"))
    assert [path.split for path in find_splits(voc)] == ["all:rest", "all:held-out"]
    assert CocoImages(voc, "all").sizes.tolist() == [[480, 640]] * 6


def test_voc_lists_of_classes_are_no_splits(voc):
    (voc / "ImageSets/Main/RBC_train.txt").write_text("BloodImage_00001  1\nBloodImage_00003 -1\n")
    assert set(find_layout(voc).sources) == set(SPLITS)


@pytest.mark.parametrize("pair, message", [
    (("</annotation>", ""), " is not valid XML"),
    (("<name>WBC", "<name>"), ": object 1 has no 'name': write its class"),
    (("<xmax>", "<xmax>a"), ": object 1 has no 'bndbox' of four numbers"),
])
def test_bad_voc(voc, pair, message):
    file = voc / f"Annotations/{SPLITS['train'][0]}.xml"
    replace_in(file, pair)
    with pytest.raises(ValueError, match=f"{file}{message}"): read_split(SplitPath(voc, "train"))


def test_bad_encoding_of_voc(voc):
    file = voc / f"Annotations/{SPLITS['train'][0]}.xml"
    for encoding in ("gb2312", "nonsense"):
        file.write_text(f'<?xml version="1.0" encoding="{encoding}"?><annotation/>')
        with pytest.raises(ValueError, match=f"{file} is not valid XML .*: export it again, in UTF-8"):
            read_split(SplitPath(voc, "train"))


def test_voc_lists_of_files(voc):
    found = boxes_read(read_split(SplitPath(voc, "train")))
    list_file = voc / "ImageSets/Main/train.txt"
    list_file.write_text("\n".join(f"{stem}.jpg" for stem in list_file.read_text().split()))
    assert boxes_read(read_split(SplitPath(voc, "train"))) == found


def test_voc_in_two_folders_has_the_classes_and_the_first_pixel_of_both(voc):
    folders = {name: voc / name for name in ("train", "val")}
    for name, folder in folders.items():
        folder.mkdir()
        for stem in SPLITS[name]:
            for file in (voc / f"Annotations/{stem}.xml", voc / f"JPEGImages/{stem}.jpg"): shutil.copy(file, folder)
    replace_in(next(folders["train"].glob("*.xml")), ("<name>RBC", "<name>Rare"))
    text = next(folders["val"].glob("*.xml")).read_text()
    next(folders["val"].glob("*.xml")).write_text(re.sub("<xmin>[0-9]+", "<xmin>0", text, count=1))
    places = {f"{name}_{kind}": str(folder) for name, folder in folders.items() for kind in ("annotations", "images")}
    train, val = read_splits(*find_splits(voc, **places))
    assert CocoImages(train).class_names == CocoImages(val).class_names and "Rare" in CocoImages(val).class_names
    assert train.notes == val.notes == ("pixels are counted from 0, where objects begin (1)",)


def test_voc_list_of_a_file_that_is_not_there(voc):
    (voc / "ImageSets/Main/train.txt").write_text("BloodImage_00001\nBloodImage_99\n")
    with pytest.raises(FileNotFoundError, match="train.txt names BloodImage_99, and .*99.xml does not exist"):
        read_split(SplitPath(voc, "train"))


def test_a_file_in_place_of_its_folder(voc):
    with pytest.raises(FileNotFoundError, match="is a file: give the folder that it lies in"):
        find_layout(voc / f"Annotations/{SPLITS['train'][0]}.xml")


def test_voc_names_with_spaces(voc):
    train, val = (read_split(SplitPath(voc, name)) for name in ("train", "val"))
    for file in (*(voc / "Annotations").iterdir(), *(voc / "JPEGImages").iterdir()):
        file.rename(file.with_name(file.name.replace("Image_", " Image ")))
    for name, stems in SPLITS.items():
        (voc / f"ImageSets/Main/{name}.txt").write_text("\n".join(s.replace("Image_", " Image ") for s in stems))
    assert [path.split for path in find_splits(voc)] == ["train", "val"]
    for split in (train, val):
        assert list(boxes_read(read_split(SplitPath(voc, split.name))).values()) == list(boxes_read(split).values())


def test_voc_photographs_beside_their_annotations(voc):
    for file in (voc / "JPEGImages").iterdir(): file.rename(voc / "Annotations" / file.name)
    (voc / "JPEGImages").rmdir()
    assert check_data(voc, "train").images == len(SPLITS["train"])


# --- YOLO


@pytest.fixture
def yolo(tmp_path):
    write_yolo(tmp_path / "yolo")
    return tmp_path / "yolo"


def test_yolo_lists_of_files_and_names_by_number(yolo):
    (yolo / "train.txt").write_text("".join(f"images/train/{stem}.jpg\n" for stem in SPLITS["train"]))
    places = "path: .\ntrain: [train.txt, images/test]\nval: ../images/val\n"
    (yolo / "data.yaml").write_text(places + "names: {0: P, 1: R, 2: W}\n")
    train, val = read_splits(*find_splits(yolo))
    assert set(boxes_read(train)) == {*SPLITS["train"], *SPLITS["test"]} and set(boxes_read(val)) == set(SPLITS["val"])
    assert CocoImages(train).class_names == ["P", "R", "W"]


def test_yolo_photographs_that_lie_on_their_side_or_have_no_labels(yolo):
    first, second, _ = SPLITS["train"]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(SOURCE / f"JPEGImages/{first}.jpg").save(yolo / f"images/train/{first}.jpg", exif=exif)
    (yolo / f"labels/train/{first}.txt").write_text("1 0.5 0.5 0.5 0.25\n", encoding="utf-8-sig")
    (yolo / f"labels/train/{second}.txt").unlink()
    images = CocoImages(yolo, "train")
    assert images.sizes.tolist() == [[640, 480], [480, 640], [480, 640]]
    assert images.boxes[0].tolist() == [120, 240, 240, 160] and images.first[1:3].tolist() == [1, 1]
    assert check_data(yolo, "train").empty == 1


def test_yolo_labels_whose_names_differ_in_case_or_unicode_form(yolo):
    (first, second, _), boxes = SPLITS["train"], boxes_read(read_split(SplitPath(yolo, "train")))
    images, labels = yolo / "images/train", yolo / "labels/train"
    (labels / f"{first}.txt").rename(labels / f"{first}.TXT")
    (images / f"{second}.jpg").rename(images / "Ba\u0308ume.jpg")
    (labels / f"{second}.txt").rename(labels / "B\u00e4ume.txt")
    found = boxes_read(read_split(SplitPath(yolo, "train")))
    assert sorted(map(sorted, found.values())) == sorted(map(sorted, boxes.values()))
    shutil.copy(images / f"{first}.jpg", images / f"{first.upper()}.jpg")  # whose labels are not those of the other
    (labels / f"{first}.TXT").rename(labels / f"{first}.txt")
    assert boxes_read(read_split(SplitPath(yolo, "train"))) == {**found, first.upper(): []}


def test_yolo_boxes_with_key_points(yolo):
    first = SPLITS["train"][0]
    (yolo / f"labels/train/{first}.txt").write_text("1 0.5 0.5 0.2 0.2 0.1 0.1 2 0.9 0.9 0\n1 0.5 0.5 0.2 0.2\n")
    with pytest.raises(ValueError, match="line 1 has the number 2"): read_split(SplitPath(yolo, "train"))
    (yolo / "data.yaml").write_text(f"{(yolo / 'data.yaml').read_text()}\nkpt_shape: [2, 3]\n")
    found = boxes_read(read_split(SplitPath(yolo, "train")))[first]
    assert [box[1:] for box in found] == [(256, 192, 128, 96)] * 2


def test_yaml_of_another_program(yolo):
    (yolo / "a.yml").write_text("plugin: !!python/name:module.function\n")
    assert [path.split for path in find_splits(yolo)] == ["train", "val"]


@pytest.mark.parametrize("line, message", [
    ("3 0.5 0.5 0.1 0.1", r"line 2 has the class 3, and the classes are \[0, 1, 2\]"),
    ("1.5 0.5 0.5 0.1 0.1", "line 2 has the class 1.5"),
    ("1 0.5 0.5 0.1", "line 2 has 3 numbers after its class"),
    ("1 0.5 0.5 0.1 0.1 0.9", "line 2 has 5 numbers after its class"),
    ("1 320 240 64 48", "line 2 has the number 320: write fractions"),
    ("1 0.5 nan 0.1 0.1", "line 2 has the number nan"),
    ("1 0.5 -0.2 0.1 0.1", "line 2 has the number -0.2"),
    ("RBC 0.5 0.5 0.1 0.1", "line 2 holds 'RBC 0.5 0.5 0.1 0.1': write numbers alone"),
])
def test_bad_labels(yolo, line, message):
    file = yolo / f"labels/train/{SPLITS['train'][1]}.txt"
    file.write_text(f"1 0.5 0.5 0.1 0.1\n{line}\n")
    with pytest.raises(ValueError, match=f"{file}, {message}"): read_split(SplitPath(yolo, "train"))


@pytest.mark.parametrize("text, message", [
    ("names: [a, b\ntrain: x", "data.yaml is not valid YAML"),
    ("names: cells\ntrain: images/train", "data.yaml: 'names' is 'cells': list the classes"),
    ("names: [a, b]\nnc: 3\ntrain: images/train", "data.yaml: 'nc' is 3 and 'names' has 2 classes"),
    ("names: [a, b, c]\nkpt_shape: many\ntrain: images/train", "data.yaml: 'kpt_shape' is 'many': write the number"),
    ("names: [a, b, c]\ntrain: images/nowhere", "data.yaml: 'train' is 'images/nowhere', and .* does not exist"),
    ("names: [a, b, c]\ntrain: labels", "data.yaml: 'train' has no images"),
])
def test_bad_yaml(yolo, text, message):
    (yolo / "data.yaml").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message): read_split(SplitPath(yolo, "train"))


def test_yolo_without_any_labels(yolo):
    shutil.rmtree(yolo / "labels/train")
    with pytest.raises(FileNotFoundError, match="no image of 'train' has labels, such as .*labels/train/.*txt"):
        read_split(SplitPath(yolo, "train"))
    with pytest.raises(ValueError, match="names the images of its splits: leave out"):
        read_split(SplitPath(yolo, "train", images=str(yolo / "images/train")))


# --- what is odd is said before work


def settings_of(root, **changes):
    size = dict(short_side=96, max_side=128, neck_channels=64, head_convs=1, recipe="small", iterations=1, batch_size=2)
    given = {**size, "data": str(root), "out": str(root.parent / "run"), "workers": 0, "devices": "cpu", **changes}
    return TrainSettings(role="teacher", **given)


def change_json(file, change):
    dataset = json.loads(file.read_text())
    change(dataset)
    file.write_text(json.dumps(dataset))


def test_roboflows_root_category_is_left_out(tmp_path):
    root = tmp_path / "cells"
    write_roboflow(root)
    for file in root.glob("*/*.json"): change_json(file, lambda d: d["categories"].append({"id": 0, "name": "cells"}))
    plan = prepare(settings_of(root))
    assert plan.config.class_names == tuple(NAMES) and plan.images.class_names == plan.val_images.class_names == NAMES
    assert "no box in either split, left out (keep_empty_classes learns them too): cells\n" in str(plan)
    kept = prepare(settings_of(root, keep_empty_classes=True))
    assert kept.config.class_names == ("cells", *NAMES) and "left out" not in str(kept)
    assert plan.content == kept.content


@pytest.mark.slow
def test_a_detector_without_the_root_category_is_evaluated(tmp_path):
    root = tmp_path / "cells"
    write_roboflow(root)
    for file in root.glob("*/*.json"): change_json(file, lambda d: d["categories"].append({"id": 0, "name": "cells"}))
    folder = train(settings_of(root))
    images = CocoImages(root, "valid")
    _, model, fitting = load_detector(EvaluateSettings(model=str(folder)), images)
    assert images.class_names == ["cells", *NAMES] and fitting.class_names == list(model.config.class_names) == NAMES


def test_files_under_two_ids_and_in_both_splits(tmp_path):
    root = tmp_path / "cells"
    write_coco(root)
    change_json(root / "annotations/instances_train.json", lambda d: d["images"].append({**d["images"][0], "id": 9}))
    shutil.copy(root / f"train/{SPLITS['train'][1]}.jpg", root / f"val/{SPLITS['val'][0]}.jpg")
    text = str(prepare(settings_of(root)))
    assert f"train: files under more than one id: 1, such as {root}/train/{SPLITS['train'][0]}.jpg" in text
    pair = f"{root}/train/{SPLITS['train'][1]}.jpg and {root}/val/{SPLITS['val'][0]}.jpg"
    assert f"files in both splits, so that the evaluation asks for what was learned: 1, such as {pair}" in text
    assert "val: classes without a box: Platelets" in text


def test_the_same_split_twice_is_told(tmp_path):
    write_coco(tmp_path / "cells")
    text = str(prepare(settings_of(tmp_path / "cells", train_split="val", val_split="val")))
    assert "the same split to learn from and to evaluate on" in text


def test_boxes_smaller_than_pixels(tmp_path):
    root = tmp_path / "cells"
    write_coco(root)
    text = str(prepare(settings_of(root, short_side=64, max_side=96)))
    assert "of the boxes lie between its locations" in text and " 0.0% of the boxes lie" not in text
    assert " 0.0% of the boxes lie" in str(prepare(settings_of(root, short_side=400, max_side=800)))

    def to_fractions(dataset):
        for box in dataset["annotations"]:
            box["bbox"] = [side / size for side, size in zip(box["bbox"], [640, 480] * 2, strict=True)]

    for split in ("train", "val"): change_json(root / f"annotations/instances_{split}.json", to_fractions)
    with pytest.raises(ValueError, match=r"the median side of a box is 0.0\d+ pixels of the network at the test"):
        prepare(settings_of(root))


@pytest.mark.parametrize("split", ["train", "val"])
def test_headers_that_contradict_the_file_are_found_in_the_plan(tmp_path, split):
    root = tmp_path / "cells"
    write_coco(root)
    Image.new("RGB", (320, 240)).save(root / split / f"{SPLITS[split][0]}.jpg")
    with pytest.raises(ValueError, match=r"1 of \d images have another \[height, width\].*is \[240, 320\], stated"):
        prepare(settings_of(root))


# --- whole runs


@pytest.mark.slow
def test_one_command_trains_on_a_folder_of_pascal_voc(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    size = "--short-side 96 --max-side 128 --workers 0 --devices cpu"
    model = "--recipe small --iterations 2 --batch-size 2 --neck-channels 64 --head-convs 1"
    before = {path: path.stat().st_mtime_ns for path in sorted(SOURCE.rglob("*"))}
    main(f"train --role teacher --data {SOURCE} --out teacher {model} {size}".split())
    assert "train is Pascal VOC" in capsys.readouterr().out
    settings = json.loads((tmp_path / "teacher/settings.json").read_text())
    assert (settings["train_split"], settings["val_split"]) == ("train", "val")
    assert settings["model"]["class_names"] == NAMES
    for split in ("val", "test"):
        main(f"evaluate --model teacher --data {SOURCE} --val-split {split} --out {split} {size}".split())
        folder = finished_runs([tmp_path / split])[0]
        images = run_images(folder)
        assert [Path(path).stem for path in images.paths] == SPLITS[split]
        found = {box["image_id"] for box in json.loads((folder / "detections.json").read_text())}
        assert found <= set(images.image_ids)
    main(f"export --model teacher --data {SOURCE} --out model.onnx --num-images 2".split())
    assert (tmp_path / "model.onnx").is_file()
    assert {path: path.stat().st_mtime_ns for path in sorted(SOURCE.rglob("*"))} == before


def test_files_that_were_named_are_found_again(tmp_path):
    named = dict(train_annotations=str(tmp_path / "boxes.json"), train_images=str(tmp_path / "photographs"))
    stems = [stem for part in SPLITS.values() for stem in part]
    write_json(tmp_path / "boxes.json", coco_dataset(stems))
    copy_images(tmp_path / "photographs", stems)
    plan = prepare(TrainSettings(role="teacher", recipe="small", devices="cpu", **named))
    assert plan.settings.data == str(tmp_path)
    write_json(tmp_path / "run/settings.json", plan.description)
    assert run_images(tmp_path / "run").image_ids == plan.val_images.image_ids
    assert len(plan.images) == 4 and len(plan.val_images) == 2


@pytest.mark.slow
def test_a_share_that_is_held_out_is_found_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_cvat(tmp_path / "cells")
    size = "--short-side 96 --max-side 128 --workers 0 --devices cpu --data cells"
    model = "--recipe small --iterations 1 --batch-size 2 --neck-channels 64 --head-convs 1"
    main(f"train --role teacher --out teacher {model} {size}".split())
    main(f"evaluate --model teacher --out evaluation {size}".split())
    learned, kept = read_splits(*find_splits(tmp_path / "cells"))
    for folder in ("teacher", "evaluation"):
        assert run_images(tmp_path / folder).image_ids == sorted(kept.paths)
    assert not set(learned.paths) & set(kept.paths)
