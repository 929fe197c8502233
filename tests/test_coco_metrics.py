"Evaluation against pycocotools called directly, at the edges, and with input that is wrong."

import contextlib
import copy
import io
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from msad.evaluation.bootstrap import _match_classes, _weighted_ap, bootstrap
from msad.evaluation.coco_metrics import (
    METRIC_NAMES,
    evaluate_coco,
    per_class_ap,
    read_truth,
    run_coco_eval,
    summary_metrics,
    to_coco,
)


def make_truth(seed=0, n_images=12):
    rng = np.random.default_rng(seed)
    annotations = []
    for image in range(n_images):
        for _ in range(rng.integers(0, 6)):
            x, y, w, h = rng.uniform((0, 0, 8, 8), (100, 100, 150, 150)).tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image * 3,
                    "category_id": [2, 5, 11][rng.integers(3)],
                    "bbox": [x, y, w, h],
                    "area": w * h * 0.7,
                    "iscrowd": int(rng.random() < 0.15),
                }
            )
    return {
        "images": [{"id": image * 3} for image in range(n_images)],
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in ((11, "c"), (5, "b"), (2, "a"), (30, "d"))],
    }


def make_results(truth, seed=1):
    rng = np.random.default_rng(seed)
    results = []
    for a in truth["annotations"]:
        for spread in (1, 12):
            box = np.array(a["bbox"]) + rng.normal(0, spread, 4)
            category = a["category_id"] if rng.random() < 0.8 else 30
            scored = {"bbox": box.clip(1).tolist(), "score": float(rng.random())}
            results.append({"image_id": a["image_id"], "category_id": category, **scored})
    return results


def index(dataset):
    coco = COCO()
    coco.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()): coco.createIndex()
    return coco


def direct(truth, results):
    "pycocotools called directly."
    truth = index(copy.deepcopy(truth))
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), "bbox")
        evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_same_as_pycocotools(tmp_path, capsys, seed):
    truth = make_truth(seed)
    results = make_results(truth, seed + 10)
    expected = direct(truth, results)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "results.json").write_text(json.dumps(results))
    coco = index(copy.deepcopy(truth))
    before = copy.deepcopy(results)
    for annotations in (coco, tmp_path / "truth.json", str(tmp_path / "truth.json")):
        for given in (results, tmp_path / "results.json"):
            found = evaluate_coco(annotations, given)
            assert tuple(found) == METRIC_NAMES and all(type(value) is float for value in found.values())
            for value, stat in zip(found.values(), expected.stats, strict=True):
                assert value == 100 * stat or (math.isnan(value) and stat == -1)
    assert coco.dataset == truth and results == before
    assert capsys.readouterr().out == ""

    evaluation = run_coco_eval(coco, results)
    classes = per_class_ap(evaluation)
    assert list(classes) == ["a", "b", "c", "d"] and math.isnan(classes["d"])
    for k, value in enumerate(list(classes.values())[:3]):
        assert value == pytest.approx(100 * expected.eval["precision"][:, :, k, 0, -1].mean())
    assert np.nanmean(list(classes.values())) == pytest.approx(found["AP"])
    assert summary_metrics(evaluation)["AP"] == found["AP"]


def hard_case(seed, n_images=12, n_classes=3, most=30, digits=16, map_id=lambda i: i):
    "Crowds, areas of their own, empty images, detections without objects and without area; scores tie at few digits."
    rng = np.random.default_rng(seed)
    images = [map_id(7 * i) for i in rng.permutation(n_images).tolist()]
    categories = [map_id(5 * k) for k in range(n_classes)]
    truth, results = [], []
    for image in images:
        boxes = rng.uniform((0, 0, 4, 4), (300, 300, 200, 200), (rng.integers(10) if rng.random() < 0.8 else 0, 4))
        for box in boxes.tolist():
            area = float(rng.choice([box[2] * box[3], 0.5 * box[2] * box[3], 0, 32**2, 96**2, 1e10, 2e10]))
            annotation = {"id": map_id(len(truth) + 1), "bbox": box, "area": area, "iscrowd": int(rng.random() < 0.15)}
            category = categories[rng.integers(n_classes - 1)]
            truth.append({**annotation, "image_id": image, "category_id": category, "ignore": int(rng.random() < 0.2)})
        for _ in range(rng.integers(most)):
            box = boxes[rng.integers(len(boxes))] if len(boxes) and rng.random() < 0.7 else rng.uniform(9, 300, 4)
            box = box + rng.normal(0, rng.choice([0, 1, 5, 20]), 4)
            box[2:] = box[2:].clip(0) * (rng.random(2) < 0.95)
            score = round(rng.random(), digits)
            category = categories[rng.integers(n_classes)]
            results.append({"image_id": image, "category_id": category, "bbox": box.tolist(), "score": score})
    truth, results = ([entries[i] for i in rng.permutation(len(entries))] for entries in (truth, results))
    categories = [{"id": category, "name": f"class {category}"} for category in rng.permutation(categories).tolist()]
    return {"info": {}, "images": [{"id": i} for i in images], "annotations": truth, "categories": categories}, results


