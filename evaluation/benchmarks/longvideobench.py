"""LongVideoBench (arXiv 2407.15754), validation: questions that refer to a moment in a video of up to an hour.

Its own protocol puts each subtitle between the frames around it. Here, where a video is one piece, subtitles stand
before the question, in order.
"""

import json
from collections.abc import Mapping
from typing import Any

from .adapter import Adapter, Row, index_answer, lettered, located, option_lines
from .base import Prompt, Question, Subtitle
from .files import Files


ASK = "Answer with the option's letter from the given choices directly."


def parse_subtitles(entries: list[Mapping[str, Any]], offset: float, duration: float) -> tuple[Subtitle, ...]:
    """Subtitles as the benchmark has them, in either of its two forms.

    Args:
        entries (`list`): `{"timestamp": [start, end], "text"}` in seconds, `end` perhaps null, or
            `{"start": "00:00:01.5", "end", "line"}`.
        offset (`float`): second of the subtitles' clock at which the video begins.
        duration (`float`): of the video; what lies outside is left out.
    """
    subtitles = []
    for entry in entries:
        if "timestamp" in entry:
            start, end = entry["timestamp"]
            end = end if isinstance(end, (int, float)) else offset + duration
            text = entry["text"]
        else:
            start, end = _seconds(entry["start"]), _seconds(entry["end"])
            text = entry["line"]
        if end > offset and start < offset + duration and text.strip():
            subtitles.append(Subtitle(start - offset, end - offset, " ".join(text.split())))
    return tuple(subtitles)


def _seconds(clock: str) -> float:
    hours, minutes, seconds = clock.split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def read(row: Row, table: str, row_idx: int, files: Files, subtitles: bool) -> Question:
    candidates = row.get("candidates") or [row[f"option{place}"] for place in range(5)]
    options = lettered([text for text in candidates if text not in (None, "N/A")])
    spoken = files.read(f"subtitles/{row['subtitle_path']}") if subtitles else None
    entries = json.loads(spoken) if spoken else []
    return Question(
        id=row["id"],
        question=row["question"].strip(),
        answer=index_answer(row["correct_choice"], options),
        options=options,
        video_id=row["video_path"],
        categories={"duration_group": str(row["duration_group"]), "question_category": row["question_category"]},
        subtitles=parse_subtitles(entries, row["starting_timestamp_for_subtitles"], row["duration"]),
        **located(files, f"videos/{row['video_path']}"),
    )


def official(question: Question) -> Prompt:
    """The texts that the repository's data loader gives, a line each."""
    spoken = "".join(f"{subtitle.text}\n" for subtitle in question.subtitles)
    return Prompt(f"{spoken}Question: {question.question}\n{option_lines(question)}\n{ASK}")


def lmms_eval(question: Question) -> Prompt:
    """Its task `longvideobench_val_v`; with subtitles, the text of `longvideobench_val_i`."""
    spoken = "".join(f"{subtitle.text}\n" for subtitle in question.subtitles)
    return Prompt(f"{spoken}{question.question}\n{option_lines(question)}\n{ASK}\n")


ADAPTER = Adapter(
    dataset="longvideobench/LongVideoBench",
    split="validation",
    tables={"": ("lvb_val.json", "validation-*.parquet")},
    read=read,
    counts={"": 1337},
    download=("lvb_val.json", "validation-*.parquet", "*.tar*"),
    num_options=(2, 5),
    prompts={"official": official, "lmms_eval": lmms_eval},
    subtitle_prompts={"official": official, "lmms_eval": lmms_eval},
)
