"""The trainer's losses, gradients and metrics against formulas written out by hand on the plain backbone."""

import copy
import json
import math
import resource
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from evaluation.prompts import storms_prompt
from modeling_storms import StormsForConditionalGeneration, StormsProcessor
from modeling_storms.video_storms import decode_video
from recipes import trainer as trainer_module
from recipes.trainer import _draw, run

from ..modeling_storms.conftest import same_weights
from ..modeling_storms.reference import recompute, single_rows
from ..modeling_storms.test_generate import STATE_TOLERANCE
from .tiny_runs import GradientRecorder, make_rows, make_trainer, train, worst_difference


# Sums of the same float32 products in another order. Losses of 6 to 13 were seen to differ by 2e-6 at most, gradients,
# relative to their norm, by 1.8e-6 (one batch or four, one process or two) and 1.6e-6 (cache-free recomputation); a
# wrong denominator, a row that is counted twice or a slot without gradient change them by percents.
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 2e-5

STAGES = {
    "sft": ("sft", {}),
    "stage1": ("stage1", {"latent_size": None}),
    "stage1-rollout": ("stage1", {"latent_size": None, "latent_input": "rollout"}),
    "stage2": ("stage2", {}),
    "stage2-bottleneck": ("stage2", {"latent_size": None, "latent_bottleneck": 0.5, "stop_supervision": "pad"}),
}


@pytest.fixture(scope="session")
def rows():
    return make_rows()


@pytest.fixture
def build(tiny_checkpoint, tmp_path, rows):
    def build(stage, rows=rows, **options):
        return make_trainer(tiny_checkpoint, tmp_path / "run", stage, rows, **options)

    return build


@pytest.fixture(scope="module")
def outcome(tiny_checkpoint, tmp_path_factory, rows):
    """What two steps on one batch of four make of a kind of training; each kind once."""
    known = {}

    def outcome(name):
        if name not in known:
            stage, options = STAGES[name]
            folder = tmp_path_factory.mktemp("runs")
            known[name] = train(make_trainer(tiny_checkpoint, folder, stage, rows, max_steps=2, **options))
        return known[name]

    return outcome


class Snapshots(TrainerCallback):
    """Weights before each step."""

    def __init__(self):
        self.weights = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})


def as_train_calls_it(trainer, batch, **options):
    """`compute_loss` of a batch that is all of a step."""
    trainer.model.train()
    (batch,), num_items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    return trainer.compute_loss(trainer.model, batch, num_items_in_batch=num_items, **options)


