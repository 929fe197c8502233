"Should this student be shipped: the statistics on invented results, and the command, stopped and gone on with."

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, write_coco

from msad.cli import main
from msad.experiments.compare import (
    CompareSettings,
    has_teachers_backbone,
    plan_comparison,
    run_folder,
    train_settings,
    write_results,
)
from msad.experiments.verdict import (
    ALONE,
    TEACHER,
    UNDISTILLED,
    UNLABELLED,
    comparison_table,
    judge,
    mean_gain,
    more_needed,
    recovered_lead,
    recovered_text,
    with_teachers,
)

PHOTOGRAPHS = 60


@cache
def drawn_photographs(photographs):
    "How often each photograph is in each of 500 sets, as parts of a set."
    parts = np.full(photographs, 1 / photographs)
    return np.random.default_rng(0).multinomial(photographs, parts, 500) / photographs


def invent(rng, truth, seeds, of_seeds, of_photographs, photographs=PHOTOGRAPHS):
    "Differences of seeds of which the truth is known, and the same on 500 sets of resampled photographs."
    single = truth + rng.normal(0, of_seeds, (seeds, 1)) + rng.normal(0, of_photographs, photographs)
    return single.mean(axis=1), single @ drawn_photographs(photographs).T


def invented_rows(seeds=4, of_seeds=0.2, of_photographs=1.0, **means):
    "Rows of results with such means of AP."
    rng, rows = np.random.default_rng(1), []
    for variant, mean in means.items():
        values, samples = invent(rng, mean, seeds, of_seeds, of_photographs)
        for seed in range(seeds):
            rows.append({"variant": variant, "seed": seed, "AP": values[seed], "samples": samples[seed].tolist()})
    return rows


@pytest.mark.parametrize(("of_seeds", "of_photographs"), [(1.0, 1.0), (0.2, 5.0), (1.0, 8.0)])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_interval_holds_the_truth(seeds, of_seeds, of_photographs):
    rng, hits, tries = np.random.default_rng(0), 0, 400
    for _ in range(tries):
        gain = mean_gain(*invent(rng, 1.5, seeds, of_seeds, of_photographs), PHOTOGRAPHS)
        hits += gain.low <= 1.5 <= gain.high
    assert hits / tries > 0.925  # 95 % but for what 400 tries leave to chance


def test_one_seed_has_an_interval_over_photographs_alone():
    values, samples = invent(np.random.default_rng(0), 1.0, 1, 1.0, 3.0)
    gain = mean_gain(values, samples, PHOTOGRAPHS)
    assert gain.over_seeds == 0 and gain.high - gain.low == pytest.approx(2 * gain.over_photographs)
    text = str(judge(invented_rows(seeds=1, published=33, none=31, alone=30), "published", PHOTOGRAPHS))
    assert "for other photographs alone, since there is one seed; 60 photographs" in text


@pytest.mark.parametrize(("student", "undistilled", "alone", "ship", "text"), [
    (33, 31, 30, "published", r"Ship the student: it has [12]\.\d AP more than the undistilled one \(95 % "),
    (33, 30, 31, "published", r"Ship the student: it has [12]\.\d AP more than the one trained alone \("),
    (31, 33, 30, UNDISTILLED, r"Ship the undistilled one: it has [12]\.\d AP more than the student \(95 % "),
    (31, 31, 33, ALONE, r"Ship the one trained alone: it has \d\.\d AP more than the student \(.*, 60 photographs\)\."),
    (31.2, 31, 25, None, r"Too close to call: the student has 0\.\d AP (more|less) than the undistilled one \(.*; .*"),
    (33, 25, 32.9, None, r"Too close to call: the student has .* than the one trained alone \("),
])
def test_verdicts(student, undistilled, alone, ship, text):
    rows = invented_rows(published=student, none=undistilled, alone=alone)
    verdict = judge(rows, "published", PHOTOGRAPHS)
    assert verdict.ship == ship and re.match(text, str(verdict)), str(verdict)
    assert re.search(r"interval −?\d+\.\d to −?\d+\.\d, 4 seeds, 60 photographs\)", str(verdict))


def test_a_rival_that_is_clearly_better_decides():
    rows = invented_rows(published=31, none=30, alone=34)
    for row in rows:
        if row["variant"] == UNDISTILLED: row["AP"] += (20, -6, 14, -12)[row["seed"]]  # better in the mean, and unsure
    verdict = judge(rows, "published", PHOTOGRAPHS)
    assert verdict.ship == ALONE and "Ship the one trained alone" in str(verdict)


