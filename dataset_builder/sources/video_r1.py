"""Source `video_r1`: the video rows of Video-R1's training data (arXiv 2503.21776)."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..schema import Rejected
from .questions import Refused, file_stat, question_row, split_of


PROBLEM_TYPES = ("multiple choice", "free-form")


def list_rows(
    questions: Path,
    video_root: Path,
    license: str,
    seed: int,
    fractions: Mapping[str, float],
    is_excluded: Callable[[str], bool],
) -> Iterator[dict[str, Any] | Refused]:
    """Read `Video-R1-260k.json` or `Video-R1-COT-165k.json` (whose `process` becomes the plan that the source knows).

    Args: see `local_folder.list_rows`; `video_root` is the folder that holds the subsets' folders.

    Yields:
        Question rows and refused ones. Image rows are passed over: this dataset is about video.

    Raises:
        ValueError: if the file is missing or not a JSON list of objects.
    """
    if not questions.is_file():
        raise ValueError(f"--questions {str(questions)!r}: there is no such file. Expected Video-R1's JSON.")
    try:
        entries = json.loads(questions.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"--questions {questions.name!r} is not JSON: {error}. Was its download cut short?"
        ) from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"--questions {questions.name!r}: expected a JSON list of objects, as Video-R1 publishes it.")
    seen: set[str] = set()
    for place, entry in enumerate(entries):
        if entry.get("data_type") == "image":
            continue
        row_id = f"video_r1-{entry.get('problem_id', f'at-{place}')}"
        try:
            row = _row(row_id, entry, video_root, license, seed, fractions)
            if is_excluded(row["video_path"]):
                raise Rejected("in_evaluation_set", "its video occurs in the list of excluded videos")
            if row_id in seen:
                raise Rejected("duplicate_id", f"saw id {row_id!r} before, expected each once")
        except Rejected as refused:
            yield Refused(row_id, refused.reason, refused.detail)
            continue
        seen.add(row_id)
        yield row


def _row(
    row_id: str, entry: dict[str, Any], video_root: Path, license: str, seed: int, fractions: Mapping[str, float]
) -> dict[str, Any]:
    if entry.get("data_type") != "video":
        raise Rejected("bad_question", f"saw data_type {entry.get('data_type')!r:.80}, expected 'video' or 'image'")
    if entry.get("problem_type") not in PROBLEM_TYPES:
        raise Rejected("problem_type", f"saw {entry.get('problem_type')!r:.80}, expected one of {PROBLEM_TYPES}")
    texts: dict[str, Any] = {name: entry.get(name) for name in ("path", "problem", "solution")}
    if not all(isinstance(text, str) and text.strip() for text in texts.values()):
        raise Rejected("bad_question", f"saw {texts!r:.200}, expected texts")
    solution = re.fullmatch(r"\s*<answer>(.*)</answer>\s*", texts["solution"], re.DOTALL)
    if solution is None:
        raise Rejected("bad_answer", f"saw solution {texts['solution']!r:.80}, expected <answer>...</answer>")
    options = entry.get("options") or []
    if not isinstance(options, list) or bool(options) != (entry["problem_type"] == "multiple choice"):
        raise Rejected("bad_question", f"saw options {options!r:.80} for a {entry['problem_type']} problem")
    video_path = re.sub(r"^(\./)+", "", texts["path"])
    video_id = re.sub(r"\.\w+$", "", video_path)
    plan = re.fullmatch(r"\s*<think>(.*)</think>\s*", str(entry.get("process", "")), re.DOTALL)
    return question_row(
        row_id=row_id,
        source="video_r1",
        video_path=video_path,
        video_id=video_id,
        question=texts["problem"],
        options=options,
        # A letter by the format, even where an option's text is a letter too.
        answer=f"({solution[1].strip()})" if re.fullmatch(r"\s*[A-J]\s*", solution[1]) and options else solution[1],
        license=license,
        split=split_of(video_id, seed, fractions),
        video_stat=file_stat(video_root, video_path),
        source_plan=plan[1].strip() if plan else "",
    )
