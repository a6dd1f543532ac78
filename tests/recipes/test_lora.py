"""LoRA: what trains, what does not, and the plain checkpoint that comes of it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from trl import ModelConfig

from modeling_storms import StormsForConditionalGeneration
from recipes.checkpoints import lora_config
from recipes.init_checkpoint import build_tiny_base, convert
from recipes.merge_lora import merge_lora

from ..conftest import enliven
from .test_trainer import GRADIENT_TOLERANCE, LOSS_TOLERANCE
from .tiny_runs import make_rows, make_trainer, train, worst_difference


LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}

# Runs elsewhere, where neither this package nor peft can be imported. Saves logits of the inputs it is given.
STRANGER = """
import sys
for package in ("modeling_storms", "recipes", "tests", "peft"):
    sys.modules[package] = None
import torch
from transformers import AutoModel, AutoProcessor

inputs = torch.load(sys.argv[1])
found = {}
for folder in sys.argv[2:]:
    model, loading = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        output = model.eval()(**inputs, latent_input="rollout")
    found[folder] = {"logits": output.logits, "latent_states": output.latent_states,
                     "latent_size": model.generation_config.latent_size, "config_size": model.config.latent_size,
                     "num_frames": processor.video_processor.num_frames}
torch.save(found, sys.argv[1] + ".out")
"""


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Checkpoints with untied and with tied embeddings."""
    folders = {}
    for kind in ("untied", "tied"):
        base, processor = build_tiny_base()
        if kind == "tied":
            base.config.tie_word_embeddings = True
            base.lm_head.weight = base.get_input_embeddings().weight
        base = enliven(base)
        model, processor = convert(base, processor)
        folders[kind] = tmp_path_factory.mktemp("bases") / kind
        model.save_pretrained(folders[kind])
        processor.save_pretrained(folders[kind])
    return folders


@pytest.fixture(scope="module")
def rows():
    return make_rows()


