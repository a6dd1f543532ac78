"""What a training run pushes works for a stranger at any commit, and tells nothing but what it should."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from dataset_builder.__main__ import main as dataset_builder
from recipes.init_checkpoint import InitArguments, init_checkpoint

from .server import loopback_hub


ROOT = Path(__file__).parents[2]
TOKENS = {"environment": "hf_ofTheEnvironment", "flag": "hf_ofTheCommandLine"}

# Loads every commit by its name, without our packages, and has it answer with a latent block.
STRANGER = """
import sys
for package in ("dataset_builder", "evaluation", "model_card", "modeling_storms", "recipes"):
    sys.modules[package] = None
from transformers import AutoModel, AutoProcessor
for revision in sys.argv[2:]:
    model, told = AutoModel.from_pretrained(
        "org/storms-tiny", revision=revision, trust_remote_code=True, output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"], told
    processor = AutoProcessor.from_pretrained("org/storms-tiny", revision=revision, trust_remote_code=True)
    messages = [{"role": "user", "content": [{"type": "video", "video": sys.argv[1]}, {"type": "text", "text": "?"}]}]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True,
                                           return_tensors="pt", processor_kwargs={"num_frames": 4})
    out = model.eval().generate(**inputs, max_new_tokens=16, latent_mode="force", return_dict_in_generate=True)
    print(type(model).__module__.split(".")[0], out.latent_lengths.tolist(), out.latent_stop_reasons)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint and a dataset to begin with."""
    folder = tmp_path_factory.mktemp("local")
    init_checkpoint(InitArguments(output=str(folder / "storms-init"), tiny=True))
    flags = ["--world", "shell_game", "--num_rows", "6", "--validation_fraction", "0.34", "--test_fraction", "0"]
    dataset_builder(["build", *flags, "--output", str(folder / "thoughts")])
    return folder


@pytest.fixture
def hub(folders, tmp_path):
    """A loopback Hub that holds both, and a way to run Python against it."""
    with loopback_hub() as hub:
        for repo_id, folder in (("org/storms-init", "storms-init"), ("datasets/org/thoughts", "thoughts")):
            paths = [path for path in (folders / folder).rglob("*") if path.is_file() and ".staging" not in path.parts]
            files = {path.relative_to(folders / folder).as_posix(): path.read_bytes() for path in paths}
            hub.create(repo_id)
            hub.commits[repo_id].append((hashlib.sha1(repo_id.encode() * 2).hexdigest(), files))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
        environment |= {"HF_TOKEN": TOKENS["environment"], "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}

        def call(*command):
            return subprocess.run(
                [*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
            )

        def run(*command):
            done = call(*command)
            assert done.returncode == 0, done.stderr
            return done.stdout

        hub.call, hub.run = call, run
        yield hub


def command(output, *flags):
    """Stage II as users start it."""
    return [
        *(Path(sys.executable).parent / "accelerate", "launch", "--cpu", "recipes/stage2.py", "--output_dir", output),
        *("--model_name_or_path", "org/storms-init", "--dataset_name", "org/thoughts", "--num_frames", 4),
        *("--max_steps", 4, "--save_steps", 2, "--logging_steps", 1, "--per_device_train_batch_size", 2),
        *("--learning_rate", 1e-3, "--eval_strategy", "steps", "--eval_steps", 2, "--eval_answers", 2),
        *("--use_cpu", "true", "--bf16", "false", "--disable_tqdm", "true", "--report_to", "none"),
        *("--push_to_hub", "true", "--hub_model_id", "org/storms-tiny", *flags),
    ]


def train(hub, output, *flags):
    """Run it; the commits it made after the repository's first one, oldest first."""
    printed = hub.run(*command(output, *flags))
    assert "Pushed to org/storms-tiny" in printed
    (_, first), *commits = hub.commits["org/storms-tiny"]
    assert first == {}
    return commits


def assert_tells_nothing_private(files: dict[str, bytes], *folders: Path) -> None:
    for name, data in files.items():
        for token in TOKENS.values():
            assert token.encode() not in data, name
        for folder in (*folders, ROOT, Path.home()):
            assert str(folder).encode() + b"/" not in data, name
        assert not name.endswith((".bin", ".pt", ".pth", ".pkl")), "a pickle"
        if name.endswith(".py"):
            assert data == (ROOT / "modeling_storms" / name).read_bytes()


