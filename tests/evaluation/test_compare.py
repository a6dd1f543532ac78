"""A run's results, and whether two runs differ."""

import io
import json
import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from evaluation.benchmarks.base import Benchmark, Question
from evaluation.compare import compare_answers, compare_means, compare_runs, main, read_run
from evaluation.report import print_table, summarise
from model_card.render import check_results, render_model_card


def answer(number, is_right=True, video=None, **fields):
    """One answer of a run's file, to a question with four options."""
    return {
        "id": f"q{number}",
        "benchmark": "clips",
        "video_id": f"v{number if video is None else video}",
        "categories": {},
        "num_options": 4,
        "answer": "A",
        "text": "A" if is_right else "B",
        "choice": "A" if is_right else "B",
        "rule": "whole_letter",
        "is_correct": bool(is_right),
        "is_parsed": True,
        "failure": "",
        **fields,
    }


def write(path, answers, settings=None, mean_over=None):
    results = [{"benchmark": name, "mean_over": mean_over} for name in {one["benchmark"] for one in answers}]
    path.write_text(json.dumps({"results": results, "settings": settings or {}, "answers": answers}))
    return path


@pytest.fixture
def files(tmp_path):
    """Writes two runs and returns their paths."""
    return lambda a, b, **extra: (write(tmp_path / "a.json", a, **extra), write(tmp_path / "b.json", b, **extra))


def shown(show, *arguments) -> str:
    file = io.StringIO()
    show(*arguments, Console(file=file, width=250))
    return file.getvalue()


# A run's results


CIRCUMSTANCES = {
    "protocol": "32 frames, uniform, 360x420",
    "prompt": "storms",
    "latent_mode": "auto",
    "command": "python -m evaluation --model storms-tiny --benchmarks clips",
}


def benchmark_of(answers, **fields):
    questions = [Question(one["id"], "Why?", one["answer"], video_id=one["video_id"]) for one in answers]
    return Benchmark("clips", "org/clips", "test", questions, revision="abc", **fields)


def mixed_answers():
    """Right, wrong, unparsed, unread, and two free-form ones, over four videos and two tasks."""
    task = {"categories": {"task": "what"}}
    return [
        answer(0, True, 0, **task),
        answer(1, False, 0, **task),
        answer(2, False, 1, **task, text="I can't tell.", choice=None, is_parsed=False, rule="unparsed"),
        answer(3, False, 2, **task, text="", choice=None, is_parsed=False, rule="", failure="no such video"),
        answer(4, True, 2, categories={"task": "why"}, num_options=0, answer="a dog", text="a dog", choice=None),
        answer(5, False, 3, categories={"task": "why"}, num_options=0, answer="a dog", text="a cat", choice=None),
    ]


def test_a_runs_result_counts_all_that_went_wrong_and_fits_a_card():
    answers = mixed_answers()
    result = summarise(benchmark_of(answers), answers, **CIRCUMSTANCES)
    assert result["value"] == pytest.approx(2 / 6)
    assert result["num_rows"] == 6
    assert result["num_videos"] == 4
    assert result["parse_failure_rate"] == 1 / 6
    assert result["decode_failure_rate"] == 1 / 6
    assert result["chance"] == pytest.approx(4 / 6 / 4)
    parts = result["categories"]["task"]
    assert {name: one["accuracy"] for name, one in parts.items()} == {"what": 1 / 4, "why": 1 / 2}
    assert result["revision"] == "abc"
    assert result | CIRCUMSTANCES == result
    stored = json.loads(json.dumps({"results": [result]}, allow_nan=False))
    assert check_results(stored, "run.json") == [result]
    assert "| clips, accuracy | 33.3 |" in render_model_card("org/storms-tiny", {}, [result])


def test_a_benchmarks_own_mean_is_the_headline():
    answers = mixed_answers()
    result = summarise(benchmark_of(answers, mean_over="task"), answers, **CIRCUMSTANCES)
    assert result["value"] == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert result["mean_over"] == "task"


def test_a_judge_is_part_of_the_result():
    answers = mixed_answers()
    assert "judge" not in summarise(benchmark_of(answers), answers, **CIRCUMSTANCES)
    judge = {"model": "grader-1", "num_failures": 0}
    assert summarise(benchmark_of(answers), answers, **CIRCUMSTANCES, judge=judge)["judge"] == judge


