"""A checkpoint or dataset pushed to a Hub works for a stranger who knows only its name."""

import os
import subprocess
import sys

import pytest

from .server import loopback_hub


STRANGER = """
import sys
for package in ("modeling_storms", "recipes"):
    sys.modules[package] = None
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained("org/storms-tiny", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("org/storms-tiny", trust_remote_code=True)
messages = [{"role": "user", "content": [{"type": "video", "video": sys.argv[1]}, {"type": "text", "text": "Why?"}]}]
inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True,
                                       return_tensors="pt", processor_kwargs={"num_frames": 4})
out = model.generate(**inputs, max_new_tokens=12, latent_mode="force", return_dict_in_generate=True)
print(type(model).__module__, out.latent_lengths.tolist(), out.latent_stop_reasons)
model.save_pretrained(sys.argv[2])
"""


READER = """
import sys
for package in ("dataset_builder", "modeling_storms", "model_card", "recipes"):
    sys.modules[package] = None
from datasets import load_dataset
rows = load_dataset("org/thoughts")
streamed = load_dataset("org/thoughts", streaming=True)
assert list(rows) == list(streamed) == ["train", "validation", "test"]
for split in rows:
    for row, again in zip(rows[split], streamed[split], strict=True):
        assert row["id"] == again["id"]
        assert row["thought_video"]["bytes"] == again["thought_video"]["bytes"]
        assert row["thought_video"]["bytes"][4:8] == b"ftyp"
print({split: len(rows[split]) for split in rows}, rows["train"][0]["id"])
"""


@pytest.fixture
def run(tmp_path):
    """Runs Python against a loopback Hub, with caches of its own."""
    with loopback_hub() as hub:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
        environment |= {"HF_TOKEN": "hf_test", "NO_PROXY": "127.0.0.1"}

        def call(*arguments, cwd=None):
            command = [sys.executable, *map(str, arguments)]
            return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)

        yield hub, call


def test_a_pushed_checkpoint_loads_by_name(run, tmp_path, clip):
    hub, call = run
    output = tmp_path / "storms-tiny"
    pushed = call("-m", "recipes.init_checkpoint", "--tiny", "--output", output, "--push_to_hub", "org/storms-tiny")
    assert pushed.returncode == 0, pushed.stderr
    assert "Pushed to org/storms-tiny" in pushed.stdout
    _, files = hub.tree("org/storms-tiny")
    assert files == {file.name: file.read_bytes() for file in output.iterdir()}

    done = call("-c", STRANGER, clip, tmp_path / "saved")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("transformers_modules.org")
    assert "[8] ['budget']" in done.stdout
    # What a stranger saves points at its own code, not back at the repository it came from.
    assert "--" not in (tmp_path / "saved" / "config.json").read_text()
    assert (tmp_path / "saved" / "latent_storms.py").read_bytes() == files["latent_storms.py"]


def test_a_pushed_dataset_loads_by_name_and_streams(run, tmp_path):
    hub, call = run
    flags = ["--num_rows", 10, "--seed", 1, "--output", tmp_path / "out", "--push_to_hub", "org/thoughts"]
    hub.fail(500, "POST .*/commit/", times=1)
    pushed = call("-m", "dataset_builder", "build", "--world", "bounce", *flags)
    assert pushed.returncode == 0, pushed.stdout + pushed.stderr
    assert "the Hub has an error of its own. Trying again in 1 s" in pushed.stdout
    assert "Pushed    " in pushed.stdout
    _, files = hub.tree("datasets/org/thoughts")
    data = {f"data/{path.name}" for path in (tmp_path / "out" / "data").iterdir()}
    assert set(files) == {"README.md", "ledger.json", *data}
    assert files["README.md"] == (tmp_path / "out" / "README.md").read_bytes()
    assert 'load_dataset("org/thoughts")' in files["README.md"].decode()
    done = call("-c", READER, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{'train': 8, 'validation': 1, 'test': 1} simulated-bounce-1-train-00000"
    # A smaller build replaces the files of the larger one in the same commit.
    flags += ["--num_rows", 4, "--validation_fraction", 0, "--test_fraction", 0]
    pushed = call("-m", "dataset_builder", "build", "--world", "bounce", *flags)
    assert pushed.returncode == 0, pushed.stdout + pushed.stderr
    _, files = hub.tree("datasets/org/thoughts")
    assert {name for name in files if name.startswith("data/")} == {"data/train-00000-of-00001.parquet"}
