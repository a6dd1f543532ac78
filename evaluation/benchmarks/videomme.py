"""Video-MME (arXiv 2405.21075): 2,700 questions with four options about 900 videos of 11 seconds to one hour."""

import re

from .adapter import Adapter, Row, letter_answer, lettered, located, option_lines
from .base import Prompt, Question, Subtitle
from .files import Files


ASK = "Respond with only the letter (A, B, C, or D) of the correct option."


def parse_srt(text: str) -> tuple[Subtitle, ...]:
    """The lines of a SubRip file, without markup such as `<font color="white">`."""
    subtitles = []
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n").lstrip("\N{BYTE ORDER MARK}")):
        times = re.search(rf"^{_TIME}\s*-->\s*{_TIME}[^\n]*$", block, re.MULTILINE)
        if times is None:
            continue
        start, end = (
            3600 * int(hours) + 60 * int(minutes) + float(f"{seconds}.{fraction}")
            for hours, minutes, seconds, fraction in (times.groups()[:4], times.groups()[4:])
        )
        spoken = " ".join(re.sub(r"<[^<>]*>|\{\\[^{}]*\}", " ", block[times.end() :]).split())
        if spoken:
            subtitles.append(Subtitle(start, end, spoken))
    return tuple(subtitles)


_TIME = r"\s*(\d+):(\d+):(\d+)[,.](\d+)"


def read(row: Row, table: str, row_idx: int, files: Files, subtitles: bool) -> Question:
    options = lettered(row["options"])
    srt = files.read(f"{row['videoID']}.srt") if subtitles else None
    return Question(
        id=row["question_id"],
        question=row["question"].strip(),
        answer=letter_answer(row["answer"], options),
        options=options,
        video_id=row["videoID"],
        categories={name: row[name] for name in ("duration", "domain", "sub_category", "task_type")},
        subtitles=parse_srt(srt.decode("utf-8", "replace")) if srt else (),
        **located(files, f"{row['videoID']}.mp4"),
    )


def official(question: Question) -> Prompt:
    """As the repository's README gives it; the same with and without subtitles, but for their lines."""
    spoken = "".join(f"{subtitle.text}\n" for subtitle in question.subtitles)
    listed = f"This video's subtitles are listed below:\n{spoken}" if spoken else ""
    return Prompt(
        f"{listed}Select the best answer to the following multiple-choice question based on the video. {ASK}\n"
        f"{question.question}\n{option_lines(question)}\nThe best answer is:"
    )


def lmms_eval(question: Question) -> Prompt:
    """Its task `videomme`, which speaks of subtitles though there are none."""
    return Prompt(
        "Select the best answer to the following multiple-choice question based on the video and the subtitles. "
        f"{ASK}\n{question.question}\n{option_lines(question)}\n\n"
        "Answer with the option's letter from the given choices directly."
    )


def lmms_eval_with_subtitles(question: Question) -> Prompt:
    """Its task `videomme_w_subtitle`."""
    spoken = "\n".join(subtitle.text for subtitle in question.subtitles) or "No subtitles available"
    return Prompt(
        f"This video's subtitles are listed below: \n{spoken}\n"
        "Select the best answer to the following multiple-choice question based on the video and the subtitles. "
        f"{ASK}\n{question.question}\n{option_lines(question)}\nThe best answer is:"
    )


ADAPTER = Adapter(
    dataset="lmms-lab/Video-MME",
    split="test",
    tables={"": ("videomme/test-*.parquet",)},
    read=read,
    counts={"": 2700},
    download=("videomme/*.parquet", "*.zip"),
    num_options=(4, 4),
    prompts={"official": official, "lmms_eval": lmms_eval},
    subtitle_prompts={"official": official, "lmms_eval": lmms_eval_with_subtitles},
)