def test_a_folder_of_this_machine_is_not_named_in_a_result(tmp_path):
    answers = mixed_answers()
    benchmark = Benchmark("clips", str(tmp_path), "test", benchmark_of(answers).questions)
    assert summarise(benchmark, answers, **CIRCUMSTANCES)["dataset"] == f"./{tmp_path.name}"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda answers: answers[:-1], r"5 answers to 6 questions, 1 not answered \('q5'\)"),
        (lambda answers: [*answers, answer(9)], r"7 answers to 6 questions, 1 not of this benchmark \('q9'\)"),
        (lambda answers: [*answers, answers[0]], r"7 answers to 6 questions, 1 answered twice \('q0'\)"),
        (lambda answers: [*answers[:-1], answers[0]], r"1 not answered \('q5'\); 1 answered twice \('q0'\)"),
    ],
)
def test_a_result_hides_no_missing_answer(change, told):
    answers = mixed_answers()
    with pytest.raises(ValueError, match=told):
        summarise(benchmark_of(answers), change(answers), **CIRCUMSTANCES)


def test_the_table_shows_how_sure_and_how_broken_a_result_is():
    answers = mixed_answers()
    result = summarise(benchmark_of(answers), answers, **CIRCUMSTANCES)
    alone = summarise(benchmark_of(answers[:1]), answers[:1], **CIRCUMSTANCES)
    table = shown(print_table, [result, alone])
    low, high = result["interval"]
    (row,) = [line for line in table.splitlines() if "33.3" in line]
    for text in ("clips", CIRCUMSTANCES["latent_mode"], f"{100 * low:.1f} to {100 * high:.1f}", " 6 ", " 4 ", "16.7"):
        assert text in row
    assert f"{CIRCUMSTANCES['protocol']}, prompt {CIRCUMSTANCES['prompt']}" in table
    assert "undefined" in table


# Two runs


def binomial_p(gained, lost):
    """The exact two-sided McNemar test."""
    n = gained + lost
    tail = sum(math.comb(n, one) for one in range(min(gained, lost) + 1)) / 2**n
    return min(1.0, 2 * tail)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (3, 0), (9, 2), (30, 12), (25, 25)])
def test_with_a_question_a_video_the_p_value_is_mcnemars(gained, lost):
    right = np.array([[0, 1]] * gained + [[1, 0]] * lost + [[1, 1]] * 20 + [[0, 0]] * 20)
    n = len(right)
    found = compare_means(right, np.arange(n), np.zeros(n), 10_000, 0)
    # 10,000 swaps: a standard error of at most 0.005.
    assert found["p_value"] == pytest.approx(binomial_p(gained, lost), abs=0.015)
    assert (found["gained"], found["lost"]) == (gained, lost)
    assert found["difference"] == pytest.approx((gained - lost) / n)


def clustered(generator, num_videos, gain, num_strata=1):
    """Two runs on videos of very different sizes; B gains or loses whole videos at once."""
    sizes = generator.choice([1, 2, 10], num_videos, p=[0.5, 0.3, 0.2])
    change = generator.choice([-1, 0, 1], num_videos, p=[0.2, 0.6 - gain, 0.2 + gain])
    a = np.repeat(np.where(change > 0, 0, np.where(change < 0, 1, generator.integers(0, 2, num_videos))), sizes)
    right = np.stack([a, a + np.repeat(change, sizes)], axis=1)
    videos = np.repeat(np.arange(num_videos), sizes)
    sizes = 0.3 ** np.arange(num_strata)
    strata = generator.choice(num_strata, len(videos), p=sizes / sizes.sum())
    right[strata > 0, 1] = right[strata > 0, 0]  # B's gains are in the largest stratum
    return right, videos, strata


@pytest.mark.parametrize("num_strata", [1, 3])
def test_the_interval_is_that_of_a_bootstrap_over_videos(num_strata):
    right, videos, strata = clustered(np.random.default_rng(1), 80, 0.2, num_strata)
    found = compare_means(right, videos, strata, 4000, 0)
    generator = np.random.default_rng(2)
    differences = []
    for _ in range(3000):
        rows = np.concatenate([np.flatnonzero(videos == one) for one in generator.integers(0, 80, 80)])
        means = [right[rows][strata[rows] == stratum].mean(axis=0) for stratum in range(num_strata)]
        differences.append(np.diff(np.mean(means, axis=0))[0])
    # Both intervals are of some thousand draws: their ends are within a tenth of a standard error or so.
    assert found["interval"] == pytest.approx(np.quantile(differences, [0.025, 0.975]), abs=0.15 * np.std(differences))
    means = [right[strata == stratum].mean(axis=0) for stratum in range(num_strata)]
    assert [found["accuracy_a"], found["accuracy_b"]] == pytest.approx(list(np.mean(means, axis=0)))
    assert found["difference"] == pytest.approx(found["accuracy_b"] - found["accuracy_a"])


