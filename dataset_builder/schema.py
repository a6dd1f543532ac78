"""The dataset's contract: its columns, what their values must satisfy, and what a refused row carries."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Features, Image, List, Value, Video


SPLITS = ("train", "validation", "test")
MULTIPLE_CHOICE, FREE_FORM = "multiple choice", "free-form"
LETTERS = "ABCDEFGHIJ"  # at most ten options

FEATURES = Features(
    {
        "id": Value("string"),
        "source": Value("string"),
        "video_id": Value("string"),
        "video": Video(decode=False),
        "video_path": Value("string"),
        "video_start": Value("float32"),
        "video_end": Value("float32"),
        "question": Value("string"),
        "options": List(Value("string")),
        "answer": Value("string"),
        "problem_type": Value("string"),
        "keyframes": List(Image()),
        "keyframe_indices": List(Value("int32")),
        "keyframe_timestamps": List(Value("float32")),
        "reasoning_plan": Value("string"),
        "thought_video": Video(decode=False),
        "thought_video_fps": Value("float32"),
        "thought_video_num_frames": Value("int32"),
        "generator": Value("string"),
        "quality": Value("string"),
        "license": Value("string"),
    }
)
NULLABLE = frozenset({"video", "video_start", "video_end"})
# A column that `recipes.cache_targets` adds: Array2D((K, hidden_size), "float32"); the card says what made it.
LATENT_TARGETS = "latent_targets"

# What stages tell each other beside the contract's columns. Staged, never published.
STAGING_FEATURES = Features(
    {
        "split": Value("string"),
        "scene": Value("string"),  # JSON that rebuilds a simulated scene; "" for real videos
        "source_plan": Value("string"),  # a plan that the source knows; "" where it knows none
        "video_stat": Value("string"),  # size and time of the file, so that a replaced one is noticed; "" if missing
        "video_num_frames": Value("int32"),
        "video_fps": Value("float32"),
        "signature": List(Value("uint8")),  # small grey thumbnails of the thought video, to find near-duplicates
    }
)
ALL_FEATURES = Features({**FEATURES, **STAGING_FEATURES})


class SchemaError(ValueError):
    """A row breaks the contract; names the row, the column, what was seen and what was expected."""


class Rejected(Exception):
    """A row can't go on. It is kept out of the dataset and into the ledger, never lost.

    Args:
        reason (`str`): a short name that the ledger counts by, for example `no_motion`.
        detail (`str`): what was seen and what was expected. No paths of this machine, no keys.
        details (`dict`, *optional*): scores, token usage and the like, kept with the row in the ledger.
        transient (`bool`): whether the same row may pass another time (a server was down); see `--retry_rejected`.
    """

    def __init__(self, reason: str, detail: str, details: dict[str, Any] | None = None, transient: bool = False):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.details, self.transient = reason, detail, details or {}, transient


def check_columns(columns: Mapping[str, Any], row_id: str) -> None:
    """Check any subset of a row's columns against the contract; what two columns must agree on, if both are there.

    Raises:
        SchemaError: on an unknown column, a wrong type, or a value the contract forbids. Publishing it would be found
            by whoever loads the dataset, or, worse, by nobody.
    """

    def fail(column: str, expected: str) -> None:
        seen = repr(columns[column])
        raise SchemaError(
            f"Row {row_id!r}, column {column!r}: saw {seen[:200]}, expected {expected}. "
            "A source or stage wrote it: correct it there and run the same command again."
        )

    for name, value in columns.items():
        if name not in ALL_FEATURES:
            raise SchemaError(f"Row {row_id!r}: unknown column {name!r}. Known: {', '.join(ALL_FEATURES)}.")
        if value is None:
            if name not in NULLABLE:
                fail(name, "a value: this column is never null")
            continue
        feature = ALL_FEATURES[name]
        if isinstance(feature, Video):
            if not _is_media(value, b"ftyp", 4) and name == "thought_video":
                fail(name, '{"bytes": an MP4 file\'s bytes, "path": None}')
            if not _is_media(value):
                fail(name, '{"bytes": the file\'s bytes, "path": None}')
        elif name == "keyframes":
            if not isinstance(value, list) or not value or not all(_is_media(one) for one in value):
                fail(name, 'a non-empty list of {"bytes": an image file\'s bytes, "path": None}')
        else:
            kind: Any = feature.feature if isinstance(feature, List) else feature
            values = value if isinstance(feature, List) else [value]
            try:
                array = pa.array(values, kind.pa_type)
            except (pa.ArrowException, TypeError, OverflowError, UnicodeError):
                fail(name, f"{kind.dtype} values")
            if not isinstance(values, list) or array.null_count:
                fail(name, f"a list of {kind.dtype} values, none of them null")
            if pa.types.is_integer(kind.pa_type) and not all(type(one) is int for one in values):
                fail(name, "whole numbers")  # pyarrow would cut 8.5 to 8
            if pa.types.is_floating(kind.pa_type) and not all(math.isfinite(one) for one in values):
                fail(name, "finite numbers")

    for name in ("id", "source", "video_id", "video_path", "question", "answer", "reasoning_plan", "license"):
        if name in columns and not columns[name].strip():
            fail(name, "text that is not empty")
    if "video_path" in columns and is_machine_path(columns["video_path"]):
        fail("video_path", "a path relative to the source's root, without '..'")
    if "split" in columns and columns["split"] not in SPLITS:
        fail("split", f"one of {', '.join(SPLITS)}")
    for name in ("video_start", "video_end"):
        if columns.get(name) is not None and columns[name] < 0:
            fail(name, "seconds from 0 on, or null")
    for name in ("id", "video_id"):
        if name in columns and re.match(r"[/\\~]|[A-Za-z]:[\\/]", columns[name]):
            fail(name, "a name that is no path of a machine")
    start, end = columns.get("video_start"), columns.get("video_end")
    if start is not None and end is not None and np.float32(end) <= np.float32(start):
        fail("video_end", f"more than video_start ({start})")
    if "problem_type" in columns:
        if columns["problem_type"] not in (MULTIPLE_CHOICE, FREE_FORM):
            fail("problem_type", f"{MULTIPLE_CHOICE!r} or {FREE_FORM!r}")
        if {"options", "answer"} <= set(columns):
            options = columns["options"]
            if columns["problem_type"] == FREE_FORM and options:
                fail("options", "none, as the problem is free-form")
            if columns["problem_type"] == MULTIPLE_CHOICE:
                if not 2 <= len(options) <= len(LETTERS) or not all(option.strip() for option in options):
                    fail("options", f"2 to {len(LETTERS)} texts, none empty")
                if len(set(options)) != len(options):
                    fail("options", "different texts")
                if columns["answer"] not in LETTERS[: len(options)] or len(columns["answer"]) != 1:
                    fail("answer", f"one of the letters {LETTERS[: len(options)]}")
    indices = columns.get("keyframe_indices")
    if indices is not None and (indices != sorted(set(indices)) or not indices or indices[0] < 0):
        fail("keyframe_indices", "ascending frame indices from 0 on, each once, at least one")
    timestamps = columns.get("keyframe_timestamps")
    if timestamps is not None and (timestamps != sorted(timestamps) or any(one < 0 for one in timestamps)):
        fail("keyframe_timestamps", "ascending seconds from 0 on")
    lengths = {name: len(columns[name]) for name in FEATURES if name.startswith("keyframe") and name in columns}
    if len(set(lengths.values())) > 1:
        raise SchemaError(f"Row {row_id!r}: {lengths} differ, expected one index and one time for each keyframe.")
    for name in ("thought_video_fps", "thought_video_num_frames", "video_num_frames", "video_fps"):
        if name in columns and columns[name] <= 0:
            fail(name, "more than 0")
    for name in ("generator", "quality"):
        if name in columns:
            try:
                is_object = isinstance(json.loads(columns[name]), dict)
            except ValueError:
                is_object = False
            if not is_object:
                fail(name, "a JSON object")


def check_row(row: Mapping[str, Any]) -> None:
    """Check a whole row: every column of the contract, no other but `latent_targets`, and what `check_columns` checks.

    Raises:
        SchemaError: see `check_columns`.
    """
    row_id = str(row.get("id", "?"))
    columns = {name: value for name, value in row.items() if name != LATENT_TARGETS}
    if set(columns) != set(FEATURES):
        missing, extra = sorted(set(FEATURES) - set(columns)), sorted(set(columns) - set(FEATURES))
        raise SchemaError(f"Row {row_id!r}: missing columns {missing}, unknown columns {extra}.")
    check_columns(columns, row_id)
    if LATENT_TARGETS in row and not _is_matrix(row[LATENT_TARGETS]):
        raise SchemaError(
            f"Row {row_id!r}, column {LATENT_TARGETS!r}: saw {repr(row[LATENT_TARGETS])[:200]}, expected finite "
            "numbers of shape (K, hidden_size). Run `python -m recipes.cache_targets` again."
        )


def is_machine_path(path: str) -> bool:
    """Whether a path leaves the folder it is relative to: absolute (POSIX, drive letter, URL) or through `..`."""
    parts = re.split(r"[\\/]", path)
    return (
        ".." in parts or parts[0] in ("", "~") or re.match(r"[A-Za-z]:|[A-Za-z][A-Za-z0-9+.-]*://", path) is not None
    )


def _is_matrix(value: Any) -> bool:
    try:
        array = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError):  # null, text, rows of unequal length
        return False
    return array.ndim == 2 and array.size > 0 and bool(np.isfinite(array).all())


def _is_media(value: Any, magic: bytes = b"", at: int = 0) -> bool:
    return (
        isinstance(value, Mapping)
        and set(value) == {"bytes", "path"}
        and value["path"] is None
        and isinstance(value["bytes"], bytes)
        and len(value["bytes"]) > 0
        and value["bytes"][at : at + len(magic)] == magic
    )
