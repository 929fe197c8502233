"Films through detectors: the frames, the files that are written, damage, Ctrl-C, and memory."

import json
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction

import av
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_predict import same, save_detector, settings

from msad.data.files import read_json
from msad.data.images import read_image
from msad.deploy.film import detect_film, film_size, open_device, open_film
from msad.deploy.predict import predict, results_text
from msad.deploy.predictor import Predictor

PHOTOGRAPH = np.asarray(read_image(ROOT / "data" / "trees" / "val2017" / "000000001001.jpg"))
LOSSLESS = ("ffv1", "bgr0")


def views(count=12, height=96, width=128):
    "Windows that move over a photograph."
    return [np.ascontiguousarray(PHOTOGRAPH[i : i + height, 2 * i : 2 * i + width]) for i in range(count)]


def write_film(path, frames, codec=LOSSLESS, rate=24, ticks=None, turn=None, gop=12, **options):
    "Write frames (H×W×3) as a film; `ticks` are their times in milliseconds."
    with av.open(str(path), "w", options=options) as file:
        stream = file.add_stream(codec[0], rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], codec[1]
        stream.codec_context.gop_size = gop
        if ticks: stream.codec_context.time_base = Fraction(1, 1000)
        if turn: stream.set_display_rotation(turn)
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if ticks: frame.pts, frame.time_base = ticks[i], Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def write_sound(path):
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        for packet in (*stream.encode(frame), *stream.encode(None)): file.mux(packet)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_times(path):
    "The times of a film's frames as FFmpeg tells them."
    with av.open(str(path)) as file: return [frame.time for frame in file.decode(video=0)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with the file of a student."
    folder = tmp_path_factory.mktemp("film")
    save_detector(folder / "student.pth")
    return folder


@pytest.fixture(scope="module")
def student(place):
    return Predictor(place / "student.pth")


def check_line(line, found):
    "A line says what the prediction of a photograph says."
    assert line["names"] == found["names"] and len(line["names"]) > 0
    assert line["category_ids"] == [{"ash": 7, "oak": 90}[name] for name in line["names"]]
    np.testing.assert_allclose(line["boxes"], found["boxes"], atol=1e-3)
    np.testing.assert_allclose(line["scores"], found["scores"], atol=1e-5)


# --- frames


def test_a_frame_is_found_as_the_same_photograph(place, student, tmp_path):
    film = write_film(tmp_path / "film.mkv", views())
    out = predict(settings(film, place, tmp_path / "out", min_score=0.2))
    lines = read_lines(out / "films" / "film.mkv.jsonl")
    assert [line["frame"] for line in lines] == list(range(12))
    for line, pixels in zip(lines, views(), strict=True): check_line(line, student(pixels).above(0.2))
    (entry,) = read_json(out / "results.json")["films"]
    assert entry["film"] == "films/film.mkv.mp4" and (out / entry["film"]).is_file()
    assert (entry["frames"], entry["frame_rate"], entry["damage"]) == (12, 24, None)
    assert sum(entry["objects"].values()) == sum(len(line["scores"]) for line in lines)
    assert sorted(path.name for path in out.iterdir()) == ["films", "results.json", "settings.json"]
    assert sorted(path.name for path in (out / "films").iterdir()) == ["film.mkv.jsonl", "film.mkv.mp4"]


def test_a_large_frame_is_tiled_as_a_photograph(place, tmp_path):
    (frame,) = views(1, 256, 256)
    Image.fromarray(frame).save(tmp_path / "frame.png")
    film = write_film(tmp_path / "frame.mkv", [frame])
    tiles = dict(tile=96, overlap=32, min_score=0.3)
    found = read_json(predict(settings(tmp_path / "frame.png", place, tmp_path / "a", **tiles)) / "results.json")
    out = predict(settings(film, place, tmp_path / "b", **tiles))
    (line,) = read_lines(out / "films" / "frame.mkv.jsonl")
    corners = np.array([annotation["bbox"] for annotation in found["annotations"]])
    corners[:, 2:] += corners[:, :2]
    np.testing.assert_allclose(line["boxes"], corners, atol=1e-3)
    assert read_json(out / "settings.json")["tiles"].startswith("96 pixels, overlap 32")


@pytest.mark.parametrize("turn", [90, -90, 180])
def test_boxes_are_those_of_the_upright_film(place, student, tmp_path, turn):
    film = write_film(tmp_path / "film.mov", views(3), ("png", "rgb24"), turn=turn)
    out = predict(settings(film, place, tmp_path / "out", min_score=0.2))
    for line, pixels in zip(read_lines(out / "films" / "film.mov.jsonl"), views(3), strict=True):
        check_line(line, student(np.ascontiguousarray(np.rot90(pixels, turn // 90))).above(0.2))
    expected = (96, 128) if turn == 180 else (128, 96)
    assert film_size(film) == film_size(out / "films" / "film.mov.mp4") == expected


@pytest.mark.parametrize(
    ("ending", "rate", "ticks"),
    [
        ("mp4", 24, None), ("mov", Fraction(30000, 1001), None), ("mkv", 30, None), ("ts", 25, None), ("avi", 12, None),
        ("mp4", 10, [0, 40, 80, 200, 210, 500, 900, 910, 1500, 3000, 3010, 3050]),
    ],
)
def test_number_and_times_of_frames(student, tmp_path, ending, rate, ticks):
    codec = ("mpeg4" if ending == "avi" else "libx264", "yuv420p")
    path = write_film(tmp_path / f"film.{ending}", views(), codec, rate, ticks)
    with open_film(path) as film:
        found = detect_film(student, film, tmp_path / "found", student.model.config, 0.9)
    times = np.array(ticks) / 1000 if ticks else np.arange(12) / float(rate)
    lines = read_lines(tmp_path / "found.jsonl")
    assert found["frames"] == len(lines) == 12 and found["damage"] is None
    np.testing.assert_allclose([line["time"] for line in lines], times, atol=1e-5)
    np.testing.assert_allclose(read_times(tmp_path / "found.mp4"), times, atol=1e-4)
    with av.open(str(tmp_path / "found.mp4")) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.frames, stream.height, stream.width) == ("h264", 12, 96, 128)
        if not ticks: assert stream.average_rate == rate


@pytest.mark.parametrize("size", [(96, 128), (720, 1280)])
def test_an_annotated_film_keeps_its_colours(student, tmp_path, size):
    colours = np.array([[[220, 30, 30], [30, 200, 40]], [[40, 60, 210], [230, 220, 60]]], np.uint8)
    pixels = colours.repeat(size[0] // 2, axis=0).repeat(size[1] // 2, axis=1)
    path = write_film(tmp_path / "film.mkv", [pixels, pixels])
    with open_film(path) as film: detect_film(student, film, tmp_path / "found", student.model.config, 1.0)
    with open_film(tmp_path / "found.mp4") as film: shown = np.asarray(next(film.frames).photograph).astype(int)
    middles = shown[size[0] // 4 :: size[0] // 2, size[1] // 4 :: size[1] // 2]
    assert abs(middles - colours).max() < 10


# --- what cannot be read


def test_a_film_that_was_cut_is_kept_as_far_as_it_goes(place, tmp_path, capsys):
    folder = tmp_path / "films"
    folder.mkdir()
    for name, options in {"a.mkv": {}, "b.mp4": {"movflags": "+faststart"}, "c.mp4": {}}.items():
        write_film(folder / name, views(36), ("libx264", "yuv420p"), rate=6, **options)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) * 6 // 10])
    out = predict(settings(folder, place, tmp_path / "out"))
    results = read_json(out / "results.json")
    assert [film["file_name"] for film in results["films"]] == ["a.mkv", "b.mp4"]
    for film in results["films"]:
        assert "of 6.0 seconds" in film["damage"] and film["damage"].startswith(str(folder / film["file_name"]))
        assert 8 < film["frames"] < 30
        assert len(read_times(out / film["film"])) == len(read_lines(out / film["lines"])) == film["frames"]
        assert film["damage"] in capsys.readouterr().out or film["damage"] in results_text(out)
    (skipped,) = results["skipped"]  # its index was at the end
    assert skipped["file_name"] == "c.mp4" and "c.mp4 does not open as a film" in skipped["reason"]


def test_damage_inside_a_film_costs_the_damaged_frames(student, tmp_path):
    path = write_film(tmp_path / "film.mov", views(40), ("mpeg4", "yuv420p"), movflags="+faststart")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = bytes(range(200)) * 2
    path.write_bytes(content)
    with open_film(path) as film: found = detect_film(student, film, tmp_path / "found", student.model.config, 0.9)
    assert "is damaged in" in found["damage"] and "the first at frame" in found["damage"]
    assert 20 < found["frames"] <= 40


def test_what_is_no_film(place, tmp_path):
    folder = tmp_path / "films"
    folder.mkdir()
    write_sound(folder / "sound.mp4")
    (folder / "text.avi").write_text("no film")
    (folder / "empty.webm").write_bytes(b"")
    strange = write_film(folder / "strange.mov", views(2), ("png", "rgb24"))
    strange.write_bytes(strange.read_bytes().replace(b"png ", b"zzzz"))
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="no file of .* could be read"): predict(settings(folder, place, out))
    results = read_json(out / "results.json")
    reasons = {skipped["file_name"]: skipped["reason"] for skipped in results["skipped"]}
    assert set(reasons) == {"sound.mp4", "text.avi", "empty.webm", "strange.mov"} and results["films"] == []
    assert "sound.mp4 has no moving pictures, at most sound: leave it out" in reasons["sound.mp4"]
    for name, reason in reasons.items(): assert name in reason and "leave it out" in reason and "\n" not in reason
    assert not list(out.rglob("*.unfinished.*"))


def test_no_camera_and_no_pyav(place, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"images: camera 97 does not open \(.*\); connect it, or give a file"):
        predict(settings("97", place, tmp_path / "out"))
    film = write_film(tmp_path / "film.mkv", views(1))
    monkeypatch.setitem(sys.modules, "av", None)
    for images in (film, "0"):
        with pytest.raises(ValueError, match=r'needs PyAV: pip install "\.\[film\]" in the clone'):
            predict(settings(images, place, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# --- folders


def test_photographs_and_films_of_a_folder(place, student, tmp_path, capsys):
    folder = tmp_path / "holiday"
    folder.mkdir()
    Image.fromarray(views(1)[0]).save(folder / "a.png")
    write_film(folder / "b.mkv", views(5))
    (folder / "0").mkdir()
    out = predict(settings(folder, place, tmp_path / "out", min_score=0.2))
    results = read_json(out / "results.json")
    assert [image["file_name"] for image in results["images"]] == ["a.png"]
    assert [film["file_name"] for film in results["films"]] == ["b.mkv"]
    same(student(folder / "a.png"), student(views(1)[0]))
    said = capsys.readouterr().out
    assert "1 photograph: " in said and "b.mkv, 5 frames in 0.2 s: " in said
    written = [path.stat().st_mtime_ns for path in sorted(out.rglob("*.*"))]
    predict(settings(folder, place, tmp_path / "out", min_score=0.2))
    assert "finished already" in capsys.readouterr().out
    assert written == [path.stat().st_mtime_ns for path in sorted(out.rglob("*.*"))]
    with pytest.raises(ValueError, match="holds something else"):
        predict(settings(folder, place, tmp_path / "out", min_score=0.3))


def test_films_that_are_done_are_not_done_again(place, tmp_path):
    folder = tmp_path / "films"
    folder.mkdir()
    for name in ("a.mkv", "b.mkv"): write_film(folder / name, views(3))
    run = settings(folder, place, tmp_path / "out")
    out = predict(run)
    results = read_json(out / "results.json")
    (out / "results.json").unlink()  # as if it had been stopped after the first
    for path in (out / "films").glob("b.*"): path.unlink()
    (out / "done").mkdir()
    (out / "done" / "a.mkv.json").write_text(json.dumps(results["films"][0]))
    written = (out / "films" / "a.mkv.mp4").stat().st_mtime_ns
    predict(run)
    assert read_json(out / "results.json") == results and not (out / "done").exists()
    assert (out / "films" / "a.mkv.mp4").stat().st_mtime_ns == written and (out / "films" / "b.mkv.mp4").is_file()


# --- processes

LIVE = """
import sys
from pathlib import Path
from msad import Predictor
from msad.deploy.film import detect_film, open_device

predictor = Predictor(sys.argv[1])
with open_device("player", sys.argv[2], "lavfi", {}) as film:
    print(detect_film(predictor, film, Path(sys.argv[3]), predictor.model.config))
"""
PREDICT = "import sys; from msad.cli import main; main(sys.argv[1:])"


def signalled(command, lines, count, number):
    "Start a process, send it a signal once a file has so many lines; its return code and output."
    process = subprocess.Popen([sys.executable, "-c", *map(str, command)], stdout=subprocess.PIPE, text=True)
    deadline = time.time() + 300
    while not lines.is_file() or len(lines.read_text().splitlines()) < count:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    said, _ = process.communicate(timeout=300)
    return process.returncode, said


@pytest.mark.parametrize(("number", "count"), [(signal.SIGINT, 8), (signal.SIGKILL, 120)])
def test_a_film_that_is_stopped_can_be_opened_and_begins_again(place, tmp_path, number, count):
    film = write_film(tmp_path / "film.mp4", views(12) * 30, ("mpeg4", "yuv420p"))
    out, options = tmp_path / "out", ("--images", film, "--model", place / "student.pth", "--min-score", "0.9")
    command = (PREDICT, "predict", *options, "--out", out)
    unfinished = [out / "films" / f"film.mp4.unfinished.{ending}" for ending in ("mp4", "jsonl")]
    code, said = signalled(command, unfinished[1], count, number)
    assert code != 0 and [path.name for path in (out / "films").glob("*.mp4")] == ["film.mp4.unfinished.mp4"]
    lines = read_lines(unfinished[1])
    frames = len(read_times(unfinished[0]))
    assert count <= len(lines) < 360 and not (out / "results.json").exists()
    if number == signal.SIGINT:
        assert frames == len(lines) and f"stopped after {frames} frames" in said
    else: assert 40 <= frames <= len(lines)
    assert subprocess.run([sys.executable, "-c", *map(str, command)], stdout=subprocess.DEVNULL).returncode == 0
    assert len(read_lines(out / "films" / "film.mp4.jsonl")) == len(read_times(out / "films" / "film.mp4.mp4")) == 360
    assert not list(out.rglob("*.unfinished.*"))


def test_ctrl_c_completes_what_a_camera_saw(place, tmp_path):
    film = write_film(tmp_path / "film.mov", views(24), ("libx264", "yuv420p"))
    source = f"movie={film}:loop=0,setpts=N/(24*TB),realtime"
    command = (LIVE, place / "student.pth", source, tmp_path / "seen")
    code, said = signalled(command, tmp_path / "seen.unfinished.jsonl", 6, signal.SIGINT)
    assert code == 0 and "'damage': None" in said
    lines = read_lines(tmp_path / "seen.jsonl")
    assert len(lines) == len(read_times(tmp_path / "seen.mp4")) >= 6
    np.testing.assert_allclose([line["frame"] / 24 for line in lines], [line["time"] for line in lines], atol=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.mov", "seen.jsonl", "seen.mp4"]


def test_a_camera_ends_with_its_frames(student, tmp_path):
    with open_device("player", "testsrc=size=64x48:rate=30:duration=0.5", "lavfi", {}) as film:
        found = detect_film(student, film, tmp_path / "seen", student.model.config)
    assert found["frames"] + found["dropped"] == 15 and (found["width"], found["height"]) == (64, 48)


MEMORY = """
import sys, time
from pathlib import Path
import torch
from msad.deploy.film import detect_film, open_film
from msad.models.detector import ModelConfig

def detect(photographs):
    time.sleep(0.02)
    return [{"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0).long()}] * len(photographs)

def memory(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) // 1024

config = ModelConfig("student", 0.25, ("tree",), (1,))
for path in sys.argv[1:]:
    Path("/proc/self/clear_refs").write_text("5")
    with open_film(path) as film: detect_film(detect, film, Path(path).with_suffix(""), config)
    print(memory("VmHWM"))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the system does not tell the most memory")
def test_memory_does_not_grow_with_the_film(tmp_path):
    pixels = [np.asarray(Image.fromarray(view).resize((640, 480))) for view in views(12)]
    for name, times in (("a", 3), ("b", 40)): write_film(tmp_path / f"{name}.mp4", pixels * times, ("mpeg4", "yuv420p"))
    command = [sys.executable, "-c", MEMORY, tmp_path / "a.mp4", tmp_path / "b.mp4"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    short, long = map(int, said.split())
    assert long - short < 60  # megabytes; all frames of the longer film are 440


FULL = """
import resource, sys
from msad.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
main(sys.argv[1:])
"""


def test_a_full_disk_is_told(place, tmp_path):
    film = write_film(tmp_path / "film.mp4", views(12) * 12, ("mpeg4", "yuv420p"))
    command = (FULL, "predict", "--images", film, "--model", place / "student.pth", "--out", tmp_path / "out")
    done = subprocess.run([sys.executable, "-c", *map(str, command)], capture_output=True, text=True)
    assert done.returncode != 0 and "cannot write" in done.stderr and "make room" in done.stderr
    assert not (tmp_path / "out" / "results.json").exists()
    assert not (tmp_path / "out" / "films" / "film.mp4.mp4").exists()