def pooled(features, size):
    """Bin k averages tokens floor(k * T / size) to ceil((k + 1) * T / size) - 1."""
    if size is None:
        return features
    count = len(features)
    bins = [(k * count // size, -(-(k + 1) * count // size)) for k in range(size)]
    return torch.stack([torch.stack([features[t] for t in range(*span)]).mean(0) for span in bins])


def thought_targets(plain, processor, rows, size):
    """Each row's thought video, decoded, encoded and pooled on its own."""
    targets = []
    for row in rows:
        frames, _ = decode_video(row["thought_video"]["bytes"])
        encoded = processor.video_processor(videos=[frames], do_sample_frames=False, return_tensors="pt")
        with torch.no_grad():
            (features,) = plain.model.get_video_features(
                encoded["pixel_values_videos"], encoded["video_grid_thw"]
            ).pooler_output
        targets.append(pooled(features, size))
    return targets


def by_hand(plain, tokens, batch, targets=None, rollout=False):
    """Everything a step's loss and metrics are made of, one row and one full pass at a time on the plain class.

    Labels are written out anew: everything from `<|latent_start|>` on, or as the batch has it where there is no block.
    """
    found = SimpleNamespace(lm=0.0, labels=0, correct=0, errors=[], states=[], logits=[], targets=targets)
    for index, row in enumerate(single_rows(batch, plain.config)):
        ids = row["input_ids"][0]
        is_slot = ids == tokens.pad
        embeds = plain.get_input_embeddings()(row["input_ids"])
        vectors = list(embeds.unbind(1))
        for number, position in enumerate(is_slot.nonzero()[:, 0].tolist()):
            if rollout:
                cut = {**row, **{k: row[k][:, :position] for k in ("input_ids", "mm_token_type_ids")}}
                vectors[position] = recompute(plain, cut, torch.stack(vectors[:position], dim=1))[-1:]
            else:
                vectors[position] = targets[index][number][None]
        hidden = recompute(plain, row, torch.stack(vectors, dim=1))
        logits = plain.lm_head(hidden)
        if is_slot.any():
            first = ids.tolist().index(tokens.start)
            labelled = [p for p in range(first, len(ids)) if not is_slot[p]]
        else:
            kept = batch["attention_mask"][index].bool()
            labelled = (batch["labels"][index][kept] != -100).nonzero()[:, 0].tolist()
        for position in labelled:
            found.lm = found.lm - logits[position - 1].log_softmax(-1)[ids[position]]
            found.correct += int(logits[position - 1].argmax() == ids[position])
        found.labels += len(labelled)
        before = is_slot.nonzero()[:, 0] - 1
        found.states.append(hidden[before])
        found.logits.append(logits[before])
        if targets is not None:
            found.errors += [(hidden[p] - t).square().mean() for p, t in zip(before.tolist(), targets[index])]
    found.lm = found.lm / found.labels
    found.latent = torch.stack(found.errors).mean() if targets is not None else None
    return found


def gradients_of(model):
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


class TestStageOne:
    @pytest.mark.parametrize(
        ("latent_input", "latent_size"),
        [("teacher_forced", 3), ("teacher_forced", 20), ("teacher_forced", None), ("rollout", 3), ("rollout", None)],
    )
    def test_loss_is_the_formula_on_a_separate_encoding_of_the_thought_video(
        self, build, rows, reference, latent_input, latent_size
    ):
        recorder = GradientRecorder()
        trainer = build("stage1", latent_input=latent_input, latent_size=latent_size, callbacks=[recorder])
        plain, tokens = same_weights(reference, trainer.model), trainer.model.latent_tokens
        batch = trainer.data_collator(rows)
        targets = thought_targets(plain, trainer.processing_class, rows, latent_size)
        assert [len(one) for one in targets] == [latent_size or n for n in (4, 12, 8, 4)]
        found = by_hand(plain, tokens, batch, targets, rollout=latent_input == "rollout")
        expected = found.lm + 0.1 * found.latent
        assert found.latent.item() > 0.1

        # As `train` calls it.
        loss = as_train_calls_it(trainer, batch)
        torch.testing.assert_close(loss, expected, atol=LOSS_TOLERANCE, rtol=LOSS_TOLERANCE)
        # As a real step logs it.
        trainer.train()
        logged = trainer.state.log_history[0]
        assert logged["loss"] == pytest.approx(expected.item(), abs=LOSS_TOLERANCE)
        assert logged["loss/lm"] == pytest.approx(found.lm.item(), abs=LOSS_TOLERANCE)
        assert logged["loss/latent"] == pytest.approx(found.latent.item(), abs=LOSS_TOLERANCE)
        # And its gradient: that of the formula, with the targets as constants.
        plain.model.visual.requires_grad_(False)
        expected.backward()
        assert not any(name.startswith("model.visual") for name in recorder.gradients)
        assert worst_difference(recorder.gradients, gradients_of(plain)) < GRADIENT_TOLERANCE

    def test_latent_loss_alone_reaches_every_layer_of_the_language_model(self, build, rows):
        trainer = build("stage1")
        _, outputs = as_train_calls_it(trainer, trainer.data_collator(rows), return_outputs=True)
        outputs.latent_loss.backward()
        for layer in range(trainer.model.config.text_config.num_hidden_layers):
            for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
                weight = trainer.model.get_submodule(f"model.language_model.layers.{layer}.{name}").weight
                assert weight.grad.norm() > 1e-4

    def test_no_gradient_reaches_a_trained_tower_through_the_targets(self, build, rows, reference):
        recorder = GradientRecorder()
        trainer = build("stage1", trainable="all", callbacks=[recorder])
        plain = same_weights(reference, trainer.model)
        targets = thought_targets(plain, trainer.processing_class, rows, 3)
        found = by_hand(plain, trainer.model.latent_tokens, trainer.data_collator(rows), targets)
        (found.lm + 0.1 * found.latent).backward()
        trainer.train()
        # It has a gradient: that of the rows' own videos, and of nothing else.
        assert recorder.gradients["model.visual.merger.mlp.2.weight"].norm() > 1e-3
        assert worst_difference(recorder.gradients, gradients_of(plain)) < GRADIENT_TOLERANCE

    def test_targets_stay_those_of_the_tower_that_training_began_with(self, build, rows, reference):
        snapshots = Snapshots()
        trainer = build("stage1", trainable="all", max_steps=4, learning_rate=0.05, callbacks=[snapshots])
        first = same_weights(reference, trainer.model)
        trainer.train()
        last = copy.deepcopy(reference)
        last.load_state_dict(snapshots.weights[-1])
        batch, tokens = trainer.data_collator(rows), trainer.model.latent_tokens
        logged = [entry["loss/latent"] for entry in trainer.state.log_history if "loss/latent" in entry][-1]
        fixed, moved = (thought_targets(one, trainer.processing_class, rows, 3) for one in (first, last))
        assert logged == pytest.approx(by_hand(last, tokens, batch, fixed).latent.item(), abs=LOSS_TOLERANCE)
        wrong = by_hand(last, tokens, batch, moved).latent.item()
        assert abs(wrong - logged) > 100 * LOSS_TOLERANCE, "the tower has not moved: this test could not fail"

    def test_weight_of_the_latent_loss_is_an_option(self, build, rows):
        batch = build("stage1").data_collator(rows)
        _, light = as_train_calls_it(build("stage1", latent_loss_weight=0.0), batch, return_outputs=True)
        heavy = as_train_calls_it(build("stage1", latent_loss_weight=2.0), batch)
        torch.testing.assert_close(heavy, light.lm_loss + 2 * light.latent_loss)
        assert light.loss == light.lm_loss

    @pytest.mark.parametrize("source", ["keyframes", "self_distilled"])
    def test_other_sources_of_targets(self, build, rows, reference, source):
        """Keyframes one after another, or the row's own video as the model sees it."""
        from PIL import Image

        keyframes = [decode_video(row["video"]["bytes"])[0][[0, 5]] for row in rows]
        rows = [{**row, "keyframes": [Image.fromarray(f) for f in one]} for row, one in zip(rows, keyframes)]
        trainer = build("stage1", rows, target_source=source, latent_size=5)
        processor, model = trainer.processing_class, trainer.model
        targets = []
        for row, images in zip(rows, keyframes):
            if source == "keyframes":
                encoded = processor.image_processor(images=list(images), return_tensors="pt")
                features = reference.model.get_image_features(encoded["pixel_values"], encoded["image_grid_thw"])
            else:
                frames = decode_video(row["video"]["bytes"])[0][[0, 2, 4, 6]]  # 4 of 8
                encoded = processor.video_processor(videos=[frames], do_sample_frames=False, return_tensors="pt")
                features = reference.model.get_video_features(
                    encoded["pixel_values_videos"], encoded["video_grid_thw"]
                )
            targets.append(pooled(torch.cat(list(features.pooler_output)), 5).detach())
        batch = trainer.data_collator(rows)
        _, outputs = as_train_calls_it(trainer, batch, return_outputs=True)
        with torch.no_grad():
            expected = by_hand(reference, model.latent_tokens, batch, targets).latent
        torch.testing.assert_close(outputs.latent_loss, expected, atol=LOSS_TOLERANCE, rtol=LOSS_TOLERANCE)


class TestStageTwo:
    @pytest.mark.parametrize("latent_size", [3, None])
    @pytest.mark.parametrize("supervision", ["none", "not_end", "pad"])
    def test_loss_is_that_of_answers_after_the_models_own_states(
        self, build, rows, reference, latent_size, supervision
    ):
        recorder = GradientRecorder()
        trainer = build("stage2", latent_size=latent_size, stop_supervision=supervision, callbacks=[recorder])
        plain, tokens = same_weights(reference, trainer.model), trainer.model.latent_tokens
        batch = trainer.data_collator(rows)
        found = by_hand(plain, tokens, batch, rollout=True)
        chance = torch.cat(found.logits).softmax(-1)
        stop = {
            "none": torch.zeros(()),
            "not_end": -(1 - chance[:, tokens.end]).log().mean(),
            "pad": -chance[:, tokens.pad].log().mean(),
        }[supervision]
        trainer.train()
        logged = trainer.state.log_history[0]
        assert logged["loss"] == pytest.approx((found.lm + stop).item(), abs=LOSS_TOLERANCE)
        assert logged.get("loss/stop", 0.0) == pytest.approx(stop.item(), abs=LOSS_TOLERANCE)
        assert "loss/latent" not in logged
        assert logged["latent_norm"] == pytest.approx(
            torch.cat(found.states).norm(dim=-1).mean().item(), rel=LOSS_TOLERANCE
        )
        plain.model.visual.requires_grad_(False)
        (found.lm + stop).backward()
        assert worst_difference(recorder.gradients, gradients_of(plain)) < GRADIENT_TOLERANCE

    def test_gradient_through_every_slot_agrees_with_finite_differences(self, build, rows):
        """Parameters that act through the latents only: a push to the vector fed to each slot, and, under a full
        bottleneck, the embedding of `<|latent_start|>` and the vision tower, which nothing but the slots see.

        RMSNorm, RoPE and the loss compute in float32, which leaves noise near 1e-6 in a loss of 6. Steps that change
        the loss by 4e-4 keep that below 1% (seen: 0.11%).
        """
        trainer = build("stage2", latent_size=4, latent_bottleneck=1.0, trainable="all")
        model = trainer.model.double()
        batch = trainer.data_collator(rows)
        batch["pixel_values_videos"] = batch["pixel_values_videos"].double()
        pushes = torch.zeros(4, 64, dtype=torch.double, requires_grad=True)
        slot_idx = 0

        def push(module, args, kwargs):
            nonlocal slot_idx
            embeds = kwargs.get("inputs_embeds")
            if embeds is None or embeds.shape[1] != 1:
                return None
            pushed = embeds + pushes[slot_idx]
            slot_idx += 1
            return args, {**kwargs, "inputs_embeds": pushed}

        model.model.register_forward_pre_hook(push, with_kwargs=True)

        def loss():
            nonlocal slot_idx
            slot_idx = 0
            value = as_train_calls_it(trainer, dict(batch))
            assert slot_idx == 4
            return value

        loss().backward()
        table, start = model.get_input_embeddings().weight, model.latent_tokens.start
        merger = model.model.visual.merger.mlp[2].weight
        acting = [(f"slot {k}", pushes, pushes.grad, k) for k in range(4)]
        acting += [("start", table, table.grad, start), ("tower", merger, merger.grad, ...)]
        generator = torch.Generator().manual_seed(0)
        for name, parameter, gradient, where in acting:
            gradient = gradient[where]
            assert gradient.norm() > 1e-3, name
            direction = torch.randn(gradient.shape, generator=generator).double()
            direction = direction / direction.norm() + gradient / gradient.norm()
            direction /= direction.norm()
            slope = float((gradient * direction).sum())
            values = []
            with torch.no_grad():
                for step in (2e-4 / slope, -2e-4 / slope):
                    parameter[where] += step * direction
                    values.append(float(loss()))
                    parameter[where] -= step * direction
            assert (values[0] - values[1]) / 4e-4 == pytest.approx(1.0, rel=0.01), name

    def test_bottleneck_needs_an_attention_with_masks_of_its_own(self, build, rows):
        trainer = build("stage2", latent_bottleneck=1.0)
        batch = trainer.data_collator(rows)
        expected = as_train_calls_it(trainer, dict(batch))
        trainer.model.set_attn_implementation("eager")
        torch.testing.assert_close(
            as_train_calls_it(trainer, dict(batch)), expected, atol=LOSS_TOLERANCE, rtol=LOSS_TOLERANCE
        )
        trainer.model.config.text_config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match="Load the model with attn_implementation='sdpa'"):
            as_train_calls_it(trainer, batch)


class TestBottleneckDraws:
    def test_they_have_the_asked_probability_and_no_pattern(self):
        num_rows, num_steps = 1000, 300
        seeds = torch.randint(0, 2**32, (num_rows,), generator=torch.Generator().manual_seed(0))
        draws = torch.stack([_draw(seeds, 42, step) for step in range(num_steps)]).double() / 2**32
        count = num_rows * num_steps
        assert draws.min() >= 0
        assert draws.max() < 1
        for chance in (0.1, 0.5, 0.9):
            drawn = (draws < chance).double()
            # Five standard deviations: once in two million seeds.
            assert abs(drawn.mean() - chance) < 5 * math.sqrt(chance * (1 - chance) / count)
            # A row's share over steps, and a step's over rows, scatter as independent draws do.
            for dim, size in ((0, num_steps), (1, num_rows)):
                expected = math.sqrt(chance * (1 - chance) / size)
                assert drawn.mean(dim).std() == pytest.approx(expected, rel=0.25)
        # No lag of steps and no neighbour among rows tells anything: 5 deviations of a correlation of `count` pairs.
        centred = (draws - draws.mean()) / draws.std()
        for lag in range(1, 65):
            assert abs((centred[lag:] * centred[:-lag]).mean()) < 5 / math.sqrt(count - lag * num_rows), lag
        assert abs((centred[:, 1:] * centred[:, :-1]).mean()) < 5 / math.sqrt(count)

    def test_neighbouring_seeds_and_runs_differ(self):
        rows = torch.arange(1000)
        first, second = _draw(rows, 0, 0), _draw(rows, 1, 0)
        assert len(set(first.tolist())) == 1000
        for one, other in ((first, second), (first, _draw(rows, 0, 1)), (first[1:], first[:-1])):
            pair = torch.stack([one, other]).double()
            assert abs(torch.corrcoef(pair)[0, 1]) < 5 / math.sqrt(1000)

    def test_they_depend_on_row_and_step_only(self, build, rows):
        def drawn(rows, **options):
            trainer = build("stage2", rows, latent_bottleneck=0.5, max_steps=6, **options)
            seen, forward = [], trainer.model.forward

            def spy(*args, **kwargs):
                seen.append((trainer.state.global_step, kwargs["input_ids"], kwargs["latent_bottleneck"]))
                return forward(*args, **kwargs)

            trainer.model.forward = spy
            trainer.train()
            answers = {tuple(trainer.data_collator.encode(row).input_ids): row["id"] for row in rows}
            found = {}
            for step, ids, chosen in seen:
                for one, is_chosen in zip(ids.tolist(), chosen.tolist()):
                    key = next(name for known, name in answers.items() if tuple(one[-len(known) :]) == known)
                    found[step, key] = is_chosen
            return found

        together = drawn(rows)
        assert together == drawn(rows[::-1], per_device_train_batch_size=1, gradient_accumulation_steps=4)
        assert len(together) == 24
        assert 4 <= sum(together.values()) <= 20
        assert len({tuple(together[step, row["id"]] for row in rows) for step in range(6)}) > 1


class TestInvariance:
    """The same global batch gives the same step, however it is cut, padded or recomputed."""

    @staticmethod
    def assert_same(one, other):
        for mine, theirs in zip(one["logs"], other["logs"]):
            for name in set(mine) & set(theirs) - {"tokens_per_second", "items_per_second", "peak_memory_gb"}:
                assert mine[name] == pytest.approx(theirs[name], rel=LOSS_TOLERANCE, abs=LOSS_TOLERANCE), name
        assert worst_difference(one["gradients"], other["gradients"]) < GRADIENT_TOLERANCE

    @pytest.mark.parametrize(
        ("name", "batch_size"), [*((name, 1) for name in STAGES), ("stage1", 2), ("stage2-bottleneck", 2)]
    )
    def test_accumulated_batches_equal_one(self, build, outcome, name, batch_size):
        stage, options = STAGES[name]
        cut = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 4 // batch_size}
        self.assert_same(train(build(stage, max_steps=2, **cut, **options)), outcome(name))

    @pytest.mark.parametrize("name", STAGES)
    def test_padding_side_changes_nothing(self, build, outcome, name):
        stage, options = STAGES[name]
        self.assert_same(train(build(stage, max_steps=2, padding_side="right", **options)), outcome(name))

    @pytest.mark.parametrize("name", STAGES)
    def test_checkpointing_changes_nothing(self, build, outcome, name):
        stage, options = STAGES[name]
        trainer = build(stage, max_steps=2, gradient_checkpointing=True, **options)
        calls, layer = [], trainer.model.model.language_model.layers[0].self_attn
        layer.register_forward_hook(lambda module, args, output: calls.append(torch.is_grad_enabled()))
        result = train(trainer)
        self.assert_same(result, outcome(name))
        passes = 1 if name in ("sft", "stage1") else 2 + (options.get("latent_size", 3) or 12)
        assert len(calls) == 2 * 2 * passes, "each pass of the two steps runs a second time in its backward"

    @pytest.mark.parametrize("trainable", ["llm", "all", "lora"])
    def test_checkpointing_differentiates_the_tower_only_where_it_trains(self, build, trainable):
        found = []
        for checkpointing in (False, True):
            options = (
                {"model_options": {"use_peft": True, "lora_dropout": 0.0}}
                if trainable == "lora"
                else {"trainable": trainable}
            )
            trainer, seen = build("sft", max_steps=1, gradient_checkpointing=checkpointing, **options), []
            tower = trainer._backbone(trainer.model).model.visual
            tower.register_forward_hook(
                lambda module, args, output, seen=seen: seen.append(output.pooler_output.requires_grad)
            )
            found.append(train(trainer))
            assert seen == [trainable == "all"]
        self.assert_same(*found)

    @pytest.mark.parametrize("name", ["stage1", "stage2-bottleneck"])
    def test_bf16_stays_near(self, build, outcome, name):
        """bfloat16 keeps 8 bits, 0.4%: losses were seen to differ by 0.3%, gradients by 2%."""
        stage, options = STAGES[name]
        half = train(build(stage, max_steps=2, bf16=True, gradient_checkpointing=True, **options))
        for mine, theirs in zip(half["logs"], outcome(name)["logs"]):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=0.01)
        assert 1e-4 < worst_difference(half["gradients"], outcome(name)["gradients"]) < 0.1

    def test_reentrant_checkpointing_is_refused_in_a_rollout(self, build):
        trainer = build("stage2", gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
        with pytest.raises(ValueError, match="reentrant"):
            trainer.train()


class TestSft:
    def test_loss_is_the_plain_class_loss(self, build, rows, reference):
        trainer = build("sft")
        batch = trainer.data_collator(rows)
        assert not trainer.model.latent_tokens.isin(batch["input_ids"]).any()
        inputs = {name: value for name, value in batch.items() if name != "row_seeds"}
        with torch.no_grad():
            expected = float(reference(**inputs).loss)
        assert as_train_calls_it(trainer, dict(batch)).item() == pytest.approx(expected, abs=LOSS_TOLERANCE)
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=LOSS_TOLERANCE)


