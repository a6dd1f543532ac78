"""Accuracy on video question answering that counts every failure and knows that questions share videos."""

from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

import datasets
import evaluate
import numpy as np


DESCRIPTION = """
Accuracy on video question answering. Answers that could not be parsed and videos that could not be read are wrong and
stay in the denominator; their rates are reported, and so is chance. Standard errors and intervals are clustered by
video, as questions about one video are not independent.
"""

CITATION = """\
@article{miller2024errorbars,
  title = {Adding Error Bars to Evals: A Statistical Approach to Language Model Evaluations},
  author = {Evan Miller},
  journal = {arXiv preprint arXiv:2411.00640},
  year = {2024},
}"""

INPUTS = """
Args:
    predictions (`list[str]`): for each question the capital letter that was chosen; "" where none could be parsed. Of
        a free-form question any text; "" for none.
    references (`list[str]`): the right letters; of a free-form question any text.
    video_ids (`list[str]`, *optional*): questions about the same video share it; by default each has its own.
    num_options (`list[int]`, *optional*): how many options each question has, 0 for a free-form one. Without it all
        are multiple-choice, and chance is not known.
    is_decoded (`list[bool]`, *optional*): False where the video could not be read: wrong, whatever was predicted.
    is_correct (`list[bool]`, *optional*): whether each answer is right. Needed for free-form questions alone:
        elsewhere None, or what the letters say.
    categories (`dict[str, list]` or `list[dict]`, *optional*): for example `{"duration": ["short", "long", ...]}`.
        None or "" where a question has no such category.
    mean_over (`str`, *optional*): a category; `accuracy` is then the mean of its values' accuracies.
Returns:
    `dict`, of all questions and in `categories`, name by name and value by value, of each part of them:
    accuracy (`float`): the share of right answers among all questions, or the mean that `mean_over` asks for.
    n (`int`), num_videos (`int`): of questions, of videos.
    parse_failure_rate (`float`): the share of questions whose video was read and whose answer could not be.
    decode_failure_rate (`float`): the share of questions whose video could not be read.
    chance (`float`): the accuracy expected from guessing; None without `num_options`.
    standard_error (`float`): of the accuracy, clustered by video; None where undefined, never 0 for want of videos.
    interval (`list[float]`): 95%; None where the standard error is.
Raises:
    ValueError: for no questions, lists of unequal lengths, a prediction that is not "" or one capital letter, a
        reference outside the options, a free-form question without `is_correct`, or a question without a value of
        `mean_over`.
Examples:
    >>> metric = evaluate.load("evaluation/metrics/video_qa_accuracy")
    >>> found = metric.compute(predictions=["A", "B", "", "C"], references=["A", "B", "C", "D"],
    ...                        video_ids=["x", "x", "y", "y"], num_options=[4, 4, 4, 4])
    >>> found["accuracy"], found["parse_failure_rate"], found["chance"]
    (0.5, 0.25, 0.25)
"""

Z = 1.959964  # 97.5th percentile of the normal distribution


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class VideoQAAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
            reference_urls=["https://arxiv.org/abs/2411.00640"],
        )

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[str],
        video_ids: Sequence[Any] | None = None,
        num_options: Sequence[int] | None = None,
        is_decoded: Sequence[bool] | None = None,
        is_correct: Sequence[bool | None] | None = None,
        categories: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]] | None = None,
        mean_over: str | None = None,
    ) -> dict[str, Any]:
        n = len(predictions)
        if n == 0:
            raise ValueError("Saw no predictions, expected at least one: an accuracy over nothing is undefined.")
        columns = _category_columns(categories)
        given = {
            "video_ids": video_ids,
            "num_options": num_options,
            "is_decoded": is_decoded,
            "is_correct": is_correct,
        }
        given |= {f"categories[{name!r}]": values for name, values in columns.items()}
        for name, values in given.items():
            if values is not None and len(values) != n:
                raise ValueError(f"Saw {n} predictions and {len(values)} {name}, expected one for each question.")
        if mean_over is not None:
            missing = [index for index, value in enumerate(columns.get(mean_over, [None])) if value in (None, "")]
            if missing:
                raise ValueError(
                    f"Saw mean_over={mean_over!r}, categories {list(columns)}, and question {missing[0]} without a "
                    "value. Expected a category that every question has, or else some would count for nothing."
                )
        options = [None] * n if num_options is None else num_options
        said = [None] * n if is_correct is None else is_correct
        decoded = np.ones(n, bool) if is_decoded is None else np.array(is_decoded, bool)
        parsed = np.array([prediction != "" for prediction in predictions])
        answers = zip(range(n), predictions, references, options, said)
        correct = np.array([is_read and _is_right(*answer) for is_read, answer in zip(decoded, answers)], bool)
        guessed = None if num_options is None else np.array([1 / count if count else 0.0 for count in num_options])
        videos = _codes(range(n) if video_ids is None else video_ids)

        def summarise(rows: np.ndarray, strata: np.ndarray) -> dict[str, Any]:
            accuracy, standard_error, interval = clustered_mean(correct[rows], videos[rows], strata)
            return {
                "accuracy": accuracy,
                "n": len(rows),
                "num_videos": len(np.unique(videos[rows])),
                "parse_failure_rate": float(np.mean(decoded[rows] & ~parsed[rows])),
                "decode_failure_rate": float(np.mean(~decoded[rows])),
                "chance": None if guessed is None else float(guessed[rows] @ _weights(strata)),
                "standard_error": standard_error,
                "interval": interval,
            }

        strata = np.zeros(n, int) if mean_over is None else _codes(columns[mean_over])
        found = summarise(np.arange(n), strata)
        found["categories"] = {name: {} for name in columns}
        for name, values in columns.items():
            for value in sorted({str(value) for value in values if value not in (None, "")}):
                rows = np.array([index for index, one in enumerate(values) if str(one) == value])
                found["categories"][name][value] = summarise(rows, np.zeros(len(rows), int))
        return found


