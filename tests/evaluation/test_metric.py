"""The metric: what it counts, how sure it says it is, and the Space that it is."""

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
from gradio import Error
from huggingface_hub import SpaceCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement

from evaluation.metrics.push import METRIC, push
from tests.hub.server import loopback_hub


ROOT = Path(__file__).parents[2]
RATES = ("accuracy", "n", "num_videos", "parse_failure_rate", "decode_failure_rate", "chance", "standard_error")


@pytest.fixture(scope="module")
def metric():
    return evaluate.load(str(METRIC), keep_in_memory=True)


def score(metric, rights, videos=None, **inputs):
    """The metric of four-option questions that are answered right or wrong."""
    n = len(rights)
    inputs = {"predictions": ["A" if one else "B" for one in rights], "num_options": [4] * n, **inputs}
    return metric.compute(references=["A"] * n, video_ids=videos, **inputs)


# Questions as (right, video, stratum). Videos have very different numbers of questions.
row = st.tuples(st.booleans(), st.integers(0, 9).map(lambda one: one // 3 * one), st.integers(0, 2))
rows = st.lists(row, min_size=2)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


# What is counted


def test_unparsed_answers_and_unread_videos_are_wrong_and_stay_in_the_denominator(metric):
    found = metric.compute(
        predictions=["A", "", "C", "B", "D"],
        references=["A", "B", "C", "A", "D"],
        video_ids=["x", "x", "y", "y", "z"],
        num_options=[4, 4, 4, 2, 5],
        is_decoded=[True, True, True, True, False],  # the last letter is right by luck: its video was never seen
    )
    assert found["accuracy"] == 2 / 5
    assert found["parse_failure_rate"] == 1 / 5
    assert found["decode_failure_rate"] == 1 / 5
    assert found["chance"] == pytest.approx((3 / 4 + 1 / 2 + 1 / 5) / 5)
    assert (found["n"], found["num_videos"]) == (5, 3)


def test_an_unread_video_is_no_parse_failure(metric):
    found = metric.compute(predictions=["", "A"], references=["A", "A"], is_decoded=[False, True])
    assert (found["parse_failure_rate"], found["decode_failure_rate"]) == (0, 1 / 2)


def test_a_letter_beyond_the_options_is_wrong(metric):
    assert metric.compute(predictions=["E"], references=["A"], num_options=[4])["accuracy"] == 0


def test_free_form_answers_are_as_right_as_is_said(metric):
    found = metric.compute(
        predictions=["A", "a red car", "a dog", ""],
        references=["A", "the red car", "a cat", "a cup"],
        num_options=[4, 0, 0, 0],
        is_correct=[None, True, False, False],
    )
    assert found["accuracy"] == 2 / 4
    assert found["chance"] == 1 / 16
    assert found["parse_failure_rate"] == 1 / 4


def test_chance_is_unknown_without_numbers_of_options(metric):
    found = metric.compute(predictions=["Z"], references=["Z"])
    assert found["accuracy"] == 1
    assert found["chance"] is None


@quick
@given(rows)
def test_each_category_is_what_its_questions_alone_come_to(metric, rows):
    rights, videos, strata = zip(*rows)
    columns = {"part": strata, "half": [one > 0 or None for one in strata]}
    listed = [{"part": one, "half": one > 0 or None} for one in strata]
    whole = score(metric, rights, videos, categories=columns)
    assert score(metric, rights, videos, categories=listed) == whole
    assert set(whole["categories"]["part"]) == {str(one) for one in strata}
    assert set(whole["categories"]["half"]) <= {"True"}
    for value, found in whole["categories"]["part"].items():
        chosen = [index for index, one in enumerate(strata) if str(one) == value]
        alone = score(metric, [rights[one] for one in chosen], [videos[one] for one in chosen])
        del alone["categories"]
        assert found.pop("interval") == pytest.approx(alone.pop("interval"))
        assert found == pytest.approx(alone)


@quick
@given(rows, st.randoms(use_true_random=False))
def test_the_order_of_questions_does_not_matter(metric, rows, random):
    shuffled = random.sample(rows, len(rows))
    first, second = (
        score(metric, *list(zip(*one))[:2], categories={"part": [row[2] for row in one]}, mean_over="part")
        for one in (rows, shuffled)
    )
    assert {name: first[name] for name in RATES} == pytest.approx({name: second[name] for name in RATES})


def test_the_mean_over_a_category_weighs_its_values_alike(metric):
    rights = [1, 1, 1, 1, 0, 1, 0, 0]
    inputs = {"categories": {"task": ["a"] * 6 + ["b"] * 2}, "num_options": [2] * 6 + [5] * 2}
    found = score(metric, rights, **inputs, mean_over="task")
    assert found["accuracy"] == pytest.approx((5 / 6 + 0) / 2)
    assert found["chance"] == pytest.approx((1 / 2 + 1 / 5) / 2)
    assert score(metric, rights, **inputs)["accuracy"] == 5 / 8


@pytest.mark.parametrize("n", [3, 7, 33, 49, 100, 2700])
def test_a_perfect_score_is_one_exactly(metric, n):
    found = score(metric, [1] * n, categories={"task": [index % 3 for index in range(n)]}, mean_over="task")
    assert found["accuracy"] == 1


# How sure it is


def sandwich(rights, videos, strata=None):
    """The standard error by matrices: least squares on strata's indicators, CR1, and the mean of the coefficients."""
    names = sorted(set(strata)) if strata is not None else [None]
    design = np.array([[float(name is None or stratum == name) for name in names] for stratum in strata or rights])
    n, k = design.shape
    bread = np.linalg.inv(design.T @ design)
    coefficients = bread @ design.T @ np.array(rights, float)
    meat = np.zeros((k, k))
    for video in set(videos):
        inside = [index for index, one in enumerate(videos) if one == video]
        push = design[inside].T @ (np.array(rights, float)[inside] - design[inside] @ coefficients)
        meat += np.outer(push, push)
    num = len(set(videos))
    covariance = num / (num - 1) * (n - 1) / (n - k) * bread @ meat @ bread
    return math.sqrt(max(0, np.ones(k) @ covariance @ np.ones(k))) / k


def has_two_videos_each(videos, strata):
    return all(len({v for v, s in zip(videos, strata) if s == one}) > 1 for one in strata)


@quick
@given(rows)
def test_the_standard_error_is_that_of_a_clustered_regression(metric, rows):
    rights, videos, strata = zip(*rows)
    plain = score(metric, rights, videos)["standard_error"]
    if len(set(videos)) < 2:
        assert plain is None
    else:
        assert plain == pytest.approx(sandwich(rights, videos), abs=1e-12)
    mean = score(metric, rights, videos, categories={"task": strata}, mean_over="task")["standard_error"]
    if has_two_videos_each(videos, strata):
        assert mean == pytest.approx(sandwich(rights, videos, strata), abs=1e-12)
    else:
        assert mean is None


@quick
@given(st.lists(st.booleans(), min_size=2, max_size=60))
def test_with_a_question_a_video_the_standard_error_is_the_binomial_one(metric, rights):
    p, n = np.mean(rights), len(rights)
    expected = pytest.approx(math.sqrt(p * (1 - p) / (n - 1)), abs=1e-12)
    assert score(metric, rights)["standard_error"] == expected
    assert score(metric, rights, [f"video {index}" for index in range(n)])["standard_error"] == expected


def test_the_standard_error_is_that_of_a_bootstrap_over_videos(metric):
    generator = np.random.default_rng(0)
    sizes = generator.choice([1, 2, 10, 40], 120, p=[0.5, 0.3, 0.15, 0.05])
    skill = generator.beta(1, 1, 120)
    right = [generator.random(size) < skill[video] for video, size in enumerate(sizes)]
    found = score(metric, np.concatenate(right), np.repeat(np.arange(120), sizes))
    drawn = generator.integers(0, 120, (4000, 120))
    means = [np.concatenate([right[video] for video in one]).mean() for one in drawn]
    assert found["standard_error"] == pytest.approx(np.std(means), rel=0.06)
    p, n = found["accuracy"], found["n"]
    assert found["standard_error"] > 1.5 * math.sqrt(p * (1 - p) / n), "videos matter in this example"


@quick
@given(rows)
def test_asking_everything_twice_makes_nothing_more_certain(metric, rows):
    rights, videos, _ = zip(*rows)
    once, twice = score(metric, rights, videos), score(metric, rights * 2, videos * 2)
    assert once["standard_error"] == pytest.approx(twice["standard_error"])


@pytest.mark.parametrize("rights", [[1, 1, 1], [1, 0, 1]])
def test_one_video_says_nothing_of_others(metric, rights):
    found = score(metric, rights, ["x"] * 3)
    assert found["standard_error"] is None
    assert found["interval"] is None
    # Nor does one video of each value, over which a mean is taken: its residuals add up to 0 whatever they are.
    found = score(metric, rights * 2, ["x", "y"] * 3, categories={"task": ["x", "y"] * 3}, mean_over="task")
    assert found["standard_error"] is None
    assert found["interval"] is None


@quick
@given(rows)
def test_the_interval_holds_the_accuracy_and_stays_within_0_and_1(metric, rows):
    rights, videos, strata = zip(*rows)
    found = score(metric, rights, videos, categories={"task": strata}, mean_over="task")
    if found["interval"] is not None:
        low, high = found["interval"]
        assert 0 <= low <= found["accuracy"] <= high <= 1
        assert high - low > 0.01, "of at most 100 questions none is certain, a perfect score neither"


def test_the_interval_is_wilsons_where_questions_are_independent(metric):
    low, high = score(metric, [1] * 15 + [0] * 5)["interval"]
    for bound in (low, high):  # where the score test of a share is just significant
        assert abs(0.75 - bound) / math.sqrt(bound * (1 - bound) / 20) == pytest.approx(1.959964, rel=1e-6)


def test_the_interval_holds_the_truth_nineteen_times_in_twenty(metric):
    generator = np.random.default_rng(0)
    hits = []
    for _ in range(300):
        sizes = generator.integers(1, 9, 120)
        skill = np.repeat(generator.beta(2, 1, 120), sizes)  # mean 2/3
        low, high = score(metric, generator.random(len(skill)) < skill, np.repeat(np.arange(120), sizes))["interval"]
        hits.append(low <= 2 / 3 <= high)
    # The binomial error of 300 draws is 0.013. (Of 3,000 draws 0.955; without clustering 0.82.)
    assert 0.91 <= np.mean(hits) <= 0.975


# What is refused


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ({"predictions": [], "references": []}, "no predictions, expected at least one"),
        ({"references": ["A"]}, r"number of predictions \(2\) and references \(1\)"),
        ({"video_ids": ["x"]}, "2 predictions and 1 video_ids"),
        ({"num_options": [4] * 3}, "2 predictions and 3 num_options"),
        ({"is_decoded": [True]}, "2 predictions and 1 is_decoded"),
        ({"is_correct": [True]}, "2 predictions and 1 is_correct"),
        ({"categories": {"task": ["a"]}}, r"2 predictions and 1 categories\['task'\]"),
        ({"categories": [{"task": "a"}]}, r"2 predictions and 1 categories\['task'\]"),
        ({"predictions": ["A", "b"]}, "Question 1 has the prediction 'b', expected one capital letter"),
        ({"predictions": ["A", "BC"]}, "Question 1 has the prediction 'BC'"),
        ({"predictions": ["A", None]}, "Question 1 has the prediction None"),
        ({"references": ["A", "E"], "num_options": [4, 4]}, "Question 1 has the reference 'E', expected one of ABCD"),
        ({"references": ["A", ""]}, "Question 1 has the reference ''"),
        ({"num_options": [4, 1]}, "Question 1 has num_options 1, expected 0"),
        ({"num_options": [4, 27]}, "Question 1 has num_options 27"),
        ({"num_options": [4, 0]}, "Question 1 is free-form .* who judges it"),
        ({"predictions": ["A", ""], "num_options": [4, 0], "is_correct": [None, True]}, "no prediction"),
        ({"is_correct": [False, False]}, "Question 0 has is_correct False, and its letters 'A' and 'A' say otherwise"),
        ({"mean_over": "task"}, r"mean_over='task', categories \[\], and question 0"),
        ({"mean_over": "task", "categories": [{"task": "a"}, {}]}, "question 1 without a value"),
    ],
)
def test_inputs_that_make_no_sense_are_refused(metric, inputs, told):
    with pytest.raises(ValueError, match=told):
        metric.compute(**{"predictions": ["A", "B"], "references": ["A", "A"], **inputs})
    assert score(metric, [1])["accuracy"] == 1  # and the metric works on


