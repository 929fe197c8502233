"""Object detectors that look at half-size images: multi-scale aligned distillation on slimmable backbones."""

from importlib import import_module

__version__ = "0.1.0"

_MODULES = {
    "Predictor": "deploy.predictor",
    "TrainSettings": "runs.settings",
    "backbone_capacity": "evaluation.capacity",
    "evaluate_coco": "evaluation.coco_metrics",
    "export_onnx": "deploy.onnx",
    "load_model": "engine.weights",
    "train": "runs.train",
}
__all__ = ["Predictor", "TrainSettings", "backbone_capacity", "evaluate_coco", "export_onnx", "load_model", "train"]


def __getattr__(name: str) -> object:
    "Import a public name when it is first used, so that `import msad` does not wait for PyTorch."
    if name not in _MODULES: raise AttributeError(f"module 'msad' has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    "List the public names."
    return [*globals(), *__all__]
