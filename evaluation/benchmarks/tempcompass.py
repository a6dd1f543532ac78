"""TempCompass (arXiv 2403.00476): short videos, five temporal dimensions, asked in four forms (tasks).

Captioning is scored by a judge, who answers a multiple-choice question from the caption alone. The other three are
scored here; caption matching names its options "Option 1", "Sentence A" or "Caption A".
"""

import re

from dataset_builder.schema import LETTERS

from .adapter import Adapter, Row, letter_answer, lettered, located
from .base import Prompt, Question
from .files import Files


ASK = {
    "multi-choice": "\nPlease directly give the best option:",
    "yes_no": "\nPlease answer yes or no:",
    "caption_matching": "\nPlease directly give the best option:",
    "captioning": "",  # the question ends in "Generated Caption:"
}
_LABELLED = re.compile(r"((?:Option|Sentence|Caption|Description) [0-9A-Z]):\s*(.*)", re.DOTALL)


def read(row: Row, table: str, row_idx: int, files: Files, subtitles: bool) -> Question:
    text, *listed = row["question"].strip().split("\n")
    options: dict[str, str] = {}
    labels: dict[str, str] = {}
    answer, judge_question = row["answer"].strip(), ""
    if table == "captioning":
        text, answer, judge_question = row["question"].strip(), row["mc_answer"].strip(), row["mc_question"].strip()
    elif table == "yes_no":
        text, options = row["question"].strip(), {"A": "yes", "B": "no"}
        answer = letter_answer(answer.lower().rstrip("."), options)
    elif table == "multi-choice":
        options = lettered(listed)
        answer = letter_answer(answer, options)
    else:
        found = [_LABELLED.fullmatch(line.strip()) for line in listed]
        if not all(found):
            raise ValueError(f"saw options {listed}, expected lines like 'Option 1: ...' or 'Sentence A: ...'")
        options = {letter: match[2].strip() for letter, match in zip(LETTERS, found) if match}
        labels = {letter: match[1] for letter, match in zip(LETTERS, found) if match}
        chosen = [letter for letter in options if answer.startswith(f"{labels[letter]}:")]
        if len(chosen) != 1:
            raise ValueError(f"saw answer {answer[:80]!r}, expected one of {listed}")
        answer = chosen[0]
    return Question(
        id=f"{table}-{row_idx}",
        question=text,
        answer=answer,
        options=options,
        video_id=str(row["video_id"]),
        task=table,
        categories={"task": table, "dim": row["dim"]},
        full_text=row["question"],
        labels=labels,
        judge_question=judge_question,
        **located(files, f"{row['video_id']}.mp4"),
    )


def official(question: Question) -> Prompt:
    """As `run_qwen2_vl.py` of the repository asks; lmms-eval's default is the same."""
    return Prompt(question.full_text + ASK[question.task])


COUNTS = {"multi-choice": 1580, "yes_no": 2453, "caption_matching": 1503, "captioning": 2004}

ADAPTER = Adapter(
    dataset="lmms-lab/TempCompass",
    split="test",
    tables={task: (f"{task}/test-*.parquet",) for task in COUNTS},
    read=read,
    counts=COUNTS,
    download=("*.parquet", "*.zip"),
    num_options=(2, 4),
    judged_tasks=frozenset({"captioning"}),
    prompts={"official": official, "lmms_eval": official},
)
