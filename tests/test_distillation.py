"Distillation: what each imitation pulls, that it keeps its share, and whole runs with each of them."

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import write_coco, write_teacher
from test_without_gpu import make_batch, step_of
from torch._subclasses.fake_tensor import FakeTensorMode

from msad.engine.hooks import read_log
from msad.engine.recipe import CHOICES, SMALL, Recipe, find_recipe, loss_weights_at
from msad.engine.trainer import read_losses, train_step
from msad.models.detector import ModelConfig, build_model, student_of
from msad.models.distillation import SHARE, Distillation, share_of
from msad.models.imitation import IMITATIONS, Side, distillation_loss, make_imitation
from msad.models.sandwich import Sandwich
from msad.models.targets import assign_targets, make_locations
from msad.runs.plan import prepare
from msad.runs.settings import TrainSettings, read_settings_file
from msad.runs.train import train, warn_of_share

LIMITED = tuple(name for name in IMITATIONS if name != "published")
CONFIG = ModelConfig("teacher", 0.25, ("pine", "oak"), (7, 90), neck_channels=32, head_convs=2)
BOXES = [
    dict(boxes=torch.tensor([[8.0, 8, 60, 40], [70, 20, 90, 50]]), labels=torch.tensor([0, 1])),
    dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64)),
]


def make_teacher(seed=0, **changes):
    "A teacher that finds something everywhere, so that no score is the same."
    torch.manual_seed(seed)
    teacher = build_model(replace(CONFIG, **changes))
    torch.nn.init.normal_(teacher.head.cls_logits.weight, std=0.3)
    torch.nn.init.normal_(teacher.head.bbox_pred.weight, std=0.3)
    return teacher.eval().requires_grad_(False)


def make_side(teacher, seed, scale=1.0):
    "A side with features of its own."
    noise = torch.Generator().manual_seed(seed)
    sizes, channels = ((16, 12), (8, 6), (4, 3), (2, 2), (1, 1)), teacher.neck.out_channels
    features = [scale * torch.randn(2, channels, *size, generator=noise) for size in sizes]
    begun = list(teacher.head.towers(features))
    return Side(features, teacher.head, teacher.head.predict(begun), begun)


def targets_for(side):
    return assign_targets(make_locations(side.features), BOXES)


# --- imitations


@pytest.mark.parametrize("name", IMITATIONS)
def test_zero_for_what_is_the_same_and_more_for_what_is_not(name):
    teacher = make_teacher()
    ours, theirs, imitation = make_side(teacher, 0), make_side(teacher, 1), make_imitation(name, 32, 32)
    assert imitation(theirs, theirs, targets_for(theirs)).item() == pytest.approx(0, abs=1e-5)
    assert imitation(ours, theirs, targets_for(theirs)).item() > 0.01


@pytest.mark.parametrize("name", IMITATIONS)
def test_gradients_reach_the_student_only(name):
    teacher = make_teacher()
    student = student_of(teacher, replace(CONFIG, role="student", neck_channels=64))
    pair = Distillation(student, teacher, imitation=name).train()
    assert [tuple(p.shape[:2]) for p in pair.projection.parameters() if p.ndim > 1] in ([(32, 64)], [(32, 64)] * 2)
    images = [torch.randint(0, 256, (3, 128, 128), dtype=torch.uint8) for _ in BOXES]
    pair(images, BOXES)["loss_kd"].backward()
    assert all(p.grad is None for p in teacher.parameters())
    learned = [p for p in (*student.backbone.parameters(), *pair.projection.parameters())]
    assert sum(p.grad.abs().sum() for p in learned if p.grad is not None) > 0
    assert all(p.grad is not None for p in pair.projection.parameters())


