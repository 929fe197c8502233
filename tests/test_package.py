"The package as others get it: built, installed without the tools that wrote it, documented and in layers."

import ast
import importlib
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import msad

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for path in (ROOT / "msad").glob("*.py") if not path.name.startswith("_"))
MODULES = [path.stem for path in SOURCES]
PARTS = ("backbone", "neck", "targets", "head", "losses", "detections", "alignment")
MODEL = (*PARTS, "detectors", "checkpoint", "capacity", "fast", "export")
RUNNING = ("processes", "inference", "log", "resume", "loop", "plots", "runs", "launch", "evaluation", "train")
ORDER = (*MODEL, "data", "coco_eval", "recipe", *RUNNING, "comparison", "shapes", "ablation", "predict", "benchmark")

FROM_WHEEL = """
import importlib, pkgutil, sys
from pathlib import Path

ABSENT = ("nbdev", "fastcore", "execnb", "IPython", "onnx", "onnxscript", "onnxruntime")
sys.modules.update({name: None for name in ABSENT})  # importing them fails
target = Path(sys.argv[1]).resolve()
import msad
assert target in Path(msad.__file__).resolve().parents, msad.__file__
names = [found.name for found in pkgutil.iter_modules(msad.__path__)]
for name in names:
    module = importlib.import_module(f"msad.{name}")
    assert target in Path(module.__file__).resolve().parents, module.__file__

import torch
from msad.detectors import ModelConfig, build_model
torch.manual_seed(0)
for role in ("teacher", "student"):
    model = build_model(ModelConfig(role, width=0.25, neck_channels=64, head_convs=1)).eval()
    with torch.no_grad():
        model.head.cls_logits.bias.zero_()
        found = model([torch.randint(0, 256, (3, 100, 130), dtype=torch.uint8)])[0]
    assert len(found["boxes"]) == len(found["scores"]) == len(found["labels"]) > 0
print(" ".join(names))
"""


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def run(*command, **options) -> str:
    "What a command prints; its errors if it fails."
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    "A folder into which a wheel of the repository's files has been installed, and nothing else."
    folder = tmp_path_factory.mktemp("package")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT).split("\0")
    for name in filter(None, listed):
        if not (ROOT / name).is_file() or name.startswith(("data/", "tests/", "nbs/")): continue
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "source" / name)
    wheels = folder / "wheels"
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", wheels, cwd=folder / "source")
    (wheel,) = wheels.glob("*.whl")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install")
    run(*pip, "--quiet", "--no-deps", "--no-index", "--target", folder / "target", wheel, cwd=folder)
    return folder / "target"


def test_the_wheel_works_without_the_tools_that_wrote_it(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed), "MPLBACKEND": "Agg"}
    names = run(sys.executable, "-c", FROM_WHEEL, installed, cwd=tmp_path, env=environment).split()
    assert {name for name in names if not name.startswith("_")} == set(MODULES)


def test_the_wheel_holds_the_package_alone(installed):
    (info,) = installed.glob("*.dist-info")
    assert {path.name for path in installed.iterdir()} == {"msad", info.name}
    assert info.name == f"msad-{msad.__version__}.dist-info"
    metadata = (info / "METADATA").read_text(encoding="utf-8")
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: ") and "extra ==" not in line]
    for tool in ("nbdev", "fastcore", "execnb", "jupyter", "onnx"): assert not any(tool in line for line in required)
    libraries = ("torch", "torchvision", "pycocotools", "ultrafast-pycocotools", "fvcore", "matplotlib", "numpy")
    for library in (*libraries, "pillow", "tqdm"):
        assert any(line.startswith(f"Requires-Dist: {library}>") for line in required), library


def test_importing_brings_no_notebook_tools(tmp_path):
    code = f"import sys, msad, {', '.join(f'msad.{name}' for name in MODULES)}; print(*sys.modules)"
    imported = run(sys.executable, "-c", code, cwd=tmp_path, env={**os.environ, "MPLBACKEND": "Agg"}).split()
    assert not {"nbdev", "fastcore", "execnb"} & set(imported)


def public(name: str) -> dict[str, object]:
    "The public functions and classes of a module, and the public methods and properties it defines."
    module = importlib.import_module(f"msad.{name}")
    found = {}
    for attribute in module.__all__:
        thing = getattr(module, attribute)
        if not inspect.isfunction(thing) and not inspect.isclass(thing): continue
        found[attribute] = thing
        if not inspect.isclass(thing): continue
        for method, value in vars(thing).items():
            if method.startswith("_"): continue
            value = value.__func__ if isinstance(value, staticmethod | classmethod) else value
            if inspect.isfunction(value) or isinstance(value, property): found[f"{attribute}.{method}"] = value
    return found


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_has_a_docstring(name):
    def documented(attribute, thing):
        doc = (thing.__doc__ or "").strip()
        # A dataclass or NamedTuple without a docstring gets its signature for one.
        return doc and not doc.startswith(f"{attribute.split('.')[-1]}(")

    assert importlib.import_module(f"msad.{name}").__doc__
    assert [attribute for attribute, thing in public(name).items() if not documented(attribute, thing)] == []


@pytest.mark.parametrize("name", MODULES)
def test_public_functions_are_annotated(name):
    bare = []
    for attribute, thing in public(name).items():
        if not inspect.isfunction(thing): continue
        signature = inspect.signature(thing)
        parameters = [p for p in signature.parameters.values() if p.name != "self"]
        bare += [f"{attribute}({p.name})" for p in parameters if p.annotation is p.empty]
        if signature.return_annotation is signature.empty: bare.append(f"{attribute} -> ?")
    assert bare == []


@pytest.mark.parametrize("path", SOURCES, ids=MODULES)
def test_files_are_read_with_weights_only(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            assert "load" not in [alias.name for alias in node.names]
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert keywords.get("weights_only") == "True", f"{path.name}:{node.lineno}"
        assert not (isinstance(node, ast.Attribute) and ast.unparse(node) in ("pickle.load", "pickle.loads"))


def siblings(path: Path) -> set[str]:
    "The modules of the package that a module imports."
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import): names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = f"msad.{node.module or ''}".rstrip(".") if node.level else node.module
            names = [f"msad.{alias.name}" for alias in node.names] if package == "msad" else [package]
        else: continue
        found |= {name.split(".")[1] for name in names if name.startswith("msad.")}
    return found & set(MODULES)


@pytest.mark.parametrize("path", SOURCES, ids=MODULES)
def test_modules_import_lower_ones_alone(path):
    assert path.stem in ORDER, f"say where msad.{path.stem} stands"
    assert siblings(path) <= set(ORDER[: ORDER.index(path.stem)])


@pytest.mark.parametrize("name", ("data", "coco_eval"))
def test_data_and_evaluation_know_no_model(name):
    assert siblings(ROOT / "msad" / f"{name}.py").isdisjoint(MODEL)