# The Space


STRANGER = """
import sys
for package in ("dataset_builder", "evaluation", "model_card", "modeling_storms", "recipes"):
    sys.modules[package] = None
import evaluate
metric = evaluate.load("org/video_qa_accuracy")
print(metric.compute(predictions=["A", "B"], references=["A", "C"])["accuracy"])
"""


def test_a_pushed_metric_loads_by_name(tmp_path):
    with loopback_hub() as hub:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
        environment |= {"HF_TOKEN": "hf_test", "NO_PROXY": "127.0.0.1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}

        def call(*arguments, cwd):
            command = [sys.executable, *map(str, arguments)]
            return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)

        hub.tokens = set()
        refused = call("-m", "evaluation.metrics.push", "org/video_qa_accuracy", cwd=ROOT)
        assert refused.returncode == 1
        assert "Error: Making the Space org/video_qa_accuracy failed: status 401" in refused.stderr
        assert "The same command tries again." in refused.stderr
        hub.tokens = None
        hub.fail(500, "POST .*/commit/", times=1)
        pushed = call("-m", "evaluation.metrics.push", "org/video_qa_accuracy", cwd=ROOT)
        assert pushed.returncode == 0, pushed.stderr
        assert f"Pushed to {hub.endpoint}/spaces/org/video_qa_accuracy" in pushed.stdout
        _, files = hub.tree("spaces/org/video_qa_accuracy")
        assert set(files) == {"README.md", "app.py", "requirements.txt", "video_qa_accuracy.py"}
        assert all(data == (METRIC / name).read_bytes() for name, data in files.items())
        loaded = call("-c", STRANGER, cwd=tmp_path)
        assert loaded.stdout.strip() == "0.5", loaded.stderr


