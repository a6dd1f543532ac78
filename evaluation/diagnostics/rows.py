"""The rows that a checkpoint is put on trial with: whole videos with all their questions, in batches."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ..benchmarks.base import Question
from ..benchmarks.files import open_files
from ..benchmarks.simulated import load_dataset_split
from ..prompts import storms_prompt
from ..protocols import Protocol, read_clip


@dataclass(frozen=True)
class Row:
    """A question, and what the dataset's builder made for it.

    Args:
        question (`Question`): what is asked.
        keyframes (`tuple[bytes, ...]`): image files; may be none.
        thought_video (`bytes`): a video file; may be empty.
        free_form_chance (`float`): how often a guess is right where there are no options.
    """

    question: Question
    keyframes: tuple[bytes, ...] = ()
    thought_video: bytes = b""
    free_form_chance: float = 0.0

    @property
    def text(self) -> str:
        """The prompt, as in training."""
        return storms_prompt(self.question.question, list(self.question.options.values()))

    @property
    def clip(self) -> tuple[Any, ...]:
        """What rows that show the same frames share."""
        return self.question.video_id, self.question.start, self.question.end

    @property
    def chance(self) -> float:
        """How often a guess is right: one in the number of options, if there are any."""
        return 1 / len(self.question.options) if self.question.options else self.free_form_chance


def load_rows(
    dataset: str,
    split: str,
    max_questions: int | None = None,
    video_root: str | None = None,
    revision: str | None = None,
    seed: int = 0,
    free_form_chance: float = 0.0,
) -> list[Row]:
    """Rows of a dataset of the builder's schema; with `max_questions`, of whole videos drawn at random.

    Raises:
        ValueError: if there is no such dataset or split, a row breaks the contract, or no video is there.
    """
    questions: Sequence[Question] = load_dataset_split(dataset, dataset, split, revision, video_root).questions
    if max_questions is not None and max_questions < len(questions):
        videos = list(dict.fromkeys(one.video_id for one in questions))
        drawn = np.random.default_rng(seed).permutation(len(videos)).tolist()
        order = {videos[index]: rank for rank, index in enumerate(drawn)}
        questions = sorted(questions, key=lambda one: order[one.video_id])[:max_questions]
    pattern = f"data/{split}-*.parquet"
    found = open_files(dataset, revision, (pattern,))[0].table((pattern,), ("id", "keyframes", "thought_video"))[1]
    extras = {one["id"]: one for one in found}
    rows = []
    for question in questions:
        extra = extras[question.id]
        keyframes = tuple(one["bytes"] for one in extra.get("keyframes") or () if one.get("bytes"))
        rows.append(Row(question, keyframes, (extra.get("thought_video") or {}).get("bytes") or b"", free_form_chance))
    return sorted(rows, key=lambda row: (row.clip[0], row.clip[1] or 0.0, row.clip[2] or 0.0))  # a clip's in a row


def readable_batches(
    rows: Sequence[Row], batch_size: int, protocol: Protocol, left_out: list[dict[str, str]]
) -> Iterator[tuple[list[Row], dict[Any, tuple[np.ndarray, Any]]]]:
    """Rows in batches, each with the sampled frames of its clips. What can't be read goes to `left_out`."""
    batch: list[Row] = []
    frames: dict[Any, tuple[np.ndarray, Any]] = {}
    for row in tqdm(rows, desc="read and answer", unit="question", disable=None):
        try:
            if row.question.failure:
                raise ValueError(row.question.failure)
            if row.clip not in frames:
                frames[row.clip] = read_frames(row, protocol)
        except (ValueError, OSError) as error:  # VideoDecodeError is a ValueError
            left_out.append({"id": row.question.id, "reason": f"{type(error).__name__}: {error}"})
            continue
        batch.append(row)
        if len(batch) == batch_size:
            yield batch, frames
            batch, frames = [], {row.clip: frames[row.clip]}  # its next questions may follow
    if batch:
        yield batch, frames


def read_frames(row: Row, protocol: Protocol) -> tuple[np.ndarray, Any]:
    """The frames that a protocol samples of a row's clip, `(num_frames, height, width, 3)`, and their metadata."""
    one = row.question
    return read_clip(one.video, protocol.sample, one.start, one.end, one.video_fps or None)


def read_thought_video(row: Row, num_frames: int) -> tuple[np.ndarray, Any]:
    """Frames spread over a row's thought video, and their metadata."""
    return read_clip(row.thought_video, Protocol(num_frames=num_frames).sample)


def open_keyframes(row: Row) -> list[Image.Image]:
    return [Image.open(io.BytesIO(one)).convert("RGB") for one in row.keyframes]