def test_every_commit_of_a_training_run_loads_and_reasons(hub, tmp_path, folders, clip):
    output = tmp_path / "out"
    hub.fail(500, "POST .*/commit/", times=1)
    hub.fail(429, "PUT /lfs/", times=1)
    commits = train(hub, output, "--hub_token", TOKENS["flag"])
    assert sum(fault.times for fault in hub.faults) == 0
    # Step 2, step 4 unless step 2 was still on its way then, and the end.
    assert 2 <= len(commits) <= 3

    printed = hub.run(sys.executable, "-c", STRANGER, clip, *(revision for revision, _ in commits))
    assert printed.splitlines() == ["transformers_modules [8] ['budget']"] * len(commits)
    saved = [(output / f"checkpoint-{step}" / "model.safetensors").read_bytes() for step in (2, 4)]
    assert saved[0] != saved[1]
    pushed = [files["model.safetensors"] for _, files in commits]
    assert (pushed[0], pushed[-1]) == (saved[0], saved[1])

    for revision, files in commits:
        assert_tells_nothing_private(files, tmp_path, folders)
        card = ModelCard(files["README.md"].decode())
        assert card.data.base_model == "org/storms-init"
        assert card.data.datasets == ["org/thoughts"]
        assert {"storms", "stage2"} <= set(card.data.tags)
        assert 'AutoModel.from_pretrained("org/storms-tiny", trust_remote_code=True' in card.text, revision
        record = json.loads(files["training.json"])
        assert record["stage"] == "stage2"
        assert f"| optimiser steps | {record['steps']} |" in card.text
        assert {"loss/lm", "eval_loss", "eval_accuracy"} <= set(record["metrics"])
        for name, value in record["metrics"].items():
            assert f"| {name}, last logged | {value:.4g} |" in card.text
    assert json.loads(commits[-1][1]["training.json"])["steps"] == 4


@pytest.mark.slow
def test_a_token_revoked_in_mid_training_costs_no_checkpoint(hub, tmp_path):
    output = tmp_path / "out"
    hub.fail("revoked", "POST .*/commit/", times=1)
    done = hub.call(*command(output))
    assert done.returncode != 0
    assert "status 401" in done.stderr
    assert "Training goes on, and the next checkpoint will be pushed." in done.stderr
    assert f"push it by `python -m model_card push --checkpoint {output} --repo org/storms-tiny`" in done.stderr
    assert not [token for token in TOKENS.values() if token in done.stdout + done.stderr]
    for folder in (output, output / "checkpoint-2", output / "checkpoint-4"):
        assert (folder / "model.safetensors").is_file()
    assert len(hub.commits["org/storms-tiny"]) == 1

    refused = hub.call(*command(output))
    assert refused.returncode != 0
    assert "Can't make org/storms-tiny on the Hub: status 401" in refused.stderr, refused.stderr
    assert "Nothing was trained yet." in refused.stderr

    hub.tokens = set(TOKENS.values())
    printed = hub.run(sys.executable, "-m", "model_card", "push", "--checkpoint", output, "--repo", "org/storms-tiny")
    assert "tagged v1" in printed
    pushed = hub.tree("org/storms-tiny")[1]
    assert pushed["model.safetensors"] == (output / "checkpoint-4" / "model.safetensors").read_bytes()
    # Or by the training command itself, which finds that nothing is left to train.
    assert "Pushed to org/storms-tiny" in hub.run(*command(output, "--resume_from_checkpoint", "last"))


@pytest.mark.slow
def test_of_a_lora_run_only_the_merged_model_is_pushed(hub, tmp_path, folders, clip):
    pytest.importorskip("peft")
    commits = train(hub, tmp_path / "out", "--use_peft", "true")
    ((revision, files),) = commits
    assert not [name for name in files if "adapter" in name]
    assert_tells_nothing_private(files, tmp_path, folders)
    printed = hub.run(sys.executable, "-c", "import sys; sys.modules['peft'] = None\n" + STRANGER, clip, revision)
    assert printed == "transformers_modules [8] ['budget']\n"
    assert files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert files["model.safetensors"] != (folders / "storms-init" / "model.safetensors").read_bytes()
