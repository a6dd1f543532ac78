"""Compare two runs on the same questions.

    python -m evaluation.compare a.json b.json
    python -m evaluation.compare a.json b.json --common --output difference.json

Both are files that `python -m evaluation` wrote. A difference is B's accuracy less A's, on questions that both were
asked. Questions about one video stay together: the 95% interval is a bootstrap's over videos, and the p-value is the
share of random swaps of the two runs' answers, video by video, that differ at least as much.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from model_card.push import write_whole

from .report import interval_text, percent


ASKED = ("answer", "num_options", "video_id", "categories")  # what both runs must agree on, question by question
NEEDED = frozenset({"id", "benchmark", "is_correct", *ASKED})
JUDGE = ("model", "prompt_sha256", "temperature", "seed")
CHUNK = 500  # resamples at a time: with thousands of videos, some 10 MB
FEW_VIDEOS = 30

Answer = Mapping[str, Any]


@dataclass
class Run:
    """A run's file: answers by benchmark and question, settings, and results by benchmark."""

    path: Path
    answers: dict[str, dict[str, Answer]]
    settings: Mapping[str, Any]
    results: dict[str, Mapping[str, Any]]

    def measure(self, benchmark: str) -> dict[str, Any]:
        """What its accuracy on a benchmark is: a mean over a category's values, by whose verdict."""
        result = self.results.get(benchmark, {})
        judge = result.get("judge") or {}
        return {"mean_over": result.get("mean_over"), **{name: judge.get(name) for name in JUDGE}}


def read_run(path: Path) -> Run:
    """Read a run's file.

    Raises:
        ValueError: if it is no run's, or holds two answers to one question.
    """
    run = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(run, dict) or not run.get("answers"):
        raise ValueError(f"{path} has no `answers`, expected a JSON file that `python -m evaluation` wrote.")
    answers: dict[str, dict[str, Answer]] = {}
    for number, answer in enumerate(run["answers"]):
        if missing := NEEDED - answer.keys():
            raise ValueError(f"{path}: answer {number} has no {', '.join(sorted(missing))}.")
        known = answers.setdefault(answer["benchmark"], {})
        if answer["id"] in known:
            raise ValueError(f"{path} has two answers to question {answer['id']!r} of {answer['benchmark']}.")
        known[answer["id"]] = answer
    return Run(path, answers, run.get("settings", {}), {one["benchmark"]: one for one in run.get("results", ())})


def compare_runs(a: Run, b: Run, samples: int = 10_000, seed: int = 0, common: bool = False) -> list[dict[str, Any]]:
    """The differences between two runs, one for each benchmark; see `compare_answers`.

    Args:
        common (`bool`): leave out questions and benchmarks that only one run has, instead of refusing.

    Raises:
        ValueError: if the runs were not asked the same, or what is right differs: the difference would be another's.
    """
    benchmarks = [name for name in a.answers if name in b.answers]
    if not benchmarks or (not common and a.answers.keys() != b.answers.keys()):
        raise ValueError(
            f"{a.path} has answers to {', '.join(a.answers)}, {b.path} to {', '.join(b.answers)}. Expected the same "
            "benchmarks, or --common for those in both."
        )
    differences = []
    for benchmark in benchmarks:
        answers_a, answers_b = a.answers[benchmark], b.answers[benchmark]
        pairs = [(answer, answers_b[name]) for name, answer in answers_a.items() if name in answers_b]
        only_a, only_b = len(answers_a) - len(pairs), len(answers_b) - len(pairs)
        if not pairs or (not common and (only_a or only_b)):
            raise ValueError(
                f"{benchmark}: {len(pairs)} questions are in both runs, {only_a} only in {a.path}, {only_b} only in "
                f"{b.path}. Expected the same questions, or --common for those in both."
            )
        for one, other in pairs:
            if unlike := [name for name in ASKED if one[name] != other[name]]:
                raise ValueError(
                    f"{benchmark}: question {one['id']!r} has {unlike[0]} {one[unlike[0]]!r} in {a.path} and "
                    f"{other[unlike[0]]!r} in {b.path}. Expected runs on the same version of the benchmark."
                )
        measure, other_measure = a.measure(benchmark), b.measure(benchmark)
        if measure != other_measure:
            raise ValueError(
                f"{benchmark}: accuracy is by {measure} in {a.path} and by {other_measure} in {b.path}. Expected runs "
                "that are averaged and judged alike."
            )
        differences.append({"benchmark": benchmark, **compare_answers(pairs, measure["mean_over"], samples, seed)})
    return differences


