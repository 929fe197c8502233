"""Check that notebooks and package agree, and that notebooks are clean.

Works on a copy, so that the working tree is left as it is: there `nbdev_export` must not change a line of the package,
and `nbdev_clean` not a line of a notebook. Also looks for what makes papermill silently ignore its parameters.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUN_NOTEBOOKS = (
    "train_teacher", "train_student", "evaluate", "predict", "export", "own_data", "analysis", "ablation", "compare",
    "choose", "distillations", "few_labels", "grid", "sizes", "peers", "benchmark",
)


def changed_by(command: str, folder: str, pattern: str) -> list[str]:
    "List the files of `folder` (relative to the root) that an nbdev command changes, adds or removes."
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "copy"
        skipped = {str(ROOT / name) for name in (".git", ".venv", "runs", "data", "models")}

        def skip(parent, names):
            skip_names = ("__pycache__", ".ipynb_checkpoints")
            return [name for name in names if f"{parent}/{name}" in skipped or name in skip_names]

        shutil.copytree(ROOT, copy, ignore=skip)
        before = {path.relative_to(copy): path.read_bytes() for path in (copy / folder).rglob(pattern)}
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        subprocess.run([command], cwd=copy, env=environment, check=True, stdout=subprocess.DEVNULL)
        after = {path.relative_to(copy): path.read_bytes() for path in (copy / folder).rglob(pattern)}
    return sorted(str(name) for name in {*before, *after} if before.get(name) != after.get(name))


def notebook_faults(path: Path) -> list[str]:
    "List the faults of a notebook as it is committed."
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    faults = []
    if any("injected-parameters" in cell["metadata"].get("tags", []) for cell in cells):
        faults.append("holds a cell of injected parameters, which would override papermill's")
    tagged = sum("parameters" in cell["metadata"].get("tags", []) for cell in cells)
    if path.stem in RUN_NOTEBOOKS and tagged != 1:
        faults.append(f"has {tagged} cells tagged `parameters` instead of one")
    if any(output["output_type"] == "error" for cell in cells for output in cell["outputs"]):
        faults.append("shows an error")
    if any("site-packages" in json.dumps(cell["outputs"]) for cell in cells):
        faults.append("shows a path of the machine that executed it, maybe in a warning")
    if not any(cell["outputs"] for cell in cells):
        faults.append("was not executed")
    return [f"{path.name} {fault}" for fault in faults]


def main() -> int:
    "Print every fault; the exit status is 1 if there is one."
    faults = [f"{name}: nbdev_export changes it" for name in changed_by("nbdev_export", "msad", "*.py")]
    faults += [f"{name}: nbdev_clean changes it" for name in changed_by("nbdev_clean", "nbs", "*.ipynb")]
    index = (ROOT / "nbs/index.ipynb").read_text()
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        faults += notebook_faults(path)
        if path.stem != "index" and f"({path.name})" not in index: faults.append(f"{path.name}: index.ipynb lacks it")
    print("\n".join(faults) or "Notebooks and package agree; notebooks are clean.")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
