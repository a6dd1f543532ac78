"""Every snippet of the README does what it says, against a loopback Hub (`make` targets: see `.ci/run`)."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dataset_builder.__main__ import main as dataset_builder
from recipes.init_checkpoint import build_tiny_base

from ..evaluation.test_benchmarks import mvbench, videomme
from .server import loopback_hub
from .test_publishing import RESULT


ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
# The commands are for GPUs; these flags let them run here, on a tiny model.
TRAIN_HERE = "--use_cpu true --bf16 false --max_steps 2 --num_frames 4 --per_device_eval_batch_size 2 --eval_answers 2"
HERE = {
    "accelerate": TRAIN_HERE,
    # Benchmarks are small copies in this folder.
    "evaluation": "--data_root copies --allow_subset --num_workers 0 --max_new_tokens 4",
    "evaluation.diagnostics": "--max_questions 2 --protocol uniform4 --budgets 1 --samples 100 --max_new_tokens 4",
}

# What stands before a snippet that continues the reader's own code.
BATCH = """
from datasets import load_dataset
from modeling_storms import StormsForConditionalGeneration, StormsProcessor
from recipes.collator import StormsCollator
from recipes.targets import encode_targets
model = StormsForConditionalGeneration.from_pretrained("storms-7b")
collator = StormsCollator(StormsProcessor.from_pretrained("storms-7b"), "stage1", num_target_frames=4)
batch = collator(load_dataset("thoughts", split="train").to_list()[:2])
batch.pop("row_seeds")
media = [batch.pop(name) for name in ("target_pixel_values", "target_grid_thw", "target_media_per_row")]
targets = encode_targets(model, *media, 8)
"""
BEFORE = {"output = model(**batch": BATCH}
AFTER = {
    'AutoModel.from_pretrained("org/storms-7b"': "print(out.latent_lengths, out.latent_stop_reasons)",
    'load_dataset("thoughts"': "print(len(train), train[0]['options'])",
    "output = model(**batch": "print(model.lm_head.weight.grad.norm() > 0)",
}
PRINTED = {
    'AutoModel.from_pretrained("org/storms-7b"': "tensor([8]) ['budget']",  # what its comments promise
    'load_dataset("thoughts"': "cup'",
    "output = model(**batch": "tensor(True)",
}


@pytest.fixture
def reader(tmp_path, clip):
    """Someone who has installed the project, with a folder of their own."""
    base, processor = build_tiny_base()
    base.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    flags = ["--world", "shell_game", "--num_rows", "8", "--validation_fraction", "0.25", "--test_fraction", "0.25"]
    dataset_builder(["build", *flags, "--output", str(tmp_path / "published")])
    folder = tmp_path / "reader"
    folder.mkdir()
    (folder / "recipes").symlink_to(ROOT / "recipes")
    (folder / "clip.mp4").write_bytes(clip.read_bytes())
    for copy in (videomme, mvbench):
        copy(folder / "copies" / copy.__name__, clip.read_bytes())
    (folder / "results.json").write_text(json.dumps({"results": [RESULT]}))
    with loopback_hub() as hub:
        for repo_id, source in (
            ("Qwen/Qwen2.5-VL-7B-Instruct", "base"),
            ("datasets/org/storms-thought-videos", "published"),
        ):
            paths = [
                path for path in (tmp_path / source).rglob("*") if path.is_file() and ".staging" not in path.parts
            ]
            hub.create(repo_id)
            hub.commits[repo_id][0][1].update(
                {path.relative_to(tmp_path / source).as_posix(): path.read_bytes() for path in paths}
            )
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
        environment |= {"HF_TOKEN": "hf_test", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        environment["PYTHONPATH"] = str(ROOT)

        def run(*command):
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=600
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
            return done.stdout

        yield run, folder, hub


@pytest.mark.slow
def test_every_snippet_runs_as_it_stands(reader):
    run, folder, hub = reader
    lines = [row for language, text in SNIPPETS if language == "json" for row in text.splitlines()]
    for row in lines:  # questions about the reader's own videos
        video = folder / "my_videos" / json.loads(row)["video"]
        video.parent.mkdir(parents=True)
        video.write_bytes((folder / "clip.mp4").read_bytes())
    (folder / "my_videos" / "questions.jsonl").write_text("\n".join(lines))

    num_run = 0
    # Shell first: it makes what the others load.
    for text in [text for language, text in SNIPPETS if language == "bash"]:
        for line in text.replace("\\\n", "").splitlines():
            command = shlex.split(line, comments=True)
            if command[:1] == ["make"]:
                assert f"\n{command[1]}:" in (ROOT / "Makefile").read_text()
            elif command:
                command += shlex.split(HERE.get(command[2 if command[1] == "-m" else 0], ""))
                run(*command)
                num_run += 1
    assert num_run >= 8
    num_run = 0
    for text in [text for language, text in SNIPPETS if language == "python"]:
        (marker,) = [name for name in AFTER if name in text]
        printed = run(sys.executable, "-c", f"{BEFORE.get(marker, '')}\n{text}\n{AFTER[marker]}")
        assert PRINTED[marker] in printed
        num_run += 1
    assert num_run == len(AFTER)

    assert {"org/storms-7b", "datasets/org/name", "spaces/org/storms-demo"} <= set(hub.commits)
    assert list(hub.tags["org/storms-7b"]) == ["v1"]
    assert "| Shell game, accuracy | 62.5 |" in hub.tree("org/storms-7b")[1]["README.md"].decode()


def test_no_snippet_is_left_out():
    fences = re.findall(r"^```(\w*)$", README, re.MULTILINE)
    assert {name for name in fences if name} == {"bash", "python", "json"}
    assert len([name for name in fences if name]) == len(SNIPPETS)
    # The one without a language is a drawing.
    assert (len(fences) - 2 * len(SNIPPETS)) == 2
