"""Everything published works for a stranger: stock packages, no package of ours, a name on the Hub."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, close_session

from dataset_builder.__main__ import main as dataset_builder
from model_card.push import PushArguments, push, upload
from modeling_storms import StormsForConditionalGeneration
from recipes.init_checkpoint import InitArguments, init_checkpoint

from .clean import make_clean_packages
from .server import loopback_hub


TOKEN = "hf_" + "aValidTokenOfATest" * 2
DATASET = "org/storms-thought-videos"

ASK = """
def ask(model, processor, video, **options):
    messages = [{"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": "Why?"}]}]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True,
                                           return_tensors="pt", processor_kwargs={"num_frames": 4})
    return model.generate(**inputs, max_new_tokens=16, return_dict_in_generate=True, **options)
"""

LOAD = (
    ASK
    + """
from transformers import AutoModel, AutoProcessor
for revision in ("main", "v1"):
    chosen = {"revision": revision, "trust_remote_code": True}
    model = AutoModel.from_pretrained("org/storms-tiny", **chosen).eval()
    processor = AutoProcessor.from_pretrained("org/storms-tiny", **chosen)
    out = ask(model, processor, CLIP, latent_mode="force")
    print(revision, float(model.lm_head.weight[0, 0]), out.latent_lengths.tolist(), out.latent_stop_reasons)
"""
)

READ = """
import io, shutil
import decord
from datasets import load_dataset
assert shutil.which("ffmpeg") is None
rows = load_dataset("org/storms-thought-videos")
streamed = load_dataset("org/storms-thought-videos", streaming=True)
for split in rows:
    for row, again in zip(rows[split], streamed[split], strict=True):
        assert row["id"] == again["id"] and row["keyframes"][0].size == (168, 112)
        for name in ("video", "thought_video"):
            assert row[name]["bytes"] == again[name]["bytes"]
            frames = decord.VideoReader(io.BytesIO(row[name]["bytes"]))
            assert len(frames) > 8 and frames[0].shape == (112, 168, 3)
print({split: len(rows[split]) for split in rows})
"""

OFFLINE = (
    ASK
    + """
from datasets import load_dataset
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained("org/storms-tiny", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("org/storms-tiny", trust_remote_code=True)
print(ask(model, processor, CLIP, latent_mode="force").latent_lengths.tolist())
print(len(load_dataset("org/storms-thought-videos", split="train")))
"""
)

PIPELINE = """
from transformers import pipeline
pipe = pipeline("image-text-to-text", model="org/storms-tiny", trust_remote_code=True)
messages = [{"role": "user", "content": [{"type": "video", "video": CLIP}, {"type": "text", "text": "Why?"}]}]
(answer,) = pipe(text=messages, max_new_tokens=16, generate_kwargs={"latent_mode": "force"}, return_full_text=False)
print(type(pipe.model).__name__, type(answer["generated_text"]).__name__, "latent" in answer["generated_text"])
"""

OLD = """
from transformers import AutoModel, AutoProcessor
import transformers
transformers.__version__ = "5.9.1"
AutoModel.from_pretrained("org/storms-tiny", trust_remote_code=True)
AutoProcessor.from_pretrained("org/storms-tiny", trust_remote_code=True)
AutoModel.from_pretrained("org/storms-tiny", trust_remote_code=True)
"""


@pytest.fixture(scope="module")
def stranger(tmp_path_factory, clip):
    """Runs Python with stock packages against a Hub that holds a checkpoint, released twice, and a dataset."""
    folder = tmp_path_factory.mktemp("published")
    packages = make_clean_packages(folder / "packages")
    checkpoint = init_checkpoint(InitArguments(output=str(folder / "storms-tiny"), tiny=True))
    flags = ["--world", "shell_game", "--num_rows", "5", "--validation_fraction", "0.4", "--test_fraction", "0"]
    dataset_builder(["build", *flags, "--output", str(folder / "thoughts")])
    with pytest.MonkeyPatch.context() as patch, loopback_hub() as hub:
        hub.tokens = {TOKEN}
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        close_session()
        api = HfApi(endpoint=hub.endpoint, token=TOKEN)
        push(PushArguments(str(checkpoint), "org/storms-tiny"), api)
        model = StormsForConditionalGeneration.from_pretrained(checkpoint)
        torch.nn.init.constant_(model.lm_head.weight[:1, :1], 0.5)
        model.save_pretrained(checkpoint)
        push(PushArguments(str(checkpoint), "org/storms-tiny"), api)
        api.create_repo(DATASET, repo_type="dataset")
        upload(folder / "thoughts", DATASET, "Publish", "", repo_type="dataset", patterns=["**"], ignored=[], api=api)
        close_session()

        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
        environment |= {"HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        environment |= {"PATH": str(folder), "HOME": str(folder), "CUDA_VISIBLE_DEVICES": ""}

        def call(code, **variables):
            return subprocess.run(
                packages,
                input=f"CLIP = {str(clip)!r}\n{code}",
                env=environment | {"HF_ENDPOINT": hub.endpoint} | variables,
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
            )

        def run(code, **variables):
            done = call(code, **variables)
            assert done.returncode == 0, done.stderr
            return done

        yield run, call, hub


def test_a_model_reasons_and_a_revision_is_an_older_release(stranger):
    run, _, _ = stranger
    now, before = run(LOAD).stdout.splitlines()
    assert now == "main 0.5 [8] ['budget']"
    assert before.startswith("v1 ")
    assert before.endswith(" [8] ['budget']")
    assert not before.startswith("v1 0.5 ")


def test_nothing_of_ours_is_installed_there(stranger):
    run, _, _ = stranger
    code = "for name in NAMES:\n  try: __import__(name)\n  except ImportError: print(name)"
    names = ["modeling_storms", "dataset_builder", "recipes", "trl", "accelerate", "av", "pytest"]
    assert run(f"NAMES = {names}\n{code}").stdout.split() == names


def test_code_runs_only_for_who_trusts_it(stranger):
    _, call, _ = stranger
    done = call(LOAD.replace('"trust_remote_code": True', '"trust_remote_code": False'))
    assert done.returncode != 0
    assert "trust_remote_code=True" in done.stderr


def test_a_dataset_loads_and_streams_and_its_videos_decode_without_ffmpeg(stranger):
    run, _, _ = stranger
    assert run(READ).stdout == "{'train': 3, 'validation': 2}\n"


def test_offline_both_come_from_the_cache(stranger):
    run, _, hub = stranger
    run(LOAD), run(READ)
    before = len(hub.requests)
    done = run(OFFLINE, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.stdout == "[8]\n3\n"
    assert len(hub.requests) == before


def test_the_librarys_pipeline_takes_a_video_message(stranger):
    run, _, _ = stranger
    assert run(PIPELINE).stdout == "StormsForConditionalGeneration str False\n"


def test_an_older_library_is_warned_about_once(stranger):
    run, _, _ = stranger
    said = run(OLD).stderr
    assert said.count("STORMS needs transformers 5.23 or newer, found 5.9.1") == 1
    assert "STORMS needs" not in run(LOAD).stderr


def test_the_oldest_library_is_the_one_that_installing_asks_for():
    from modeling_storms.configuration_storms import OLDEST_TRANSFORMERS

    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'"transformers>={".".join(map(str, OLDEST_TRANSFORMERS))}"' in pyproject