@pytest.mark.parametrize("name", ["balanced", "pkd"])
def test_the_size_and_mean_of_features_are_nothing_to_a_correlation(name):
    teacher, imitation = make_teacher(), make_imitation(name, 32, 32)
    ours, theirs = make_side(teacher, 0), make_side(teacher, 1)
    targets = targets_for(theirs)
    louder = ours._replace(features=[7 * level + 3 for level in ours.features])
    term, opposite = imitation(ours, theirs, targets).item(), theirs._replace(features=[-x for x in theirs.features])
    assert imitation(louder, theirs, targets).item() == pytest.approx(term, rel=1e-3)
    most = 2 if name == "balanced" else 2 * len(ours.features)  # of equal weights, twice 1
    assert imitation(opposite, theirs, targets).item() == pytest.approx(most, rel=0.05)


def test_the_published_one_is_as_published():
    teacher = make_teacher()
    ours, theirs = make_side(teacher, 0), make_side(teacher, 1)
    by_hand = 3 * 0.2 * sum((a - b).abs().mean() for a, b in zip(ours.features, theirs.features, strict=True))
    assert distillation_loss(ours.features, theirs.features).item() == pytest.approx(by_hand.item(), rel=1e-6)
    tenfold = [make_imitation("published", 32, 32, alpha)(ours, theirs, None).item() for alpha in (0.02, 0.2)]
    assert tenfold[1] == pytest.approx(by_hand.item()) == pytest.approx(10 * tenfold[0])


def test_balanced_looks_where_the_teacher_does():
    teacher, imitation = make_teacher(), make_imitation("balanced", 32, 32)
    theirs = make_side(teacher, 1)
    logits = [torch.full_like(level, -20.0) for level in theirs.outputs.logits]
    logits[0][0, 1, 3, 4] = 5.0  # of one place, one class
    theirs = theirs._replace(outputs=theirs.outputs._replace(logits=logits))
    features = [level.clone().requires_grad_() for level in make_side(teacher, 0).features]
    imitation(make_side(teacher, 0)._replace(features=features), theirs, None).backward()
    sizes = features[0].grad.norm(dim=1)
    assert sizes.argmax() == 3 * 12 + 4 and sizes[0, 3, 4] > 10 * sizes.flatten().sort().values[-2]


def test_masks_need_no_objects():
    teacher, imitation = make_teacher(), make_imitation("fgd", 32, 32)
    ours, theirs = make_side(teacher, 0), make_side(teacher, 1)
    empty = assign_targets(make_locations(theirs.features), [BOXES[1]] * 2)
    by_hand = sum((a - b).square().mean() for a, b in zip(ours.features, theirs.features, strict=True)) / 2
    assert imitation(ours, theirs, empty).item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_half_precision_is_compared_in_full():
    teacher = make_teacher()
    ours, theirs = make_side(teacher, 0), make_side(teacher, 1)
    half = [side._replace(features=[level.bfloat16() for level in side.features]) for side in (ours, theirs)]
    for name in set(IMITATIONS) - {"crosskd"}:
        imitation = make_imitation(name, 32, 32)
        term = imitation(*half, targets_for(theirs))
        assert term.dtype == torch.float32
        assert term.item() == pytest.approx(imitation(ours, theirs, targets_for(theirs)).item(), rel=0.02)


def test_heads_of_other_classes_do_not_cross():
    student = build_model(replace(CONFIG, role="student", class_names=("tree",), category_ids=(1,)))
    with pytest.raises(ValueError, match="crosskd, and the teacher has 2 classes and the student 1: give a teacher of"):
        Distillation(student, make_teacher(), imitation="crosskd")


# --- the share


@pytest.mark.parametrize("name", LIMITED)
@pytest.mark.parametrize("share", [0.05, SHARE])
def test_the_share_is_kept(name, share):
    teacher = make_teacher()
    student = student_of(make_teacher(seed=5), replace(CONFIG, role="student"))
    pair = Distillation(student, teacher, imitation=name, share=share).train()
    images = [torch.randint(0, 256, (3, 128, 128), dtype=torch.uint8) for _ in BOXES]
    losses = {loss: value.item() for loss, value in pair(images, BOXES).items()}
    assert 0 < share_of(losses) < share * 1.0001
    raw = replace_share(pair, 1e9)(images, BOXES)["loss_kd"].item()
    assert losses["loss_kd"] == pytest.approx(min(raw, share * sum(list(losses.values())[:3])), rel=1e-3)


