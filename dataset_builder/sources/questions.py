"""What all sources of real videos share: question rows, letters of options, splits, and where a video file may lie."""

import hashlib
import re
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..schema import FREE_FORM, LETTERS, MULTIPLE_CHOICE, Rejected, SchemaError, check_columns, is_machine_path


# "A. text", "A) text", "(A) text", "A: text"
OPTION_LETTER = re.compile(r"\s*\(?([A-J])\s*[.):]\s*(.*)", re.DOTALL)


@dataclass(frozen=True)
class Refused:
    """A source's row that can't become a question: kept for the ledger."""

    id: str
    reason: str
    detail: str


def strip_letters(options: Sequence[str]) -> list[str]:
    """Option texts without their letters, if all carry theirs in order: `["A. red", "B. blue"]` -> `["red", "blue"]`.

    An option that merely begins like one ("A. Lincoln" among names) is left as it is.
    """
    found = [OPTION_LETTER.fullmatch(option) for option in options]
    if all(match is not None and match[1] == letter for match, letter in zip(found, LETTERS)):
        return [match[2].strip() for match in found if match is not None]
    return [option.strip() for option in options]


def answer_letter(answer: str, options: Sequence[str]) -> str:
    """The letter of an answer given as "B", "(B)", "B. text" or an option's text.

    Raises:
        Rejected: if it names no option, or its letter and its text disagree, or it may be read either way ("A", where
            option C is "A").
    """
    answer = answer.strip()
    letters = LETTERS[: len(options)]
    texts = [option.casefold() for option in options]
    meant = {letter for letter, text in zip(letters, texts) if text == answer.casefold()}
    if re.fullmatch(r"\(?[A-Ja-j][.):]?\)?", answer):
        meant |= {answer.strip("().: ").upper()} & set(letters)
    if len(meant) == 1:
        return meant.pop()
    match = OPTION_LETTER.fullmatch(answer)
    if match and (match[1], match[2].strip().casefold()) in zip(letters, texts):
        return match[1]
    raise Rejected("bad_answer", f"saw answer {answer[:80]!r}, expected one of {letters} or the text of an option")


def question_row(
    row_id: str,
    source: str,
    video_path: str,
    video_id: str,
    question: str,
    options: Sequence[str],
    answer: str,
    license: str,
    split: str,
    video_stat: str,
    start: float | None = None,
    end: float | None = None,
    source_plan: str = "",
) -> dict[str, Any]:
    """A source row with all columns that the first stage expects.

    Raises:
        Rejected: if the question, its options or its answer break the contract.
    """
    options = strip_letters([str(option) for option in options])
    row = {
        "id": row_id,
        "source": source,
        "video_id": video_id,
        "video_path": video_path,
        "video_start": start,
        "video_end": end,
        "question": question.strip(),
        "options": options,
        "answer": answer_letter(answer, options) if options else answer.strip(),
        "problem_type": MULTIPLE_CHOICE if options else FREE_FORM,
        "license": license.strip().lower(),
        "split": split,
        "scene": "",
        "source_plan": source_plan,
        "video_stat": video_stat,
    }
    try:
        check_columns(row, row_id)
    except SchemaError as error:
        raise Rejected("bad_question", str(error)) from error
    return row


def split_of(video_id: str, seed: int, fractions: Mapping[str, float]) -> str:
    """The split of a video, by a hash of its id: all its questions land in the same one, in every run."""
    position = int(hashlib.sha256(f"{seed}/{video_id}".encode()).hexdigest()[:12], 16) / 16**12
    for split, fraction in fractions.items():
        if position < fraction:
            return split
        position -= fraction
    return "train"


def draw(rows: Iterable[Mapping[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Rows in an order drawn by their ids: taking the first n is a fair sample, the same in every run."""
    return sorted(map(dict, rows), key=lambda row: hashlib.sha256(f"{seed}/{row['id']}".encode()).digest())


def excluded_videos(lines: Iterable[str]) -> Callable[[str], bool]:
    """Whether a video occurs in a list of ids, one a line, with or without folders and file endings.

    An id with folders matches a path that ends in it; one without matches the file's name.
    """

    def plain(path: str) -> str:
        path = path.strip().casefold().replace("\\", "/").removeprefix("./")
        return re.sub(r"\.[a-z][a-z0-9]{1,3}$", "", path)

    listed = {plain(line) for line in lines if line.strip()}

    def is_excluded(video_path: str) -> bool:
        parts = plain(video_path).split("/")
        return any("/".join(parts[start:]) in listed for start in range(len(parts)))

    return is_excluded


def file_stat(root: Path, video_path: str) -> str:
    """Size and time of a video file, "" if there is none.

    Raises:
        Rejected: if the path leads out of `root`, by itself or through a link: that file was never meant to be read.
    """
    if is_machine_path(video_path):
        name = re.split(r"[\\/]", video_path)[-1]
        raise Rejected("outside_video_root", f"{name[:80]!r} has a path that leaves the video folder")
    path = root / video_path
    try:
        resolved = path.resolve()
        if not resolved.is_relative_to(root.resolve()):
            raise Rejected(
                "outside_video_root", f"{video_path[:80]!r} is a link out of the video folder: copy the file"
            )
        found = resolved.stat()
    except (OSError, ValueError):  # no such file, too long a name, a null byte
        return ""
    return f"{found.st_size}-{found.st_mtime_ns}" if stat.S_ISREG(found.st_mode) else ""


def open_root(video_root: Path, unpack_to: Path) -> tuple[Path, list[Refused]]:
    """The folder of videos; a .zip or .tar is unpacked once, without members that would land outside.

    Args:
        video_root (`Path`): a folder or an archive.
        unpack_to (`Path`): folder for unpacked archives.

    Raises:
        ValueError: if there is neither.
    """
    if video_root.is_dir():
        return video_root, []
    if not video_root.is_file():
        raise ValueError(f"--video_root {str(video_root)!r}: there is no such folder or archive.")
    found = video_root.stat()
    key = hashlib.sha256(f"{video_root.resolve()}/{found.st_size}/{found.st_mtime_ns}".encode()).hexdigest()[:16]
    folder, unfinished = unpack_to / key, unpack_to / f"{key}.partial"
    refused = []
    for name, is_safe, extract in _members(video_root):
        if not is_safe:
            refused.append(
                Refused(name, "unsafe_archive_member", "its name or link leads out of the archive's folder")
            )
        elif not folder.is_dir():
            extract(unfinished)
    if not folder.is_dir():
        unfinished.mkdir(parents=True, exist_ok=True)
        unfinished.rename(folder)
    return folder, refused


def _members(archive: Path) -> Iterator[tuple[str, bool, Callable[[Path], Any]]]:
    """Name, whether it is safe to unpack, and how, of each file in an archive."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            for info in file.infolist():
                is_link = stat.S_ISLNK(info.external_attr >> 16)
                if not info.is_dir():
                    safe = not is_machine_path(info.filename) and not is_link
                    yield info.filename, safe, partial(file.extract, info)
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as tar:
            for member in tar:
                if not member.isdir():
                    safe = not is_machine_path(member.name) and member.isreg()
                    # Early releases of Python 3.11 have no filters; what is safe here needs none.
                    options: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
                    yield member.name, safe, partial(tar.extract, member, **options)
    else:
        raise ValueError(f"--video_root {str(archive)!r} is a file, but not a .zip or .tar archive. Give a folder.")
