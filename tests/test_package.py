"The package as others get it: built, installed without the tools that wrote it, documented and in layers."

import ast
import dataclasses
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import msad
from msad.deploy.export import ExportSettings
from msad.deploy.predict import PredictSettings
from msad.runs.comparison import AnalysisSettings
from msad.runs.evaluate import EvaluateSettings
from msad.runs.settings import DISTILLATION, TrainSettings

ROOT = Path(__file__).parent.parent
NOTEBOOKS = {path.stem.partition("_")[2]: path for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))}
MODULES = list(NOTEBOOKS)  # "models.backbone", in the order of the notebooks
SOURCES = [ROOT / "msad" / (name.replace(".", "/") + ".py") for name in MODULES]
MAX_LINES = 40  # of an exported cell

FROM_WHEEL = """
import importlib, pkgutil, sys
from pathlib import Path

ABSENT = ("nbdev", "fastcore", "execnb", "IPython", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf", "av")
sys.modules.update({name: None for name in ABSENT})  # importing them fails
target = Path(sys.argv[1]).resolve()
import msad
assert target in Path(msad.__file__).resolve().parents, msad.__file__
found = [found for found in pkgutil.walk_packages(msad.__path__, "msad.") if not found.name.startswith("msad._")]
names = [entry.name.removeprefix("msad.") for entry in found if not entry.ispkg]
for name in names:
    module = importlib.import_module(f"msad.{name}")
    assert target in Path(module.__file__).resolve().parents, module.__file__

import torch
from msad.models.detector import ModelConfig, build_model
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


@pytest.mark.slow
def test_the_wheel_works_without_the_tools_that_wrote_it(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed), "MPLBACKEND": "Agg"}
    names = run(sys.executable, "-c", FROM_WHEEL, installed, cwd=tmp_path, env=environment).split()
    assert set(names) == set(MODULES)


def test_the_wheel_holds_the_page(installed):
    page = ROOT / "msad/deploy/page"
    assert {path.name for path in (installed / "msad/deploy/page").iterdir()} == {path.name for path in page.iterdir()}


def test_the_wheel_holds_the_package_alone(installed):
    (info,) = installed.glob("*.dist-info")
    assert {path.name for path in installed.iterdir()} == {"bin", "msad", info.name}
    assert info.name == f"msad-{msad.__version__}.dist-info"
    assert "msad = msad.cli:main" in (info / "entry_points.txt").read_text(encoding="utf-8")
    metadata = (info / "METADATA").read_text(encoding="utf-8")
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: ") and "extra ==" not in line]
    for tool in ("nbdev", "fastcore", "execnb", "jupyter", "onnx"): assert not any(tool in line for line in required)
    libraries = ("torch", "torchvision", "pycocotools", "ultrafast-pycocotools", "fvcore", "matplotlib", "numpy")
    for library in (*libraries, "pillow", "tqdm", "tyro"):
        assert any(line.startswith(f"Requires-Dist: {library}>") for line in required), library


@pytest.mark.slow
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


def imported_modules(path: Path) -> set[str]:
    "List the modules of the package that a module imports."
    package, found = ["msad", *path.relative_to(ROOT / "msad").parent.parts], set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import): names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else: continue
        found |= {name.removeprefix("msad.") for name in names}
    return found & set(MODULES)


@pytest.mark.parametrize("path", SOURCES, ids=MODULES)
def test_modules_import_lower_ones_alone(path):
    lower = MODULES[: MODULES.index(".".join(path.relative_to(ROOT / "msad").with_suffix("").parts))]
    assert imported_modules(path) <= set(lower)


def test_rooms_follow_one_another():
    rooms = [name.partition(".")[0] for name in MODULES]
    in_order = ["models", "data", "engine", "evaluation", "runs", "deploy", "experiments", "cli"]
    assert list(dict.fromkeys(rooms)) == in_order and rooms == sorted(rooms, key=in_order.index)
    assert {path.stem for path in (ROOT / "msad").glob("*.py")} == {"__init__", "_modidx", "cli"}


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith(("data.", "evaluation.coco_metrics"))])
def test_data_and_metrics_import_no_model(name):
    imported = imported_modules(ROOT / "msad" / (name.replace(".", "/") + ".py"))
    assert {other.partition(".")[0] for other in imported} <= {"data"}


@pytest.mark.parametrize("name", MODULES)
def test_exported_cells_are_short(name):
    cells = [cell for cell in json.loads(NOTEBOOKS[name].read_text())["cells"] if cell["cell_type"] == "code"]
    exported = [cell["source"] for cell in cells if cell["source"] and cell["source"][0].startswith("#| export")]
    assert [len(lines) for lines in exported if len(lines) > MAX_LINES] == []


def test_public_names_are_imported_when_used(tmp_path):
    code = "import sys, msad; print('torch' in sys.modules, *(callable(getattr(msad, name)) for name in msad.__all__))"
    assert run(sys.executable, "-c", code, cwd=tmp_path).split() == ["False", *["True"] * len(msad.__all__)]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"): msad.nothing  # noqa: B018
    seconds = min(timed(sys.executable, "-c", "import msad") - timed(sys.executable, "-c", "pass") for _ in range(3))
    assert seconds < 0.3


def timed(*command) -> float:
    "Measure the seconds that a command takes."
    started = time.perf_counter()
    run(*command)
    return time.perf_counter() - started


SETTINGS = {
    "train_teacher": (TrainSettings, {"role", "teacher", "unlabelled", "all_widths", *DISTILLATION}),
    "train_student": (TrainSettings, {"role"}),
    "evaluate": (EvaluateSettings, set()),
    "predict": (PredictSettings, set()),
    "export": (ExportSettings, set()),
    "analysis": (AnalysisSettings, set()),
}


def documented_fields(kind: type) -> dict[str, tuple[str, str]]:
    "List the fields of a dataclass with default and sentence, as they are written."
    found = {}
    for parent in kind.__mro__[:-1]:
        for line in inspect.getsource(parent).splitlines():
            if field := re.match(r"    (\w+): [^=#]+ = (.+?)  # (.+)$", line): found[field[1]] = (field[2], field[3])
    return {field.name: found[field.name] for field in dataclasses.fields(kind) if field.name in found}


@pytest.mark.parametrize("name", SETTINGS)
def test_parameters_of_notebooks_are_the_settings(name):
    kind, fixed = SETTINGS[name]
    cells = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text())["cells"]
    (parameters,) = (cell["source"] for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    lines = [re.fullmatch(r"(\w+) = (.+?)  # (.+)", line.rstrip("\n")) for line in parameters]
    assert all(lines)
    expected = {field: values for field, values in documented_fields(kind).items() if field not in fixed}
    assert set(expected) | fixed == {field.name for field in dataclasses.fields(kind)}
    assert {line[1]: (line[2], line[3]) for line in lines} == expected
