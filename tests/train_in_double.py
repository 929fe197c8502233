"""Fifteen iterations in 64-bit numbers: python tests/train_in_double.py DATA TEACHER ROLE ACCUMULATE OUT

Shares of a batch add up to the batch but for rounding, and training magnifies rounding: where a rectified value or the
smaller of two lies at its kink, a last digit decides which gradient flows. In 64-bit numbers hardly any value lies
that near, so that a difference that matters would show. The images of a batch differ in their
padded size. Started plainly, or with torchrun.
"""

import sys
from pathlib import Path

import torch

from msad.data.images import CocoImages
from msad.data.transforms import TrainTransform
from msad.engine.distributed import init_distributed, rank
from msad.engine.hooks import LogFile
from msad.engine.recipe import Recipe
from msad.engine.trainer import Trainer
from msad.engine.weights import load_model, save_model
from msad.models.detector import student_of
from msad.models.distillation import Distillation, trained_module

data, teacher, role, accumulate, out = sys.argv[1:]
with init_distributed(torch.device("cpu")):
    model = load_model(teacher).double()
    if role == "student": model = Distillation(student_of(model).double(), model)
    recipe = Recipe(15, batch_size=6, lr=3e-3, warmup=2, distillation_warmup=4, batch_norm="fixed")
    transform = TrainTransform(80, 133)
    images, hooks = CocoImages(data, "train2017"), [LogFile()] if rank() == 0 else []
    Trainer(model, images, transform, recipe, Path(out), hooks, accumulate=int(accumulate)).fit()
    if rank() == 0: save_model(Path(out) / "model_final.pth", trained_module(model))
