"Several processes, and what is left when they are killed: real launchers, real kernels, real signals."

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_coco
from jupyter_client.manager import KernelManager
from kill_many import kill_many

from msad.engine.checkpoint import list_checkpoints
from msad.engine.hooks import read_log
from msad.engine.launcher import LaunchError, exit_on_user_error
from msad.engine.weights import load_model, save_model
from msad.runs.evaluate import EvaluateSettings, evaluate
from msad.runs.settings import TrainSettings, settings_dict
from msad.runs.train import train

pytestmark = pytest.mark.slow

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}
# Kernels that round alike on every processor, for what is compared to the twelfth digit.
ALIKE = {**ENVIRONMENT, "MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
SIZES = dict(recipe="published", neck_channels=64, short_side=64, max_side=107, workers=0)


@pytest.fixture(autouse=True)
def one_thread_each(monkeypatch):
    "Two cores are shared by all these processes."
    for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT"): monkeypatch.setenv(name, ENVIRONMENT[name])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A data set with 12 images to learn from and 5 to evaluate on, and a teacher."
    root = tmp_path_factory.mktemp("processes")
    write_coco(root / "data", "train2017", images=12)
    write_coco(root / "data", "val2017", images=5)
    # Past the steep beginning: there, with BatchNorm fixed, each step makes a difference in rounding a hundred times
    # larger, and ten steps tell nothing.
    recipe = dict(iterations=60, batch_size=4, lr=1e-3)
    settings = TrainSettings(role="teacher", data=str(root / "data"), out=str(root / "teacher"), **SIZES, **recipe)
    trained = start(settings, root / "teacher.json", environment=ALIKE)
    printed, _ = trained.communicate(timeout=300)
    assert trained.returncode == 0, printed
    return root


def settings_of(place, out, role="teacher", **changes):
    "Settings of a run that starts from the teacher and goes fast."
    values = dict(weights=str(place / "teacher"), iterations=10, batch_size=6, lr=5e-6, batch_norm="fixed")
    if role == "student": values = {**values, "weights": None, "teacher": str(place / "teacher")}
    places = dict(data=str(place / "data"), out=str(out))
    return TrainSettings(role=role, **{**SIZES, **places, **values, "devices": "cpu", **changes})


@pytest.fixture(scope="module")
def alone(place):
    "A run of ten iterations in one process, undisturbed."
    return train(settings_of(place, place / "alone"))


def weights(folder):
    return load_model(folder).state_dict()


def largest_difference(ours, theirs):
    assert list(ours) == list(theirs)
    return max((ours[name].double() - theirs[name].double()).abs().max().item() for name in ours)


def assert_same(folder, other):
    "To the last bit, and each iteration is in the log once."
    ours, theirs = weights(folder), weights(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    logs = [[(row["iteration"], row["loss"]) for row in read_log(f)] for f in (folder, other)]
    assert logs[0] == logs[1] and [iteration for iteration, _ in logs[0]] == list(range(1, len(logs[0]) + 1))


def start(settings, file, *launcher, environment=ENVIRONMENT):
    "Start `python -m msad.runs.train` (or a launcher's equivalent) with settings from a file."
    file.write_text(json.dumps(settings_dict(settings)))
    command = [sys.executable, *(launcher or ("-m",)), "msad.runs.train", str(file)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for_iteration(process, folder, iteration):
    deadline = time.monotonic() + 120
    while len(read_log(folder)) < iteration:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def processes_about(text):
    "Process ids whose command line or environment has `text`; zombies have neither."
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            output = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
        except OSError:
            continue
        if str(text).encode() in output and int(path.name) != os.getpid(): found.append(int(path.name))
    return found


def command_lines_of(pids):
    return {pid: Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode() for pid in pids}


def assert_gone(text, seconds=40):
    deadline = time.monotonic() + seconds
    while left := processes_about(text):
        assert time.monotonic() < deadline, command_lines_of(left)
        time.sleep(0.2)


def workers_of(file):
    "Process ids of the processes that train, by number."
    found = {}
    for pid in processes_about("msad.runs.train"):
        try:
            environment = (Path("/proc") / str(pid) / "environ").read_bytes().decode().split("\0")
            line = command_lines_of([pid])[pid]
        except OSError:
            continue
        values = dict(item.partition("=")[::2] for item in environment)
        if "RANK" not in values or "msad.engine.launcher" in line or str(file) not in line: continue
        found[int(values["RANK"])] = pid
    return found


# Any number of processes learns the same.


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_any_number_of_processes_learns_the_same(place, tmp_path, role):
    def learned(processes, accumulate=1):
        out = tmp_path / f"{processes}-{accumulate}"
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
        program = ROOT / "tests" / "train_in_double.py"
        arguments = (place / "data", place / "teacher", role, accumulate, out)
        command = [sys.executable, *(torchrun if processes > 1 else ()), *map(str, (program, *arguments))]
        done = subprocess.run(command, env=ALIKE, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        state = torch.load(out / "model_final.pth", weights_only=True)
        return state["model"], [row["loss"] for row in read_log(out)]

    alone, losses = learned(1)
    assert alone["neck.p6.weight"].dtype == torch.float64
    began = weights(place / "teacher")
    assert largest_difference(alone, {name: began[name] for name in alone}) > 0.01
    for how in ((2,), (3, 2)) if role == "teacher" else ((2, 3),):
        theirs, their_losses = learned(*how)
        assert their_losses == pytest.approx(losses, rel=1e-13)
        assert largest_difference(alone, theirs) < 1e-12


def test_run_of_several_processes_is_that_of_one(place, alone, tmp_path):
    shared = train(settings_of(place, tmp_path / "run", devices=3))
    assert largest_difference(weights(alone), weights(shared)) < 1e-5
    losses = [[row["loss"] for row in read_log(folder)] for folder in (alone, shared)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_any_number_of_processes_evaluates_the_same(place, tmp_path):
    model = load_model(place / "teacher")
    torch.nn.init.constant_(model.head.cls_logits.bias, -2.5)  # so that it finds something everywhere
    save_model(tmp_path / "model.pth", model)
    common = dict(model=str(tmp_path / "model.pth"), data=str(place / "data"), workers=0)
    found = {}
    for devices in ("cpu", 2, 3):
        folder = evaluate(EvaluateSettings(**common, out=str(tmp_path / str(devices)), devices=devices))
        found[devices] = [json.loads((folder / f"{name}.json").read_text()) for name in ("detections", "metrics")]
    detections, metrics = found["cpu"]
    assert len({d["image_id"] for d in detections}) == 5
    for devices in (2, 3):
        theirs, their_metrics = found[devices]
        assert [(d["image_id"], d["category_id"]) for d in theirs] == [
            (d["image_id"], d["category_id"]) for d in detections
        ]
        for a, b in zip(theirs, detections, strict=True):
            assert [a["score"], *a["bbox"]] == pytest.approx([b["score"], *b["bbox"]], rel=1e-6, abs=1e-6)
        assert their_metrics["AP"] == pytest.approx(metrics["AP"], abs=1e-6)
        assert their_metrics["images"] == 5


def test_two_machines(place, alone, tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    settings = settings_of(place, tmp_path / "run", devices=1, nnodes=2, rdzv_endpoint=f"localhost:{port}")
    machines = [start(replace(settings, node_rank=i), tmp_path / f"machine-{i}.json") for i in range(2)]
    output = [machine.communicate(timeout=200)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], output
    assert all("2 processes (cpu) on 2 machines" in text and "training: 100%" in text for text in output)
    assert largest_difference(weights(alone), weights(tmp_path / "run")) < 1e-5


# Whatever ends it, nothing is lost.


def test_killed_at_random_moments():
    summary = kill_many(kills=4, iterations=25, seed=1)
    assert sum(summary["kills"].values()) == 4 and summary["found"] == []


def test_killed_worker_is_replaced(place, tmp_path):
    settings = settings_of(place, tmp_path / "run", devices=2, iterations=14, checkpoint_every=3)
    process = start(settings, tmp_path / "run.json")
    wait_for_iteration(process, tmp_path / "run", 4)
    launched = next(pid for pid in workers_of("msad-launch").values())
    file = next(word for word in command_lines_of([launched])[launched].split() if word.endswith("settings.json"))
    os.kill(workers_of(file)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert_same(tmp_path / "run", train(replace(settings, out=str(tmp_path / "undisturbed"))))


def test_a_run_of_minutes_goes_on_in_several_processes(place, tmp_path):
    settings = settings_of(place, tmp_path / "run", devices=2, iterations=None, minutes=0.4)
    process = start(settings, tmp_path / "run.json")
    wait_for_iteration(process, tmp_path / "run", 2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143 and not (tmp_path / "run/metrics.json").exists()
    assert (train(settings) / "metrics.json").is_file()


@pytest.mark.parametrize("launcher, devices, everybody, status", [
    ((), "cpu", False, 143),
    ((), 2, True, 143),
    (("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"), "cpu", False, 1),
])
def test_preempted(place, tmp_path, launcher, devices, everybody, status):
    settings = settings_of(place, tmp_path / "run", iterations=16, devices=devices, checkpoint_every=1000)
    process = start(settings, tmp_path / "run.json", *launcher)
    wait_for_iteration(process, tmp_path / "run", 2)
    began = time.monotonic()
    # Some schedulers signal the process that they started, and some every process there is.
    for pid in [process.pid, *workers_of("settings.json").values()] if everybody else [process.pid]:
        os.kill(pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output
    assert time.monotonic() - began < 20
    assert_gone(tmp_path / "run.json")
    saved = int(list_checkpoints(tmp_path / "run")[0].stem)
    assert saved == len(read_log(tmp_path / "run")) < 16
    done = start(settings, tmp_path / "run.json", *launcher)
    output, _ = done.communicate(timeout=200)
    assert done.returncode == 0, output
    assert [row["iteration"] for row in read_log(tmp_path / "run")] == list(range(1, 17))
    if launcher:  # once more, and it finds itself finished
        again = start(settings, tmp_path / "run.json", *launcher)
        output, _ = again.communicate(timeout=200)
        assert again.returncode == 0 and "finished, is shown" in output, output


@pytest.mark.parametrize("everybody", [False, True])
def test_stopped_by_hand(place, tmp_path, everybody):
    settings = settings_of(place, tmp_path / "run", iterations=60, workers=2, checkpoint_every=1000)
    arguments = "; ".join(["from msad.runs.settings import TrainSettings", "from msad.runs.train import train",
                           f"train(TrainSettings(**{settings_dict(settings)}))"])
    process = subprocess.Popen([sys.executable, "-c", arguments], env=ENVIRONMENT, start_new_session=True)
    wait_for_iteration(process, tmp_path / "run", 2)
    # Ctrl-C reaches all processes that a terminal shows, those that decode as well.
    if everybody: os.killpg(process.pid, signal.SIGINT)
    else: process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) != 0
    assert int(list_checkpoints(tmp_path / "run")[0].stem) == len(read_log(tmp_path / "run")) < 60
    assert_gone(tmp_path / "run", seconds=5)


def test_full_disk(place, alone, tmp_path):
    settings = settings_of(place, tmp_path / "run", checkpoint_every=2)
    first = start(settings, tmp_path / "run.json")
    wait_for_iteration(first, tmp_path / "run", 3)
    first.terminate()
    first.communicate()
    before = {path: path.read_bytes() for path in list_checkpoints(tmp_path / "run")}
    # A limit on the size of files stands in for a full disk: the system refuses to write on, all the same.
    limited = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)); "
        "from msad.runs.train import main; main()"
    )
    command = [sys.executable, "-c", limited, str(tmp_path / "run.json")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "cannot write" in done.stderr and "make room, what was there is untouched" in done.stderr
    assert {path: path.read_bytes() for path in list_checkpoints(tmp_path / "run")} == before
    train(settings)
    assert_same(tmp_path / "run", alone)


def test_error_of_a_worker_reaches_the_notebook(place, tmp_path, capfd):
    write_coco(tmp_path / "data", "train2017", images=6)
    write_coco(tmp_path / "data", "val2017", images=2)
    path = tmp_path / "data" / "train2017" / "5.jpg"
    path.write_bytes(path.read_bytes()[:900])
    settings = settings_of(place, tmp_path / "run", data=str(tmp_path / "data"), devices=2, batch_size=2)
    began = time.monotonic()
    with pytest.raises(SystemExit, match=r"^process [01]: ValueError: \S+5\.jpg does not decode") as stop:
        with exit_on_user_error(): train(settings)  # as a command does
    assert isinstance(stop.value.__context__, LaunchError)
    assert time.monotonic() - began < 60
    assert "Traceback (most recent call last)" in capfd.readouterr().err
    assert_gone("msad-launch")


# Notebooks.


CELL = """
from msad.runs.settings import TrainSettings
from msad.runs.train import train
train(TrainSettings(**{settings}))
"""


@pytest.fixture
def kernel():
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(ROOT), env=ENVIRONMENT)
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def begun_in(kernel, settings, iterations=2):
    "Start a run in a notebook's kernel and wait until it is under way; what to wait for."
    manager, client = kernel
    message = client.execute(CELL.format(settings=settings_dict(settings)))
    deadline = time.monotonic() + 120
    while len(read_log(settings.folder)) < iterations:
        assert time.monotonic() < deadline and manager.is_alive()
        time.sleep(0.1)
    return message


@pytest.mark.parametrize("devices", ["cpu", 2])
def test_stop_button_saves_and_leaves_nobody(place, tmp_path, kernel, devices):
    settings = settings_of(place, tmp_path / "run", iterations=60, devices=devices, checkpoint_every=1000)
    message = begun_in(kernel, settings)
    kernel[0].interrupt_kernel()
    reply = {"parent_header": {}}
    while reply["parent_header"].get("msg_id") != message:  # a slow kernel answers once more that it is ready
        reply = kernel[1].get_shell_msg(timeout=60)
    assert (reply["content"]["status"], reply["content"]["ename"]) == ("error", "KeyboardInterrupt")
    assert_gone("msad-launch", seconds=5)
    assert int(list_checkpoints(settings.folder)[0].stem) == len(read_log(settings.folder)) >= 2


def test_output_of_the_workers_appears_while_they_work(place, tmp_path, kernel):
    settings = settings_of(place, tmp_path / "run", iterations=60, devices=2)
    begun_in(kernel, settings)
    output, deadline = "", time.monotonic() + 30
    while "loss=" not in output:
        assert time.monotonic() < deadline, output
        content = kernel[1].get_iopub_msg(timeout=30)["content"]
        output += content.get("text", "")
    assert "iterations to go" in output and not (settings.folder / "metrics.json").exists()


def test_no_process_outlives_its_kernel(place, tmp_path, kernel):
    settings = settings_of(place, tmp_path / "run", iterations=60, devices=2, checkpoint_every=1000)
    begun_in(kernel, settings)
    os.kill(kernel[0].provisioner.pid, signal.SIGKILL)
    assert_gone("msad-launch")
    assert int(list_checkpoints(settings.folder)[0].stem) == len(read_log(settings.folder)) < 60


@pytest.mark.parametrize("devices", ["cpu", "2"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_outlives_papermill(place, tmp_path, number, devices):
    out, mark = tmp_path / "run", f"MSAD_TEST_{number}_{devices}"
    values = dict(
        data=place / "data", weights=place / "teacher", out=out, iterations=60, batch_size=2, batch_norm="fixed",
        recipe="published", short_side=64, neck_channels=64, devices=devices, workers=1, checkpoint_every=1000,
    )
    parameters = [str(word) for name, value in values.items() for word in ("-p", name, value)]
    command = [str(Path(sys.executable).with_name("papermill")), "nbs/train_teacher.ipynb", str(tmp_path / "run.ipynb")]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        [*command, *parameters], cwd=ROOT, env={**ENVIRONMENT, "PATH": path, mark: "1"}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    wait_for_iteration(process, out, 2)
    process.send_signal(number)
    process.wait(timeout=60)
    assert_gone(mark)
    # The kernel ends at once, the processes that it started save first.
    assert bool(list_checkpoints(out)) == (devices == "2")