def clustered_mean(
    values: np.ndarray, clusters: np.ndarray, strata: np.ndarray
) -> tuple[float, float | None, list[float] | None]:
    """The mean over strata of their mean values, its standard error clustered, and its 95% interval.

    With n values in G clusters and K strata, weights w = 1 / (K n_k) and residuals r = value - mean of its stratum:

        SE^2 = G / (G - 1) * (n - 1) / (n - K) * sum over clusters of (sum of w r in the cluster)^2

    This is the cluster-robust variance (CR1) of a regression on the strata's indicators. With one stratum and one
    value a cluster it is p (1 - p) / (n - 1), the binomial variance with n - 1. It is undefined if a stratum has
    values of one cluster only, for their residuals add up to 0 whatever they are.

    The interval is Wilson's, for as many independent values as would have this standard error, at most n; if all
    values are equal, for one of each cluster. So it stays within 0 and 1, and perfect scores have one, too.

    Args:
        values (`np.ndarray` of shape `(n,)`): bool.
        clusters, strata (`np.ndarray` of shape `(n,)`): which of them each value belongs to, from 0 on.
    """
    n, num_strata, num_clusters = len(values), strata.max() + 1, len(np.unique(clusters))
    weights = _weights(strata)
    stratum_means = np.bincount(strata, values) / np.bincount(strata)
    mean = float(stratum_means.mean())
    if any(len(np.unique(clusters[strata == stratum])) < 2 for stratum in range(num_strata)):
        return mean, None, None
    sums = np.bincount(clusters, weights * (values - stratum_means[strata]))
    variance = num_clusters / (num_clusters - 1) * (n - 1) / (n - num_strata) * float(np.sum(sums**2))
    independent = float(num_clusters)
    if 0 < mean < 1:
        independent = min(n, 1 + mean * (1 - mean) / variance) if variance > 0 else n
    centre = (mean + Z**2 / (2 * independent)) / (1 + Z**2 / independent)
    half = Z * np.sqrt(mean * (1 - mean) / independent + (Z / (2 * independent)) ** 2) / (1 + Z**2 / independent)
    low, high = max(0.0, float(centre - half)), min(1.0, float(centre + half))
    return mean, float(np.sqrt(variance)), [min(low, mean), max(high, mean)]  # at 0 and 1, rounding would part them


def _weights(strata: np.ndarray) -> np.ndarray:
    """What each value weighs in the mean over strata of their means."""
    sizes = np.bincount(strata)
    return 1 / (len(sizes) * sizes[strata])


def _codes(names: Any) -> np.ndarray:
    """Names -> their numbers, from 0 on."""
    return np.unique([str(name) for name in names], return_inverse=True)[1]


def _category_columns(categories: Any) -> dict[str, list[Any]]:
    """Name -> a value for each question, of either form."""
    if categories is None or isinstance(categories, Mapping):
        return {name: list(values) for name, values in (categories or {}).items()}
    names = dict.fromkeys(name for row in categories for name in row)
    return {name: [row.get(name) for row in categories] for name in names}


def _is_right(index: int, prediction: str, reference: str, num_options: int | None, said: bool | None) -> bool:
    """Whether one answer is right, checked against all that is known of the question."""
    if num_options == 0:
        if said is None:
            raise ValueError(f"Question {index} is free-form (num_options 0) and has no is_correct: who judges it?")
        if said and not prediction:
            raise ValueError(
                f"Question {index} has is_correct {said} and no prediction: what was not read is not right."
            )
        return bool(said)
    if num_options is not None and not 2 <= num_options <= 26:
        raise ValueError(f"Question {index} has num_options {num_options}, expected 0 (free-form) or 2 to 26.")
    letters = ascii_uppercase[:num_options]
    if reference not in list(letters):
        raise ValueError(f"Question {index} has the reference {reference!r}, expected one of {letters}.")
    if prediction not in ["", *ascii_uppercase]:
        raise ValueError(
            f"Question {index} has the prediction {prediction!r}, expected one capital letter, or '' for an answer "
            "that could not be parsed."
        )
    if said is not None and bool(said) != (prediction == reference):
        raise ValueError(
            f"Question {index} has is_correct {said}, and its letters {prediction!r} and {reference!r} say otherwise."
        )
    return prediction == reference
