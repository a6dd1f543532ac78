"""A split of any dataset of the builder's schema, such as the simulated worlds that `dataset_builder` renders.

Questions are the contract's rows (`dataset_builder/schema.py`). A video is the row's bytes, or `video_path` under a
given folder.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dataset_builder.schema import LETTERS, is_machine_path

from .adapter import check_ids, draw_questions
from .base import Benchmark, Question
from .files import open_files


COLUMNS = (
    *("id", "source", "question", "options", "answer"),
    *("video_id", "video", "video_path", "video_start", "video_end"),
)


def load_dataset_split(
    name: str,
    dataset: str,
    split: str = "test",
    revision: str | None = None,
    video_root: str | None = None,
    max_questions: int | None = None,
    cache_dir: str | None = None,
) -> Benchmark:
    """Read a split.

    Args:
        name (`str`): of the benchmark.
        dataset (`str`): folder that `dataset_builder build` wrote, or Hub id.
        split (`str`): of it.
        revision (`str`, *optional*): of the Hub's.
        video_root (`str`, *optional*): folder of `video_path`, for rows without the video's bytes.
        max_questions, cache_dir: see `load_benchmark`.

    Raises:
        ValueError: if there is no such dataset or split, a row breaks the contract, or no video is there.
    """
    files, commit = open_files(dataset, revision, (f"data/{split}-*.parquet",), Path(cache_dir) if cache_dir else None)
    if video_root is not None and not Path(video_root).is_dir():
        raise ValueError(f"{name}: --video_root {video_root}: there is no such folder.")
    source, rows = files.table((f"data/{split}-*.parquet",), COLUMNS)
    questions = []
    for row_idx, row in enumerate(rows):
        try:
            questions.append(_question(row, video_root))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            column = f"it has no column {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"{name}, row {row_idx} of {source}: {column}. Check it with `python -m dataset_builder validate`."
            ) from error
    check_ids(name, questions)
    if not questions:
        raise ValueError(f"{name}: {dataset} has no rows in its split {split}. Choose another split.")
    is_subset = max_questions is not None and max_questions < len(questions)
    if max_questions is not None:
        questions = draw_questions(questions, max_questions)
    if all(one.failure for one in questions):
        raise ValueError(
            f"{name}: none of the videos of {len(questions)} questions is there, as {questions[0].failure!r}. Give "
            "--video_root, or build the dataset with --embed_video."
        )
    return Benchmark(name, dataset, split, questions, commit, is_subset=is_subset)


def _question(row: Mapping[str, Any], video_root: str | None) -> Question:
    options = dict(zip(LETTERS, row["options"]))
    if options and row["answer"] not in options:
        raise ValueError(f"saw answer {row['answer'][:80]!r}, expected one of {', '.join(options)}")
    if len(row["options"]) == 1 or len(row["options"]) > len(LETTERS):
        raise ValueError(f"saw {len(row['options'])} options, expected none or 2 to {len(LETTERS)}")
    if not row["question"].strip() or not row["answer"].strip():
        raise ValueError("the question or its answer is empty")
    video: str | bytes = (row["video"] or {}).get("bytes") or b""
    if not video and video_root is not None and not is_machine_path(row["video_path"]):
        path = Path(video_root) / row["video_path"]
        video = str(path) if path.is_file() else b""
    return Question(
        id=row["id"],
        question=row["question"].strip(),
        answer=row["answer"].strip(),
        options=options,
        video_id=row["video_id"],
        video=video,
        start=row["video_start"],
        end=row["video_end"],
        # Simulated rows lie in a folder of their world's name: `bounce/simulated-bounce-0-test-00001.mp4`.
        categories={"source": row["source"], "folder": row["video_path"].rpartition("/")[0]},
        failure="" if video else f"missing video: {row['video_path']}",
    )