HARD = {
    "plain": {},
    "ties": {"digits": 1},
    "more than 100 detections": {"n_images": 4, "n_classes": 2, "most": 500},
    "and ties": {"n_images": 4, "n_classes": 2, "most": 500, "digits": 1},
    "many classes": {"n_classes": 80},
    "negative ids": {"map_id": lambda i: -i - 1},
    "ids of 64 bits": {"map_id": lambda i: 2**60 + i},
    "annotation 0": {"map_id": lambda i: i - 1, "n_classes": 2},
}


@pytest.mark.filterwarnings("ignore:.*number them from 1")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", HARD)
def test_bit_for_bit_as_pycocotools(case, seed):
    truth, results = hard_case(seed, **HARD[case])
    found, expected = run_coco_eval(index(truth), results), direct(truth, results)
    np.testing.assert_array_equal(found.stats, expected.stats)
    for name in ("precision", "recall", "scores"):
        np.testing.assert_array_equal(found.eval[name], expected.eval[name], name)
    for name in ("iouThrs", "recThrs"):
        np.testing.assert_array_equal(getattr(found.params, name), getattr(expected.params, name))


@pytest.mark.parametrize(
    "change",
    [
        lambda r: {**r, "image_id": float(r["image_id"]), "category_id": np.int64(r["category_id"])},
        lambda r: {**r, "bbox": tuple(map(np.float64, r["bbox"])), "score": np.float64(r["score"])},
        lambda r: {**r, "bbox": tuple(map(Fraction, r["bbox"])), "score": Fraction(r["score"])},
        lambda r: {**r, "bbox": tuple(r["bbox"])},
        lambda r: {**r, "caption": "a tree", "segmentation": [], "area": -1, "id": 0, "iscrowd": 1},
    ],
)
def test_numbers_of_other_types_and_more_fields(change):
    truth, results = hard_case(0, most=10)
    found = evaluate_coco(index(truth), [change(result) for result in results])
    np.testing.assert_equal(found, evaluate_coco(index(truth), results))


def test_a_crowd_in_any_number():
    truth, results = hard_case(0)
    expected = evaluate_coco(index(truth), results)
    for kind in (bool, float, np.int64):
        for annotation in truth["annotations"]: annotation["iscrowd"] = kind(annotation["iscrowd"])
        np.testing.assert_equal(evaluate_coco(index(truth), results), expected)


def copied(truth, results, times):
    "A data set and results with every image, by its id, so many times."
    larger, more = {**truth, "images": [], "annotations": []}, []
    for image, count in zip(sorted(image["id"] for image in truth["images"]), times, strict=True):
        for _ in range(count):
            new = len(larger["images"]) + 1
            larger["images"].append({"id": new})
            for a in [a for a in truth["annotations"] if a["image_id"] == image]:
                larger["annotations"].append({**a, "id": len(larger["annotations"]) + 1, "image_id": new})
            more += [{**result, "image_id": new} for result in results if result["image_id"] == image]
    return larger, more


@pytest.mark.parametrize("digits", [16, 1])
@pytest.mark.parametrize("shape", [{}, {"n_images": 4, "n_classes": 2, "most": 300}])
def test_bootstrap_is_the_evaluation_of_copied_images(digits, shape):
    truth, results = hard_case(4, digits=digits, **shape)
    models = [results, results[::2], []]
    images, samples = len(truth["images"]), 6
    found = bootstrap(index(truth), models, samples=samples, seed=5)
    draws = np.random.default_rng(5).multinomial(images, np.full(images, 1 / images), size=samples)
    for times, row in zip(draws, found, strict=True):
        larger = [copied(truth, model, times) for model in models]
        expected = [evaluate_coco(index(dataset), more)["AP"] for dataset, more in larger]
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", HARD)
@pytest.mark.filterwarnings("ignore:.*number them from 1")
def test_bootstrap_of_every_image_once_is_ap(case):
    truth, results = hard_case(1, **HARD[case])
    matches = _match_classes(read_truth(index(truth)), results, most=2)
    found = _weighted_ap(matches, np.ones((len(truth["images"]), 1)))
    assert found == pytest.approx(evaluate_coco(index(truth), results)["AP"], abs=1e-9)