@pytest.fixture(scope="module", params=["untied", "tied"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def finished(bases, rows, tmp_path_factory):
    """A finished run on each base, with checkpoints of its middle, and what its model makes of a batch."""
    runs = {}
    for kind, base in bases.items():
        folder = tmp_path_factory.mktemp("lora") / kind
        options = {"max_steps": 4, "learning_rate": 0.1, "save_strategy": "steps", "save_steps": 2, "latent_size": 5}
        trainer = make_trainer(base, folder, "stage2", rows, model_options=LORA, **options)
        trainer.train()
        trainer.finish()
        batch = trainer.data_collator(rows)
        batch.pop("row_seeds")
        with torch.no_grad():
            outputs = trainer.model.eval()(**batch, latent_input="rollout")
        runs[kind] = SimpleNamespace(folder=folder, trainer=trainer, batch=batch, outputs=outputs)
    return runs


@pytest.fixture(scope="module")
def merged(finished, tmp_path_factory):
    """Checkpoints of the middle, merged: one by the command, one by the function behind it."""
    folders = {kind: tmp_path_factory.mktemp("merged") / kind for kind in finished}
    adapter = finished["untied"].folder / "checkpoint-2"
    command = [sys.executable, "-m", "recipes.merge_lora", "--adapter", adapter, "--output", folders["untied"]]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(folders["untied"]) in done.stdout
    merge_lora(finished["tied"].folder / "checkpoint-2", folders["tied"])
    return folders


@pytest.fixture(scope="module")
def elsewhere(finished, merged, tmp_path_factory):
    """What a process that has neither this package nor peft makes of finished runs and of merged checkpoints."""
    place = tmp_path_factory.mktemp("elsewhere")
    torch.save(finished["untied"].batch, place / "inputs")
    folders = [*(str(run.folder) for run in finished.values()), *map(str, merged.values())]
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(place / "inputs"), *folders],
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(place / "inputs.out")


class TestTraining:
    @pytest.mark.parametrize("kind", ["untied", "tied"])
    @pytest.mark.parametrize("stage", ["stage1", "stage2"])
    def test_it_begins_as_the_base(self, bases, rows, tmp_path, kind, stage):
        """The first step's loss is the base's, and so is the gradient of what both train, the latent tokens' rows."""
        lora, full = (
            train(make_trainer(bases[kind], tmp_path / str(bool(options)), stage, rows, model_options=options))
            for options in (LORA, None)
        )
        for name in ("loss", "loss/lm", "latent_norm", *(["loss/latent"] if stage == "stage1" else [])):
            assert lora["logs"][0][name] == pytest.approx(full["logs"][0][name], rel=LOSS_TOLERANCE), name
        model = StormsForConditionalGeneration.from_pretrained(bases[kind])
        latent = [model.latent_tokens.start, model.latent_tokens.pad, model.latent_tokens.end]
        (name,) = [one for one in lora["gradients"] if "embed_tokens" in one]
        ours = {"embedding": lora["gradients"][name]}
        theirs = {"embedding": full["gradients"]["model.language_model.embed_tokens.weight"][latent]}
        if kind == "untied":
            (name,) = [one for one in lora["gradients"] if "lm_head" in one]
            ours["head"] = lora["gradients"][name]
            theirs["head"] = full["gradients"]["lm_head.weight"][latent]
        assert worst_difference(ours, theirs) < GRADIENT_TOLERANCE
        assert theirs["embedding"].norm() > 1e-3

    def test_accumulated_batches_equal_one(self, bases, rows, tmp_path):
        one, cut = (
            train(
                make_trainer(
                    bases["untied"],
                    tmp_path,
                    "stage1",
                    rows,
                    model_options=LORA,
                    latent_size=None,
                    max_steps=2,
                    per_device_train_batch_size=size,
                    gradient_accumulation_steps=4 // size,
                    gradient_checkpointing=size == 1,
                )
            )
            for size in (4, 1)
        )
        assert [entry["loss"] for entry in cut["logs"]] == pytest.approx(
            [entry["loss"] for entry in one["logs"]], rel=LOSS_TOLERANCE
        )
        assert worst_difference(cut["gradients"], one["gradients"]) < GRADIENT_TOLERANCE

    def test_only_adapters_and_rows_of_latent_tokens_train(self, finished, bases, kind):
        folder, tokens = finished[kind].folder, finished[kind].trainer.data_collator
        before = load_file(bases[kind] / "model.safetensors")
        after = load_file(folder / "model.safetensors")
        assert after.keys() == before.keys()
        latent = [tokens.start_id, tokens.pad_id, tokens.end_id]
        tables = {"model.language_model.embed_tokens.weight"} | ({"lm_head.weight"} if kind == "untied" else set())
        for name in before:
            if name in tables:
                others = torch.ones(len(before[name]), dtype=torch.bool)
                others[latent] = False
                assert torch.equal(after[name][others], before[name][others]), name
                assert not torch.equal(after[name][latent[0]], before[name][latent[0]]), name
                assert not torch.equal(after[name][latent[2]], before[name][latent[2]]), name
            elif "language_model" in name and name.endswith("proj.weight"):
                assert not torch.equal(after[name], before[name]), name
            else:
                assert torch.equal(after[name], before[name]), name
        adapter = load_file(folder / "_adapter" / "adapter_model.safetensors")
        assert max(tensor.shape[0] for tensor in adapter.values()) < 200, "no whole embedding is saved with an adapter"


class TestMerging:
    """Merged weights are W + B A, where the adapter computes W x + B (A x): logits of size 3 and states of size 1
    were seen to differ by 3e-6."""

    SAME: ClassVar = {"atol": 3e-5, "rtol": 1e-5}

    def test_a_finished_run_loads_without_the_package_or_peft(self, finished, elsewhere, kind):
        run = finished[kind]
        files = {path.name for path in run.folder.iterdir()}
        assert {"model.safetensors", "modeling_storms.py", "chat_template.jinja", "processor_config.json"} <= files
        assert not any(name.startswith("adapter_") for name in files), "AutoModel would look for its base instead"
        found = elsewhere[str(run.folder)]
        torch.testing.assert_close(found["logits"], run.outputs.logits, **self.SAME)
        torch.testing.assert_close(found["latent_states"], run.outputs.latent_states, **self.SAME)
        assert found["latent_size"] == found["config_size"] == 5, "K is the run's, not the base's"
        assert found["num_frames"] == 4

    def test_a_checkpoint_of_the_middle_merges_into_one_that_loads_alike(
        self, finished, bases, merged, elsewhere, kind
    ):
        adapter = finished[kind].folder / "checkpoint-2"
        base = StormsForConditionalGeneration.from_pretrained(bases[kind])
        with torch.no_grad():
            expected = PeftModel.from_pretrained(base, adapter).eval()(**finished[kind].batch, latent_input="rollout")
        found = elsewhere[str(merged[kind])]
        torch.testing.assert_close(found["logits"], expected.logits, **self.SAME)
        torch.testing.assert_close(found["latent_states"], expected.latent_states, **self.SAME)
        assert found["latent_size"] == found["config_size"] == 5
        assert found["num_frames"] == 4
        assert (found["logits"] - finished[kind].outputs.logits).abs().max() > 0.1, "it is the end's, not the middle's"

    def test_the_merged_model_generates_as_the_adapted_one(self, finished, kind, rows):
        run = finished[kind]
        merged = StormsForConditionalGeneration.from_pretrained(run.folder).eval()
        prompts = run.trainer.data_collator.prompts(rows)
        options = {"latent_mode": "force", "max_new_tokens": 10, "return_dict_in_generate": True}
        ours, theirs = (model.generate(**prompts, **options) for model in (merged, run.trainer.model.eval()))
        assert ours.latent_lengths.tolist() == theirs.latent_lengths.tolist() == [5] * 4
        torch.testing.assert_close(torch.stack(ours.latent_states), torch.stack(theirs.latent_states), **self.SAME)

    def test_the_base_may_be_named_and_its_precision_chosen(self, finished, bases, kind, tmp_path):
        adapter = shutil.copytree(finished[kind].folder / "checkpoint-4", tmp_path / "adapter")
        settings = json.loads((adapter / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(bases[kind])
        assert settings["revision"] == "main"
        settings["base_model_name_or_path"] = "/nowhere"
        (adapter / "adapter_config.json").write_text(json.dumps(settings))
        merge_lora(adapter, tmp_path / "out", base=str(bases[kind]))
        ours, theirs = (load_file(one / "model.safetensors") for one in (tmp_path / "out", finished[kind].folder))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        merge_lora(adapter, tmp_path / "half", base=str(bases[kind]), dtype="bfloat16")
        half = load_file(tmp_path / "half" / "model.safetensors")
        assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
        assert not list(tmp_path.rglob(".merged*")), "nothing half-written is left"

    def test_the_base_is_read_at_the_revision_it_was_trained_at(self, finished, bases, tmp_path, monkeypatch):
        adapter = shutil.copytree(finished["untied"].folder / "checkpoint-4", tmp_path / "adapter")
        settings = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(settings | {"revision": "v1.0"}))
        asked, load = [], StormsForConditionalGeneration.from_pretrained

        def spy(name, revision="main", **options):
            asked.append((name, revision))
            return load(name, **options)

        monkeypatch.setattr(StormsForConditionalGeneration, "from_pretrained", spy)
        merge_lora(adapter, tmp_path / "out")
        assert asked == [(str(bases["untied"]), "v1.0")]
        trainer = finished["untied"].trainer
        chosen = ModelConfig(model_name_or_path=str(bases["untied"]), model_revision="v1.0", **LORA)
        assert lora_config(chosen, trainer.model.get_base_model()).revision == "v1.0"

    def test_a_folder_without_an_adapter_is_refused(self, bases, tmp_path):
        with pytest.raises(ValueError, match=r"holds no adapter_config\.json"):
            merge_lora(bases["untied"], tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_without_peft_the_error_says_what_to_install(self, bases, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(ValueError, match=r'pip install "storms\[lora\]"'):
            merge_lora(bases["untied"], tmp_path / "out")