def replace_share(pair, share):
    pair.share = share
    return pair


def test_widths_keep_their_share():
    config = replace(CONFIG, role="student", width=1.0, all_widths=True)
    sandwich = Sandwich(build_model(config)).train()
    images = [torch.randint(0, 256, (3, 128, 128), dtype=torch.uint8) for _ in BOXES]
    losses = {loss: value.item() for loss, value in sandwich(images, BOXES).items()}
    wide = losses.pop("loss_wide")
    assert 0 < wide < SHARE * sum(losses.values()) * 1.0001
    assert Sandwich(sandwich.model, 0.0).train()(images, BOXES)["loss_wide"] == 0


def test_the_teacher_is_asked_only_where_it_counts():
    recipe = Recipe(10, 4, 0.01, distillation_warmup=2, distillation="balanced", distillation_until=0.5)
    teacher = make_teacher()
    pair = Distillation(student_of(teacher, replace(CONFIG, role="student", neck_channels=64)), teacher)
    step_of(pair, make_batch(), recipe)  # sets training
    asked, optimizer = [], torch.optim.SGD([p for p in pair.parameters() if p.requires_grad], 0.01)
    teacher.backbone.register_forward_hook(lambda *_: asked.append(1))
    scaler, counts = torch.amp.GradScaler("cpu", enabled=False), []
    for iteration in (0, 1, 4, 5, 9):
        before = len(asked)
        [losses] = read_losses([train_step(pair, optimizer, scaler, recipe, iteration, make_batch())])
        counts.append(len(asked) - before)
        assert (losses["loss_kd"] > 0) == (counts[-1] > 0) == (loss_weights_at(recipe, iteration)["loss_kd"] > 0)
        assert all(p.grad is not None for p in pair.projection.parameters())
    assert counts == [0, 2, 2, 0, 0]


@pytest.mark.parametrize("name", IMITATIONS)
def test_no_step_asks_for_a_number(name):
    with FakeTensorMode():  # their numbers are not there, so a step that asks for one fails
        torch.manual_seed(0)
        teacher = build_model(CONFIG)
        pair = Distillation(student_of(teacher, replace(CONFIG, role="student", neck_channels=64)), teacher, 0.2, name)
        losses = step_of(pair, make_batch(), Recipe(10, 4, 0.01, distillation="balanced", distillation_warmup=0))()
        with pytest.raises(Exception, match="_local_scalar_dense"): losses["loss_kd"].item()


# --- recipes and settings


def test_recipes_say_what_is_distilled(tmp_path):
    assert {find_recipe("published", role, 0.5).distillation for role in ("teacher", "student")} == {"published"}
    small = SMALL["student"]
    assert (small.distillation, small.distillation_share, small.distillation_until) == ("crosskd", 0.25, 0.8)
    path = tmp_path / "recipe.json"
    for given, expected in (({}, "crosskd"), ({"alpha": 0.1}, "published"), ({"distillation": "cwd"}, "cwd")):
        path.write_text(json.dumps({"iterations": 9, "batch_size": 2, "lr": 0.1, **given}))
        assert find_recipe(str(path), "student", 0.5).distillation == expected
    assert set(CHOICES["distillation"]) == {"none", *IMITATIONS}