def test_bootstrap_of_models(tmp_path):
    truth, results = hard_case(2)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    before = copy.deepcopy(results)
    found = bootstrap(index(truth), [results, path, []], samples=250)
    assert found.shape == (250, 3) and results == before
    np.testing.assert_array_equal(found[:, 0], found[:, 1])
    assert found[:, 0].std() > 0 and not found[:, 2].any()
    np.testing.assert_array_equal(bootstrap(index(truth), [results], samples=250)[:, 0], found[:, 0])
    assert (bootstrap(index(truth), [results], samples=250, seed=1)[:, 0] != found[:, 0]).any()
    with pytest.raises(ValueError, match="detection 0 .* has no 'image_id'"): bootstrap(index(truth), [results, [{}]])


def test_bootstrap_of_photographs_with_more_than_a_hundred_objects():
    places = [(x, y) for x in range(0, 400, 20) for y in range(0, 200, 20)]
    boxes = [[float(x), float(y), 10.0, 10.0] for x, y in places]
    truth = {"images": [{"id": 1}], "categories": [{"id": 1, "name": "tree"}], "annotations": [
        {"id": n, "image_id": 1, "category_id": 1, "bbox": box, "area": 100.0, "iscrowd": 0}
        for n, box in enumerate(boxes, 1)
    ]}
    results = [{"image_id": 1, "category_id": 1, "bbox": box, "score": 0.9} for box in boxes]
    assert bootstrap(index(truth), [results], samples=3, limit=200) == pytest.approx(100)
    ap = evaluate_coco(index(truth), results)["AP"]
    assert ap < 51 and bootstrap(index(truth), [results], samples=3)[0, 0] == pytest.approx(ap)


def test_bootstrap_without_objects():
    found = bootstrap(index(one_box()), [[hit()]], samples=50)
    drawn = np.random.default_rng(0).multinomial(2, [0.5, 0.5], size=50)[:, 0] > 0
    np.testing.assert_allclose(found[drawn], 100)
    assert 0 < drawn.sum() < 50 and np.isnan(found[~drawn]).all()
    assert np.isnan(bootstrap(index(one_box(iscrowd=1)), [[hit()]], samples=3)).all()


def one_box(**changes):
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10.0, 10, 40, 40], "area": 1600, "iscrowd": 0}
    return {
        "images": [{"id": 1}, {"id": 2}],
        "annotations": [{**box, **changes}],
        "categories": [{"id": 1, "name": "thing"}],
    }


def hit(**changes):
    return {"image_id": 1, "category_id": 1, "bbox": [10.0, 10, 40, 40], "score": 0.5, **changes}


def test_a_perfect_detection():
    found = evaluate_coco(index(one_box()), [hit()])
    assert found["AP"] == pytest.approx(100) and found["APm"] == pytest.approx(100) and found["AR1"] == 100
    assert math.isnan(found["APs"]) and math.isnan(found["ARl"])


def test_nothing_found(tmp_path):
    found = evaluate_coco(index(one_box()), [])
    assert found["AP"] == 0 and found["AR100"] == 0 and found["APm"] == 0 and math.isnan(found["APl"])
    assert per_class_ap(run_coco_eval(index(one_box()), [])) == {"thing": 0}
    (tmp_path / "results.json").write_text("[]")
    assert evaluate_coco(index(one_box()), tmp_path / "results.json")["AP"] == 0


@pytest.mark.parametrize("results", [[], [hit()]])
def test_nothing_to_find(results):
    for truth in ({**one_box(), "annotations": []}, one_box(iscrowd=1)):
        assert all(math.isnan(value) for value in evaluate_coco(index(truth), results).values())
        assert math.isnan(per_class_ap(run_coco_eval(index(truth), results))["thing"])


def test_crowds_and_other_sizes_are_ignored():
    truth = one_box()
    truth["annotations"].append({**truth["annotations"][0], "id": 2, "bbox": [100.0, 100, 60, 60], "iscrowd": 1})
    crowd = hit(bbox=[110.0, 110, 20, 20], score=0.9)
    assert evaluate_coco(index(truth), [hit(), crowd])["AP"] == pytest.approx(100)
    truth["annotations"][1].update(iscrowd=0, area=50_000)
    found = evaluate_coco(index(truth), [hit(), hit(bbox=[100.0, 100, 60, 60], score=0.9)])
    assert found["APm"] == pytest.approx(100) and found["APl"] == pytest.approx(100) and math.isnan(found["APs"])


