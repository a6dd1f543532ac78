"""EgoSchema (arXiv 2308.09126), the 500 questions with public answers, about first-person videos of three minutes.

Its authors give no prompt for language models.
"""

from .adapter import Adapter, Row, index_answer, lettered, located, option_lines
from .base import Prompt, Question
from .files import Files


def read(row: Row, table: str, row_idx: int, files: Files, subtitles: bool) -> Question:
    options = lettered(row["option"])
    return Question(
        id=str(row.get("question_idx") or row_idx),
        question=row["question"].strip(),
        answer=index_answer(row["answer"], options),
        options=options,
        video_id=row["video_idx"],
        **located(files, f"{row['video_idx']}.mp4"),
    )


def lmms_eval(question: Question) -> Prompt:
    """Its task `egoschema_subset`."""
    return Prompt(
        f"{question.question}\n{option_lines(question)}\n"
        "Answer with the option's letter from the given choices directly."
    )


ADAPTER = Adapter(
    dataset="lmms-lab/egoschema",
    split="test",
    tables={"": ("Subset/test-*.parquet",)},
    read=read,
    counts={"": 500},
    download=("Subset/*.parquet", "*.zip"),
    num_options=(5, 5),
    prompts={"lmms_eval": lmms_eval},
)