def compare_answers(
    pairs: Sequence[tuple[Answer, Answer]], mean_over: str | None = None, samples: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """The difference in accuracy between two runs on the same questions, and on those of each category's values.

    Args:
        pairs (`Sequence[tuple[Mapping, Mapping]]`): A's and B's answer to each question.
        mean_over (`str`, *optional*): category whose values' accuracies are averaged into the accuracy.
        samples (`int`), seed (`int`): of the resampling, see `compare_means`.

    Returns:
        `dict`: what `compare_means` returns, `mean_over`, and by name and value of `categories` the same again.
    """
    right = np.array([[bool(answer["is_correct"]) for answer in pair] for pair in pairs], float)
    videos = np.array([pair[0]["video_id"] for pair in pairs])
    strata = np.array(["" if mean_over is None else pair[0]["categories"][mean_over] for pair in pairs])
    values: dict[str, dict[str, list[int]]] = {}
    for row, (answer, _) in enumerate(pairs):
        for name, value in answer["categories"].items():
            values.setdefault(name, {}).setdefault(value, []).append(row)

    def compare(rows: list[int], strata: np.ndarray) -> dict[str, Any]:
        return compare_means(right[rows], videos[rows], strata, samples, seed)

    return {
        **compare(list(range(len(pairs))), strata),
        "mean_over": mean_over,
        "categories": {
            name: {value: compare(rows, np.zeros(len(rows))) for value, rows in sorted(parts.items())}
            for name, parts in values.items()
        },
    }


def compare_means(
    right: np.ndarray, videos: np.ndarray, strata: np.ndarray, samples: int, seed: int
) -> dict[str, Any]:
    """The difference between two runs' accuracies, each the mean over strata of their shares of right answers.

    Args:
        right (`np.ndarray` of shape `(num_questions, 2)`): whether A's and B's answers are right, 0 or 1.
        videos, strata (`np.ndarray` of shape `(num_questions,)`): names of them.
        samples (`int`): of both kinds. 1. Videos are drawn with replacement, as many as there are; the interval holds
            the middle 95% of the differences seen. 2. Each video's answers of A and B change places or not; `p_value`
            is (1 + number of differences at least as large, either way) / (1 + samples).
        seed (`int`): of the random numbers.

    Returns:
        `dict`: `accuracy_a`, `accuracy_b`, `difference` (B less A), `interval`, `p_value` (two-sided; both None if a
        stratum has one video only), `gained` (questions that A has wrong and B right), `lost` (the reverse),
        `num_rows` and `num_videos`.
    """
    stratum_idx = np.unique(strata, return_inverse=True)[1]
    video_idx = np.unique(videos, return_inverse=True)[1]
    sizes = np.bincount(stratum_idx)
    num_videos = video_idx.max() + 1
    change = right[:, 1] - right[:, 0]
    changes, counts = np.zeros((2, num_videos, len(sizes)))  # sums over each video's questions of a stratum
    np.add.at(changes, (video_idx, stratum_idx), change)
    np.add.at(counts, (video_idx, stratum_idx), 1)
    accuracies = [float(np.mean(np.bincount(stratum_idx, one) / sizes)) for one in right.T]
    shares = (changes / sizes).mean(axis=1)  # (num_videos,): what each adds to the difference
    difference = float(shares.sum())

    interval = p_value = None
    if ((counts > 0).sum(axis=0) > 1).all():
        generator = np.random.default_rng(seed)
        drawn, num_as_large = [], 0
        for start in range(0, samples, CHUNK):
            size = min(CHUNK, samples - start)
            times = generator.multinomial(num_videos, np.full(num_videos, 1 / num_videos), size)
            with np.errstate(invalid="ignore"):  # 0 / 0: none of a stratum's videos was drawn
                drawn.append(np.nanmean(times @ changes / (times @ counts), axis=1))
            signs = generator.choice([-1.0, 1.0], (size, num_videos))
            num_as_large += int((np.abs(signs @ shares) >= abs(difference) - 1e-9).sum())
        interval = np.quantile(np.concatenate(drawn), [0.025, 0.975]).tolist()
        p_value = (1 + num_as_large) / (1 + samples)
    return {
        "accuracy_a": accuracies[0],
        "accuracy_b": accuracies[1],
        "difference": difference,
        "interval": interval,
        "p_value": p_value,
        "gained": int((change > 0).sum()),
        "lost": int((change < 0).sum()),
        "num_rows": len(right),
        "num_videos": int(num_videos),
    }


def print_differences(differences: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """Print the differences, a row for each benchmark and one for each value of its categories, in percent."""
    headings = ("A", "B", "B - A", "95% interval", "p", "wrong to right", "right to wrong", "questions", "videos")
    caption = "Accuracy in percent. The p-values are not corrected for how many there are."
    rows = []
    for one in differences:
        rows.append((one["benchmark"], one))
        for name, parts in one["categories"].items():
            rows += [(f"  {name}: {value}", part) for value, part in parts.items()]
    if any(part["num_videos"] < FEW_VIDEOS for _, part in rows):
        caption += f" Intervals from fewer than {FEW_VIDEOS} videos are too narrow."
    table = Table("", *headings, caption=caption)
    for title, part in rows:
        table.add_row(
            escape(title),
            percent(part["accuracy_a"]),
            percent(part["accuracy_b"]),
            f"{100 * part['difference']:+.1f}",
            interval_text(part["interval"]),
            "" if part["p_value"] is None else f"{part['p_value']:.4f}",
            *(str(part[name]) for name in ("gained", "lost", "num_rows", "num_videos")),
        )
    (console or Console()).print(table)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, help="JSON file of a run")
    parser.add_argument("b", type=Path, help="JSON file of another, whose gain is wanted")
    parser.add_argument("--common", action="store_true", help="compare on the questions that both runs have")
    parser.add_argument("--samples", type=int, default=10_000, help="resamples (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args(argv)
    if arguments.samples < 100:
        parser.error(f"--samples {arguments.samples}, expected 100 or more: fewer have no 2.5th percentile")
    try:
        a, b = read_run(arguments.a), read_run(arguments.b)
        differences = compare_runs(a, b, arguments.samples, arguments.seed, arguments.common)
        names = sorted(a.settings.keys() | b.settings.keys())
        settings = {name: [run.settings.get(name) for run in (a, b)] for name in names}
        unlike = {name: pair for name, pair in settings.items() if pair[0] != pair[1]}
        if arguments.output is not None:
            record = {"samples": arguments.samples, "seed": arguments.seed, "settings": unlike}
            write_whole(arguments.output, json.dumps({**record, "differences": differences}, indent=2) + "\n")
    except (OSError, ValueError) as error:
        raise SystemExit(f"Error: {error}") from error
    for name, pair in unlike.items():
        print(f"{name}: A {pair[0]}, B {pair[1]}")
    print_differences(differences)
    if arguments.output is not None:
        print(f"Written to {arguments.output}")


if __name__ == "__main__":
    main()