def test_runs_that_are_alike_differ_once_in_twenty():
    generator = np.random.default_rng(0)
    found = [compare_means(*clustered(generator, 100, 0.0), 400, seed) for seed in range(200)]
    # Measured 0.07 (p-value) and 0.08 (interval); the binomial error of 200 draws is 0.015. Were questions drawn
    # instead of videos, both would be above 0.4.
    assert np.mean([one["p_value"] <= 0.05 for one in found]) <= 0.09
    assert np.mean([not one["interval"][0] <= 0 <= one["interval"][1] for one in found]) <= 0.12


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 4)), min_size=1, max_size=30))
def test_the_other_way_round_everything_changes_its_sign_and_nothing_else(rows):
    there = [(answer(i, a, video), answer(i, b, video)) for i, (a, b, video) in enumerate(rows)]
    back = [(b, a) for a, b in there]
    first, second = compare_answers(there, samples=200), compare_answers(back, samples=200)
    assert first["difference"] == pytest.approx(-second["difference"])
    assert (first["gained"], first["lost"]) == (second["lost"], second["gained"])
    assert first["p_value"] == second["p_value"]
    if first["interval"] is None:
        assert second["interval"] is None
        assert first["num_videos"] == 1
    else:
        assert first["interval"] == pytest.approx([-one for one in second["interval"][::-1]])


def test_a_run_does_not_differ_from_itself():
    pairs = [(answer(number, number % 3 == 0),) * 2 for number in range(20)]
    found = compare_answers(pairs, samples=500)
    assert (found["difference"], found["p_value"], found["interval"]) == (0, 1, [0, 0])


def test_one_video_decides_nothing():
    found = compare_answers([(answer(number, 0, "x"), answer(number, 1, "x")) for number in range(5)])
    assert found["difference"] == 1
    assert found["interval"] is None
    assert found["p_value"] is None


def test_each_category_is_compared_by_itself_and_the_mean_weighs_its_values_alike():
    tasks = ["what"] * 6 + ["why"] * 3
    rights = [(0, 1), (0, 1), (0, 1), (0, 0), (1, 1), (1, 1), (1, 0), (1, 1), (1, 1)]
    pairs = [
        tuple(answer(number, one, categories={"task": task}) for one in pair)
        for number, (task, pair) in enumerate(zip(tasks, rights))
    ]
    found = compare_answers(pairs, mean_over="task", samples=300)
    parts = found["categories"]["task"]
    assert parts["what"] == {
        name: value
        for name, value in compare_answers(pairs[:6], samples=300).items()
        if name not in ("mean_over", "categories")
    }
    assert (parts["why"]["gained"], parts["why"]["lost"]) == (0, 1)
    assert found["difference"] == pytest.approx((3 / 6 - 1 / 3) / 2)
    assert compare_answers(pairs, samples=300)["difference"] == pytest.approx(2 / 9)


# Files


def test_runs_on_different_questions_are_refused_unless_told_otherwise(files):
    a, b = map(read_run, files([answer(one) for one in (0, 1, 2)], [answer(one, one > 1) for one in (1, 2, 3, 4)]))
    told = r"2 questions are in both runs, 1 only in .*a\.json, 2 only in .*b\.json.*--common"
    with pytest.raises(ValueError, match=told):
        compare_runs(a, b)
    (found,) = compare_runs(a, b, samples=200, common=True)
    assert (found["num_rows"], found["lost"]) == (2, 1)


@pytest.mark.parametrize("common", [False, True])
def test_runs_with_no_question_in_both_are_refused(files, common):
    for other in ([answer(5)], [answer(0, benchmark="others")]):
        with pytest.raises(ValueError, match="--common for those in both"):
            compare_runs(*map(read_run, files([answer(0)], other)), common=common)


