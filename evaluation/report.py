"""What one run's answers come to: entries for its JSON file, which model cards take, and a table for the terminal."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import evaluate
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from model_card.render import public_name
from modeling_storms.temporal_storms import REDUCTIONS, TokenReducer

from .benchmarks.base import Benchmark
from .clock import MODULES


METRIC = Path(__file__).parent / "metrics" / "video_qa_accuracy"


def summarise(
    benchmark: Benchmark,
    answers: Sequence[Mapping[str, Any]],
    protocol: str,
    prompt: str,
    latent_mode: str,
    command: str,
    judge: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One run's result on a benchmark, fit for `model_card.render.check_results`.

    Args:
        benchmark (`Benchmark`): with the questions that were to be asked, and no others.
        answers (`Sequence[Mapping]`): one for each question, as a run's file holds them.
        protocol, prompt, latent_mode, command (`str`): the circumstances; a protocol with its token reduction.
        judge (`Mapping`, *optional*): who judged free-form answers, from `judge_answers`.

    Returns:
        `dict`: the fields of `RESULT_FIELDS`; `revision`, `standard_error`, `interval`, `chance`, `num_videos`,
        `parse_failure_rate`, `decode_failure_rate`, `mean_over` and `categories` as the metric returns them;
        `is_subset`, where it is of fewer questions than the benchmark has; `judge`.

    Raises:
        ValueError: if there is not exactly one answer to each question: a result would hide what is missing.
    """
    asked, answered = [question.id for question in benchmark.questions], [answer["id"] for answer in answers]
    if sorted(asked) != sorted(answered):
        faults = {
            "not answered": set(asked) - set(answered),
            "not of this benchmark": set(answered) - set(asked),
            "answered twice": {one for one in answered if answered.count(one) > asked.count(one)} & set(asked),
        }
        told = "; ".join(f"{len(ids)} {fault} ({min(ids)!r})" for fault, ids in faults.items() if ids)
        raise ValueError(f"{benchmark.name}: saw {len(answered)} answers to {len(asked)} questions, {told}.")
    metric = evaluate.load(str(METRIC), keep_in_memory=True)
    found = metric.compute(
        predictions=[(one["choice"] or one["text"]) if one["is_parsed"] else "" for one in answers],
        references=[one["answer"] for one in answers],
        video_ids=[one["video_id"] for one in answers],
        num_options=[one["num_options"] for one in answers],
        is_decoded=[not one["failure"] for one in answers],
        is_correct=[one["is_correct"] for one in answers],
        categories=[one["categories"] for one in answers],
        mean_over=benchmark.mean_over,
    )
    return {
        "benchmark": benchmark.name,
        "dataset": public_name(benchmark.dataset),
        "split": benchmark.split,
        "revision": benchmark.revision,
        "metric": "accuracy",
        "value": found.pop("accuracy"),
        "num_rows": found.pop("n"),
        "mean_over": benchmark.mean_over,
        **found,
        "is_subset": benchmark.is_subset,
        "protocol": protocol,
        "prompt": prompt,
        "latent_mode": latent_mode,
        "command": command,
        **({} if judge is None else {"judge": dict(judge)}),
    }


def print_table(results: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """Print results, a row each, in percent.

    Args:
        results (`Sequence[Mapping]`): from `summarise`.
        console (`Console`, *optional*): by default the terminal.
    """
    is_swept = len({one["protocol"] for one in results}) > 1
    shown = {f"{'' if is_swept else one['protocol'] + ', '}prompt {one['prompt']}": None for one in results}
    headings = ["benchmark", "latents", "accuracy", "95% interval", "chance", "n", "videos", "unread", "broken"]
    caption = "In percent. Wrong are also answers that could not be read, and those to broken videos."
    if any(one["is_subset"] for one in results):
        caption += " * Not all of the benchmark's questions: no result to compare with others'."
    table = Table(*["protocol"] * is_swept, *headings, title="; ".join(shown), caption=caption)
    for one in results:
        table.add_row(
            *[one["protocol"]] * is_swept,
            one["benchmark"],
            one["latent_mode"],
            percent(one["value"]),
            interval_text(one["interval"]),
            percent(one["chance"]),
            f"{one['num_rows']}{'*' * one['is_subset']}",
            str(one["num_videos"]),
            percent(one["parse_failure_rate"]),
            percent(one["decode_failure_rate"]),
        )
    (console or Console()).print(table)


def print_sweep(
    rows: Sequence[tuple[str, str, Mapping[str, Any], Mapping[str, Any]]], console: Console | None = None
) -> None:
    """Print what frames and token reduction cost and bring, a row for each result.

    Args:
        rows (`Sequence[tuple]`): the protocol's name, `reduction_text`, the result from `summarise` and what its
            answers took, from `costs`.
        console (`Console`, *optional*): by default the terminal.
    """
    differing = [name for name in ("benchmark", "latent_mode") if len({result[name] for *_, result, _ in rows}) > 1]
    caption = "Accuracy in percent. Milliseconds of the model, a question, on one device."
    table = Table(box=SIMPLE, padding=0, show_edge=False, caption=caption)  # many columns in 80 characters
    for heading in ("frames", "reduction", *differing, "visual tokens", "accuracy (95% interval)"):
        table.add_column(heading, overflow="fold")
    for heading in ("all, ms", *MODULES):
        table.add_column(heading.replace(" ", "\n"), no_wrap=True, justify="right")
    for frames, reduction, result, taken in rows:
        seconds = [taken["seconds_per_question"], *taken["modules"].values()] if taken else []
        table.add_row(
            frames,
            reduction,
            *(result[name] for name in differing),
            f"{taken['video_tokens_per_question']:.0f}" if taken else "",
            f"{percent(result['value'])} ({interval_text(result['interval'])})",
            *(f"{1e3 * one:.{1 if one < 0.1 else 0}f}" for one in seconds),
        )
    (console or Console()).print(table)


def reduction_text(reducer: TokenReducer) -> str:
    """What happens to a video's tokens, in words: `temporal pool 4, spatial pool 4`, `none`."""
    numbers = [(name.replace("_", " "), getattr(reducer, name)) for name in REDUCTIONS]
    return ", ".join(f"{name} {number}" for name, number in numbers if number > 1) or "none"


def public_command(module: str, given: Sequence[str]) -> str:
    """A command as it may be published: folders of this machine by their last part."""

    def public(value: str) -> str:  # also of `--output=FOLDER`, and of `NAME=FOLDER,NAME=FOLDER`
        name, equals, path = value.rpartition("=")
        return name + equals + (public_name(path) if "/" in path else path)

    return shlex.join(["python", "-m", module, *(",".join(map(public, one.split(","))) for one in given)])


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def interval_text(interval: Sequence[float] | None) -> str:
    return "undefined" if interval is None else f"{percent(interval[0])} to {percent(interval[1])}"
