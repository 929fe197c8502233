"Evaluation against pycocotools called directly, at the edges, and with input that is wrong."

import contextlib
import copy
import io
import json
import math

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from msad.coco_eval import NAMES, class_figures, evaluate, evaluate_classes, figures, run_coco_eval, to_coco


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
    "pycocotools without us."
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
            found = evaluate(annotations, given)
            assert tuple(found) == NAMES and all(type(value) is float for value in found.values())
            for value, stat in zip(found.values(), expected.stats, strict=True):
                assert value == 100 * stat or (math.isnan(value) and stat == -1)
    assert coco.dataset == truth and results == before
    assert capsys.readouterr().out == ""

    classes = evaluate_classes(coco, results)
    assert list(classes) == ["a", "b", "c", "d"] and math.isnan(classes["d"])
    for k, value in enumerate(list(classes.values())[:3]):
        assert value == pytest.approx(100 * expected.eval["precision"][:, :, k, 0, -1].mean())
    assert np.nanmean(list(classes.values())) == pytest.approx(found["AP"])
    evaluation = run_coco_eval(coco, results)
    assert figures(evaluation)["AP"] == found["AP"] and class_figures(evaluation)["a"] == classes["a"]


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
    found = evaluate(index(one_box()), [hit()])
    assert found["AP"] == pytest.approx(100) and found["APm"] == pytest.approx(100) and found["AR1"] == 100
    assert math.isnan(found["APs"]) and math.isnan(found["ARl"])


def test_nothing_found(tmp_path):
    found = evaluate(index(one_box()), [])
    assert found["AP"] == 0 and found["AR100"] == 0 and found["APm"] == 0 and math.isnan(found["APl"])
    assert evaluate_classes(index(one_box()), []) == {"thing": 0}
    (tmp_path / "results.json").write_text("[]")
    assert evaluate(index(one_box()), tmp_path / "results.json")["AP"] == 0


@pytest.mark.parametrize("results", [[], [hit()]])
def test_nothing_to_find(results):
    for truth in ({**one_box(), "annotations": []}, one_box(iscrowd=1)):
        assert all(math.isnan(value) for value in evaluate(index(truth), results).values())
        assert math.isnan(evaluate_classes(index(truth), results)["thing"])


def test_crowds_and_other_sizes_are_ignored():
    truth = one_box()
    truth["annotations"].append({**truth["annotations"][0], "id": 2, "bbox": [100.0, 100, 60, 60], "iscrowd": 1})
    crowd = hit(bbox=[110.0, 110, 20, 20], score=0.9)
    assert evaluate(index(truth), [hit(), crowd])["AP"] == pytest.approx(100)
    truth["annotations"][1].update(iscrowd=0, area=50_000)
    found = evaluate(index(truth), [hit(), hit(bbox=[100.0, 100, 60, 60], score=0.9)])
    assert found["APm"] == pytest.approx(100) and found["APl"] == pytest.approx(100) and math.isnan(found["APs"])


def test_missing_area_and_iscrowd_have_defaults():
    whole, truth = one_box(), one_box()
    for field in ("area", "iscrowd"): del truth["annotations"][0][field]
    coco = index(truth)
    before = copy.deepcopy(truth)
    found, expected = evaluate(coco, [hit()]), evaluate(index(whole), [hit()])
    np.testing.assert_equal(found, expected)
    assert coco.dataset == before
    np.testing.assert_equal(evaluate(index(one_box(area=float("nan"))), [hit()]), expected)


def test_a_true_box_that_is_not_finite_is_left_out():
    truth = one_box()
    truth["annotations"].append({**truth["annotations"][0], "id": 2, "bbox": [math.nan, 10, 40, 40], "area": math.nan})
    assert evaluate(index(truth), [hit(), hit(bbox=[200.0, 200, 9, 9])])["AP"] == pytest.approx(100)


def test_annotation_zero_warns():
    with pytest.warns(UserWarning, match="number them from 1"): evaluate(index(one_box(id=0)), [hit()])


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
    with pytest.raises(ValueError, match=message): evaluate(index(one_box()), results)
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=f"results.json: .*{message}"):
        evaluate(index(one_box()), tmp_path / "results.json")


@pytest.mark.parametrize("field", ["image_id", "category_id", "bbox", "score"])
def test_missing_fields_of_results(field):
    result = hit()
    del result[field]
    with pytest.raises(ValueError, match=f"detection 0 .* has no '{field}'"): evaluate(index(one_box()), [result])


@pytest.mark.parametrize("text", ["{}", "3", "[", "[1]", '[{"image_id": 1, "image_id": 2}]'])
def test_result_files_that_are_no_results(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="results.json"): evaluate(index(one_box()), path)
    with pytest.raises(FileNotFoundError, match="nowhere.json"): evaluate(index(one_box()), tmp_path / "nowhere.json")


def test_bad_annotations(tmp_path):
    with pytest.raises(ValueError, match="annotation 1 has 'image_id' 9"): evaluate(index(one_box(image_id=9)), [])
    with pytest.raises(ValueError, match="annotation 1 has 'category_id' 9"):
        evaluate(index(one_box(category_id=9)), [])
    path = tmp_path / "truth.json"
    path.write_text(json.dumps({"images": [{"id": 1}]}))
    with pytest.raises(ValueError, match="truth.json has no list 'annotations'"): evaluate(path, [])
    with pytest.raises(FileNotFoundError, match="nowhere.json"): evaluate(tmp_path / "nowhere.json", [])


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