class TestMetrics:
    def test_they_are_means_over_the_whole_accumulated_batch(self, build, rows, reference):
        """After some training, so that accuracy is neither 0 nor 1; answers and blocks of unequal length."""
        snapshots = Snapshots()
        trainer = build(
            "stage1",
            latent_size=None,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            optim="adamw_torch",
            learning_rate=3e-3,
            max_steps=8,
            callbacks=[snapshots],
        )
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
        targets = thought_targets(reference, trainer.processing_class, rows, None)
        plain = copy.deepcopy(reference)
        plain.load_state_dict(snapshots.weights[-1])
        batch = trainer.data_collator(rows)
        with torch.no_grad():
            found = by_hand(plain, trainer.model.latent_tokens, batch, targets)
        states, targets = torch.cat(found.states), torch.cat(targets)
        cosine = (states * targets).sum(-1) / states.norm(dim=-1) / targets.norm(dim=-1)
        assert 0 < found.correct < found.labels
        tokens = int(batch["attention_mask"].sum())
        expected = {
            "loss": float(found.lm + 0.1 * found.latent),
            "loss/lm": found.lm.item(),
            "loss/latent": found.latent.item(),
            "latent_norm": float(states.norm(dim=-1).mean()),
            "latent_cosine": float(cosine.mean()),
            "mean_token_accuracy": found.correct / found.labels,
            "num_tokens": 8 * tokens,
        }
        for name, value in expected.items():
            assert logged[name] == pytest.approx(value, rel=LOSS_TOLERANCE, abs=LOSS_TOLERANCE), name
        assert logged["tokens_per_second"] / logged["items_per_second"] == pytest.approx(tokens / 4)
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert logged["peak_memory_gb"] == pytest.approx(kilobytes * 1024 / 1e9, rel=0.1)

    def test_training_ends_once_the_answers_are_learned(self, build, capsys):
        run = partial(build, "stage2", optim="adamw_torch", learning_rate=3e-3, max_steps=6, logging_steps=2)
        whole = run()
        whole.train()
        losses = {entry["step"]: entry["loss/lm"] for entry in whole.state.log_history if "loss/lm" in entry}
        assert list(losses) == [2, 4, 6]
        assert losses[2] > losses[4]
        ended = run(stop_at_loss=losses[4])
        ended.train()
        ended.finish()
        assert ended.state.global_step == 4
        assert json.loads(Path(ended.args.output_dir, "training.json").read_text())["steps"] == 4
        assert f"Step 4: the answers' loss is {losses[4]:.4f}, training ends." in capsys.readouterr().out

    def test_throughput_counts_the_time_of_training_alone(self, build, rows, monkeypatch):
        """A step takes one second by this clock, and an evaluation, in the middle of what is logged, a thousand."""
        now = 0.0
        trainer = build("sft", max_steps=4, logging_steps=4, eval_rows=rows, eval_strategy="steps", eval_steps=2)

        def taking(seconds, method):
            def timed(*args, **kwargs):
                nonlocal now
                now += seconds
                return method(*args, **kwargs)

            return timed

        clock = SimpleNamespace(**{name: getattr(time, name) for name in ("time", "sleep")}, perf_counter=lambda: now)
        monkeypatch.setattr(trainer_module, "time", clock)
        trainer.training_step = taking(1.0, trainer.training_step)
        trainer.prediction_step = taking(1000.0, trainer.prediction_step)
        trainer.train()
        (logged,) = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert logged["items_per_second"] == pytest.approx(4)
        assert logged["tokens_per_second"] == pytest.approx(logged["num_tokens"] / 4)


