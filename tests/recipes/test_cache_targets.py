"""Stored targets are those that Stage I would make, say what made them, and are refused for anything else."""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Array2D, load_dataset

from dataset_builder.__main__ import main as dataset_builder
from dataset_builder.schema import FEATURES, SchemaError, check_row
from modeling_storms import StormsForConditionalGeneration, StormsProcessor, decode_video
from recipes import stage1
from recipes.cache_targets import CacheArguments, MakeTargets, cache_targets, main
from recipes.collator import RowError, StormsCollator
from recipes.data import TARGETS_KEY, load_card
from recipes.targets import encode_targets, tower_revision


NUM_ROWS = {"train": 9, "validation": 3}
K = 8


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A dataset as the builder publishes it."""
    folder = tmp_path_factory.mktemp("datasets") / "thoughts"
    flags = ["--world", "shell_game", "--num_rows", str(sum(NUM_ROWS.values())), "--validation_fraction", "0.25"]
    dataset_builder(["build", *flags, "--test_fraction", "0", "--output", str(folder)])
    return folder


@pytest.fixture(scope="module")
def cached(tiny_checkpoint, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets") / "with-targets"
    assert cache_targets(CacheArguments(str(tiny_checkpoint), str(source), str(folder))) == NUM_ROWS
    return folder


def losses(checkpoint, dataset, output, *flags):
    """Losses of Stage I at each of three steps, as they are logged; in an order of the rows that the seed decides."""
    trainer = stage1.main(
        [
            *("--model_name_or_path", str(checkpoint), "--dataset_name", str(dataset), "--output_dir", str(output)),
            *("--max_steps", "3", "--per_device_train_batch_size", "3", "--logging_steps", "1", "--num_frames", "4"),
            *("--learning_rate", "1e-3", "--save_strategy", "no", "--report_to", "none"),
            *("--use_cpu", "true", "--bf16", "false", "--disable_tqdm", "true", *flags),
        ]
    )
    names = ("loss", "loss/lm", "loss/latent", "latent_cosine")
    return torch.tensor([[log[name] for name in names] for log in trainer.state.log_history if "loss" in log])


def with_value(source: Path, folder: Path, column: str, row_idx: int, value: Any) -> Path:
    """A copy of a dataset in which a training row has another value."""
    shutil.copytree(source / "data", folder / "data")
    shutil.copy(source / "README.md", folder)
    (path,) = (folder / "data").glob("train-*")
    table = pq.read_table(path)
    values = table.column(column).to_pylist()
    values[row_idx] = value
    position = table.column_names.index(column)
    array = pa.array(values, table.schema.field(column).type)
    pq.write_table(table.set_column(position, table.schema.field(column), array), path)
    # The library's cache goes by the card alone.
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("description: sha256 ", f"description: {column} {row_idx} "))
    return folder


class TestStageOne:
    @pytest.mark.parametrize("target_source", ["thought_video", "keyframes", "self_distilled"])
    def test_stored_targets_give_the_loss_of_those_made_on_the_fly(
        self, tiny_checkpoint, source, cached, tmp_path, target_source
    ):
        folder, flags = cached, ["--target_source", target_source]
        if target_source != "thought_video":
            folder = tmp_path / "cached"
            cache_targets(
                CacheArguments(
                    str(tiny_checkpoint), str(source), str(folder), target_source=target_source, num_frames=4
                )
            )
        stored = losses(tiny_checkpoint, folder, tmp_path / "stored", *flags)
        made = losses(tiny_checkpoint, source, tmp_path / "made", *flags)
        assert stored.shape == (3, 4)
        torch.testing.assert_close(stored[:, 0], stored[:, 1] + 0.1 * stored[:, 2])
        assert (stored[:, 2] > 1e-3).all()
        # Rows are encoded in batches of 4 there and of 3 here, which may change the last bits of float32 (1.2e-7 of a
        # value), and two steps of training stand between them and the last loss. Worst seen: 0.
        torch.testing.assert_close(stored, made, rtol=1e-5, atol=0)

    @pytest.mark.parametrize(
        ("flags", "told"),
        [
            (["--latent_size", "4"], "latent_size 8 instead of 4"),
            (["--num_target_frames", "8"], "num_target_frames 16 instead of 8"),
            (["--target_source", "keyframes"], "target_source 'thought_video' instead of 'keyframes'"),
            (["--max_frame_pixels", "3136"], r"pixels \[3136, 4704\] instead of \[3136, 3136\]"),
            (["--trainable", "all"], "--trainable all trains the vision tower"),
        ],
    )
    def test_targets_made_otherwise_are_refused(self, tiny_checkpoint, cached, tmp_path, flags, told):
        with pytest.raises(ValueError, match=told):
            losses(tiny_checkpoint, cached, tmp_path, *flags)

    @pytest.mark.parametrize(
        ("target_source", "flags", "told"),
        [
            ("self_distilled", ["--num_frames", "6"], "num_frames 4 instead of 6"),
            ("self_distilled", ["--max_frame_pixels", "3136"], r"pixels \[3136, 4704\] instead of \[3136, 3136\]"),
        ],
    )
    def test_targets_of_the_own_video_are_those_of_its_context(
        self, tiny_checkpoint, source, tmp_path, target_source, flags, told
    ):
        arguments = CacheArguments(str(tiny_checkpoint), str(source), str(tmp_path / "cached"), num_frames=4)
        cache_targets(replace(arguments, target_source=target_source))
        with pytest.raises(ValueError, match=told):
            losses(tiny_checkpoint, tmp_path / "cached", tmp_path, "--target_source", target_source, *flags)

    def test_targets_of_another_tower_are_refused(self, tiny_checkpoint, cached, tmp_path):
        model = StormsForConditionalGeneration.from_pretrained(tiny_checkpoint)
        before = tower_revision(model)
        model.model.visual.blocks[0].mlp.down_proj.weight.data[0, 0] += 0.1
        model.save_pretrained(tmp_path / "other")
        StormsProcessor.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match=f"tower_revision '{before}' instead of '{tower_revision(model)}'"):
            losses(tmp_path / "other", cached, tmp_path)

    def test_another_language_model_over_the_same_tower_takes_them(self, tiny_checkpoint, cached, tmp_path):
        model = StormsForConditionalGeneration.from_pretrained(tiny_checkpoint)
        model.lm_head.weight.data.mul_(0.5)
        model.save_pretrained(tmp_path / "other")
        StormsProcessor.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "other")
        assert losses(tmp_path / "other", cached, tmp_path / "out").isfinite().all()

    def test_targets_of_unknown_origin_are_refused(self, tiny_checkpoint, cached, tmp_path):
        shutil.copytree(cached / "data", tmp_path / "bare" / "data")
        with pytest.raises(ValueError, match="card does not say what they were made with"):
            losses(tiny_checkpoint, tmp_path / "bare", tmp_path / "out")


class TestTheFolder:
    def test_targets_are_means_over_the_thought_videos_tokens(self, tiny_checkpoint, cached):
        model = StormsForConditionalGeneration.from_pretrained(tiny_checkpoint)
        processor = StormsProcessor.from_pretrained(tiny_checkpoint).video_processor
        for row in load_dataset(str(cached), split="train"):
            # As a user would encode the video: an independent way to the same frames and tokens.
            frames, metadata = decode_video(
                row["thought_video"]["bytes"], lambda metadata: processor.sample_frames(metadata, num_frames=16)
            )
            inputs = processor(videos=[frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt")
            with torch.no_grad():
                tokens = model.get_video_features(
                    inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True
                ).pooler_output[0]
            tokens, count = tokens.double().numpy(), len(tokens)
            parts = [tokens[count * k // K : math.ceil(count * (k + 1) / K)].mean(0) for k in range(K)]
            # Float32 features of up to 2.3, averaged in another order. Worst seen: 3.0e-7.
            np.testing.assert_allclose(row["latent_targets"], np.stack(parts), rtol=0, atol=2e-6)

    def test_it_loads_whole_and_as_a_stream_with_all_it_held_before(self, source, cached):
        for split, count in NUM_ROWS.items():
            rows = load_dataset(str(cached), split=split)
            before = load_dataset(str(source), split=split)
            assert rows.features == {**FEATURES, "latent_targets": Array2D((K, 64), "float32")}
            assert len(rows) == count
            assert rows.data.table.drop_columns("latent_targets").equals(before.data.table)
            for row, streamed in zip(rows, load_dataset(str(cached), split=split, streaming=True), strict=True):
                assert row["id"] == streamed["id"]
                assert row["thought_video"] == streamed["thought_video"]
                assert np.shape(row["latent_targets"]) == (K, 64)
                assert np.array_equal(row["latent_targets"], streamed["latent_targets"])

    def test_the_builder_finds_it_in_order(self, cached, capsys):
        dataset_builder(["validate", "--output", str(cached)])
        assert f"{sum(NUM_ROWS.values())} published rows: 0 break the contract" in capsys.readouterr().out

    def test_the_card_says_what_made_them_and_names_no_folder(self, tiny_checkpoint, source, cached):
        model = StormsForConditionalGeneration.from_pretrained(tiny_checkpoint)
        card = load_card(str(cached))
        assert card.data.to_dict()[TARGETS_KEY] == {
            "tower": "qwen2_5_vl_vision",
            "tower_revision": tower_revision(model),
            "latent_size": K,
            "target_source": "thought_video",
            "num_target_frames": 16,
            "pixels": [3136, 4704],
            "model": "./storms-tiny",
            "dtype": "float32",
            "bf16": False,
        }
        assert card.data.license == load_card(str(source)).data.license
        assert card.text.startswith(load_card(str(source)).text.rstrip())
        assert f"| tower_revision | {tower_revision(model)} |" in card.text
        assert str(tiny_checkpoint.parent) not in card.content
        assert str(source.parent) not in card.content
        assert {path.name for path in cached.iterdir()} == {"README.md", "data"}

    def test_it_can_be_encoded_again(self, tiny_checkpoint, cached, tmp_path, capsys):
        flags = ["--model_name_or_path", tiny_checkpoint, "--dataset_name", cached, "--output", tmp_path / "again"]
        main([*map(str, flags), "--latent_size", "3"])
        assert f"{tmp_path / 'again'}: 9 train, 3 validation rows, 3 targets each" in capsys.readouterr().out
        assert np.shape(load_dataset(str(tmp_path / "again"), split="train")[0]["latent_targets"]) == (3, 64)
        text = load_card(str(tmp_path / "again")).text
        assert (text.count("## Latent targets"), text.count("| latent_size | 3 |")) == (1, 1)


def test_bfloat16_targets_are_those_of_training_in_bfloat16(tiny_checkpoint, source, cached):
    model = StormsForConditionalGeneration.from_pretrained(tiny_checkpoint)
    collator = StormsCollator(StormsProcessor.from_pretrained(tiny_checkpoint), "stage1", num_target_frames=16)
    rows = load_dataset(str(source), split="train").take(4)
    batch = collator(list(rows))
    with torch.autocast("cpu", torch.bfloat16):  # as the Trainer does
        media = (batch[name] for name in ("target_pixel_values", "target_grid_thw", "target_media_per_row"))
        trained = encode_targets(model, *media, K)
    stored = torch.tensor(MakeTargets(model, collator, bf16=True)(rows[:])["latent_targets"])
    assert torch.equal(stored, trained)
    exact = torch.tensor(load_dataset(str(cached), split="train")[:4]["latent_targets"])
    # bfloat16 keeps 8 bits, so that one rounding is off by up to 0.4%. Seen after this tower's two layers: 0.39%.
    assert 1e-4 < (exact - stored).norm() / exact.norm() < 2e-2


class TestRefusals:
    def test_an_output_that_is_taken(self, tiny_checkpoint, source, tmp_path):
        (tmp_path / "mine.txt").write_text("mine")
        with pytest.raises(ValueError, match="exists and is not an empty folder"):
            cache_targets(CacheArguments(str(tiny_checkpoint), str(source), str(tmp_path)))
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]

    @pytest.mark.parametrize(
        ("column", "told"),
        [
            (
                "thought_video",
                r"Row 'simulated-shell_game-0-train-00005' of split 'train' has no thought_video, as 1 of 9",
            ),
            ("keyframes", r"Row 'simulated-shell_game-0-train-00005' .* has no keyframes"),
        ],
    )
    def test_a_row_without_what_targets_come_from(self, tiny_checkpoint, source, tmp_path, column, told):
        folder = with_value(source, tmp_path / "some", column, 5, None)
        with pytest.raises(RowError, match=told):
            cache_targets(
                CacheArguments(str(tiny_checkpoint), str(folder), str(tmp_path / "out"), target_source=column)
            )
        assert {path.name for path in tmp_path.iterdir()} == {"some"}

    def test_a_thought_video_that_does_not_decode(self, tiny_checkpoint, source, tmp_path):
        broken = {"bytes": b"\0\0\0\x20ftypisom" + bytes(99), "path": None}
        folder = with_value(source, tmp_path / "some", "thought_video", 7, broken)
        with pytest.raises(RowError, match=r"Row 'simulated-shell_game-0-train-00007'.* 0 frames decoded"):
            cache_targets(CacheArguments(str(tiny_checkpoint), str(folder), str(tmp_path / "out")))
        assert {path.name for path in tmp_path.iterdir()} == {"some"}

    def test_an_unknown_target_source(self, tiny_checkpoint, source, tmp_path):
        with pytest.raises(ValueError, match="--target_source: saw 'dreams', expected one of 'thought_video'"):
            cache_targets(
                CacheArguments(str(tiny_checkpoint), str(source), str(tmp_path / "out"), target_source="dreams")
            )

    @pytest.mark.parametrize(
        "targets",
        [None, "text", [], [[]], [1.0], [[1.0, float("nan")]], [[1.0, None]], [[1.0], [1.0, 2.0]], [[["a"]]]],
    )
    def test_the_contract_refuses_targets_that_are_no_matrix(self, cached, targets):
        (path,) = (cached / "data").glob("validation-*")
        row = pq.read_table(path).to_pylist()[0]
        check_row(row)
        with pytest.raises(SchemaError, match=r"column 'latent_targets': saw .* expected finite numbers of shape"):
            check_row({**row, "latent_targets": targets})
