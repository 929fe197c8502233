"""Kill a training at random moments, again and again, and compare what comes of it with an undisturbed one.

    python tests/kill_many.py --kills 100

A checkpoint is written after every iteration here, so that many kills fall into its writing. Each process group is
killed with SIGKILL, which no program can prepare for, and the same command is started again until enough kills are
counted; the last start is left to finish. A run that finishes before it could be killed makes way for a new one.
Prints a summary; the exit status is 1 if a weight differs by a single bit or an iteration is not in the log once.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from conftest import write_coco

from msad.engine.checkpoint import list_checkpoints
from msad.engine.hooks import read_log
from msad.engine.weights import load_model


def start(settings: Path) -> subprocess.Popen:
    "Start a training, in a process group of its own."
    command = [sys.executable, "-m", "msad.runs.train", str(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return subprocess.Popen(command, env=environment, start_new_session=True, **quiet)


def kill_within(process: subprocess.Popen, folder: Path, rng: random.Random, patience: float) -> str | None:
    """Kill a run at a random moment after its start, or after it begins to train, and say where it was.

    None if it finished before.
    """
    before = len(read_log(folder))
    if rng.random() < 0.2:  # some kills fall into the start
        moment = time.monotonic() + rng.uniform(0, patience)
    else:
        deadline = time.monotonic() + 120
        while process.poll() is None and len(read_log(folder)) <= before and time.monotonic() < deadline:
            time.sleep(0.02)
        moment = time.monotonic() + rng.uniform(0, 1.5)
    while process.poll() is None and time.monotonic() < moment: time.sleep(0.002)
    if process.poll() is not None: return None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return "writing" if list(folder.rglob(".*.partial")) else "elsewhere"


def differences(folder: Path, reference: Path, iterations: int) -> list[str]:
    "What is not as in the undisturbed run."
    found = []
    ours, theirs = (load_model(f).state_dict() for f in (folder, reference))
    found += [f"{name} differs" for name in theirs if not torch.equal(ours[name], theirs[name])]
    logged = [row["iteration"] for row in read_log(folder)]
    if logged != list(range(1, iterations + 1)): found.append(f"log.jsonl has the iterations {logged}")
    losses = [[row["loss"] for row in read_log(f)] for f in (folder, reference)]
    if losses[0] != losses[1]: found.append("log.jsonl has other losses")
    if list(folder.rglob(".*.partial")): found.append("something half written is left")
    if len(list_checkpoints(folder)) != 2: found.append(f"{len(list_checkpoints(folder))} checkpoints are left")
    return found


def kill_many(kills: int, iterations: int = 60, seed: int = 0) -> dict:
    "Count kills, where they fell, runs, and the differences found."
    rng = random.Random(seed)
    root = Path(tempfile.mkdtemp())
    for split in ("train2017", "val2017"): write_coco(root / "data", split)

    def settings(name):
        path = root / f"{name}.json"
        size = dict(width=0.25, neck_channels=64, short_side=64, max_side=107)
        length = dict(recipe="published", batch_size=2, iterations=iterations)
        writing = dict(checkpoint_every=1, keep_checkpoints=2, eval_every=20)
        places = dict(role="teacher", data=str(root / "data"), out=str(root / name), devices="cpu", workers=1)
        path.write_text(json.dumps({**places, **size, **length, **writing}))
        return path

    started = time.monotonic()
    assert start(settings("undisturbed")).wait() == 0
    patience = time.monotonic() - started
    counted, runs, found = {"writing": 0, "elsewhere": 0}, 0, []
    while sum(counted.values()) < kills:
        runs += 1
        folder, file = root / f"killed-{runs}", settings(f"killed-{runs}")
        while sum(counted.values()) < kills:
            where = kill_within(start(file), folder, rng, min(patience, 8))
            if where is None: break
            counted[where] += 1
            print(f"\r{sum(counted.values())} of {kills} kills", end="", file=sys.stderr, flush=True)
        assert start(file).wait() == 0, f"{folder} does not finish"
        found += [f"run {runs}: {what}" for what in differences(folder, root / "undisturbed", iterations)]
        if not found: shutil.rmtree(folder)
    if not found: shutil.rmtree(root)
    return {"kills": counted, "runs": runs, "minutes": round((time.monotonic() - started) / 60, 1), "found": found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--iterations", type=int, default=60, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    summary = kill_many(**vars(parser.parse_args()))
    print(json.dumps(summary, indent=2))
    sys.exit(bool(summary["found"]))
