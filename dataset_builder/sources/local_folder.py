"""Source `local_folder`: videos in a folder, questions in a JSONL or CSV file."""

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..schema import SPLITS, Rejected
from .questions import Refused, file_stat, question_row, split_of


logger = logging.get_logger(__name__)

REQUIRED = ("video", "question", "answer")
OPTIONAL = ("options", "id", "video_id", "start", "end", "license", "split", "plan")


def list_rows(
    questions: Path,
    video_root: Path,
    license: str,
    seed: int,
    fractions: Mapping[str, float],
    is_excluded: Callable[[str], bool],
) -> Iterator[dict[str, Any] | Refused]:
    """Read questions, one JSON object a line (.jsonl) or one row a line (.csv, with a header).

    Columns: `video` (path in the video folder), `question`, `answer` (letter, option text, or free text), and
    optionally `options` (a list; in a CSV a JSON list, or texts separated by "|"), `id`, `video_id`, `start` and `end`
    (seconds), `license`, `split`, `plan`. Others are ignored, and named once in the log.

    Args:
        questions (`Path`): the file.
        video_root (`Path`): folder that the paths are relative to.
        license (`str`): of rows that state none.
        seed (`int`), fractions (`Mapping[str, float]`): split of rows that state none, by their video.
        is_excluded (`Callable`): whether a video belongs to an evaluation set.

    Raises:
        ValueError: if the file is missing, is neither, or lacks a required column in every row.
    """
    ignored: set[str] = set()
    seen: set[str] = set()
    for place, fields in _read(questions):
        if isinstance(fields, str):
            yield Refused(place, "bad_question", fields)
            continue
        ignored |= set(fields) - {*REQUIRED, *OPTIONAL}
        try:
            row = _row(place, fields, video_root, license, seed, fractions)
            if is_excluded(row["video_path"]) or is_excluded(row["video_id"]):
                raise Rejected("in_evaluation_set", "its video occurs in the list of excluded videos")
            if row["id"] in seen:
                raise Rejected("duplicate_id", f"saw id {row['id']!r} before, expected each once")
        except Rejected as refused:
            yield Refused(str(fields.get("id") or place), refused.reason, refused.detail)
            continue
        seen.add(row["id"])
        yield row
    if ignored:
        logger.warning(f"{questions.name}: columns {sorted(ignored)} are ignored; known: {(*REQUIRED, *OPTIONAL)}.")


def _read(questions: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Place and fields of each line; a text that says what is wrong, instead of the fields of a bad one."""
    if not questions.is_file():
        raise ValueError(f"--questions {str(questions)!r}: there is no such file.")
    if questions.suffix not in (".jsonl", ".csv"):
        raise ValueError(f"--questions {questions.name!r}: expected a .jsonl or .csv file.")
    with questions.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if questions.suffix == ".jsonl":
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        fields = json.loads(line)
                    except (ValueError, RecursionError) as error:
                        fields = f"not JSON: {error}"
                    if not isinstance(fields, dict | str):
                        fields = f"saw a JSON {type(fields).__name__}, expected an object"
                    yield f"{questions.name}:{number}", fields
            return
        reader = csv.DictReader(file)
        missing = set(REQUIRED) - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"--questions {questions.name!r} lacks the columns {sorted(missing)} in its header.")
        csv.field_size_limit(2**31 - 1)
        for fields in reader:
            place = f"{questions.name}:{reader.line_num}"
            if None in fields:
                yield place, "more cells than the header has columns"
            else:
                yield place, {name: text for name, text in fields.items() if text}


def _row(
    place: str, fields: dict[str, Any], video_root: Path, license: str, seed: int, fractions: Mapping[str, float]
) -> dict[str, Any]:
    missing = [name for name in REQUIRED if fields.get(name) in (None, "")]
    if missing:
        raise Rejected("bad_question", f"{place} lacks {', '.join(missing)}")
    options = fields.get("options") or []
    if isinstance(options, str):
        try:
            options = json.loads(options) if options.lstrip().startswith("[") else options.split("|")
        except ValueError as error:
            raise Rejected("bad_question", f"{place}: its options are not a JSON list: {error}") from error
    texts = [value for name, value in fields.items() if name in (*REQUIRED, *OPTIONAL) and name != "options" and value]
    for value in (*texts, *(options if isinstance(options, list) else [options])):
        if type(value) not in (str, int, float):
            raise Rejected("bad_question", f"{place}: saw {value!r:.80}, expected text or a number")
    video_path = str(fields["video"])
    if Path(video_path).is_absolute() and Path(video_path).is_relative_to(video_root.resolve()):
        video_path = Path(video_path).relative_to(video_root.resolve()).as_posix()
    video_id = str(fields.get("video_id") or re.sub(r"\.\w+$", "", video_path))
    split = str(fields.get("split") or split_of(video_id, seed, fractions))
    if split not in SPLITS:
        raise Rejected("bad_question", f"{place}: saw split {split[:80]!r}, expected one of {', '.join(SPLITS)}")
    content = json.dumps([video_path, fields["question"], options, fields.get("start"), fields.get("end")])
    try:
        start, end = (float(fields[name]) if fields.get(name) not in (None, "") else None for name in ("start", "end"))
    except (OverflowError, ValueError) as error:
        raise Rejected("bad_question", f"{place}: start and end must be seconds: {error}") from error
    return question_row(
        row_id=str(fields.get("id") or f"local-{hashlib.sha256(content.encode()).hexdigest()[:16]}"),
        source="local_folder",
        video_path=video_path,
        video_id=video_id,
        question=str(fields["question"]),
        options=options,
        answer=str(fields["answer"]),
        license=str(fields.get("license") or license),
        split=split,
        video_stat=file_stat(video_root, video_path),
        start=start,
        end=end,
        source_plan=str(fields.get("plan") or ""),
    )
