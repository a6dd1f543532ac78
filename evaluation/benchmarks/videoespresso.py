"""VideoEspresso (arXiv 2411.14794), its close-ended test set: questions of 14 tasks about the course of events.

Neither the number of questions nor the layout of `all_video.zip` is documented by its authors: both are inferred.
lmms-eval has no task for it.
"""

import re

from .adapter import Adapter, Row, letter_answer, lettered, located, option_lines
from .base import Prompt, Question
from .files import Files


def read(row: Row, table: str, row_idx: int, files: Files, subtitles: bool) -> Question:
    options = lettered([re.sub(r"^\(([A-J])\):", r"\1.", text) for text in row["options"]])  # "(A): a wall"
    path = row["video_path"].removeprefix("./")
    return Question(
        id=f"videoespresso-{row_idx}",
        question=row["question"].strip(),
        answer=letter_answer(row["correct_answer"], options),
        options=options,
        video_id=path,
        task=row["task"],
        categories={"task": row["task"]},
        **located(files, path),
    )


def official(question: Question) -> Prompt:
    """As `eval/eval.py` of the repository asks, without evidence."""
    listed = option_lines(question, "({letter}) {text}")
    return Prompt(
        f"Please finish the {question.task} task. Question: {question.question}. You have the following options: \n"
        f"{listed}\n. Select the answer and only give the option letters."
    )


ADAPTER = Adapter(
    dataset="hshjerry0315/VideoEspresso-Test",
    split="test",
    tables={"": ("bench_hard.json",)},
    read=read,
    counts={"": 1382},
    download=("bench_hard.json", "*.zip"),
    prompts={"official": official},
)