@pytest.fixture(scope="module")
def trained(tiny_checkpoint, tmp_path_factory, rows):
    """A model that knows its four rows by heart, its trainer, and its folder; weights have moved far."""
    folder = tmp_path_factory.mktemp("trained")
    # One of the rows to evaluate on has a wrong answer.
    judged = [*rows[:3], {**rows[3], "answer": "the car stops"}]
    trainer = make_trainer(
        tiny_checkpoint,
        folder,
        "stage2",
        rows,
        judged,
        latent_size=4,
        optim="adamw_torch",
        learning_rate=3e-3,
        max_steps=60,
        eval_answers=64,
        eval_max_new_tokens=24,
        per_device_eval_batch_size=3,
    )
    trainer.train()
    trainer.save_model()
    return trainer, folder, judged


def asked(processor, row, folder):
    """Model inputs of a row's question, as a user of the checkpoint makes them from a file."""
    path = folder / f"{row['id']}.mp4"
    path.write_bytes(row["video"]["bytes"])
    content = [{"type": "video", "video": str(path)}]
    content.append({"type": "text", "text": storms_prompt(row["question"], row["options"])})
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


class TestTrainedModel:
    def test_states_of_training_are_those_that_generate_makes(self, trained, tiny_checkpoint, rows, tmp_path):
        trainer, folder, _ = trained
        loaded = StormsForConditionalGeneration.from_pretrained(folder).eval()
        processor = StormsProcessor.from_pretrained(folder)
        before = StormsForConditionalGeneration.from_pretrained(tiny_checkpoint).eval()
        _, outputs = as_train_calls_it(trainer, trainer.data_collator(rows), return_outputs=True)
        assert outputs.latent_states.shape == (4, 4, 64)
        for row, states in zip(rows, outputs.latent_states.detach()):
            inputs = asked(processor, row, tmp_path)
            out = loaded.generate(**inputs, latent_mode="force", max_new_tokens=6, return_dict_in_generate=True)
            torch.testing.assert_close(out.latent_states[0], states, atol=STATE_TOLERANCE, rtol=STATE_TOLERANCE)
            out = before.generate(
                **inputs, latent_mode="force", latent_size=4, max_new_tokens=6, return_dict_in_generate=True
            )
            assert (out.latent_states[0] - states).abs().max() > 0.1, "training has not changed the states"

    def test_a_batch_of_prompts_generates_them_too(self, trained, rows):
        trainer, folder, _ = trained
        loaded = StormsForConditionalGeneration.from_pretrained(folder).eval()
        _, outputs = as_train_calls_it(trainer, trainer.data_collator(rows), return_outputs=True)
        prompts = trainer.data_collator.prompts(rows)
        out = loaded.generate(**prompts, max_new_tokens=6, return_dict_in_generate=True)  # it opens blocks itself
        for states, expected in zip(out.latent_states, outputs.latent_states.detach()):
            torch.testing.assert_close(states, expected, atol=STATE_TOLERANCE, rtol=STATE_TOLERANCE)

    def test_evaluation_reports_answers_by_generation_and_the_loss(self, trained, reference, tmp_path):
        trainer, folder, judged = trained
        measured = trainer.evaluate()
        loaded = StormsForConditionalGeneration.from_pretrained(folder).eval()
        processor = StormsProcessor.from_pretrained(folder)
        right = []
        for row in judged:
            inputs = asked(processor, row, tmp_path)
            sequences = loaded.generate(**inputs, max_new_tokens=40)
            text = processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
            right.append(text.strip() == row["answer"])
        assert right == [True, True, True, False]
        assert measured["eval_accuracy"] == 0.75
        assert measured["eval_parsed"] == 1.0
        assert measured["eval_full_blocks"] == 1.0
        plain = same_weights(reference, trainer.model)
        with torch.no_grad():
            found = by_hand(plain, trainer.model.latent_tokens, trainer.data_collator(judged), rollout=True)
        assert measured["eval_loss/lm"] == pytest.approx(found.lm.item(), rel=1e-4)
        # A mean over tokens, of batches of 3 and 1 rows alike.
        assert measured["eval_loss"] == pytest.approx(found.lm.item(), rel=1e-4)
        assert measured["eval_mean_token_accuracy"] == pytest.approx(found.correct / found.labels)
        assert trainer.state.log_history[-1]["eval_loss/lm"] == measured["eval_loss/lm"]

    def test_evaluation_without_answers_reports_the_loss_alone(self, build, rows):
        measured = build("stage2", eval_rows=rows, eval_answers=0).evaluate()
        assert "eval_loss/lm" in measured
        assert "eval_accuracy" not in measured