@pytest.mark.parametrize("given, message", [
    (dict(distillation="l1"), "distillation is 'l1': choose one of none, published, balanced, pkd, cwd, fgd, crosskd"),
    (dict(distillation=3), "distillation is 3: write a text"),
    (dict(alpha=0), "alpha is 0: write distillation none to learn without one"),
    (dict(distillation="balanced", alpha=0.1), "alpha is 0.1 and distillation balanced, which does not have it: "),
    (dict(distillation="none", distillation_share=0.1), "distillation_share is 0.1 and distillation none"),
    (dict(distillation="published", distillation_share=0.1), "choose another distillation"),
    (dict(distillation_share=0), "distillation_share is 0: choose a number above 0"),
    (dict(distillation_share=-1), "distillation_share is -1: choose a number above 0"),
    (dict(distillation_until=1.5), "distillation_until is 1.5: choose a part of the run, at most 1"),
    (dict(distillation_until=0), "distillation_until is 0: choose a number above 0"),
    (dict(teacher="without", distillation="fgd"), 'distillation is fgd and teacher "without": nothing is distilled'),
    (dict(teacher="without", distillation_until=0.5), "nothing is distilled, so leave one out"),
    (dict(role="teacher", distillation="none"), "distillation is 'none': only a student has a distillation"),
])
def test_what_cannot_work_is_one_sentence(given, message):
    with pytest.raises(ValueError, match=message) as error: TrainSettings(**{"role": "student", **given})
    assert "\n" not in str(error.value)


SIZES = dict(neck_channels=32, head_convs=1, short_side=64, max_side=107)
RUN = dict(recipe="small", iterations=4, batch_size=2, devices="cpu", workers=0, checkpoint_every=2, warmup=1)


def student(root, out, **changes):
    "Settings of a student beside an untrained teacher."
    for split in ("train2017", "val2017"): write_coco(root / "data", split)
    teacher = root / "teacher.pth"
    if not teacher.exists(): write_teacher(teacher, **SIZES)
    given = dict(role="student", data=str(root / "data"), teacher=str(teacher), out=str(root / out), **RUN)
    return TrainSettings(**given | changes)


def test_the_plan_tells_it(tmp_path):
    for given, line in (
        (dict(), "distillation: crosskd, at most 0.25 of the detection losses, in the first 80% of the run, from"),
        (dict(distillation="pkd", distillation_share=0.5), "pkd, at most 0.5 of the detection losses, in the first"),
        (dict(distillation="published"), "distillation: published, of size 0.02 without a limit, to the end, from"),
        (dict(distillation="none"), "no distillation: it learns from the labels alone"),
        (dict(recipe="published"), "distillation: published, of size 0.2 without a limit, to the end, from"),
        (dict(recipe="auto"), "distillation: crosskd, at most 0.25 of the detection losses, in the first 80%"),
        (dict(all_widths=True, width=None), "; the narrower widths learn from the widest, at most 0.25"),
        (dict(all_widths=True, teacher="without"), "the narrower widths learn from the widest, at most 0.25 of the"),
    ): assert line in str(prepare(student(tmp_path, "run", **given)))


def test_a_parameter_without_use_is_refused_when_the_recipe_is_known(tmp_path):
    with pytest.raises(ValueError, match="alpha is 0.1 and distillation crosskd, which does not have it: .*published"):
        prepare(student(tmp_path, "run", alpha=0.1))
    with pytest.raises(ValueError, match="distillation_share is 0.1 and distillation published, which"):
        prepare(student(tmp_path, "run", recipe="published", distillation_share=0.1))
    prepare(student(tmp_path, "run", recipe="published", alpha=0.1))
    (tmp_path / "data" / "msad.json").write_text('{"alpha": 0.1}')
    with pytest.raises(ValueError, match="alpha is 0.1 and distillation crosskd"): prepare(student(tmp_path, "run"))
    assert prepare(student(tmp_path, "run", distillation="pkd")).recipe.distillation == "pkd"
    (tmp_path / "data" / "msad.json").write_text('{"distillation": "l1"}')
    with pytest.raises(ValueError, match="msad.json: distillation is 'l1'"): prepare(student(tmp_path, "run"))


