"""MLVU (arXiv 2406.04264), the multiple-choice part of its development set: seven tasks on videos of minutes to hours.

The result is the mean of the tasks' accuracies.
"""

import re

from .adapter import Adapter, Row, letter_answer, lettered, located, option_lines
from .base import Prompt, Question
from .files import Files


TASKS = ("anomaly_reco", "count", "ego", "needle", "order", "plotQA", "topic_reasoning")
SYSTEM = (
    "Carefully watch this video and pay attention to every detail. Based on your observations, select the best option "
    "that accurately addresses the question."
)
_OPTION = re.compile(r"\s*\(?[A-J][).:]")


def read(row: Row, table: str, row_idx: int, files: Files, subtitles: bool) -> Question:
    lines = row["question"].strip().split("\n")
    first = next((place for place, line in enumerate(lines) if _OPTION.match(line)), len(lines))
    options = lettered(lines[first:])
    if row["task_type"] not in TASKS:
        raise ValueError(f"saw task_type {row['task_type']!r}, expected one of {', '.join(TASKS)}")
    return Question(
        id=f"{row['task_type']}-{row_idx}",
        question="\n".join(lines[:first]).strip(),
        answer=letter_answer(row["answer"], options),
        options=options,
        video_id=row["video_name"],
        categories={"task": row["task_type"]},
        full_text=row["question"],
        **located(files, row["video_name"]),
    )


def official(question: Question) -> Prompt:
    """As `choice_bench.py` of the repository asks.

    Left out is the beginning of the answer, `Best option:(`, which it writes for the model.
    """
    listed = option_lines(question, "({letter}) {text}")
    return Prompt(f"Question: {question.question}\nOptions:\n{listed}\nOnly give the best option.", system=SYSTEM)


def lmms_eval(question: Question) -> Prompt:
    """Its task `mlvu_dev`."""
    return Prompt(f"{question.full_text}\nOnly give the best option.\nBest option: (")


ADAPTER = Adapter(
    dataset="sy1998/MLVU_dev",
    split="test",
    tables={"": ("test-*.parquet",)},
    read=read,
    counts={"": 2174},
    download=("*.parquet", "*.zip", "*.mp4"),
    mean_over="task",
    prompts={"official": official, "lmms_eval": lmms_eval},
)
