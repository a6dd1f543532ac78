"""Training with a temporal projector and pooled tokens: what trains, what is saved, and that all stages take it."""

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from modeling_storms import StormsForConditionalGeneration, StormsProcessor
from recipes import align, sft, stage1, stage2
from recipes.answers import answer_rows
from recipes.collator import StormsCollator

from .tiny_runs import make_rows


PROJECTOR = '{"num_layers": 1, "state_size": 8, "head_dim": 16}'
COMMON = "--max_steps 2 --use_cpu true --bf16 false --num_frames 8 --save_strategy no --disable_tqdm true"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows") / "data"
    Dataset.from_list(make_rows()).to_parquet(folder / "train.parquet")
    return folder


def train(script, start, data, output, *flags):
    given = ["--model_name_or_path", start, "--dataset_name", data, "--output_dir", output]
    trainer = script.main([str(one) for one in [*given, *COMMON.split(), "--learning_rate", "1e-2", *flags]])
    return trainer, load_file(output / "model.safetensors")


@pytest.fixture(scope="module")
def aligned(tiny_checkpoint, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("aligned") / "aligned"
    train(align, tiny_checkpoint, data, folder, "--temporal_projector", PROJECTOR)
    return folder


def test_alignment_trains_the_projector_and_nothing_else(tiny_checkpoint, aligned):
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_checkpoint, aligned))
    changed = {name for name in after if name not in before or not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if "temporal_projector" in name}
    assert before.keys() <= after.keys()
    projections = [after[name] for name in changed if name.endswith("out_proj.weight")]
    assert len(projections) == 2
    assert all(one.abs().max() > 0 for one in projections), "it began as the identity"


def test_alignment_needs_a_projector(tiny_checkpoint, data, tmp_path):
    with pytest.raises(ValueError, match="has no temporal projector, so nothing would train"):
        train(align, tiny_checkpoint, data, tmp_path / "out")
    with pytest.raises(ValueError, match="expected JSON"):
        train(align, tiny_checkpoint, data, tmp_path / "out", "--temporal_projector", "two layers")


@pytest.mark.parametrize("script", [sft, stage1, stage2], ids=lambda script: script.__name__)
def test_every_stage_trains_with_pooled_tokens_and_saves_their_numbers(aligned, data, tmp_path, script):
    latent = [] if script is sft else ["--latent_size", "3"]
    output = tmp_path / "out"
    trainer, after = train(script, aligned, data, output, "--temporal_pool", "2", "--spatial_pool", "4", *latent)
    before = load_file(aligned / "model.safetensors")
    trained = {name for name in after if not torch.equal(before[name], after[name])}
    assert any("temporal_projector" in name for name in trained)
    assert any("language_model" in name for name in trained)
    assert not [name for name in trained if "visual" in name]
    model = StormsForConditionalGeneration.from_pretrained(output).eval()
    processor = StormsProcessor.from_pretrained(output)
    for one in (model.config, processor.video_processor):
        assert (one.temporal_pool, one.spatial_pool, one.temporal_sampling) == (2, 4, 1)
    # Eight frames of 64 x 64 pixels: 4 steps of 2 x 2 merged tokens become 2 of 1.
    inputs = StormsCollator(processor).prompts(make_rows(1))
    assert int((inputs["input_ids"] == model.config.video_token_id).sum()) == 2
    answers = answer_rows(model, StormsCollator(processor), make_rows(2), latent_mode="force")
    assert all(answer["latent_length"] == model.config.latent_size for answer in answers)
    if script is stage1:
        # Targets come from the tower before projector and reducer.
        assert [entry for entry in trainer.state.log_history if entry.get("loss/latent", 0) > 0]