@pytest.mark.parametrize("bottleneck", [1, 0.5])
def test_a_checkpoint_generates_as_it_was_trained(tiny_checkpoint, tmp_path, bottleneck):
    """Without pooling, as many slots as its first row has; and under the bottleneck if every row was."""
    Dataset.from_list(make_rows(2)).to_parquet(tmp_path / "data" / "train.parquet")
    argv = ["--model_name_or_path", tiny_checkpoint, "--dataset_name", tmp_path / "data"]
    argv += [
        "--output_dir",
        tmp_path / "out",
        "--latent_size",
        "null",
        "--latent_bottleneck",
        bottleneck,
        "--max_steps",
        "1",
        "--use_cpu",
        "true",
        "--bf16",
        "false",
        "--num_frames",
        "4",
    ]
    run("stage2", None, [str(one) for one in [*argv, "--save_strategy", "no", "--disable_tqdm", "true"]])
    model = StormsForConditionalGeneration.from_pretrained(tmp_path / "out")
    tokens = 4  # a thought video of 2 frames is one step of 4 tokens
    assert model.config.latent_size == model.generation_config.latent_size == tokens
    assert model.generation_config.latent_bottleneck is (bottleneck == 1)


@pytest.mark.parametrize(
    ("num_frames", "num_slots", "better"),
    [(16, 8, None), (16, 10, 20), (15, 6, 12), (16, 4, None), (16, 16, None), (20, 5, None), (6, None, None)],
)
def test_stage_1_tells_that_neighbouring_slots_share_frames(monkeypatch, num_frames, num_slots, better):
    told = []
    monkeypatch.setattr(trainer_module.logger, "warning", told.append)
    arguments = SimpleNamespace(num_target_frames=num_frames, latent_size=num_slots)
    trainer_module._warn_of_shared_steps(arguments, 2)
    assert [f"With --num_target_frames {better}, or a multiple" in one for one in told] == [True] * (
        better is not None
    )
