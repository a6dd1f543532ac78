"""A saved folder is all a stranger needs: it loads, saves and loads again where this package can't be imported."""

import json
import subprocess
import sys

import pytest
import torch

from modeling_storms import StormsForConditionalGeneration, StormsProcessor
from recipes.init_checkpoint import InitArguments, init_checkpoint
from tests.conftest import PROJECTOR, REDUCED, ask, with_reduction


CODE_FILES = ("configuration", "latent", "modeling", "processing", "temporal", "video")
NAMES = ("storms-tiny", "storms-long-video")

# Runs elsewhere, with our packages blocked. Prints what the test compares.
STRANGER = """
import json, sys
for package in ("modeling_storms", "recipes", "tests"):
    sys.modules[package] = None
import torch
from transformers import (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor,
                          AutoTokenizer, AutoVideoProcessor)

clip, *folders = sys.argv[1:]
found = {}
for folder in [name for first in folders for name in (first, first + "-again")]:
    loaded = {}
    for auto in (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor,
                 AutoVideoProcessor):
        loaded[auto.__name__] = auto.from_pretrained(folder, trust_remote_code=True)
    AutoTokenizer.from_pretrained(folder)
    model, processor = loaded["AutoModel"].eval(), loaded["AutoProcessor"]
    _, loading = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    messages = [{"role": "user", "content": [{"type": "video", "video": clip}, {"type": "text", "text": "Why?"}]}]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True,
                                           return_tensors="pt", processor_kwargs={"num_frames": 12})
    out = model.generate(**inputs, max_new_tokens=12, latent_mode="force", latent_size=3, return_dict_in_generate=True)
    found[folder] = {
        "classes": {name: [type(value).__name__, type(value).__module__.split(".")[0]]
                    for name, value in loaded.items()},
        "missing": [list(loading[k]) for k in ("missing_keys", "unexpected_keys", "mismatched_keys")],
        "sequences": out.sequences.tolist(), "states": out.latent_states[0].tolist(),
        "default_size": model.generation_config.latent_size,
        "num_video_tokens": int((inputs["input_ids"] == model.config.video_token_id).sum()),
    }
    if folder in folders:
        model.save_pretrained(folder + "-again")
        processor.save_pretrained(folder + "-again")
print("RESULT" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with a checkpoint, and one that has a projector and reduces tokens."""
    folder = tmp_path_factory.mktemp("checkpoints")
    plain = init_checkpoint(InitArguments(output=str(folder / NAMES[0]), tiny=True, latent_size=6))
    model = StormsForConditionalGeneration.from_pretrained(plain)
    for part in with_reduction(model, StormsProcessor.from_pretrained(plain), PROJECTOR, **REDUCED):
        part.save_pretrained(folder / NAMES[1])
    return folder


@pytest.fixture(scope="module")
def stranger(checkpoints, clip):
    """What a process without this package finds in each folder, and in a folder it saved itself."""
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(clip), *(str(checkpoints / name) for name in NAMES)],
        cwd=checkpoints,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.split("RESULT")[1])
    return {name: [found[str(checkpoints / name)], found[f"{checkpoints / name}-again"]] for name in NAMES}


def test_every_auto_class_resolves_without_the_package(stranger):
    expected = {
        "AutoConfig": "StormsConfig",
        "AutoModel": "StormsForConditionalGeneration",
        "AutoModelForImageTextToText": "StormsForConditionalGeneration",
        "AutoModelForMultimodalLM": "StormsForConditionalGeneration",
        "AutoProcessor": "StormsProcessor",
        "AutoVideoProcessor": "StormsVideoProcessor",
    }
    for found in [one for pair in stranger.values() for one in pair]:
        assert found["classes"] == {auto: [name, "transformers_modules"] for auto, name in expected.items()}
        assert found["missing"] == [[], [], []]
        assert found["default_size"] == 6


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_saved_by_a_stranger_answers_the_same(stranger, name):
    first, second = stranger[name]
    assert first["sequences"] == second["sequences"]
    assert first["states"] == second["states"]


def test_a_stranger_reduces_tokens(stranger):
    # 6 steps of 2 x 3 tokens; half of the steps, half of those, and 1 x 2 tokens of each.
    assert [stranger[name][0]["num_video_tokens"] for name in NAMES] == [36, 4]
    assert stranger[NAMES[0]][0]["states"] != stranger[NAMES[1]][0]["states"]


@pytest.mark.parametrize("name", NAMES)
def test_the_package_and_the_folder_answer_the_same(stranger, checkpoints, clip, name):
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(checkpoints / name).eval()  # importing the package has registered the classes
    processor = AutoProcessor.from_pretrained(checkpoints / name)
    assert type(model).__module__ == "modeling_storms.modeling_storms"
    inputs = ask(processor, str(clip), num_frames=12)
    out = model.generate(**inputs, max_new_tokens=12, latent_mode="force", latent_size=3, return_dict_in_generate=True)
    assert out.sequences.tolist() == stranger[name][0]["sequences"]
    torch.testing.assert_close(out.latent_states[0], torch.tensor(stranger[name][0]["states"]))


@pytest.mark.parametrize("name", [NAMES[0], *(f"{name}-again" for name in NAMES)])
def test_code_template_and_options_are_in_the_folder(stranger, checkpoints, name):
    checkpoint = checkpoints / name
    files = {file.name for file in checkpoint.iterdir()}
    assert {f"{stem}_storms.py" for stem in CODE_FILES} <= files
    assert {"chat_template.jinja", "model.safetensors", "processor_config.json", "tokenizer.json"} <= files
    options = json.loads((checkpoint / "generation_config.json").read_text())
    expected = {"latent_mode": "auto", "latent_size": 6, "latent_stop": "budget", "max_latent_blocks": 1}
    assert {name: options[name] for name in expected} == expected
    for reference in json.loads((checkpoint / "config.json").read_text())["auto_map"].values():
        assert "--" not in reference, "the folder must not point at another repository's code"