def test_seeds_that_are_not_shared_do_not_count():
    rows = invented_rows(published=33, none=31, alone=30)
    kept = [row for row in rows if row["variant"] != UNDISTILLED or row["seed"] > 1]
    assert judge(kept, "published", PHOTOGRAPHS).gain.seeds == 2
    assert judge([row for row in rows if row["variant"] != ALONE], "published", PHOTOGRAPHS) is None


@pytest.mark.parametrize(("of_seeds", "of_photographs"), [(0.8, 0.5), (0.1, 5.0), (0.8, 5.0)])
def test_what_would_tell_tells(of_seeds, of_photographs):
    rng = np.random.default_rng(0)
    while True:  # a comparison whose mean and deviations are the true ones
        gain = mean_gain(*invent(rng, 1.0, 3, of_seeds, of_photographs), PHOTOGRAPHS)
        expected = np.array([1, of_seeds, 1.96 * of_photographs / PHOTOGRAPHS**0.5])
        if (abs(np.array([gain.mean, gain.deviation, gain.over_photographs]) / expected - 1) < 0.05).all(): break
    assert gain.low < 0
    more = more_needed(gain)
    asked = [(more.seeds, 0), (0, more.photographs), more.both or (None, None)]
    asked = [pair for pair in asked if None not in pair]
    assert asked
    for seeds, photographs in asked:
        size = PHOTOGRAPHS + photographs
        found = [mean_gain(*invent(rng, 1.0, 3 + seeds, of_seeds, of_photographs, size), size) for _ in range(200)]
        assert 0.65 < np.mean([one.low > 0 for one in found]) < 0.97  # four times in five


def test_recovered_lead():
    lead = invented_rows(teacher=35, published=33, none=31, alone=30)
    share = recovered_lead(lead, "published", PHOTOGRAPHS)
    names = (TEACHER, "published", UNDISTILLED)
    teacher, student, low = (np.mean([row["AP"] for row in lead if row["variant"] == name]) for name in names)
    assert share.mean == pytest.approx((student - low) / (teacher - low))
    assert share.low < share.mean < share.high
    assert recovered_lead(invented_rows(teacher=31.5, published=33, none=31), "published", PHOTOGRAPHS) is None


def test_share_and_lead_are_of_the_same_seeds():
    rows = invented_rows(seeds=3, of_seeds=0.0, teacher=35, published=33, none=31)
    rows = [row for row in rows if row["variant"] != "published" or row["seed"] == 0]
    one = [row for row in rows if row["seed"] == 0]
    rows[-1]["AP"] -= 10  # the lead of another seed
    assert recovered_text(rows, "published", PHOTOGRAPHS) == recovered_text(one, "published", PHOTOGRAPHS)


def test_a_shared_teacher_is_one_run():
    rows = [row | {"AP50": 70.0, "minutes": 1.0} for row in invented_rows(seeds=3, teacher=35, published=33, none=31)]
    shared = with_teachers([row for row in rows if row["variant"] != TEACHER or row["seed"] == 0], 1)
    (line,) = (line for line in comparison_table(shared, "published", PHOTOGRAPHS).splitlines() if "teacher" in line)
    assert line.split("|")[2].strip() == "1" and "±" not in line.split("|")[3]


