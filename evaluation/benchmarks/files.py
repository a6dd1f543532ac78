"""A benchmark's files, from a folder or the Hub, loose or in archives, found by the end of their path.

Archives of published benchmarks wrap their files in folders of all kinds (`data/`, `videos/`, `MVBench/video/`), so a
file is looked up as `star/Charades_segment/A.mp4`, whatever stands before that. Out of an archive comes only what is
used, one file at a time under its final name once it is whole: nothing half-written is ever believed.
"""

import hashlib
import io
import json
import os
import stat
import tarfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from shutil import copyfileobj
from typing import Any

import pyarrow.parquet as pq
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from tqdm.auto import tqdm

from dataset_builder.schema import is_machine_path


VIDEO_ENDINGS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v")
FRAME_ENDINGS = (".jpg", ".jpeg", ".png")
DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError)


@dataclass(frozen=True)
class _Place:
    """Where a file is: at `path`, or there once it came out of its archive."""

    parts: tuple[str, ...]
    path: Path
    size: int
    archive: "_Archive | None" = None
    member: Any = None
    order: int = 0


class Files:
    """The files under a folder and in its archives.

    Args:
        root (`Path`): the folder. Hidden files and folders are passed over.
        cache (`Path`): where files from archives go; defaults to a folder beside the Hub's cache.

    Raises:
        ValueError: if there is no such folder, or an archive is damaged.
    """

    def __init__(self, root: Path, cache: Path | None = None):
        if not root.is_dir():
            raise ValueError(f"{root}: there is no such folder.")
        self.root = root
        cache = cache or Path(constants.HF_HOME) / "storms_benchmarks"
        self._by_name: dict[str, list[_Place]] = defaultdict(list)
        self._by_folder: dict[str, list[_Place]] = defaultdict(list)
        self._waiting: dict[str, _Place] = {}
        archives: dict[Path, list[Path]] = defaultdict(list)
        for path in _walk(root):
            name = path.name.lower()
            if name.endswith((".zip", ".tar", ".tar.gz", ".tgz")):
                archives[path].append(path)
            elif ".tar.part" in name:  # `split` made them, `cat` would join them
                archives[path.with_name(path.name[: name.index(".part")])].append(path)
            else:
                self._add(_Place(path.relative_to(root).parts, path, path.stat().st_size))
        for whole, pieces in sorted(archives.items()):
            archive = _Archive(whole, sorted(pieces))
            for order, (name, size, member) in enumerate(archive.members()):
                parts = PurePosixPath(name).parts
                if not any(part.startswith((".", "__MACOSX")) for part in parts):
                    self._add(_Place(parts, (cache / archive.key).joinpath(*parts), size, archive, member, order))

    def _add(self, place: _Place) -> None:
        self._by_name[_stem(place.parts[-1])].append(place)
        if len(place.parts) > 1:
            self._by_folder[place.parts[-2]].append(place)

    def find(self, path: str) -> str | None:
        """Where a file is, or will be after `extract`; None if there is none.

        Args:
            path (`str`): the end of its path, such as `data/abc.mp4`. A video that is there under another ending
                (`data/abc.mkv`) is found too.

        Raises:
            ValueError: if two different files fit: either might be the wrong one.
        """
        wanted = PurePosixPath(path).parts
        same_stem = [
            place
            for place in self._by_name.get(_stem(wanted[-1]) if wanted else "", [])
            if place.parts[-len(wanted) : -1] == wanted[:-1]
        ]
        found = [place for place in same_stem if place.parts[-1] == wanted[-1]]
        if not found and path.lower().endswith(VIDEO_ENDINGS):
            found = [place for place in same_stem if place.parts[-1].lower().endswith(VIDEO_ENDINGS)]
        return self._take(path, found) if found else None

    def find_frames(self, folder: str) -> tuple[str, ...]:
        """The images in a folder, by name; where they are, or will be after `extract`. Empty if there are none."""
        wanted = PurePosixPath(folder).parts
        by_name = defaultdict(list)
        for place in self._by_folder.get(wanted[-1] if wanted else "", []):
            if place.parts[-1 - len(wanted) : -1] == wanted and place.parts[-1].lower().endswith(FRAME_ENDINGS):
                by_name[place.parts[-1]].append(place)
        return tuple(self._take(f"{folder}/{name}", by_name[name]) for name in sorted(by_name))

    def _take(self, path: str, found: list[_Place]) -> str:
        # The one that is the least deep; of equals a loose file before an archive's.
        ranked = sorted(found, key=lambda place: (len(place.parts), place.archive is not None, str(place.path)))
        place = ranked[0]
        for other in ranked[1:]:
            is_equal_rank = (other.archive is None, len(other.parts)) == (place.archive is None, len(place.parts))
            if is_equal_rank and other.size != place.size:
                raise ValueError(
                    f"{self.root}: {path!r} may be {'/'.join(place.parts)} or {'/'.join(other.parts)}, which differ. "
                    "Leave one of them there."
                )
        if place.archive is not None:  # unless it has been unpacked into a folder already
            place = next((one for one in ranked if one.archive is None and one.size == place.size), place)
        if place.archive is not None:
            self._waiting[str(place.path)] = place
        return str(place.path)

    def extract(self, paths: Iterable[str]) -> None:
        """Take those of `paths`, which `find` and `find_frames` gave, out of their archives that are still inside.

        Raises:
            ValueError: if an archive is damaged.
        """
        inside = [place for path in paths if (place := self._waiting.pop(path, None)) is not None]
        absent = [place for place in inside if not place.path.is_file() or place.path.stat().st_size != place.size]
        # In the order of the archive: a compressed tar can only be read forwards.
        absent.sort(key=lambda place: (str(place.archive and place.archive.path), place.order))
        for place in tqdm(absent, desc="extract", unit="file", delay=10, disable=None):
            assert place.archive is not None
            unfinished = place.path.with_name(f".{place.path.name}.{os.getpid()}.partial")
            place.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                place.archive.copy(place.member, unfinished)
                unfinished.replace(place.path)
            finally:
                unfinished.unlink(missing_ok=True)

    def read(self, path: str) -> bytes | None:
        """The content of a small file, such as subtitles; None if there is none."""
        found = self.find(path)
        if found is None:
            return None
        self.extract([found])
        return Path(found).read_bytes()

    def table(self, patterns: Sequence[str], columns: Sequence[str] | None = None) -> tuple[str, list[dict[str, Any]]]:
        """The rows of the files that fit the first pattern that any fits: shards in order.

        Args:
            patterns (`Sequence[str]`): of the end of a path, such as `videomme/test-*.parquet`; Parquet or JSON.
            columns (`Sequence[str]`, *optional*): to read of a Parquet file; all by default.

        Returns:
            `tuple` of the first file's path in the folder, and the rows.

        Raises:
            ValueError: if there is no such file, or it can't be read.
        """
        places = [place for same_name in self._by_name.values() for place in same_name if place.archive is None]
        for pattern in patterns:
            fitting = sorted("/".join(place.parts) for place in places if PurePosixPath(*place.parts).match(pattern))
            if fitting:
                return fitting[0], [row for name in fitting for row in self._rows(name, columns)]
        raise ValueError(
            f"{self.root} has no file like {' or '.join(patterns)}, where the questions should be. Check that it is "
            "the benchmark's whole folder."
        )

    def _rows(self, name: str, columns: Sequence[str] | None) -> list[dict[str, Any]]:
        path = self.root / name
        try:
            if path.suffix == ".parquet":
                return pq.ParquetFile(path).read(columns and list(columns)).to_pylist()
            text = path.read_text(encoding="utf-8")
            rows = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
        except ValueError as error:  # pyarrow's and json's own are both of this kind
            raise ValueError(f"{path} can't be read: {error}. Download it again.") from error
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path}: expected a JSON list of objects.")
        return rows


