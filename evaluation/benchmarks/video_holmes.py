"""Video-Holmes (arXiv 2505.21374): 1,837 questions of seven types about 270 suspense short films."""

from .adapter import Adapter, Row, letter_answer, located, option_lines
from .base import Prompt, Question
from .files import Files


def read(row: Row, table: str, row_idx: int, files: Files, subtitles: bool) -> Question:
    options = {letter: str(text).strip() for letter, text in sorted(row["Options"].items()) if text is not None}
    return Question(
        id=f"{row['Question ID']}" if row.get("Question ID") else f"{row['video ID']}-{row_idx}",
        question=row["Question"].strip(),
        answer=letter_answer(row["Answer"], options),
        options=options,
        video_id=row["video ID"],
        categories={"type": row["Question Type"]},
        **located(files, f"{row['video ID']}.mp4"),
    )


def official_thinking(question: Question) -> Prompt:
    """As `evaluate.py` of the repository asks; it has no prompt without thinking."""
    options = ", ".join(f"{letter}: {text}" for letter, text in question.options.items())
    return Prompt(
        "Based on the given video, reason and answer the single-choice question. Provide your reasoning between the "
        "<think> and </think> tags, and then give your final answer between the <answer> and </answer> tags. "
        f"The question is: {question.question}. The options are: {options}. Your answer:"
    )


def lmms_eval(question: Question) -> Prompt:
    """Its task `video_holmes`."""
    return Prompt(
        f"Question: {question.question}\n{option_lines(question)}\n"
        "Select the best answer to the following multiple-choice question based on the video. Respond with only the "
        "letter (A, B, C, D, E, or F) of the correct option."
    )


def lmms_eval_thinking(question: Question) -> Prompt:
    """Its task `video_holmes_reasoning`."""
    return Prompt(
        f"Question: {question.question}\n{option_lines(question)}\n"
        "Please perform a detailed reasoning based on the provided video frames to answer the following "
        "multiple-choice question selecting the best option from A through F and providing your final response "
        "strictly in the format: 'Final Answer: <letter>'."
    )


ADAPTER = Adapter(
    dataset="TencentARC/Video-Holmes",
    split="test",
    tables={"": ("test_Video-Holmes.json",)},
    read=read,
    counts={"": 1837},
    download=("test_Video-Holmes.json", "videos.zip"),
    prompts={"lmms_eval": lmms_eval},
    thinking_prompts={"official": official_thinking, "lmms_eval": lmms_eval_thinking},
)