def test_parameters_of_the_notebook_are_fields():
    cells = json.loads((ROOT / "nbs/compare.ipynb").read_text())["cells"]
    (lines,) = (cell["source"] for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    given = dict(re.fullmatch(r"(\w+) = .+?  # (.+)", line.rstrip("\n")).groups() for line in lines)
    written = "".join((ROOT / f"msad/{name}.py").read_text() for name in ("runs/settings", "experiments/compare"))
    assert set(given) <= {field.name for field in fields(CompareSettings)}
    assert [name for name, text in given.items() if f"  # {text}\n" not in written] == ["data"]  # none: a toy


TINY = {
    "teacher_iterations": 40, "iterations": 30, "batch_size": 2, "neck_channels": 64, "head_convs": 1, "short_side": 64,
    "max_side": 96, "recipe": "small", "devices": "cpu", "workers": 0,
}


@pytest.mark.parametrize(("options", "text"), [
    (["--data", "/nowhere"], "/nowhere"), (["--val-split", "missing"], "missing"), (["--alpha", "0"], "alpha is 0"),
    (["--weights", "/nowhere.pth"], "nowhere.pth"), (["--devices", "2"], "devices is '2': choose"),
    (["--unlabelled", "/nowhere"], "unlabelled: there is no folder /nowhere"),
])
def test_wrong_input_is_one_sentence_before_any_work(coco, tmp_path, capsys, options, text):
    command = ["compare", "--data", str(coco), "--out", str(tmp_path / "out"), *as_options(TINY), *options]
    with pytest.raises(SystemExit) as stop: main(command)
    assert text in f"{stop.value}{capsys.readouterr().err}" and not (tmp_path / "out").exists()


def test_photographs_that_changed_since_are_refused(coco, tmp_path):
    settings = CompareSettings(data=str(coco), out=str(tmp_path / "out"), **TINY)
    comparison = plan_comparison(settings)
    (tmp_path / "out").mkdir()
    head = {"settings": comparison.common, "content": comparison.content, "length": vars(comparison.length)}
    settings.file.write_text(json.dumps({**head, "runs": []}))
    assert plan_comparison(settings).length == comparison.length
    file = coco / "annotations/instances_val2017.json"
    dataset = json.loads(file.read_text())
    file.write_text(json.dumps({**dataset, "annotations": dataset["annotations"][1:]}))
    with pytest.raises(ValueError, match="the annotations of val2017 changed since"): plan_comparison(settings)
    file.write_text(json.dumps({**dataset, "annotations": []}))
    settings.file.unlink()
    with pytest.raises(ValueError, match="val2017 has no box"): plan_comparison(settings)


def test_photographs_without_boxes_make_one_student_more(coco, tmp_path):
    folder = tmp_path / "more"
    shutil.copytree(coco / "train2017", folder)
    settings = CompareSettings(data=str(coco), out=str(tmp_path / "out"), unlabelled=str(folder), **TINY)
    comparison = plan_comparison(settings)
    assert comparison.student == UNLABELLED and comparison.names[:3] == [TEACHER, UNLABELLED, "crosskd"]
    taught = [train_settings(comparison.settings, name, 0).unlabelled for name in comparison.names]
    assert [bool(given) for given in taught] == [name == UNLABELLED for name in comparison.names]
    head = {"settings": comparison.common, "content": comparison.content, "length": vars(comparison.length)}
    settings.file.parent.mkdir()
    settings.file.write_text(json.dumps({**head, "runs": []}))
    next(folder.iterdir()).unlink()
    with pytest.raises(ValueError, match="image names .* of unlabelled changed since"): plan_comparison(settings)
    without = CompareSettings(data=str(coco), out=str(tmp_path / "out"), **TINY)
    plain = plan_comparison(without)
    assert plain.student == "crosskd"
    write_results(plain, {"variant": "none", "seed": 0})
    with pytest.raises(ValueError, match="image names .* of unlabelled changed since"): plan_comparison(settings)


def test_unlabelled_photographs_by_another_distillation_are_refused(coco, tmp_path):
    settings = CompareSettings(
        data=str(coco), out=str(tmp_path / "out"), unlabelled=str(coco / "train2017"), distillation="crosskd", **TINY
    )
    row = {"variant": UNLABELLED, "seed": 0, "minutes": 1.0, "distillation": "crosskd"}
    write_results(plan_comparison(settings), row)
    assert plan_comparison(settings).rows
    with pytest.raises(ValueError, match="distillation is pkd, and the student of unlabelled .* learned by crosskd"):
        plan_comparison(replace(settings, distillation="pkd"))


@pytest.mark.parametrize(("given", "same"), [
    (dict(size="small", backbone="slimmable_resnet50", teacher_size="small"), False),
    (dict(size="paper", width=1.0, teacher_size="paper"), False), (dict(teacher_size="paper"), True),
    (dict(size="nano", teacher_size="small"), True), (dict(size="nano", teacher_size="medium"), False),
])
def test_a_students_backbone_may_be_its_teachers(coco, given, same):
    assert has_teachers_backbone(CompareSettings(data=str(coco), **given)) == same


def as_options(values):
    "Values as options of a command."
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def start(place, **more):
    "Start `msad compare` in a process of its own."
    given = {"data": place / "data", "out": place / "out", **TINY, **more}
    run = "from msad.cli import main\nif __name__ == '__main__': main()"
    (place / "command.py").write_text(run)  # a file, so that processes of its own can import it
    return subprocess.Popen(
        [sys.executable, str(place / "command.py"), "compare", *as_options(given)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, cwd=place, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, preexec_fn=heeding_ctrl_c,
    )


def heeding_ctrl_c():
    "Listen to SIGINT, which a process that a shell started in the background ignores."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_stopped_goes_on_and_finished_is_shown(tmp_path):
    for split in ("train2017", "val2017"): write_coco(tmp_path / "data", split)
    settings = CompareSettings(data=str(tmp_path / "data"), out=str(tmp_path / "out"), **TINY)
    stopped, student = start(tmp_path), run_folder(settings, "crosskd", 0)
    try:
        while not (student / "log.jsonl").exists() or len((student / "log.jsonl").read_text().splitlines()) < 10:
            assert stopped.poll() is None, stopped.communicate()[1][-2000:]
            time.sleep(0.05)
    finally:
        stopped.send_signal(signal.SIGINT)
        stopped.communicate(timeout=60)
    begun = json.loads(settings.file.read_text())
    assert [(row["variant"], row["seed"]) for row in begun["runs"]] == [(TEACHER, 0)]
    assert list((student / "checkpoints").iterdir()) and not (student / "metrics.json").exists()

    printed, errors = (both := start(tmp_path, jobs=2)).communicate(timeout=400)
    assert both.returncode == 0, errors[-2000:]
    rows = json.loads(settings.file.read_text())["runs"]
    assert {(row["variant"], row["seed"]) for row in rows} == set(plan_comparison(settings).runs) and len(rows) == 8
    assert begun["runs"][0] in rows
    log = [json.loads(line)["iteration"] for line in (student / "log.jsonl").read_text().splitlines()]
    assert log == list(range(1, 31))  # each iteration once: it went on
    updates = {TEACHER: 40, "crosskd": 30, UNDISTILLED: 30, ALONE: 70}
    assert {row["variant"]: row["iterations"] for row in rows} == updates
    assert all((run_folder(settings, row["variant"], row["seed"]) / "detections.json").is_file() for row in rows)
    sentence = re.search(r"^(Ship the|Too close to call: the) .*, 2 seeds, 4 photographs\).*\.$", printed, re.M)
    assert sentence and "runs are still to be done" not in printed

    started, written = time.perf_counter(), settings.file.stat().st_mtime_ns
    printed, errors = (again := start(tmp_path)).communicate(timeout=60)
    assert again.returncode == 0, errors[-2000:]
    assert sentence[0] in printed and "8 of 8 runs are in" in printed and settings.file.stat().st_mtime_ns == written
    assert "iterations to go" not in printed and time.perf_counter() - started < 60

    settings.file.unlink()  # the runs know all that was in it
    printed, errors = (from_runs := start(tmp_path)).communicate(timeout=60)
    assert from_runs.returncode == 0, errors[-2000:]
    assert sentence[0] in printed and json.loads(settings.file.read_text())["runs"] == rows

    printed, errors = (third := start(tmp_path, seeds=3, budget=1e-4)).communicate(timeout=60)
    assert third.returncode == 0, errors[-2000:]
    assert "4 of 12 runs are still to be done" in printed


@pytest.mark.slow
def test_notebook_takes_the_parameters_of_a_training(tmp_path):
    for split in ("train2017", "val2017"): write_coco(tmp_path / "data", split)
    given = {**TINY, "teacher_iterations": 3, "iterations": 2, "seeds": 1}
    parameters = json.dumps({**given, "data": tmp_path / "data", "out": tmp_path / "out"}, default=str)
    command = [str(Path(sys.executable).with_name("papermill")), "nbs/compare.ipynb", "-y", parameters]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    outputs = [output for cell in json.loads(done.stdout)["cells"] for output in cell.get("outputs", [])]
    text = "".join(str(output.get("text", "")) + str(output.get("data", "")) for output in outputs)
    assert "for other photographs alone, since there is one seed; 4 photographs" in text
    assert "| student (crosskd) |" in text and "image/png" in text
    settings = json.loads((tmp_path / "out/results.json").read_text())["settings"]
    assert settings["neck_channels"] == 64 and settings["iterations"] == 2
