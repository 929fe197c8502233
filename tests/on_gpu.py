"""Check msad on a GPU: `make gpu-check`, or python tests/on_gpu.py. Without a GPU it runs on the processor, in small.

Each part has a process and a time limit of its own, the most important ones first, and its results are written when it
is done. A part whose packages are missing is left out. The exit status is 0 if everything that ran holds.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torchvision

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
CLASSES = tuple(map(str, range(80))), tuple(range(80))  # names and category ids
SIZE = (800, 1333) if ON_GPU else (128, 192)  # of the high view
# Dense bf16, multiply-adds counted twice, by NVIDIA's data sheets.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12}


# --- models, batches, times


def make_model(role: str, width: float, neck_channels: int = 256) -> torch.nn.Module:
    "Build a teacher, or a student with its teacher, with weights from nothing."
    from msad.models.detector import ModelConfig, build_model, student_of
    from msad.models.distillation import Distillation

    torch.manual_seed(0)
    teacher = build_model(ModelConfig("teacher", width, *CLASSES, neck_channels))
    model = teacher if role == "teacher" else Distillation(student_of(teacher), teacher)
    return model.to(DEVICE, memory_format=torch.channels_last)


def make_samples(count: int, size: tuple[int, int] = SIZE) -> list[tuple[torch.Tensor, dict]]:
    "Draw pictures with twenty boxes each."
    random, (height, width) = torch.Generator().manual_seed(count), size
    samples = []
    for number in range(count):
        picture = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=random).permute(2, 0, 1)
        corners = torch.rand(20, 2, generator=random) * torch.tensor([width, height]) * 0.7
        boxes = torch.cat([corners, corners + 8 + torch.rand(20, 2, generator=random) * min(size) * 0.25], dim=1)
        labels = torch.randint(80, (20,), generator=random)
        samples.append((picture, {"boxes": boxes, "labels": labels, "image_id": number}))
    return samples


def make_step(model: torch.nn.Module, recipe: object, replica: torch.nn.Module | None = None) -> Callable:
    "Make a function that learns from a batch and returns the losses."
    from msad.engine.recipe import make_optimizer
    from msad.engine.trainer import make_scaler, set_training, train_step

    set_training(model, recipe)
    state, done = (make_optimizer(recipe, model), make_scaler(recipe, DEVICE)), iter(range(10**6))
    return lambda batch: train_step(model, *state, recipe, next(done), batch, 1, replica)


def wait() -> None:
    "Wait for the GPU."
    if ON_GPU: torch.cuda.synchronize()


def times(functions: dict[str, Callable], rounds: int = 5) -> dict[str, float]:
    "Measure the median seconds of functions, called in turn; two rounds more before them warm up."
    taken = {name: [] for name in functions}
    for number in range(rounds + 2):
        for name, function in functions.items():
            wait()
            started = time.perf_counter()
            function()
            wait()
            if number > 1: taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def autocast(precision: str) -> contextlib.AbstractContextManager:
    "Compute in a precision."
    from msad.engine.trainer import AUTOCAST

    return torch.autocast(DEVICE.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST)


def allow_tf32(allowed: bool) -> None:
    "Round float32 to TF32 in convolutions and products, or not."
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def count_operations(function: Callable) -> int:
    "Count the floating-point operations of a function, two for each multiply-add."
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter: function()
    return counter.get_total_flops()


def peak_memory(function: Callable) -> float | None:
    "Measure the most memory that a function needs, GiB."
    if not ON_GPU: return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() / 2**30


# --- right


def golden() -> dict:
    "The authors' recorded numbers: detections, losses and gradients, and how far other precisions are from them."
    from golden.case import CASES, RELATIVE, load, matched, off, our_name

    rows, holds = [], True
    for name in CASES if ON_GPU else CASES[:1]:
        case, row = load(name), {"case": name}
        case.model.to(DEVICE)
        recorded = [
            {kind: torch.from_numpy(case.expected[f"det/{i}/{kind}"]) for kind in ("boxes", "scores", "labels")}
            for i in range(2)
        ]
        for mode in ("fp32", "tf32", "bf16", "fp16") if ON_GPU else ("fp32", "bf16"):
            allow_tf32(mode == "tf32")
            with autocast(mode):
                with torch.no_grad(): found = [case.model([image])[0] for image in case.images]
                losses, norms = case.trained_on(case.images)
            same = []
            for ours, theirs in zip(found, recorded, strict=True):
                ours = {kind: value.cpu() for kind, value in ours.items()}
                same.append(matched(ours, theirs) / max(len(theirs["scores"]), len(ours["scores"])))
            apart = max(off(losses[loss], value) for loss, value in case.recorded("loss").items()) * RELATIVE
            gradients = [abs(norms[our_name(k)] / float(v) - 1) for k, v in case.recorded("grad").items() if v > 1e-3]
            middle = statistics.median(gradients)
            row[mode] = {"same detections": min(same), "losses apart": apart, "gradient norms apart": middle}
        fp32 = row["fp32"]
        holds &= fp32["same detections"] >= 0.99 and max(fp32["losses apart"], fp32["gradient norms apart"]) <= RELATIVE
        rows.append(row)
    return {"holds": holds, "rows": rows}


def precisions() -> dict:
    "Thirty steps on photographs in each precision: losses within 5 % of each other at the end, all finite."
    from msad.data.images import CocoImages
    from msad.data.loaders import batches, train_loader
    from msad.data.transforms import TrainTransform
    from msad.engine.recipe import Recipe
    from msad.engine.trainer import loader_options, read_losses
    from msad.models.detector import ModelConfig, build_model

    images, steps = CocoImages(ROOT / "data/trees", "train2017"), 30 if ON_GPU else 4
    found = {}
    for precision in ("fp32", "bf16", "fp16") if ON_GPU else ("fp32", "bf16"):
        torch.manual_seed(0)
        model = build_model(ModelConfig("teacher", 0.25, ("tree",), (1,), 64, 2)).to(DEVICE)
        recipe = Recipe(steps, 8, 1e-3, "adamw", "cosine", warmup=3, precision=precision, max_grad_norm=1.0)
        size = (192, 192) if ON_GPU else (64, 64)
        loader = batches(train_loader(images, TrainTransform(*size, "all"), 8, **loader_options(model, recipe)))
        step = make_step(model, recipe)
        losses = [sum(row.values()) for row in read_losses([step(next(loader)) for _ in range(steps)])]
        finite = all(abs(loss) < float("inf") for loss in losses)
        found[precision] = {"finite": finite, "mean of the last": statistics.mean(losses[-10:])}
    last = {name: row["mean of the last"] for name, row in found.items()}
    apart = {name: abs(loss / last["fp32"] - 1) for name, loss in last.items()}
    holds = all(row["finite"] for row in found.values()) and max(apart.values()) < 0.05
    return {"holds": holds, **found, "apart": apart}


def goes_on() -> dict:
    "A run that is stopped and goes on: bit for bit with deterministic algorithms, else as far as two runs are apart."
    from msad.data.images import CocoImages
    from msad.data.transforms import TrainTransform
    from msad.engine.hooks import Hook
    from msad.engine.recipe import Recipe
    from msad.engine.trainer import Trainer
    from msad.models.detector import ModelConfig, build_model

    images = CocoImages(ROOT / "data/trees", "train2017")

    class Stop(Hook):
        "Interrupt a run before an iteration."

        def __init__(self, iteration): self.iteration = iteration

        def before_step(self, trainer):
            if trainer.iteration == self.iteration: raise KeyboardInterrupt

    def trained(folder, *stops):
        for stop in (*stops, None):
            torch.manual_seed(0)
            model = build_model(ModelConfig("teacher", 0.25, ("tree",), (1,), 32, 1)).to(DEVICE)
            recipe, transform = Recipe(6, 4, 1e-3, "adamw", "cosine", warmup=2, ema=0.1), TrainTransform(96, 96, "all")
            with contextlib.suppress(KeyboardInterrupt):
                Trainer(model, images, transform, recipe, folder, [Stop(stop)], checkpoint_every=3).fit()
        return torch.cat([value.flatten().float().cpu() for value in model.state_dict().values()])

    found = {}
    for name, deterministic in (("deterministic", True), ("usual", False)):
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        with tempfile.TemporaryDirectory() as folder:
            whole, again = (trained(Path(folder) / run) for run in ("whole", "again"))
            stopped = trained(Path(folder) / "stopped", 4)
        apart = ((whole - other).abs().max().item() for other in (again, stopped))
        found[name] = dict(zip(("two runs apart", "stopped apart"), apart, strict=True))
    torch.use_deterministic_algorithms(False)
    within = found["usual"]["stopped apart"] <= 4 * found["usual"]["two runs apart"] + 1e-6
    return {"holds": found["deterministic"]["stopped apart"] == 0 and within, **found}


# --- several processes


def three_steps(backend: str | None) -> dict:
    "Learn from a batch three times, alone or as one of several processes; return losses and a sum of the weights."
    import torch.distributed as dist

    from msad.engine.recipe import Recipe
    from msad.engine.trainer import make_replica, read_losses, set_training
    from msad.models.batch import make_batch

    global DEVICE
    number, count = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE")) if backend else (0, 1)
    if ON_GPU and backend == "nccl": DEVICE = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if ON_GPU: torch.cuda.set_device(DEVICE)
    if backend: dist.init_process_group(f"cpu:gloo,cuda:{backend}" if ON_GPU else "gloo")
    allow_tf32(False)
    recipe = Recipe(3, 4, 0.01, warmup=1, batch_norm="trained" if ON_GPU else "fixed")
    model = make_model("teacher", 0.25, 64)
    set_training(model, recipe)
    replica = make_replica(model, recipe)
    step, batch = make_step(model, recipe, replica), make_batch(make_samples(4, (256, 320)))
    losses = read_losses([step(batch.part(number, count)) for _ in range(3)])
    weights = sum(value.double().abs().sum().item() for value in model.parameters())
    if backend: dist.destroy_process_group()
    return {"losses": [sum(row.values()) for row in losses], "weights": weights}


def launched(backend: str, count: int, folder: str) -> dict:
    "Do `three_steps` in several processes."
    out = Path(folder) / f"{backend}.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    worker = [__file__, "--worker", backend, str(out)]
    subprocess.run([*launcher, *worker], check=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    return json.loads(out.read_text())


def processes() -> dict:
    "Two processes on one card by gloo learn what one learns from the whole batch; NCCL with one, and with all cards."
    alone, cards = three_steps(None), torch.cuda.device_count()
    runs = {"gloo": 2} | ({"nccl": cards if 4 % cards == 0 else 2} if cards else {})
    found, holds = {}, True
    with tempfile.TemporaryDirectory() as folder:
        for backend, count in runs.items():
            run = launched(backend, count, folder)
            apart = max(abs(a / b - 1) for a, b in zip(run["losses"], alone["losses"], strict=True))
            weights = abs(run["weights"] / alone["weights"] - 1)
            found[backend] = {"processes": count, "losses apart": apart, "weights apart": weights}
            holds &= apart < 2e-3
    return {"holds": holds, **found}


# --- no waiting


def waits() -> dict:
    "A training step that never waits for the GPU, and the waits of an inference."
    if not ON_GPU: return {"left out": "there is no GPU to wait for"}
    from msad.engine.recipe import Recipe
    from msad.models.batch import make_batch

    found, holds = {}, True
    for role in ("teacher", "student"):
        for precision in ("fp32", "bf16", "fp16"):
            model, batch = make_model(role, 0.25), make_batch(make_samples(2))
            step = make_step(model, Recipe(10, 2, 0.01, precision=precision, max_grad_norm=1.0))
            for _ in range(2): step(batch)
            torch.cuda.set_sync_debug_mode("error")
            try: step(batch)
            except RuntimeError as error:
                found[f"{role}, {precision}"], holds = str(error).splitlines()[0], False
            finally: torch.cuda.set_sync_debug_mode("default")
    student = make_model("student", 0.25).student.eval()
    for count in (1, 8):
        pictures = [picture[:, ::2, ::2].to(DEVICE) for picture, _ in make_samples(count)]
        with torch.inference_mode(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            student(pictures, view="low")
            torch.cuda.set_sync_debug_mode("warn")
            before = len(caught)
            student(pictures, view="low")
            torch.cuda.set_sync_debug_mode("default")
        found[f"inference of {count}"] = len(caught) - before
        holds &= len(caught) - before <= 4
    return {"holds": holds, **found}


# --- fast


def torchvision_detector() -> torch.nn.Module:
    "Build torchvision's FCOS."
    sizes = dict(min_size=SIZE[0], max_size=SIZE[1], num_classes=81)
    model = torchvision.models.detection.fcos_resnet50_fpn(weights=None, weights_backbone=None, **sizes)
    return model.to(DEVICE, memory_format=torch.channels_last)


def theirs_step(batch: int, precision: str) -> Callable:
    "Make a training step of torchvision's FCOS."
    model, samples = torchvision_detector().train(), make_samples(batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    pictures = [picture.to(DEVICE) / 255 for picture, _ in samples]
    targets = [{name: target[name].to(DEVICE) for name in ("boxes", "labels")} for _, target in samples]

    def step():
        with autocast(precision): losses = model(pictures, targets)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        optimizer.step()

    return step


def our_step(role: str, width: float, batch: int, precision: str, **options: object) -> Callable:
    "Make a training step of ours."
    from msad.engine.recipe import Recipe
    from msad.models.batch import make_batch

    recipe = Recipe(10**6, batch, 1e-3, precision=precision, **options)
    step, batch = make_step(make_model(role, width), recipe), make_batch(make_samples(batch))
    if ON_GPU: batch = batch._replace(**{k: getattr(batch, k).pin_memory() for k in ("images", "boxes", "labels")})
    return lambda: step(batch)


def matmul_rate() -> float:
    "Measure the card's rate in large products of bf16, operations a second."
    side = 8192 if ON_GPU else 512
    a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / times({"product": lambda: a @ b})["product"]


def training() -> dict:
    "Training steps beside those of torchvision's FCOS: images a second, memory, share of the card's peak."
    allow_tf32(True)
    rate, name = matmul_rate(), torch.cuda.get_device_name() if ON_GPU else ""
    peak = next((value for card, value in PEAKS.items() if card in name), None)
    cases = [("teacher", 0.25, 2), ("student", 0.25, 2)]
    large = [("teacher", 1.0, 16), ("teacher", 0.25, 16), ("student", 0.25, 32), ("student", 1.0, 16)]
    if ON_GPU: cases = large + cases
    rows = []
    for role, width, batch in cases:
        row = {"role": role, "width": width, "batch": batch}
        rows.append(row)
        try:
            ours, theirs = our_step(role, width, batch, "bf16"), theirs_step(batch, "bf16")
            row["memory"] = {"ours": peak_memory(ours), "theirs": peak_memory(theirs)}
            work = {"ours": count_operations(ours), "theirs": count_operations(theirs)}
            seconds = times({"ours": ours, "theirs": theirs}, 6 if ON_GPU else 1)
        except torch.OutOfMemoryError:
            row["left out"] = "out of memory"
            continue
        rates = {who: work[who] / seconds[who] for who in work}
        row["images a second"] = {who: batch / taken for who, taken in seconds.items()}
        row["operations an image"] = {who: count / batch for who, count in work.items()}
        row["speed at equal work"] = rates["ours"] / rates["theirs"]
        row["share of large products"], row["share of the peak"] = rates["ours"] / rate, peak and rates["ours"] / peak
        del ours, theirs
    if ON_GPU: rows[0]["where the time goes"] = where_time_goes(our_step("teacher", 1.0, 8, "bf16"))
    return {"holds": True, "large products, operations a second": rate, "rows": rows}


def where_time_goes(step: Callable) -> dict:
    "Profile three steps: the ten largest kernels, and how long the card has nothing to do."
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3): step()
    wait()
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(3): step()
        wait()
    wall = time.perf_counter() - started
    events = [event for event in profiler.key_averages() if str(event.device_type).endswith("CUDA")]
    kernels = [event for event in events if event.self_device_time_total > 0]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    busy = sum(event.self_device_time_total for event in kernels) / 1e6
    shares = {event.key[:80]: event.self_device_time_total / 1e6 / busy for event in kernels[:10]}
    count = sum(event.count for event in kernels) / 3
    return {"idle": max(0.0, 1 - busy / wall), "kernels a step": count, "largest": shares}


def detectors(precision: str, batch: int) -> dict[str, Callable]:
    "Make functions that detect in a batch, ours in the low view, torchvision's in the high one."
    samples, found = [picture.to(DEVICE) for picture, _ in make_samples(batch)], {}
    for width in (0.25, 1.0):
        model, views = make_model("student", width).student.eval(), [picture[:, ::2, ::2] for picture in samples]
        found[f"student {width}"] = partial(model, views, view="low")
    found["teacher 0.25"] = partial(make_model("teacher", 0.25).eval(), samples)
    found["torchvision"] = partial(torchvision_detector().eval(), [picture / 255 for picture in samples])

    def detect(function):
        with torch.inference_mode(), autocast(precision): function()

    return {name: partial(detect, function) for name, function in found.items()}


def inference() -> dict:
    "Detection beside torchvision's FCOS: images a second."
    allow_tf32(True)
    rows = []
    for batch in (1, 8, 32) if ON_GPU else (1,):
        for precision in ("fp32", "bf16") if ON_GPU else ("fp32",):
            seconds = times(detectors(precision, batch), 8 if ON_GPU else 1)
            row = {"batch": batch, "precision": precision}
            row["images a second"] = {name: batch / taken for name, taken in seconds.items()}
            row["times as fast"] = {name: seconds["torchvision"] / taken for name, taken in seconds.items()}
            rows.append(row)
    return {"holds": True, "rows": rows}


def options() -> dict:
    "What each option brings: a step of the teacher and a detection of the student, with it on and off."
    if not ON_GPU: return {"left out": "they are a GPU's"}
    found, batch = {}, 8

    def compare(name, **functions):
        found[name] = times(functions, 6)

    def benchmark(on):
        torch.backends.cudnn.benchmark = on

    for name, precision, turn in (("TF32", "fp32", allow_tf32), ("cudnn.benchmark", "bf16", benchmark)):
        seconds = {}
        for on in (True, False):
            turn(on)
            seconds["on" if on else "off"] = times({"step": our_step("teacher", 0.25, batch, precision)}, 6)["step"]
        found[name] = seconds
    allow_tf32(True)
    step = our_step("teacher", 0.25, batch, "bf16")
    plain = make_model("teacher", 0.25).to(memory_format=torch.contiguous_format)
    from msad.engine.recipe import Recipe, make_optimizer
    from msad.models.batch import make_batch

    nchw, data = make_step(plain, Recipe(10**6, batch, 1e-3, precision="bf16")), make_batch(make_samples(batch))
    compare("channels last", on=step, off=lambda: nchw(data))
    model = make_model("teacher", 0.25)
    fused = make_optimizer(Recipe(2, 2, 1e-3, "adamw"), model)
    loops = torch.optim.AdamW([{**group, "fused": False, "foreach": True} for group in fused.param_groups])
    for parameter in model.parameters(): parameter.grad = torch.zeros_like(parameter)
    compare("fused optimiser", on=fused.step, off=loops.step)
    student = make_model("student", 0.25).student.eval()
    view = student.transform([picture[:, ::2, ::2].to(DEVICE) for picture, _ in make_samples(1)], "low")

    def network(x):
        with torch.inference_mode(), autocast("bf16"): return student.head(student.features(x))

    compiled = torch.compile(network)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3): network(view)
    wait()
    with torch.cuda.graph(graph): network(view)
    compare("compile, detection of one", on=lambda: compiled(view), off=lambda: network(view))
    compare("CUDA graph, detection of one", on=graph.replay, off=lambda: network(view))
    return {"holds": True, **found}


# --- fed


def fed() -> dict:
    "Images a second of the loader, from JPEG files of 640×480 to batches on the device, by workers."
    import numpy as np
    from PIL import Image

    from msad.data.images import CocoImages
    from msad.data.loaders import train_loader
    from msad.data.transforms import TrainTransform
    from msad.models.batch import make_batch

    random, found = np.random.default_rng(0), {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "annotations").mkdir()
        (root / "train2017").mkdir()
        entries, boxes = [], []
        for number in range(1, 65):
            rough = Image.fromarray(random.integers(0, 256, (60, 80, 3), dtype=np.uint8))
            rough.resize((640, 480), Image.Resampling.BICUBIC).save(root / f"train2017/{number}.jpg", quality=90)
            entries.append({"id": number, "file_name": f"{number}.jpg", "height": 480, "width": 640})
            of_all = {"image_id": number, "category_id": 1, "area": 3500, "iscrowd": 0}
            boxes += [{**of_all, "id": 10 * number + i, "bbox": [60 * i, 50, 50, 70]} for i in range(7)]
        content = {"images": entries, "annotations": boxes, "categories": [{"id": 1, "name": "thing"}]}
        (root / "annotations/instances_train2017.json").write_text(json.dumps(content))
        images = CocoImages(root, "train2017")
        for workers in (0, 1, 2, 4, 8, 16) if ON_GPU else (0, 1, 2):
            if workers > (os.cpu_count() or 1): continue
            options = dict(workers=workers, collate=make_batch, pin_memory=ON_GPU)
            loader = iter(train_loader(images, TrainTransform(800, 1333), 8, **options))
            for _ in range(2 * workers + 2): next(loader).to(DEVICE)
            started, count = time.perf_counter(), 0
            while time.perf_counter() - started < (4 if ON_GPU else 2):
                next(loader).to(DEVICE)
                count += 8
            wait()
            found[workers] = count / (time.perf_counter() - started)
            del loader
    return {"holds": True, "images a second by workers": found}


def serving() -> dict:
    "ONNX Runtime's CUDA provider takes the exported student, and finds what the model finds."
    from msad.data.images import CocoImages
    from msad.data.transforms import EvalTransform
    from msad.deploy.export import TOLERANCES
    from msad.deploy.onnx import compare_file, export_onnx
    from msad.engine.exported import runs_on
    from msad.engine.weights import load_model

    device = "cuda" if runs_on(Path("student.onnx"), torch.device("cuda")) and torch.cuda.is_available() else "cpu"
    model, photographs = load_model(ROOT / "models/trees.pth").eval(), CocoImages(ROOT / "data/trees", "val2017")
    size = EvalTransform(model.config.short_side, model.config.max_side)
    found = {"device": device, "rows": []}
    images = [model.own_view(size(*photographs[number])[0]) for number in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("fp32", "fp16"):
            part, pixels, score, _ = TOLERANCES["onnx", precision]
            file = export_onnx("trees", Path(folder) / f"{precision}.onnx", precision=precision)
            agreement = compare_file(file, model, images, part, device)
            holds = agreement.model > 0 and agreement.boxes < pixels and agreement.scores < score
            found["rows"].append({"precision": precision, **agreement._asdict(), "holds": holds})
    return {"holds": all(row["holds"] for row in found["rows"]), **found}


# --- all of it

PARTS = {  # and the seconds that each may take
    golden: 60, waits: 40, training: 100, inference: 60, precisions: 45, goes_on: 30, processes: 45, fed: 30,
    options: 30, serving: 40,
}


def about() -> dict:
    "Describe machine and versions."
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try: driver = subprocess.run(driver, capture_output=True, text=True).stdout.split()
    except FileNotFoundError: driver = []
    return {
        "device": torch.cuda.get_device_name() if ON_GPU else platform.machine(), "cards": torch.cuda.device_count(),
        "driver": driver[0] if driver else None, "cuda": torch.version.cuda, "torch": torch.__version__,
        "torchvision": torchvision.__version__, "commit": commit.stdout.strip() or None,
        "when": time.strftime("%Y-%m-%d %H:%M"),
    }


def run_part(name: str, limit: float, folder: str) -> dict:
    "Run a part in a process of its own."
    out, started, limit = Path(folder) / f"{name}.json", time.perf_counter(), limit * (1 if ON_GPU else 8)
    command = [sys.executable, __file__, "--part", name, str(out)]
    try: done = subprocess.run(command, timeout=limit, env={**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"})
    except subprocess.TimeoutExpired: return {"holds": False, "failed": f"it took more than {limit:.0f} s"}
    failed = {"holds": False, "failed": f"exit status {done.returncode}"}
    found = json.loads(out.read_text()) if out.exists() else failed
    return {**found, "seconds": round(time.perf_counter() - started, 1)}


def write(path: Path, content: dict) -> None:
    "Write JSON in one go."
    scratch = path.with_name(f".{path.name}.new")
    scratch.write_text(json.dumps(content, indent=1))
    scratch.replace(path)


def print_figures(found: object, indent: int = 2) -> None:
    "Print nested figures, one line each."
    for name, value in found.items() if isinstance(found, dict) else enumerate(found, 1):
        if isinstance(value, dict | list):
            print(" " * indent + f"{name}:")
            print_figures(value, indent + 2)
        else: print(" " * indent + f"{name}: {f'{value:.4g}' if isinstance(value, float) else value}", flush=True)


def main() -> None:
    "Run all parts, or one of them."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=None, help="JSON file; none: results/gpu.json, if there is a GPU")
    parser.add_argument("--only", nargs="*", default=None, help="names of parts")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        found = three_steps(args.worker[0])
        if os.environ["RANK"] == "0": write(Path(args.worker[1]), found)
        return
    if args.part:
        try: found = globals()[args.part[0]]()
        except ImportError as error: found = {"left out": str(error)}
        write(Path(args.part[1]), found)
        return
    out = Path(args.out) if args.out else ROOT / "results/gpu.json" if ON_GPU else None
    report = {**about(), "parts": {}}
    print(", ".join(f"{name}: {value}" for name, value in report.items() if name != "parts"), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for part, limit in PARTS.items():
            name = part.__name__
            if args.only and name not in args.only: continue
            found = report["parts"][name] = run_part(name, limit, folder)
            if out: write(out, report)
            state = "holds" if found.get("holds") else "DOES NOT HOLD"
            if "left out" in found: state = f"left out: {found['left out']}"
            print(f"\n{name}: {state} ({found.get('seconds', limit)} s). {part.__doc__}")
            print_figures({key: value for key, value in found.items() if key not in ("holds", "left out", "seconds")})
    sys.exit(not all(found.get("holds", True) for found in report["parts"].values()))


if __name__ == "__main__": main()