# --- whole runs


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("none", *IMITATIONS) if name != "balanced"]


@pytest.mark.parametrize("name", ["balanced", *OTHERS])
def test_a_run_of_each(tmp_path, name):
    asked = student(tmp_path, "run", distillation=name, neck_channels=64, iterations=5)
    folder = train(asked)
    log, settings = read_log(folder), json.loads((folder / "settings.json").read_text())
    assert settings["recipe"]["distillation"] == name and len(log) == 5
    shares = [row.get("distillation_share") for row in log]
    if name == "none":
        assert shares == [None] * 5 and "loss_kd" not in log[0]
        return
    assert shares[0] == 0 < shares[1] and (shares[4] > 0) == (name == "published")  # off after 80 %
    for row, share in zip(log, shares, strict=True):
        detection = sum(value for loss, value in row.items() if loss.startswith("loss_fcos"))
        assert share == pytest.approx(row["loss_kd"] / detection) and (name == "published" or share < 0.2501)
        assert row["loss"] == pytest.approx(detection + row["loss_kd"])
    assert prepare(asked).state == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["balanced", "crosskd"])
def test_an_interrupted_run_goes_on_with_the_same_numbers(tmp_path, name):
    given = dict(distillation=name, neck_channels=64, distillation_until=1.0)
    whole = train(student(tmp_path, "whole", **given))
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    for kept in ("checkpoints/00000004.pth", "metrics.json", "model_final.pth"): (again / kept).unlink()
    train(student(tmp_path, "again", **given))
    there, here = ([row["loss"] for row in read_log(folder)] for folder in (whole, again))
    assert here == pytest.approx(there, rel=1e-6) and len(here) == 4


def forget(folder, alpha):
    "Turn `settings.json` into one of an earlier version."
    settings = json.loads((folder / "settings.json").read_text())
    for field in ("distillation", "distillation_share", "distillation_until"): del settings["recipe"][field]
    settings["recipe"]["alpha"] = alpha
    (folder / "settings.json").write_text(json.dumps(settings))


@pytest.mark.slow
def test_folders_of_earlier_versions_are_found_again(tmp_path):
    for name, alpha in (("published", 0.02), ("none", 0.0)):
        settings = student(tmp_path, name, distillation=name, iterations=1)
        forget(train(settings), alpha)
        assert prepare(settings).state == "finished"
        with pytest.raises(ValueError, match=f"recipe.distillation: {name} there, crosskd now"):
            prepare(student(tmp_path, name, iterations=1))
    alone = student(tmp_path, "alone", teacher="without", iterations=1, **SIZES)
    forget(train(alone), 0.02)
    assert prepare(alone).state == "finished"
    teacher = replace(alone, role="teacher", teacher=None, out=str(tmp_path / "teacher"))
    forget(train(teacher), 0.2)
    assert prepare(teacher).state == "finished"


def test_settings_of_earlier_versions(tmp_path):
    path = tmp_path / "train.json"
    path.write_text('{"role": "student", "alpha": 0}')
    with pytest.raises(ValueError, match="train.json: alpha is 0: write distillation none"):
        read_settings_file(path, TrainSettings)
    path.write_text('{"role": "student", "alpha": 0.1}')
    assert read_settings_file(path, TrainSettings).alpha == 0.1