def test_a_space_of_another_name_is_refused():
    with pytest.raises(ValueError, match="expected ORG/video_qa_accuracy"):
        push("org/accuracy")


def test_the_spaces_page_computes():
    page = runpy.run_path(str(METRIC / "app.py"))
    found = page["compute"](json.dumps(page["EXAMPLE"]))
    assert found["accuracy"] == 0.5
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for wrong in ("{", '{"predictions": ["A"], "references": ["a"]}', '{"unknown": 1}', "[]"):
        with pytest.raises(Error):
            page["compute"](wrong)


def test_the_spaces_card_and_requirements_are_what_is_tested_here():
    card = SpaceCard.load(METRIC / "README.md").data.to_dict()
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    assert card["sdk"] == "gradio"
    assert card["sdk_version"] == pins["gradio"]
    assert card["app_file"] == "app.py"
    assert {"evaluate", "metric"} <= set(card["tags"])
    needed = [Requirement(line) for line in (METRIC / "requirements.txt").read_text().splitlines()]
    assert {one.name for one in needed} == {"datasets", "evaluate", "numpy"}
    assert all(one.specifier.contains(pins[one.name]) for one in needed)


def test_the_card_states_every_input_and_output(metric):
    card = (METRIC / "README.md").read_text()
    found = score(metric, [1, 0], categories={"task": ["a", "b"]})
    inputs = set(type(metric)._compute.__annotations__) - {"return"}
    for name in inputs | set(found):
        assert f"`{name}`" in card
        assert name in metric.inputs_description