def test_a_benchmark_that_only_one_run_has_is_left_out_where_told_so(files):
    both = [answer(one) for one in range(3)]
    a, b = map(read_run, files(both, [*both, answer(0, benchmark="others")]))
    with pytest.raises(ValueError, match=r"answers to clips, .* to clips, others"):
        compare_runs(a, b)
    assert [one["benchmark"] for one in compare_runs(a, b, samples=200, common=True)] == ["clips"]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"answer": "B"}, "'q1' has answer 'A' in .* and 'B' in"),
        ({"num_options": 5}, "'q1' has num_options 4 in .* and 5 in"),
        ({"video_id": "v9"}, "'q1' has video_id 'v1' in .* and 'v9' in"),
        ({"categories": {"task": "why"}}, "'q1' has categories"),
    ],
)
def test_runs_on_different_versions_of_a_benchmark_are_refused(files, changed, told):
    a, b = map(read_run, files([answer(0), answer(1)], [answer(0), {**answer(1), **changed}]))
    with pytest.raises(ValueError, match=f"{told}.*Expected runs on the same version"):
        compare_runs(a, b, common=True)


def test_runs_whose_accuracies_are_other_means_are_refused(tmp_path):
    answers = [answer(0, categories={"task": "why"})]
    a = read_run(write(tmp_path / "a.json", answers, mean_over="task"))
    b = read_run(write(tmp_path / "b.json", answers))
    with pytest.raises(
        ValueError, match=r"'mean_over': 'task'.* and by .*'mean_over': None.*averaged and judged alike"
    ):
        compare_runs(a, b)
    (found,) = compare_runs(a, a, samples=200)
    assert found["mean_over"] == "task"


def test_runs_that_were_not_judged_alike_are_refused(files):
    a, b = map(read_run, files([answer(0)], [answer(0)]))
    judge = {"model": "grader-1", "prompt_sha256": "abc", "temperature": 0.0, "seed": 0, "num_failures": 0}
    for other in ({**judge, "model": "grader-2"}, {**judge, "prompt_sha256": "def"}, None):
        a.results["clips"] = {"benchmark": "clips", "judge": judge}
        b.results["clips"] = {"benchmark": "clips", "judge": other} if other else {"benchmark": "clips"}
        with pytest.raises(ValueError, match="averaged and judged alike"):
            compare_runs(a, b)
    b.results["clips"] = {"benchmark": "clips", "judge": {**judge, "num_failures": 3}}
    assert len(compare_runs(a, b, samples=200)) == 1


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{}", "has no `answers`"),
        ("[]", "has no `answers`"),
        ('{"answers": []}', "has no `answers`"),
        ('{"answers": [{"id": "q0", "benchmark": "clips"}]}', "answer 0 has no answer, categories, is_correct"),
        (json.dumps({"answers": [answer(0), answer(0)]}), "two answers to question 'q0' of clips"),
        ("{", "Error"),
    ],
)
def test_files_that_are_no_runs_are_told_without_a_traceback(tmp_path, content, told):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(SystemExit, match=f"Error: .*{told}" if told != "Error" else "Error: "):
        main([str(tmp_path / "a.json"), str(tmp_path / "a.json")])


def test_the_command_prints_a_table_and_writes_what_it_found(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("evaluation.compare.Console", partial(Console, width=200))
    tasks = [{"categories": {"task": f"[part{number % 2}]"}} for number in range(40)]
    a = [answer(number, number % 4 == 0, **task) for number, task in enumerate(tasks)]
    b = [answer(number, number % 2 == 0, **task) for number, task in enumerate(tasks)]
    paths = files(a, b)
    write(paths[0], a, settings={"latent_mode": "off", "seed": 0})
    write(paths[1], b, settings={"latent_mode": "auto", "seed": 0})
    output = tmp_path / "difference.json"
    main([*map(str, paths), "--samples", "1000", "--seed", "3", "--output", str(output)])
    printed = capsys.readouterr().out
    assert "latent_mode: A off, B auto" in printed
    assert "seed:" not in printed
    (row,) = [line for line in printed.splitlines() if "clips" in line]
    for text in ("25.0", "50.0", "+25.0", " 10 ", " 0 ", " 40 "):
        assert text in row
    assert "task: [part0]" in printed
    assert "fewer than 30 videos" in printed  # those of the categories
    written = json.loads(output.read_text())
    assert written["settings"] == {"latent_mode": ["off", "auto"]}
    assert (written["samples"], written["seed"]) == (1000, 3)
    assert written["differences"] == compare_runs(*map(read_run, paths), samples=1000, seed=3)
    assert written["differences"][0]["difference"] == 0.25
    main([*map(str, paths), "--samples", "1000", "--seed", "3", "--output", str(output)])
    assert json.loads(output.read_text()) == written, "the same seed finds the same"
