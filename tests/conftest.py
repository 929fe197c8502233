import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from msad.engine.weights import save_model
from msad.models.detector import ModelConfig, build_model

ROOT = Path(__file__).resolve().parents[1]


def write_coco(root, split="train2017", images=4, size=(96, 64), ids=(7, 90), names=("pine", "oak"), boxes_per_image=2):
    "A small data set in COCO layout: noise with dark rectangles, the objects. Returns the annotation dictionary."
    rng = np.random.default_rng(len(split))
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir(exist_ok=True)
    width, height = size
    content = {
        "images": [{"id": i + 1, "file_name": f"{i + 1}.jpg", "width": width, "height": height} for i in range(images)],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in zip(ids, names, strict=True)],
    }
    for image in content["images"]:
        pixels = rng.integers(120, 255, (height, width, 3), dtype=np.uint8)
        for _ in range(boxes_per_image):
            w, h = rng.integers(12, 30, 2).tolist()
            x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
            pixels[y : y + h, x : x + w] = 30
            number = len(content["annotations"])
            content["annotations"].append({
                "id": number + 1, "image_id": image["id"], "category_id": ids[number % len(ids)],
                "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0,
            })
        Image.fromarray(pixels).save(root / split / image["file_name"], quality=90)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return content


def write_teacher(path, **changes):
    "The file of an untrained teacher for data of `write_coco`, which finds both kinds of objects everywhere."
    torch.manual_seed(0)
    config = dict(neck_channels=64, head_convs=4, short_side=128, max_side=213)
    model = build_model(ModelConfig("teacher", 0.25, ("pine", "oak"), (7, 90), **{**config, **changes}))
    torch.nn.init.constant_(model.head.cls_logits.bias, -2.5)
    torch.nn.init.normal_(model.head.bbox_pred.weight, std=0.3)
    save_model(path, model)
    return path


@pytest.fixture
def coco(tmp_path):
    "The folder of a small data set in COCO layout with both splits and category ids that are not consecutive."
    for split in ("train2017", "val2017"): write_coco(tmp_path / "data", split)
    return tmp_path / "data"
