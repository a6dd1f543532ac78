"""Builds, in this process and in others, and the media they are given."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dataset_builder.__main__ import main
from dataset_builder.thought_video import encode_video

from ..conftest import moving_disc


@pytest.fixture
def build(tmp_path):
    """Runs a command in this process; returns the ledger, if it published."""

    def run(command: str, *flags, output="out"):
        folder = tmp_path / output
        main([command, "--output", str(folder), *map(str, flags)])
        return json.loads((folder / "ledger.json").read_text()) if (folder / "ledger.json").exists() else None

    return run


def start(*arguments, **environment) -> subprocess.Popen:
    """A command in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "dataset_builder", *map(str, arguments)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"},
    )


def published(folder: Path) -> dict[str, bytes]:
    """All files of a built folder but its staging."""
    paths = [path for path in folder.rglob("*") if path.is_file() and ".staging" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def staged(folder: Path) -> dict[str, set[str]]:
    """Names of staged records by stage."""
    stages = ("videos", "keyframes", "plans", "thought_videos", "quality")
    return {stage: {path.name for path in (folder / ".staging" / stage).glob("*.json")} for stage in stages}


@pytest.fixture
def videos(tmp_path):
    """Makes a folder of videos with one question each, and returns it: `videos({"a.mp4": bytes})`."""

    def make(files: dict[str, bytes], **columns) -> Path:
        folder = tmp_path / "videos"
        folder.mkdir(exist_ok=True)
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        lines = [
            {"id": Path(name).stem, "video": name, "question": "Where does the disc go?", "options": ["left", "right"]}
            | {"answer": "B"}
            | columns
            for name in files
        ]
        (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return make


@pytest.fixture
def disc_videos(videos) -> Path:
    """Six good videos, all different."""
    return videos({f"disc-{seed}.mp4": encode_video(moving_disc(seed=seed), 12) for seed in range(6)})
