"""Staging: each row's result of each stage in a file of its own, so that a killed build continues where it was.

    .staging/manifest.json              the command's settings, and each stage's
    .staging/rows.jsonl                 the source's rows in order, and the ones it refused
    .staging/{stage}/{row}-{key}.json   one row's columns, details or rejection
    .staging/media/{sha256}             videos and images, by their content

A record's key is a hash of the stage's settings and of the columns it read. So a changed prompt or option redoes the
stages that depend on it, and no others, and changing it back costs nothing.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .stages import Stage, digest


MEDIA_COLUMNS = ("video", "keyframes", "thought_video")


class StagingError(RuntimeError):
    """The staging folder can't be used as it is; says why and what to do."""


@dataclass
class Progress:
    """How far a row got. `columns` hold media as `{"sha256", "size"}`, not as bytes."""

    columns: dict[str, Any]
    details: dict[str, dict[str, Any]] = field(default_factory=dict)  # by stage
    rejection: dict[str, Any] | None = None  # {"stage", "reason", "detail", "transient"}
    missing: str | None = None  # the first stage without a result
    last_record: Path | None = None


class Staging:
    """The `.staging` folder of one output folder. Safe to use from several processes at once.

    Args:
        output (`str` or `Path`): the output folder; on a cluster, one that all workers share.
    """

    def __init__(self, output: str | Path):
        self.folder = Path(output) / ".staging"
        self.manifest = self.folder / "manifest.json"

    def write_atomically(self, path: Path, data: bytes) -> None:
        """Write a file under another name and rename it: readers see all of it or nothing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / "tmp" / uuid.uuid4().hex
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for one build; what a killed one left half-written is removed.

        Raises:
            StagingError: if another process holds it: two builds would publish over each other.
        """
        import fcntl  # not on Windows, where decord and everything else here work: only building needs it

        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as file:
            try:
                # Unlike flock, this lock dies with the process that took it, even if its forked workers live on.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                raise StagingError(
                    f"Another build is writing to {self.folder.parent}. Wait for it, or choose another --output."
                ) from error
            shutil.rmtree(self.folder / "tmp", ignore_errors=True)
            yield

    def put_media(self, data: bytes) -> dict[str, Any]:
        """Store a file's bytes by their content; returns the reference that records hold."""
        sha256 = hashlib.sha256(data).hexdigest()
        path = self.folder / "media" / sha256
        if not path.exists() or path.stat().st_size != len(data):
            self.write_atomically(path, data)
        return {"sha256": sha256, "size": len(data)}

    def get_media(self, reference: Mapping[str, Any]) -> dict[str, Any]:
        """The `{"bytes", "path"}` of a reference, as `datasets` stores media.

        Raises:
            StagingError: if the file changed since it was written.
        """
        path = self.folder / "media" / reference["sha256"]
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != reference["sha256"]:
            raise StagingError(f"{path} is damaged: its content no longer has that hash. Delete it and build again.")
        return {"bytes": data, "path": None}

    def load(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Columns with their media's bytes in place of references."""

        def resolve(value: Any) -> Any:
            if isinstance(value, list):
                return [resolve(one) for one in value]
            return self.get_media(value) if value is not None else None

        return {name: resolve(value) if name in MEDIA_COLUMNS else value for name, value in columns.items()}

    def write(self, path: Path, result: Mapping[str, Any]) -> None:
        """Stage one row's result: media first, the record that refers to them last."""

        def store(value: Any) -> Any:
            if isinstance(value, list):
                return [store(one) for one in value]
            return self.put_media(value["bytes"]) if value is not None else None

        record = {name: store(value) if name in MEDIA_COLUMNS else value for name, value in result.items()}
        self.write_atomically(path, json.dumps(record, sort_keys=True).encode())

    def read(self, path: Path) -> dict[str, Any] | None:
        """A staged record, or None where there is none or only part of one (a crash of the machine can leave that)."""
        try:
            record = json.loads(path.read_bytes())
            references = [record[name] for name in MEDIA_COLUMNS if record.get(name) is not None]
            for reference in [one for each in references for one in (each if isinstance(each, list) else [each])]:
                if (self.folder / "media" / reference["sha256"]).stat().st_size != reference["size"]:
                    return None
        except (FileNotFoundError, ValueError):
            return None
        return record

    def record_path(self, stage: Stage, columns: Mapping[str, Any]) -> Path:
        """Where one row's result of a stage belongs, given the columns the row has so far."""
        row_id = columns["id"]
        read = {name: columns[name] for name in stage.inputs}
        key = digest([stage.fingerprint, row_id, read])[:24]
        return self.folder / stage.name / f"{re.sub(r'[^A-Za-z0-9._-]', '_', row_id)[:80]}-{key}.json"

    def progress(self, row: Mapping[str, Any], stages: Sequence[Stage]) -> Progress:
        """Follow a source row through the stages as far as results are staged."""
        progress = Progress(dict(row))
        for stage in stages:
            path = self.record_path(stage, progress.columns)
            record = self.read(path)
            if record is None:
                progress.missing = stage.name
                break
            progress.last_record = path
            progress.details[stage.name] = json.loads(record["details"])
            if record["rejection"] is not None:
                progress.rejection = {"stage": stage.name, **json.loads(record["rejection"])}
                break
            progress.columns.update({name: record[name] for name in stage.outputs})
        return progress

    def forget_rejection(self, row: Mapping[str, Any], stages: Sequence[Stage]) -> None:
        """Remove a row's rejection if it may pass another time: for a passing reason, or by a teacher."""
        progress = self.progress(row, stages)
        if progress.rejection is not None and progress.last_record is not None:
            was_asked = "attempts" in progress.details[progress.rejection["stage"]]
            if progress.rejection["transient"] or was_asked:
                progress.last_record.unlink(missing_ok=True)


class StagedStage:
    """A stage that skips rows it has done and stages each new result at once. What engines run.

    Args:
        output (`str`): the output folder.
        stages (`Sequence[Stage]`): all stages in order.
        stage_idx (`int`): the one to run; those before it have run.
    """

    def __init__(self, output: str, stages: Sequence[Stage], stage_idx: int):
        self.staging = Staging(output)
        self.earlier, self.stage = tuple(stages[:stage_idx]), stages[stage_idx]

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        """Batch of one column, `row`: source rows as JSON. The same comes back."""
        rows = [str(row) for row in batch["row"]]
        pool = ThreadPoolExecutor(self.stage.concurrency)
        try:
            list(pool.map(self._process, rows))
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure nothing new is begun
        return {"row": rows}

    def _process(self, row: str) -> None:
        progress = self.staging.progress(json.loads(row), self.earlier)
        if progress.rejection is not None or progress.missing is not None:
            return
        path = self.staging.record_path(self.stage, progress.columns)
        if self.staging.read(path) is not None:
            return
        names = dict.fromkeys(("id", *self.stage.inputs))
        inputs = self.staging.load({name: progress.columns[name] for name in names})
        try:
            result = self.stage({name: [value] for name, value in inputs.items()})
        except Exception as error:
            error.add_note(
                f"(In stage {self.stage.name!r}, row {inputs['id']!r}. Finished rows are kept. To go on without it, "
                "name its video in a file for --exclude_videos.)"
            )
            raise
        self.staging.write(path, {name: values[0] for name, values in result.items()})