def test_a_distillation_that_outweighs_the_detection_losses_is_told():
    with pytest.warns(UserWarning, match="was 3.0 times the detection losses .*try distillation crosskd"):
        warn_of_share([{"distillation_share": share} for share in (0, 2.0, 4.0)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_share([{"distillation_share": 0.25}] * 3)
        warn_of_share([{}])


# --- photographs without boxes


def write_unlabelled(root, count=5):
    "A folder of photographs, some of them in a folder of their own and upright."
    write_coco(root / "more", "wide", images=count - 1)
    write_coco(root / "more", "high", images=1, size=(64, 96))
    return str(root / "more")


def test_unlabelled_photographs_count_for_the_distillation_alone(tmp_path):
    asked = student(tmp_path, "run", unlabelled=write_unlabelled(tmp_path), iterations=5)
    plan = prepare(asked)
    assert f"unlabelled: 5 photographs in {tmp_path}/more, 1 with each batch, for the distillation alone" in str(plan)
    folder = train(asked)
    plain = train(student(tmp_path, "plain", iterations=5))
    ours, theirs = read_log(folder), read_log(plain)
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"])  # the teacher is not asked: the labelled ones alone
    assert ours[1]["loss_kd"] != pytest.approx(theirs[1]["loss_kd"], rel=1e-6)
    assert all(0 <= row["distillation_share"] < 0.2501 for row in ours) and ours[-1]["loss_kd"] == 0
    assert prepare(asked).state == "finished"

    # Another place, the same photographs; then one less.
    shutil.copytree(tmp_path / "more", tmp_path / "moved")
    moved = replace(asked, unlabelled=str(tmp_path / "moved"))
    assert prepare(moved).state == "finished"
    (tmp_path / "moved" / "wide" / "1.jpg").unlink()
    with pytest.raises(ValueError, match="unlabelled: .*/more there, .*/moved now"): prepare(moved)
    (tmp_path / "more" / "wide" / "1.jpg").unlink()
    with pytest.raises(ValueError, match="image names and image sizes of unlabelled changed since"):
        prepare(asked)
    with pytest.raises(ValueError, match="unlabelled: .* there, None now"): prepare(replace(asked, unlabelled=None))


@pytest.mark.slow
def test_unlabelled_photographs_come_in_the_same_order_after_a_break(tmp_path):
    given = dict(unlabelled=write_unlabelled(tmp_path), distillation_until=1.0, batch_size=4, accumulate=2)
    whole, again = train(student(tmp_path, "whole", **given)), tmp_path / "again"
    shutil.copytree(whole, again)
    for kept in ("checkpoints/00000004.pth", "metrics.json", "model_final.pth"): (again / kept).unlink()
    train(student(tmp_path, "again", **given))
    there, here = ([row["loss"] for row in read_log(folder)] for folder in (whole, again))
    assert here == pytest.approx(there, rel=1e-6) and len(here) == 4


def test_unlabelled_photographs_that_cannot_be_used(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1.jpg").write_text("no picture")
    for folder, error, message in (
        ("nowhere", FileNotFoundError, "unlabelled: there is no folder .*/nowhere: name another"),
        ("empty", FileNotFoundError, "unlabelled: there is no photograph in .*/empty: put some there, or name another"),
        ("bad", ValueError, "bad/1.jpg is no image"),
    ):
        with pytest.raises(error, match=message): prepare(student(tmp_path, "run", unlabelled=str(tmp_path / folder)))
    for given, message in (
        (dict(distillation="none"), "unlabelled is photographs and distillation none, which does not have it"),
        (dict(distillation="fgd"), "unlabelled is given and distillation fgd, which needs boxes"),
        (dict(teacher="without"), 'unlabelled is given and teacher "without"'),
        (dict(role="teacher"), "unlabelled is 'photographs': only a student has a distillation"),
        (dict(unlabelled=3), "unlabelled is 3: write a text"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainSettings(**{"role": "student", "unlabelled": "photographs", **given})
    assert TrainSettings(role="student", distillation="none", teacher="without").distillation == "none"


def test_masks_leave_unlabelled_photographs_out():
    teacher, imitation = make_teacher(), make_imitation("fgd", 32, 32)
    ours, theirs = make_side(teacher, 0), make_side(teacher, 1)
    first = assign_targets(make_locations(theirs.features), BOXES[:1])
    one = [Side([level[:1] for level in side.features], side.head) for side in (ours, theirs)]
    assert imitation(ours, theirs, first).item() == pytest.approx(imitation(*one, first).item(), rel=1e-5)
