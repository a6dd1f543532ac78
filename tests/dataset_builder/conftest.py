"""Builds, in this process and in others, and the media they are given."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dataset_builder.__main__ import main
from dataset_builder.thought_video import encode_video


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


def moving_disc(num_frames=24, height=96, width=128, seed=0) -> np.ndarray:
    """A disc that crosses a patterned background, `(num_frames, height, width, 3)`."""
    generator = np.random.default_rng(seed)
    shade = generator.integers(60, 200, (-(-height // 16), -(-width // 16), 3), dtype=np.uint8)
    background = shade.repeat(16, 0).repeat(16, 1)[:height, :width]
    frames = np.repeat(background[None], num_frames, axis=0)
    rows, columns = np.mgrid[:height, :width]
    for frame_idx, frame in enumerate(frames):
        x = width * (frame_idx + 0.5) / num_frames
        frame[(rows - height / 2) ** 2 + (columns - x) ** 2 < (height / 6) ** 2] = (220, 30, 30)
    return frames


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