def test_missing_area_and_iscrowd_have_defaults():
    complete, truth = one_box(), one_box()
    for field in ("area", "iscrowd"): del truth["annotations"][0][field]
    coco = index(truth)
    before = copy.deepcopy(truth)
    found, expected = evaluate_coco(coco, [hit()]), evaluate_coco(index(complete), [hit()])
    np.testing.assert_equal(found, expected)
    assert coco.dataset == before
    np.testing.assert_equal(evaluate_coco(index(one_box(area=float("nan"))), [hit()]), expected)


def test_a_true_box_that_is_not_finite_is_left_out():
    truth = one_box()
    truth["annotations"].append({**truth["annotations"][0], "id": 2, "bbox": [math.nan, 10, 40, 40], "area": math.nan})
    assert evaluate_coco(index(truth), [hit(), hit(bbox=[200.0, 200, 9, 9])])["AP"] == pytest.approx(100)


def test_annotation_zero_warns():
    with pytest.warns(UserWarning, match="number them from 1"): evaluate_coco(index(one_box(id=0)), [hit()])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 7}, "detection 1 .* has 'image_id' 7"),
        ({"image_id": "1"}, "has 'image_id' '1'"),
        ({"category_id": 0}, "detection 1 .* has 'category_id' 0"),
        ({"score": math.nan}, "'score' nan"),
        ({"score": None}, "'score' None"),
        ({"bbox": [1, 2, 3]}, r"'bbox' \[1, 2, 3\]"),
        ({"bbox": [1, 2, 3, math.inf]}, "four finite numbers"),
        ({"bbox": None}, "'bbox' None"),
    ],
)
def test_bad_results(tmp_path, change, message):
    results = [hit(), hit(**change)]
    with pytest.raises(ValueError, match=message): evaluate_coco(index(one_box()), results)
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=f"results.json: .*{message}"):
        evaluate_coco(index(one_box()), tmp_path / "results.json")


@pytest.mark.parametrize("field", ["image_id", "category_id", "bbox", "score"])
def test_missing_fields_of_results(field):
    result = hit()
    del result[field]
    with pytest.raises(ValueError, match=f"detection 0 .* has no '{field}'"): evaluate_coco(index(one_box()), [result])


def test_predictions_are_no_results(tmp_path):
    truth = one_box()
    (tmp_path / "results.json").write_text(json.dumps(truth))
    with pytest.raises(ValueError, match="results.json: a data set, such as `msad predict` writes, .* detections.json"):
        evaluate_coco(index(truth), tmp_path / "results.json")


@pytest.mark.parametrize("text", ["{}", "3", "[", "[1]", '[{"image_id": 1, "image_id": 2}]'])
def test_result_files_that_are_no_results(tmp_path, text):
    path, truth = tmp_path / "results.json", index(one_box())
    path.write_text(text)
    with pytest.raises(ValueError, match="results.json"): evaluate_coco(truth, path)
    with pytest.raises(FileNotFoundError, match="nowhere.json"): evaluate_coco(truth, tmp_path / "nowhere.json")


def test_bad_annotations(tmp_path):
    with pytest.raises(ValueError, match="annotation 1 has 'image_id' 9"): evaluate_coco(index(one_box(image_id=9)), [])
    with pytest.raises(ValueError, match="annotation 1 has 'category_id' 9"):
        evaluate_coco(index(one_box(category_id=9)), [])
    path = tmp_path / "truth.json"
    path.write_text(json.dumps({"images": [{"id": 1}]}))
    with pytest.raises(ValueError, match="truth.json has no list 'annotations'"): evaluate_coco(path, [])
    with pytest.raises(FileNotFoundError, match="nowhere.json"): evaluate_coco(tmp_path / "nowhere.json", [])


def test_to_coco():
    boxes = torch.tensor([[1.1, 2.2, 11.4, 22.8], [0, 0, 5, 5]], requires_grad=True)
    detection = {"boxes": boxes, "scores": torch.tensor([0.3, 0.7]), "labels": torch.tensor([1, 0])}
    none = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
    results = to_coco([detection, none], [8, 9], [-3, 90])
    assert [(r["image_id"], r["category_id"]) for r in results] == [(8, 90), (8, -3)]
    x1, y1, x2, y2 = boxes[0].tolist()
    assert results[0]["bbox"] == [x1, y1, x2 - x1, y2 - y1] and results[0]["score"] == torch.tensor(0.3).item()
    assert json.loads(json.dumps(results)) == results
    with pytest.raises(ValueError, match="Image 8 has label 1, but there are 1 categories"):
        to_coco([detection], [8], [5])
    with pytest.raises(ValueError): to_coco([detection], [8, 9], [-3, 90])
