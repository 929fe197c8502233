"The ablation through papermill, stopped, gone on with and shared by two processes, at a tiny size."

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, write_coco

pytestmark = pytest.mark.slow

TINY = {
    "iterations": 4, "student_iterations": 2, "batch_size": 2, "short_side": 64, "head_convs": 1, "precision": "fp32",
    "seeds": 2, "other_seeds": 1, "devices": "cpu",
}
RUNS = 2 * 5 + 8


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("ablation")
    for split in ("train2017", "val2017"): write_coco(root / "data", split)
    return root


def start(place, name, **more):
    "Start papermill on the ablation, with results and runs under `name`."
    files = {"data": place / "data", "out": place / name, "results": place / f"{name}.json"}
    parameters = json.dumps({**TINY, **files, **more}, default=str)
    command = [str(Path(sys.executable).with_name("papermill")), "nbs/ablation.ipynb", "-y", parameters]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=heeding_ctrl_c,
    )


def heeding_ctrl_c():
    "Listen to SIGINT; a process that a shell started in the background, and all that it starts, ignore it."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def rows(place, name):
    "Read the rows of a file of results by variant and seed."
    contents = json.loads((place / f"{name}.json").read_text())
    assert contents["settings"]["iterations"] == 4
    return {(row["variant"], row["seed"]): row for row in contents["runs"]}


def test_two_processes_share_what_a_stopped_one_began(place):
    stopped = start(place, "shared")
    try:
        while not (place / "shared.json").exists():
            assert stopped.poll() is None, stopped.communicate()[1][-2000:]
            time.sleep(0.1)
    finally:
        stopped.send_signal(signal.SIGINT)
        stopped.communicate(timeout=60)
    time.sleep(5)  # papermill goes at once, and its kernel may still write down the run that it was at
    begun = rows(place, "shared")
    assert 1 <= len(begun) < RUNS

    both = [start(place, "shared") for _ in range(2)]
    notebooks = []
    for process in both:
        printed, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-2000:]
        notebooks.append(json.loads(printed))
    shared = rows(place, "shared")
    assert len(shared) == RUNS and all(shared[key] == row for key, row in begun.items())
    texts = ["".join(str(o.get("text", "")) for c in n["cells"] for o in c.get("outputs", [])) for n in notebooks]
    started = [sum(f", seed {seed}" in line for line in t.split("\\n") for seed in (0, 1)) for t in texts]
    assert all(started) and sum(started) == RUNS - len(begun)  # both worked, and nothing was done twice
    tables = [output.get("data", {}) for cell in notebooks[0]["cells"] for output in cell.get("outputs", [])]
    assert any("6 student, the full method" in "".join(table.get("text/markdown", "")) for table in tables)


def test_same_seed_same_metrics(place):
    alone = start(place, "alone", seeds=1, variants=["high", "correlated"])
    _, errors = alone.communicate(timeout=300)
    assert alone.returncode == 0, errors[-2000:]
    first, again = rows(place, "shared"), rows(place, "alone")
    assert list(again) == [("teacher", 0), ("high", 0), ("correlated", 0)]
    for key, row in again.items():
        assert row["samples"] == first[key]["samples"] and row["AP"] == first[key]["AP"]
