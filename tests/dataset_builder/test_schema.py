"""The contract refuses what it says it refuses, and lets through what it describes."""

import json

import pytest
from datasets import Image, List, Value, Video
from hypothesis import given
from hypothesis import strategies as st

from dataset_builder.schema import FEATURES, SchemaError, check_columns, check_row, is_machine_path


MP4 = {"bytes": b"\0\0\0\x20ftypisom" + bytes(20), "path": None}


def good_row():
    return {
        "id": "local-1",
        "source": "local_folder",
        "video_id": "clips/a",
        "video": None,
        "video_path": "clips/a.mp4",
        "video_start": None,
        "video_end": 4.5,
        "question": "What moves?",
        "options": ["a cup", "a ball"],
        "answer": "B",
        "problem_type": "multiple choice",
        "keyframes": [{"bytes": b"jpeg", "path": None}, {"bytes": b"jpeg", "path": None}],
        "keyframe_indices": [0, 8],
        "keyframe_timestamps": [0.0, 0.5],
        "reasoning_plan": "The ball moves.",
        "thought_video": MP4,
        "thought_video_fps": 12.0,
        "thought_video_num_frames": 24,
        "generator": json.dumps({"keyframes": {}}),
        "quality": "{}",
        "license": "mit",
    }


def test_columns_are_the_designs():
    text, texts = Value("string"), List(Value("string"))
    assert {
        **dict.fromkeys(("id", "source", "video_id", "video_path", "question", "answer", "problem_type"), text),
        **dict.fromkeys(("reasoning_plan", "generator", "quality", "license"), text),
        **dict.fromkeys(("video", "thought_video"), Video(decode=False)),
        **dict.fromkeys(("video_start", "video_end", "thought_video_fps"), Value("float32")),
        "options": texts,
        "keyframes": List(Image()),
        "keyframe_indices": List(Value("int32")),
        "keyframe_timestamps": List(Value("float32")),
        "thought_video_num_frames": Value("int32"),
    } == FEATURES


def test_a_good_row_passes():
    check_row(good_row())


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("id", ""),
        ("id", None),
        ("question", "  "),
        ("question", 3),
        ("options", ["a cup"]),
        ("options", ["a cup", "a cup"]),
        ("options", ["a cup", ""]),
        ("options", ["a cup", None]),
        ("options", "ab"),
        ("options", [f"option {n}" for n in range(11)]),
        ("answer", "C"),
        ("answer", "b"),
        ("answer", "AB"),
        ("problem_type", "free-form"),
        ("problem_type", "ocr"),
        ("keyframes", []),
        ("keyframes", [{"bytes": b"jpeg", "path": None}]),
        ("keyframes", [{"bytes": b"", "path": None}] * 2),
        ("keyframes", [{"bytes": None, "path": "/tmp/a.jpg"}] * 2),
        ("keyframe_indices", [8, 0]),
        ("keyframe_indices", [0, 0]),
        ("keyframe_indices", [-1, 0]),
        ("keyframe_indices", [0, 2**40]),
        ("keyframe_indices", [0, 8.5]),
        ("keyframe_timestamps", [0.5, 0.0]),
        ("keyframe_timestamps", [0.0, float("nan")]),
        ("video", {"bytes": None, "path": "a.mp4"}),
        ("video_start", -1.0),
        ("video_start", 5.0),
        ("video_path", "/data/a.mp4"),
        ("video_path", "C:\\data\\a.mp4"),
        ("video_path", "../a.mp4"),
        ("thought_video", None),
        ("thought_video", {"bytes": b"not an mp4 file", "path": None}),
        ("thought_video_fps", 0.0),
        ("thought_video_fps", float("inf")),
        ("thought_video_num_frames", 0),
        ("generator", "wan"),
        ("quality", "[1]"),
        ("license", ""),
    ],
)
def test_a_value_the_contract_forbids_is_named(column, value):
    with pytest.raises(SchemaError, match=r"Row '(local-1|None|)'"):
        check_row({**good_row(), column: value})


def test_missing_and_unknown_columns_are_named():
    row = good_row()
    del row["license"]
    with pytest.raises(SchemaError, match="missing columns \\['license'\\], unknown columns \\['licence'\\]"):
        check_row({**row, "licence": "mit"})
    with pytest.raises(SchemaError, match="unknown column 'licence'"):
        check_columns({"licence": "mit"}, "local-1")


@given(st.text(st.characters(exclude_characters="\\/:~.", codec="utf-8"), min_size=1), st.text())
def test_paths_that_leave_their_folder_are_seen(name, rest):
    assert not is_machine_path(f"folder/{name}.mp4")
    for path in (f"/{name}", f"\\{name}", f"~/{name}", f"{name}/../{rest}", f"..\\{name}", f"C:\\{name}", "file:///a"):
        assert is_machine_path(path)
