"""A saved folder is all a stranger needs: it loads, saves and loads again where this package can't be imported."""

import json
import subprocess
import sys

import pytest
import torch

from recipes.init_checkpoint import InitArguments, init_checkpoint
from tests.conftest import ask


CODE_FILES = ("configuration", "latent", "modeling", "processing", "video")

# Runs elsewhere, with our packages blocked. Prints what the test compares.
STRANGER = """
import json, sys
for package in ("modeling_storms", "recipes", "tests"):
    sys.modules[package] = None
import torch
from transformers import (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor,
                          AutoTokenizer, AutoVideoProcessor)

first, second, clip = sys.argv[1:]
found = {}
for folder in (first, second):
    loaded = {}
    for auto in (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor,
                 AutoVideoProcessor):
        loaded[auto.__name__] = auto.from_pretrained(folder, trust_remote_code=True)
    AutoTokenizer.from_pretrained(folder)
    model, processor = loaded["AutoModel"].eval(), loaded["AutoProcessor"]
    _, loading = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    messages = [{"role": "user", "content": [{"type": "video", "video": clip}, {"type": "text", "text": "Why?"}]}]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True,
                                           return_tensors="pt", processor_kwargs={"num_frames": 4})
    out = model.generate(**inputs, max_new_tokens=12, latent_mode="force", latent_size=3, return_dict_in_generate=True)
    found[folder] = {
        "classes": {name: [type(value).__name__, type(value).__module__.split(".")[0]]
                    for name, value in loaded.items()},
        "missing": [list(loading[k]) for k in ("missing_keys", "unexpected_keys", "mismatched_keys")],
        "sequences": out.sequences.tolist(), "states": out.latent_states[0].tolist(),
        "default_size": model.generation_config.latent_size,
    }
    if folder == first:
        model.save_pretrained(second)
        processor.save_pretrained(second)
print("RESULT" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return init_checkpoint(
        InitArguments(output=str(tmp_path_factory.mktemp("checkpoints") / "storms-tiny"), tiny=True, latent_size=6)
    )


@pytest.fixture(scope="module")
def stranger(folder, clip):
    """What a process without this package finds in the folder, and in a folder it saved itself."""
    second = folder.parent / "saved-again"
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(folder), str(second), str(clip)],
        cwd=folder.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.split("RESULT")[1])
    return found[str(folder)], found[str(second)]


def test_every_auto_class_resolves_without_the_package(stranger):
    expected = {
        "AutoConfig": "StormsConfig",
        "AutoModel": "StormsForConditionalGeneration",
        "AutoModelForImageTextToText": "StormsForConditionalGeneration",
        "AutoModelForMultimodalLM": "StormsForConditionalGeneration",
        "AutoProcessor": "StormsProcessor",
        "AutoVideoProcessor": "StormsVideoProcessor",
    }
    for found in stranger:
        assert found["classes"] == {auto: [name, "transformers_modules"] for auto, name in expected.items()}
        assert found["missing"] == [[], [], []]
        assert found["default_size"] == 6


def test_the_folder_saved_by_a_stranger_answers_the_same(stranger):
    first, second = stranger
    assert first["sequences"] == second["sequences"]
    assert first["states"] == second["states"]


def test_the_package_and_the_folder_answer_the_same(stranger, folder, clip):
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(folder).eval()  # importing the package has registered the classes
    processor = AutoProcessor.from_pretrained(folder)
    assert type(model).__module__ == "modeling_storms.modeling_storms"
    inputs = ask(processor, str(clip), num_frames=4)
    out = model.generate(**inputs, max_new_tokens=12, latent_mode="force", latent_size=3, return_dict_in_generate=True)
    assert out.sequences.tolist() == stranger[0]["sequences"]
    torch.testing.assert_close(out.latent_states[0], torch.tensor(stranger[0]["states"]))


@pytest.mark.parametrize("name", ["storms-tiny", "saved-again"])
def test_code_template_and_options_are_in_the_folder(stranger, folder, name):
    checkpoint = folder.parent / name
    files = {file.name for file in checkpoint.iterdir()}
    assert {f"{stem}_storms.py" for stem in CODE_FILES} <= files
    assert {"chat_template.jinja", "model.safetensors", "processor_config.json", "tokenizer.json"} <= files
    options = json.loads((checkpoint / "generation_config.json").read_text())
    expected = {"latent_mode": "auto", "latent_size": 6, "latent_stop": "budget", "max_latent_blocks": 1}
    assert {name: options[name] for name in expected} == expected
    for reference in json.loads((checkpoint / "config.json").read_text())["auto_map"].values():
        assert "--" not in reference, "the folder must not point at another repository's code"