def open_files(
    dataset: str,
    revision: str | None = None,
    patterns: Sequence[str] | None = None,
    cache: Path | None = None,
) -> tuple[Files, str | None]:
    """The files of a folder, or of a dataset on the Hub, downloaded.

    Args:
        dataset (`str`): a folder, or a Hub id.
        revision (`str`, *optional*): branch, tag or commit of the Hub's.
        patterns (`Sequence[str]`, *optional*): which files to download; all by default.
        cache (`Path`, *optional*): see `Files`.

    Returns:
        `tuple` of the files and the Hub's commit, None for a folder.

    Raises:
        ValueError: if there is no such folder or dataset, or it can't be downloaded.
    """
    if Path(dataset).is_dir():
        if revision is not None:
            raise ValueError(f"{dataset} is a folder, which has no revision {revision!r}. Leave it out.")
        return Files(Path(dataset), cache), None
    try:
        folder = snapshot_download(
            dataset, repo_type="dataset", revision=revision, allow_patterns=list(patterns) if patterns else None
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ValueError(
            f"{dataset} is no folder, and can't be downloaded from the Hub: {error}. Check the name, accept the "
            "dataset's terms on the Hub and log in if it asks for that, or give a folder that holds it (--data_root)."
        ) from error
    return Files(Path(folder), cache), Path(folder).name


def _stem(name: str) -> str:
    return name.rsplit(".", 1)[0]  # case tells YouTube's ids apart


def _walk(root: Path) -> Iterator[Path]:
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        yield from (
            Path(folder, name) for name in sorted(names) if not name.startswith(".") and Path(folder, name).exists()
        )


class _Archive:
    """A zip, a tar, or a tar in pieces, whose members can be read one by one."""

    def __init__(self, path: Path, pieces: Sequence[Path]):
        self.path = path
        sizes = [(str(piece.resolve()), piece.stat().st_size, piece.stat().st_mtime_ns) for piece in pieces]
        self.key = f"{path.stem}-{hashlib.sha256(repr(sizes).encode()).hexdigest()[:16]}"
        try:
            self._file: zipfile.ZipFile | tarfile.TarFile
            if path.suffix.lower() == ".zip":
                self._file = zipfile.ZipFile(path)
            else:
                whole: Any = pieces[0].open("rb") if len(pieces) == 1 else io.BufferedReader(_Joined(pieces))
                self._file = tarfile.open(fileobj=whole)  # noqa: SIM115  # read for as long as this object lives
        except DAMAGED as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> ValueError:
        told = " ".join(str(error).split())
        return ValueError(f"{self.path} is damaged or not whole: {told}. Delete it and download it again.")

    def members(self) -> Iterator[tuple[str, int, Any]]:
        """Name, size and handle of each plain file. Links, and names that lead out of the archive, are passed over."""
        try:
            if isinstance(self._file, zipfile.ZipFile):
                for info in self._file.infolist():
                    is_plain = not info.is_dir() and not stat.S_ISLNK(info.external_attr >> 16)
                    if is_plain and not is_machine_path(info.filename):
                        yield info.filename, info.file_size, info
            else:
                for member in self._file:
                    if member.isreg() and not is_machine_path(member.name):
                        yield member.name, member.size, member
        except DAMAGED as error:
            raise self._damaged(error) from error

    def copy(self, member: Any, target: Path) -> None:
        """Write a member's content to a file; a zip's is checked on the way."""
        try:
            source = (
                self._file.open(member) if isinstance(self._file, zipfile.ZipFile) else self._file.extractfile(member)
            )
            assert source is not None
            with source, target.open("wb") as file:
                copyfileobj(source, file, 1 << 20)
        except DAMAGED as error:
            raise self._damaged(error) from error


class _Joined(io.RawIOBase):
    """Files one after another, as if they were one."""

    def __init__(self, pieces: Sequence[Path]):
        self._files = [piece.open("rb") for piece in pieces]
        self._sizes = [piece.stat().st_size for piece in pieces]
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: sum(self._sizes)}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        begin = 0
        for file, size in zip(self._files, self._sizes):
            if begin <= self._at < begin + size:
                file.seek(self._at - begin)
                data = file.read(min(len(buffer), size))
                buffer[: len(data)] = data
                self._at += len(data)
                return len(data)
            begin += size
        return 0

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()
