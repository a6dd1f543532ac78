"""The demo as a newcomer runs it."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image


def run_demo(*arguments, check=True):
    command = [sys.executable, "-m", "recipes.demo", "--num_frames", "8", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=check)


def test_demo_answers_and_draws(tmp_path):
    printed = run_demo("--output", tmp_path / "out", "--num_steps", "3").stdout
    assert "49 frames, 4.1 s, 8 used" in printed
    assert "accepted=64 rejected=0" in printed
    assert "accepted=1 rejected=0" in printed
    assert "loaded as transformers_modules." in printed
    assert "8 slots, stop reason: budget" in printed
    assert "after 3 steps a stage" in printed
    for stage in ("stage1", "stage2"):
        history = json.loads((tmp_path / "out" / stage / "trainer_state.json").read_text())["log_history"]
        assert any(entry.get("loss/latent", 0) > 0 for entry in history) == (stage == "stage1")
        assert any("eval_accuracy" in entry for entry in history)
    with Image.open(tmp_path / "out" / "curves.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 20
    # And the checkpoint it made, by a path relative to here.
    folder = os.path.relpath(tmp_path / "out" / "stage2")
    assert "8 slots, stop reason: budget" in run_demo("--output", tmp_path / "again", "--model", folder).stdout
    with Image.open(tmp_path / "out" / "demo.png") as picture:
        assert picture.size == (1540, 990)
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_demo_takes_any_video(tmp_path, real_clips):
    video = real_clips / "flipping_a_pancake.mkv"
    assert "310 frames, 10.3 s, 8 used" in run_demo("--output", tmp_path, "--video", video, "--num_steps", "1").stdout


@pytest.mark.parametrize("name", ["missing.mp4", "README.md"])
def test_demo_names_a_file_it_cannot_read(tmp_path, name):
    done = run_demo("--output", tmp_path, "--video", name, check=False)
    assert done.returncode != 0
    assert f"{name}: 0 frames decoded" in done.stderr
