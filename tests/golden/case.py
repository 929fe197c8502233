"""A recorded case, rebuilt, and our model of it."""

import copy
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from golden.golden import load_case
from torch import Tensor
from torchvision.ops import box_iou

from msad.engine.published import slimmable_name
from msad.engine.weights import load_model
from msad.models.detector import Teacher
from msad.models.distillation import Distillation
from msad.models.fusion import HIGH_LEVELS, low_view
from msad.models.neck import LEVELS

FOLDER = Path(__file__).parent / "cases"
STUDENTS = ("student_w0.25", "student_w0.50_dense", "student_w1.00")
CASES = (*STUDENTS, "teacher_w0.25", "teacher_w0.50")
RELATIVE = 1e-3


@dataclass
class Case:
    "A recorded case and our model of it."

    name: str
    role: str
    width: float
    images: list[Tensor]  # RGB 3×H×W, uint8
    targets: list[dict[str, Tensor]]
    expected: dict[str, np.ndarray]
    model: Teacher | Distillation  # in evaluation mode; tests leave it as it is

    @property
    def teacher(self) -> Teacher:
        return self.model.teacher if isinstance(self.model, Distillation) else self.model

    @cached_property
    def batch(self) -> Tensor:
        "The network's input for image 0 alone, the high view."
        return self.teacher.transform(self.images[:1])

    @cached_property
    def computed(self) -> dict[str, Tensor]:
        "The tensors of image 0 alone, under the recorded names."
        inputs = {"high": self.batch, "low": low_view(self.batch)}
        tensors = {f"{view}_input": pixels for view, pixels in inputs.items()}
        with torch.no_grad():
            for view, pixels in inputs.items():
                pyramid = self.teacher.neck(self.teacher.backbone(pixels))
                tensors |= {f"teacher_{view}/p{level}": x for level, x in zip(LEVELS, pyramid, strict=True)}
            views = self.teacher.views(self.batch)
            for level, fused, scores in zip(HIGH_LEVELS, views.fused, views.scores, strict=True):
                tensors |= {f"fused/p{level}": fused, f"fusion_score/p{level}": scores}
            if self.role == "teacher": outputs = self.model.head(views.fused)
            else: outputs = self.model.student.head(self.model.student.features(inputs["low"]))
        for kind, levels in zip(("cls", "box", "ctr"), outputs, strict=True):
            tensors |= {f"head/{kind}/{i}": x for i, x in enumerate(levels)}
        return tensors

    @cached_property
    def detections(self) -> list[dict[str, Tensor]]:
        "Detections of each image alone."
        with torch.no_grad(): return [self.model([image])[0] for image in self.images]

    @cached_property
    def training(self) -> tuple[dict[str, float], dict[str, float]]:
        "The losses of all images as one batch in training mode, and the gradient norms of their sum by parameter."
        return self.trained_on(self.images)

    def trained_on(self, images: list[Tensor]) -> tuple[dict[str, float], dict[str, float]]:
        "Losses and gradient norms with other pixels."
        model = copy.deepcopy(self.model).train()
        losses = model(images, self.targets)
        sum(losses.values()).backward()
        learner = model if self.role == "teacher" else model.student
        norms = {name: p.grad.norm().item() for name, p in learner.named_parameters()}
        norms |= {f"head.scales.{i}": x.abs().item() for i, x in enumerate(learner.head.scales.grad)}
        return {name: loss.item() for name, loss in losses.items()}, norms

    def recorded(self, kind: str) -> dict[str, float]:
        "The recorded numbers whose names begin with `kind`/, without it."
        return {name.removeprefix(f"{kind}/"): x for name, x in self.expected.items() if name.startswith(f"{kind}/")}


def load(name: str) -> Case:
    "The case of that name; its weights go through a file, as a user's do."
    path = FOLDER / name
    meta = json.loads(path.with_name(f"{path.name}.json").read_text())
    state, images, targets, expected = load_case(str(path))
    with TemporaryDirectory() as folder:
        file = Path(folder) / "model_final.pth"
        torch.save({"model": state}, file)
        del state
        model = load_model(file, with_teacher=meta["role"] == "student")
    return Case(
        name=name,
        role=meta["role"],
        width=meta["width"],
        images=[torch.from_numpy(image).permute(2, 0, 1) for image in images],
        targets=[{"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels)} for boxes, labels in targets],
        expected=expected,
        model=model,
    )


def off(actual, expected, floor: float = 0.0) -> float:
    "The largest difference as a fraction of what is allowed: of each expected value or, if that is more, `floor`."
    actual, expected = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert actual.shape == expected.shape and np.isfinite(actual).all()
    return float((np.abs(actual - expected) / np.maximum(RELATIVE * np.abs(expected), floor)).max())


def our_name(name: str) -> str:
    "Our name of the published parameter `name`."
    network, rest = name.split(".", 1)
    if network == "SE": return rest.replace("fc.", "fusion.score.")
    if network.endswith("_fcos_head"): return "head." + rest.replace("ctrness", "centerness").removesuffix(".scale")
    if rest.startswith("bottom_up."): return "backbone." + slimmable_name(rest.removeprefix("bottom_up."))
    if rest.startswith("top_block."): return rest.replace("top_block", "neck")
    kind, level, kept = re.fullmatch(r"fpn_(lateral|output)(\d)\.(.+)", rest).groups()
    return f"neck.{kind}.{int(level) - 2}.{kept}"


def matched(found: dict[str, Tensor], expected: dict[str, Tensor]) -> int:
    "How many detections pair up one to one: same label, IoU above 0.99 and scores no more than 1e-3 apart."
    fits = (box_iou(found["boxes"], expected["boxes"]) > 0.99) & (found["labels"][:, None] == expected["labels"])
    fits &= (found["scores"][:, None] - expected["scores"]).abs() <= 1e-3
    free = torch.ones(len(expected["scores"]), dtype=torch.bool)
    for row in fits:
        partners = (row & free).nonzero()
        if len(partners): free[partners[0]] = False
    return int((~free).sum())
