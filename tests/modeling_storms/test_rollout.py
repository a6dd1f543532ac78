"""Training's forward against `generate`, against a cache-free rollout, and against finite differences."""

import copy
import pickle
from itertools import product

import pytest
import torch
from accelerate.utils import convert_to_fp32
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_storms.latent_storms import RolloutLayout, StormsOutput

from .conftest import eager_to, latent_ids, one_grid_step, same_weights, variants
from .reference import recompute, single_rows
from .test_generate import STATE_TOLERANCE


# Logits are sums of 64 products of states near 1: an error of 1e-6 in a state may show as 1e-5 here (seen: 2e-5).
LOGIT_TOLERANCE = 1e-4


def repack(inputs, rows, attention, side):
    """Rows of ids and mask, padded on `side` to a common length."""
    width = max(len(row) for row in rows)

    def padded(values, fill):
        room = [width - len(value) for value in values]
        pads = [(n, 0) if side == "left" else (0, n) for n in room]
        return torch.stack([torch.nn.functional.pad(v, pad, value=fill) for v, pad in zip(values, pads)])

    vision = {k: inputs[k] for k in inputs if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
    types = [inputs["mm_token_type_ids"][i][attention[i]] for i in range(len(rows))]
    types = [torch.nn.functional.pad(t, (0, len(row) - len(t))) for t, row in zip(types, rows)]
    return {
        "input_ids": padded(rows, 0),
        "attention_mask": padded([torch.ones_like(row) for row in rows], 0),
        "mm_token_type_ids": padded(types, 0),
        **vision,
    }


def training_batch(model, inputs, out, side="left"):
    """What `generate` wrote, as a batch of whole sequences with labels on everything new."""
    prompt_length = inputs["input_ids"].shape[1]
    attention = inputs["attention_mask"].bool()
    eos = torch.tensor(model.generation_config.eos_token_id)
    rows, labels = [], []
    for prompt, seen, sequence in zip(inputs["input_ids"], attention, out.sequences):
        new = sequence[prompt_length:]
        stops = torch.isin(new, eos).nonzero()
        new = new[: int(stops[0]) + 1] if len(stops) else new
        rows.append(torch.cat([prompt[seen], new]))
        labels.append(torch.cat([torch.full_like(prompt[seen], -100), new]))
    batch = repack(inputs, rows, attention, side)
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    batch["labels"][batch["attention_mask"].bool()] = torch.cat(labels)
    return batch


def single_batches(model, batch):
    """Each row of a training batch alone and unpadded."""
    for index, row in enumerate(single_rows(batch, model.config)):
        row["labels"] = batch["labels"][index][batch["attention_mask"][index].bool()][None]
        yield row


KINDS = ("video", "text", "both", "image", "text", "short", "text", "image")


@pytest.fixture
def episode(model, prompts):
    """Rows that open at different steps, some never, some twice, one cut off inside its block; and the model."""
    eager_to(model, start=0.4, end=0.4, seed=3)
    inputs = prompts(*KINDS)
    out = model.generate(
        **inputs,
        max_new_tokens=29,
        latent_size=3,
        latent_stop="token",
        max_latent_blocks=2,
        return_dict_in_generate=True,
    )
    assert {"none", "token", "length"} <= set(out.latent_stop_reasons)
    assert len(set(out.latent_lengths.tolist())) > 2
    return model, inputs, out


@pytest.fixture
def trained_kind(model, prompts):
    """The usual training batch: one forced block of equal size in every row, videos of different lengths."""
    inputs = prompts("short", "text", "both")
    out = model.generate(**inputs, max_new_tokens=12, latent_mode="force", latent_size=4, return_dict_in_generate=True)
    return model, inputs, out


def checkpointed(model, on):
    if on:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train(on)


def assert_states(output, expected):
    for states, mask, reference in zip(output.latent_states, output.latent_mask, expected):
        torch.testing.assert_close(states[mask], reference, atol=STATE_TOLERANCE, rtol=STATE_TOLERANCE)
        assert int(mask.sum()) == len(reference)
        assert not states[~mask].any()


SIDES_AND_CHECKPOINTING = list(product(["left", "right"], [False, True]))


class TestParity:
    @variants(["side", "checkpointing"], SIDES_AND_CHECKPOINTING, [["left", True]])
    def test_rollout_yields_the_states_generate_yields(self, episode, side, checkpointing):
        model, inputs, out = episode
        batch = training_batch(model, inputs, out, side)
        checkpointed(model, checkpointing)
        rollout = model(**batch, latent_input="rollout")
        assert_states(rollout, out.latent_states)

    def test_slots_without_feedback_are_the_plain_class_reading_their_embedding(self, pair, model, prompts):
        inputs = prompts("video", "text", "both")
        pad = model.get_input_embeddings().weight[model.config.latent_pad_token_id]
        out = model.generate(
            **inputs,
            max_new_tokens=12,
            latent_mode="force",
            latent_size=4,
            latent_intervention=lambda states, slot_index: pad.expand_as(states),
            return_dict_in_generate=True,
            output_logits=True,
        )
        batch = training_batch(model, inputs, out)
        paused = model(**batch, latent_input="embedding")
        plain = same_weights(pair[0], model)(**{name: one for name, one in batch.items() if name != "labels"})
        kept = batch["attention_mask"].bool()
        torch.testing.assert_close(paused.logits[kept], plain.logits[kept], atol=LOGIT_TOLERANCE, rtol=LOGIT_TOLERANCE)
        # And generation under that intervention reads what training does: logits behind the block, row by row.
        for index, row in enumerate(single_batches(model, batch)):
            alone = model(**row, latent_input="embedding").logits[0]
            length = int(inputs["attention_mask"][index].sum())
            ended = len(alone) - length
            for step in range(6, ended):
                torch.testing.assert_close(
                    alone[length + step - 1], out.logits[step][index], atol=LOGIT_TOLERANCE, rtol=LOGIT_TOLERANCE
                )

    def test_each_row_alone_yields_the_same(self, episode):
        model, inputs, out = episode
        batch = training_batch(model, inputs, out)
        together = model(**batch, latent_input="rollout")
        for index, row in enumerate(single_batches(model, batch)):
            alone = model(**row, latent_input="rollout")
            if len(out.latent_states[index]):
                assert_states(alone, [out.latent_states[index]])
            kept = batch["attention_mask"][index].bool()
            torch.testing.assert_close(
                alone.logits[0], together.logits[index][kept], atol=LOGIT_TOLERANCE, rtol=LOGIT_TOLERANCE
            )

    @pytest.mark.parametrize(("side", "checkpointing"), SIDES_AND_CHECKPOINTING)
    def test_parallel_equals_sequential(self, episode, side, checkpointing):
        model, inputs, out = episode
        batch = training_batch(model, inputs, out, side)
        checkpointed(model, checkpointing)
        rollout = model(**batch, latent_input="rollout")
        forced = model(**batch, latent_input="teacher_forced", latent_targets=rollout.latent_states.detach())
        kept = batch["attention_mask"].bool()
        torch.testing.assert_close(
            forced.logits[kept], rollout.logits[kept], atol=LOGIT_TOLERANCE, rtol=LOGIT_TOLERANCE
        )
        assert_states(forced, out.latent_states)
        torch.testing.assert_close(forced.lm_loss, rollout.lm_loss)

    @variants(["checkpointing"], [[False], [True]], [[True]])
    def test_teacher_forced_equals_the_plain_class_fed_the_same_vectors(self, trained_kind, reference, checkpointing):
        model, inputs, out = trained_kind
        reference = same_weights(reference, model)
        batch = training_batch(model, inputs, out)
        is_slot = batch["input_ids"] == model.latent_tokens.pad
        targets = torch.randn(3, 4, 64)
        checkpointed(model, checkpointing)
        forced = model(**batch, latent_input="teacher_forced", latent_targets=targets)
        forced.loss.backward()
        expected_loss = 0.0
        for index, row in enumerate(single_batches(model, batch)):
            embeds = reference.get_input_embeddings()(row["input_ids"]).clone()
            own_slots = row["input_ids"][0] == model.latent_tokens.pad
            embeds[0, own_slots] = targets[index]
            states = recompute(reference, row, embeds)
            expected = reference.lm_head(states)
            kept = batch["attention_mask"][index].bool()
            torch.testing.assert_close(
                forced.logits[index][kept], expected, atol=LOGIT_TOLERANCE, rtol=LOGIT_TOLERANCE
            )
            labels = row["labels"][0].masked_fill(own_slots, -100)
            count = int(((batch["labels"] != -100) & ~is_slot).sum())
            loss = torch.nn.functional.cross_entropy(expected[:-1], labels[1:], ignore_index=-100, reduction="sum")
            error = (states[:-1][own_slots[1:]] - targets[index]).square().mean(-1)
            expected_loss = expected_loss + loss / count + 0.1 * error.sum() / int(is_slot.sum())
        torch.testing.assert_close(forced.loss, expected_loss)
        expected_loss.backward()
        assert_gradients(model, reference)

    def test_teacher_forcing_needs_no_embedding_of_its_own_for_placeholders(self, trained_kind):
        """Placeholder rows are always overwritten, so they may be equal, or noised as in NEFTune."""
        model, inputs, out = trained_kind
        batch = training_batch(model, inputs, out)
        targets = torch.stack(out.latent_states)
        expected = model(**batch, latent_input="teacher_forced", latent_targets=targets).logits
        table = model.get_input_embeddings()
        table.weight.data[model.config.image_token_id] = table.weight.data[model.config.video_token_id]
        visual = (batch["input_ids"] == model.config.image_token_id) | (
            batch["input_ids"] == model.config.video_token_id
        )
        table.register_forward_hook(lambda module, args, embeds: embeds + 0.1 * visual[..., None])
        changed = model(**batch, latent_input="teacher_forced", latent_targets=targets).logits
        torch.testing.assert_close(changed, expected)
        assert len(table._forward_hooks) == 1, "a training pass leaves no hook behind"

    def test_compiled_graphs_are_not_reused_across_kinds_of_input(self, trained_kind, prompts):
        model, inputs, out = trained_kind
        batch = training_batch(model, inputs, out)
        targets = {"latent_input": "teacher_forced", "latent_targets": torch.randn(3, 4, 64)}
        expected = model(**batch, **targets).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        compiled(**batch, latent_input="rollout")
        compiled(**prompts("text", "video", "both"))
        torch.testing.assert_close(compiled(**batch, **targets).logits, expected, atol=1e-5, rtol=1e-4)

    def test_hiding_slots_moves_no_position(self, trained_kind):
        """Slots masked in the 2D mask keep their places: what does not look at them is the same."""
        model, inputs, out = trained_kind
        batch = training_batch(model, inputs, out)
        positions = []
        model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: positions.append(kwargs["position_ids"]), with_kwargs=True
        )
        targets = torch.stack(out.latent_states)
        hidden = batch["attention_mask"].masked_fill(batch["input_ids"] == model.latent_tokens.pad, 0)
        for mask in (batch["attention_mask"], hidden):
            model(**{**batch, "attention_mask": mask}, latent_input="teacher_forced", latent_targets=targets)
        kept = batch["attention_mask"].bool()
        assert torch.equal(positions[0][:, kept], positions[1][:, kept])

    @variants(["latent_input"], [["rollout"], ["teacher_forced"]], [["rollout"]])
    def test_a_batch_without_blocks_is_a_plain_one(self, model, reference, prompts, latent_input):
        inputs = prompts("video", "text")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        output = model(**inputs, labels=labels, latent_input=latent_input)
        torch.testing.assert_close(output.loss, reference(**inputs, labels=labels).loss)
        assert output.latent_states is None

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_second_backbone(self, qwen3, prompts, side):
        _, model = qwen3
        inputs = one_grid_step(prompts("video", "text", "both"), model.config)
        out = model.generate(
            **inputs, max_new_tokens=10, latent_mode="force", latent_size=4, return_dict_in_generate=True
        )
        batch = training_batch(model, inputs, out, side)
        rollout = model(**batch, latent_input="rollout")
        assert_states(rollout, out.latent_states)
        forced = model(**batch, latent_input="teacher_forced", latent_targets=rollout.latent_states.detach())
        kept = batch["attention_mask"].bool()
        torch.testing.assert_close(
            forced.logits[kept], rollout.logits[kept], atol=LOGIT_TOLERANCE, rtol=LOGIT_TOLERANCE
        )

    def test_without_blocks_the_loss_is_the_plain_class_loss(self, model, reference, prompts):
        inputs = prompts("video", "text", "both")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        plain = reference(**inputs, labels=labels)
        assert model(**inputs, labels=labels).loss == plain.loss
        torch.testing.assert_close(model(**inputs, labels=labels, latent_input="rollout").loss, plain.loss)

    def test_a_rollout_costs_about_one_forward(self, trained_kind):
        model, inputs, out = trained_kind
        batch = training_batch(model, inputs, out)
        widths = []
        model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: widths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        )
        model(**batch, latent_input="rollout")
        assert widths[1:-1] == [1] * 4
        assert sum(widths) == batch["input_ids"].shape[1]  # forced blocks line up: no column is wasted


def plain_rollout_loss(reference, row, tokens, denominator, bottleneck=False):
    """Answer loss of a row whose slots are filled one full recomputation at a time, with gradient."""
    embeds = reference.get_input_embeddings()(row["input_ids"])
    is_slot = (row["input_ids"][0] == tokens.pad).tolist()
    vectors = [embeds[:, position] for position in range(len(is_slot))]
    mask = sight(row, tokens) if bottleneck else None

    def states(length):
        seen = None if mask is None else mask[None, None, :length, :length]
        return recompute(reference, cut(row, length), torch.stack(vectors[:length], dim=1), seen)

    for position, slot in enumerate(is_slot):
        if slot:
            vectors[position] = states(position)[-1:]
    logits = reference.lm_head(states(len(vectors))).float()
    labels = row["labels"][0].clone()
    labels[row["input_ids"][0] == tokens.pad] = -100
    loss = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
    return loss / denominator


def sight(row, tokens):
    """Who sees whom under the bottleneck, `(length, length)`: only visual tokens, the block's start and its slots see
    visual tokens and the start."""
    ids, is_visual = row["input_ids"][0].tolist(), (row["mm_token_type_ids"][0] > 0).tolist()
    mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    for query in range(len(ids)):
        for key in range(query + 1):
            sees_all = is_visual[query] or ids[query] in (tokens.start, tokens.pad)
            mask[query, key] = sees_all or not (is_visual[key] or ids[key] == tokens.start)
    return mask


def assert_gradients(model, reference):
    """Of all weights."""
    worst = 0.0
    for (name, one), (_, other) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            worst = max(worst, float((one.grad - other.grad).norm() / other.grad.norm().clamp(min=1e-6)))
    assert worst < 1e-5  # seen: 9e-7


def cut(row, length):
    return {**row, **{k: row[k][:, :length] for k in ("input_ids", "mm_token_type_ids")}}


class TestGradients:
    @variants(
        ["side", "checkpointing", "bottleneck"],
        [*((*case, False) for case in SIDES_AND_CHECKPOINTING), ("left", True, True)],
        [["left", True, False], ["right", False, True]],
    )
    def test_rollout_gradients_equal_a_cache_free_rollout(
        self, trained_kind, reference, side, checkpointing, bottleneck
    ):
        model, inputs, out = trained_kind
        reference = same_weights(reference, model)
        batch = training_batch(model, inputs, out, side)
        checkpointed(model, checkpointing)
        loss = model(**batch, latent_input="rollout", latent_bottleneck=bottleneck).lm_loss
        loss.backward()
        tokens = model.latent_tokens
        counted = int(((batch["labels"] != -100) & (batch["labels"] != tokens.pad)).sum())
        rows = single_batches(model, batch)
        expected = sum(plain_rollout_loss(reference, row, tokens, counted, bottleneck) for row in rows)
        expected.backward()
        torch.testing.assert_close(loss, expected)
        assert_gradients(model, reference)

    def test_checkpointing_changes_no_gradient_with_ragged_blocks(self, episode):
        model, inputs, out = episode
        batch = training_batch(model, inputs, out, "right")
        gradients = []
        for on in (False, True):
            model.zero_grad()
            checkpointed(model, on)
            model(**batch, latent_input="rollout").loss.backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)

    def test_rollout_gradients_match_finite_differences(self, trained_kind):
        # RMSNorm and RoPE compute in float32 whatever the weights' type, so the loss carries noise near 1e-7 of its
        # value: with steps of 5e-3 that allows about 2%.
        model, inputs, out = trained_kind
        batch = training_batch(model, inputs, out)
        model.double()
        batch["pixel_values"], batch["pixel_values_videos"] = (
            batch[name].double() for name in ("pixel_values", "pixel_values_videos")
        )
        labels = batch["labels"].masked_fill(batch["input_ids"] == model.latent_tokens.pad, -100)

        def loss():
            logits = model(**batch, latent_input="rollout").logits[:, :-1].double()
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)

        loss().backward()
        names = ("model.language_model.layers.1.self_attn.v_proj.weight", "model.visual.merger.mlp.2.weight")
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if name not in names:
                continue
            direction = torch.randn(parameter.shape, generator=generator).double()
            direction = 0.5 * direction + 0.5 * parameter.grad / parameter.grad.norm() * direction.norm()
            direction /= direction.norm()
            with torch.no_grad():
                values = []
                for step in (5e-3, -5e-3):
                    parameter.add_(step * direction)
                    values.append(float(loss()))
                    parameter.sub_(step * direction)
            numerical = (values[0] - values[1]) / 1e-2
            assert numerical == pytest.approx(float((parameter.grad * direction).sum()), rel=0.02), name

    def test_reentrant_checkpointing_is_refused(self, trained_kind):
        model, inputs, out = trained_kind
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.train()
        with pytest.raises(ValueError, match="reentrant"):
            model(**training_batch(model, inputs, out), latent_input="rollout")

    def test_checkpointed_layers_are_as_before_after_a_rollout(self, trained_kind):
        model, inputs, out = trained_kind
        checkpointed(model, True)
        model(**training_batch(model, inputs, out), latent_input="rollout")
        assert not any("_can_checkpoint_with_cache" in vars(module) for module in model.modules())


class TestBottleneck:
    @staticmethod
    def answer_gradient(model, batch, latent_input, hide_slots, **kwargs):
        """Largest gradient of the answer's logits with respect to the pixels of images and videos."""
        batch = dict(batch)
        tokens = model.latent_tokens
        pixels = [name for name in ("pixel_values", "pixel_values_videos") if name in batch]
        for name in pixels:
            batch[name] = batch[name].clone().requires_grad_()
        is_slot = batch["input_ids"] == tokens.pad
        if hide_slots:
            batch["attention_mask"] = batch["attention_mask"].masked_fill(is_slot, 0)
        logits = model(**batch, latent_input=latent_input, **kwargs).logits
        after = (batch["input_ids"] == tokens.end).cumsum(1).bool() & batch["attention_mask"].bool()
        gradients = torch.autograd.grad(logits[after].square().sum(), [batch[name] for name in pixels])
        return max(float(gradient.abs().max()) for gradient in gradients)

    @variants(
        ["latent_input", "attention"],
        product(["rollout", "teacher_forced"], ["sdpa", "eager"]),
        [["rollout", "sdpa"]],
    )
    def test_only_the_slots_carry_the_video(self, trained_kind, latent_input, attention):
        model, inputs, out = trained_kind
        model.set_attn_implementation(attention)
        batch = training_batch(model, inputs, out)
        kwargs = {"latent_targets": torch.stack(out.latent_states)} if latent_input == "teacher_forced" else {}

        def gradient(hide_slots, bottleneck):
            return self.answer_gradient(model, batch, latent_input, hide_slots, latent_bottleneck=bottleneck, **kwargs)

        assert gradient(True, True) == 0.0
        assert gradient(False, True) > 1e-6
        assert gradient(True, False) > 1e-6
        assert gradient(False, None) > 1e-6

    def test_it_is_a_choice_per_row(self, trained_kind):
        model, inputs, out = trained_kind
        batch = training_batch(model, inputs, out)
        open_rows = model(**batch, latent_input="rollout").logits
        closed_rows = model(**batch, latent_input="rollout", latent_bottleneck=True).logits
        mixed = model(**batch, latent_input="rollout", latent_bottleneck=torch.tensor([True, True, False])).logits
        kept = batch["attention_mask"].bool()
        torch.testing.assert_close(mixed[2][kept[2]], open_rows[2][kept[2]], atol=LOGIT_TOLERANCE, rtol=1e-4)
        torch.testing.assert_close(mixed[0][kept[0]], closed_rows[0][kept[0]], atol=LOGIT_TOLERANCE, rtol=1e-4)
        assert (open_rows[0] - closed_rows[0])[kept[0]].abs().max() > 1e-2
        # A row without images or videos only loses sight of <|latent_start|>.
        assert (open_rows[1] - closed_rows[1])[kept[1]].abs().max() > 1e-3

    @variants(["cache"], [[None], ["static"]], [["static"]])
    def test_training_and_generate_agree(self, model, prompts, cache):
        eager_to(model, start=0.4, end=0.4, seed=3)
        inputs = prompts("video", "text", "both", "short")
        out = model.generate(
            **inputs,
            max_new_tokens=14,
            latent_mode="force",
            latent_size=4,
            max_latent_blocks=2,
            latent_bottleneck=True,
            cache_implementation=cache,
            return_dict_in_generate=True,
        )
        for side in ("left", "right"):
            batch = training_batch(model, inputs, out, side)
            rollout = model(**batch, latent_input="rollout", latent_bottleneck=True)
            assert_states(rollout, out.latent_states)
            logits = rollout.logits.clone()
            logits[..., list(latent_ids(model))] = -torch.inf
            text = (batch["labels"] != -100) & ~model.latent_tokens.isin(batch["input_ids"])
            for row in range(len(inputs["input_ids"])):
                places = text[row].nonzero()[:, 0]
                assert logits[row, places - 1].argmax(-1).tolist() == batch["input_ids"][row, places].tolist()


class TestPasses:
    """Ranks that share weights must all call each layer as often, forward and backward."""

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_number_of_passes_is_known_beforehand(self, episode, side):
        model, inputs, out = episode
        batch = training_batch(model, inputs, out, side)
        calls = []
        model.model.language_model.register_forward_hook(lambda *args: calls.append(1))
        rows = list(single_batches(model, batch))
        for one in (batch, *rows):
            calls.clear()
            model(**one, latent_input="rollout")
            assert len(calls) == model.num_rollout_passes(one["input_ids"], one["attention_mask"])
        # Without a mask nothing is padding.
        alone = rows[1]["input_ids"], rows[1]["attention_mask"]
        assert model.num_rollout_passes(alone[0]) == model.num_rollout_passes(*alone) > 1
        assert model.num_rollout_passes(inputs["input_ids"], inputs["attention_mask"]) == 1, "no blocks"

    @pytest.mark.parametrize("idle", [0, 1, 5])
    @pytest.mark.parametrize("kind", ["plain", "checkpointed", "bottleneck", "without blocks"])
    def test_idle_passes_change_nothing(self, trained_kind, idle, kind):
        model, inputs, out = trained_kind
        if kind == "without blocks":
            batch = {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}
            options = {}
        else:
            batch = training_batch(model, inputs, out)
            options = {"stop_supervision": "pad", "latent_targets": torch.randn(3, 4, 64)}
        if kind == "bottleneck":
            options["latent_bottleneck"] = torch.tensor([True, True, False])
        checkpointed(model, kind == "checkpointed")
        layers = model.model.language_model.layers
        forward, backward = [], []
        layers[-1].mlp.gate_proj.register_forward_hook(lambda *args: forward.append(1))
        layers[0].self_attn.o_proj.register_full_backward_hook(lambda *args: backward.append(1))
        own = model.num_rollout_passes(batch["input_ids"], batch["attention_mask"])
        results = []
        for num_passes in (None, own + idle):
            model.zero_grad()
            forward.clear()
            backward.clear()
            output = model(**batch, **options, latent_input="rollout", num_passes=num_passes)
            assert len(forward) == (num_passes or own)
            output.loss.backward()
            assert len(backward) == (num_passes or own), "each pass is run backward, or ranks would part there"
            results.append((output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
        (output, gradients), (idled, idled_gradients) = results
        kept = batch["attention_mask"].bool()
        torch.testing.assert_close(idled.loss, output.loss)
        torch.testing.assert_close(idled.logits[kept], output.logits[kept])
        if output.latent_states is not None:
            torch.testing.assert_close(idled.latent_states, output.latent_states)
        assert gradients.keys() == idled_gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(idled_gradients[name], gradient, atol=1e-6, rtol=1e-4)

    def test_fewer_passes_than_needed_are_no_limit(self, trained_kind):
        model, inputs, out = trained_kind
        batch = training_batch(model, inputs, out)
        expected = model(**batch, latent_input="rollout").logits
        assert torch.equal(model(**batch, latent_input="rollout", num_passes=1).logits, expected)


class TestChosenLogits:
    """A mask as `logits_to_keep`: only the positions that a loss needs."""

    @staticmethod
    def inputs_of(kind, model, batch):
        ids, tokens = batch["input_ids"], model.latent_tokens
        batch = {**batch, "labels": batch["labels"].masked_fill(ids == tokens.pad, -100)}
        if kind is None:  # text in place of the blocks
            return {**batch, "input_ids": ids.masked_fill(tokens.isin(ids), 5)}
        targets = torch.ones(len(ids), int((ids == tokens.pad).sum(1).max()), 64)
        return {**batch, "latent_input": kind, "stop_supervision": "pad", "latent_targets": targets}

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("kind", [None, "teacher_forced", "rollout"])
    def test_they_are_the_same_logits_and_losses(self, episode, kind, side):
        model, inputs, out = episode
        inputs = self.inputs_of(kind, model, training_batch(model, inputs, out, side))
        full = model(**inputs)
        is_slot = inputs["input_ids"] == model.latent_tokens.pad
        needed = torch.nn.functional.pad(((inputs["labels"] != -100) | is_slot)[:, 1:], (0, 1))
        more = needed | (torch.arange(needed.shape[1]) % 3 == 0)
        for kept in (needed, more, torch.ones_like(needed)):
            some = model(**inputs, logits_to_keep=kept)
            assert some.logits.shape == (1, int(kept.sum()), full.logits.shape[-1])
            torch.testing.assert_close(some.logits[0], full.logits[kept], atol=1e-5, rtol=1e-5)
            for name in ("loss", "lm_loss", "latent_loss", "stop_loss", "latent_states"):
                if name in full:
                    torch.testing.assert_close(some[name], full[name])
        halved = model(**inputs, logits_to_keep=needed, num_items_in_batch=1000, num_slots_in_batch=1000)
        counted = int((inputs["labels"] != -100)[:, 1:].sum())
        torch.testing.assert_close(halved.lm_loss, full.lm_loss * counted / 1000)

    @pytest.mark.parametrize("kind", [None, "teacher_forced", "rollout"])
    def test_a_mask_that_leaves_out_what_a_loss_needs_is_refused(self, episode, kind):
        model, inputs, out = episode
        inputs = self.inputs_of(kind, model, training_batch(model, inputs, out))
        is_slot = inputs["input_ids"] == model.latent_tokens.pad
        for name, needed in (("labels", inputs["labels"] != -100), ("stop_supervision", is_slot)):
            if not needed.any():
                continue
            row, position = needed[:, 1:].nonzero()[7].tolist()  # the logits at `position` predict the next
            kept = torch.ones_like(needed)
            kept[row, position] = False
            with pytest.raises(ValueError, match=rf"leaves out position {position} of row {row}, whose logits {name}"):
                model(**inputs, logits_to_keep=kept)


class TestTargetFeatures:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_they_are_the_plain_towers_one_video_after_another(self, model, reference, prompts, dtype):
        inputs = prompts("video", "video", num_frames=4)
        longer = prompts("video", num_frames=8)
        pixels = torch.cat([inputs["pixel_values_videos"], longer["pixel_values_videos"]])
        grids = torch.cat([inputs["video_grid_thw"], longer["video_grid_thw"]])
        features = model.to(dtype).get_target_features(pixels, grids)
        reference = copy.deepcopy(reference).to(dtype)
        assert [len(one) for one in features] == (grids.prod(-1) // 4).tolist()
        begin = 0
        for one, grid in zip(features, grids):
            span = slice(begin, begin := begin + int(grid.prod()))
            (alone,) = reference.model.get_video_features(pixels[span].to(dtype), grid[None]).pooler_output
            torch.testing.assert_close(one, alone)
            assert not one.requires_grad

    def test_images_have_theirs(self, model, reference, prompts):
        inputs = prompts("image", "image")
        features = model.get_target_features(inputs["pixel_values"], inputs["image_grid_thw"])
        expected = reference.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        assert len(features) == 2
        torch.testing.assert_close(torch.cat(features), torch.cat(list(expected)))

    def test_another_tower_may_give_them(self, model, prompts):
        inputs = prompts("video")
        other = copy.deepcopy(model.model.visual)
        for parameter in model.model.visual.parameters():
            parameter.data.mul_(2)
        media = inputs["pixel_values_videos"], inputs["video_grid_thw"]
        (by_other,), (by_own,) = model.get_target_features(*media, tower=other), model.get_target_features(*media)
        assert (by_other - by_own).abs().max() > 0.1
        model.model.visual = other
        torch.testing.assert_close(by_other, model.get_target_features(*media)[0])


class TestOutput:
    def test_it_is_a_model_output_like_any_other(self, trained_kind):
        model, inputs, out = trained_kind
        batch = training_batch(model, inputs, out)
        output = model(**batch, latent_input="rollout")
        names = ["loss", "lm_loss", "logits", "latent_states", "latent_mask", "latent_feedback"]
        assert list(output.keys()) == names  # in the order of the fields, whatever is None left out
        assert output.latent_loss is None
        assert output["loss"] is output.loss is output.to_tuple()[0]
        assert len(model(**batch, latent_input="rollout", return_dict=False)) == len(names)
        with torch.no_grad():
            output = model(**batch, latent_input="rollout")
        for same in (pickle.loads(pickle.dumps(output)), copy.deepcopy(output)):
            assert list(same.keys()) == names
            assert torch.equal(same.logits, output.logits)

    def test_accelerate_can_convert_it(self, trained_kind):
        model, inputs, out = trained_kind
        output = model.bfloat16()(**training_batch(model, inputs, out), latent_input="rollout")
        converted = convert_to_fp32(output)
        assert type(converted) is StormsOutput
        assert converted.logits.dtype == torch.float32
        assert converted.keys() == output.keys()

    def test_an_unknown_field_is_an_error(self):
        with pytest.raises(TypeError, match=r"got \['hidden'\]"):
            StormsOutput(hidden=1)


class TestLosses:
    def test_lm_loss_is_the_mean_over_labelled_tokens_without_slots(self, trained_kind):
        model, inputs, out = trained_kind
        batch = training_batch(model, inputs, out)
        output = model(**batch, latent_input="rollout")
        labels = batch["labels"].masked_fill(batch["input_ids"] == model.latent_tokens.pad, -100)
        per_token = torch.nn.functional.cross_entropy(
            output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="none"
        )
        count = int((labels != -100).sum())
        torch.testing.assert_close(output.lm_loss, per_token.sum() / count)
        assert output.loss == output.lm_loss
        halved = model(**{**batch, "labels": labels}, latent_input="rollout", num_items_in_batch=2 * count)
        torch.testing.assert_close(halved.lm_loss, output.lm_loss / 2)

    @pytest.mark.parametrize("latent_input", ["rollout", "teacher_forced"])
    def test_latent_loss_is_the_mean_over_slots(self, episode, latent_input):
        model, inputs, out = episode
        batch = training_batch(model, inputs, out)
        targets = torch.randn(len(KINDS), int(out.latent_lengths.max()), 64)
        output = model(**batch, latent_input=latent_input, latent_targets=targets)
        errors = [
            (states[mask] - target[mask]).square().mean(-1)
            for states, mask, target in zip(output.latent_states, output.latent_mask, targets)
        ]
        torch.testing.assert_close(output.latent_loss, torch.cat(errors).mean())
        torch.testing.assert_close(output.loss, output.lm_loss + 0.1 * output.latent_loss)
        heavier = model(**batch, latent_input=latent_input, latent_targets=targets, latent_loss_weight=2.0)
        torch.testing.assert_close(heavier.loss, output.lm_loss + 2.0 * output.latent_loss)
        count = int(out.latent_lengths.sum())
        halved = model(**batch, latent_input=latent_input, latent_targets=targets, num_slots_in_batch=2 * count)
        torch.testing.assert_close(halved.latent_loss, output.latent_loss / 2)

    def test_latent_loss_is_computed_in_float32(self, trained_kind):
        model, inputs, out = trained_kind
        model.bfloat16()
        batch = training_batch(model, inputs, out)
        targets = torch.randn(3, 4, 64).bfloat16()
        output = model(**batch, latent_input="teacher_forced", latent_targets=targets)
        assert output.latent_states.dtype == torch.bfloat16
        assert output.latent_loss.dtype == torch.float32
        expected = (output.latent_states.float() - targets.float()).square().mean()
        torch.testing.assert_close(output.latent_loss, expected)

    def test_stop_losses(self, trained_kind):
        model, inputs, out = trained_kind
        eager_to(model, end=0.4, seed=3)  # else p(end) and p(pad) are nearly equal
        batch, tokens = training_batch(model, inputs, out), model.latent_tokens
        follows = batch["input_ids"].roll(-1, 1) == tokens.pad
        output = model(**batch, latent_input="rollout")
        p = output.logits[follows].softmax(-1)
        assert p.shape[0] == int(out.latent_lengths.sum())
        for supervision, expected in (("not_end", -(1 - p[:, tokens.end]).log()), ("pad", -p[:, tokens.pad].log())):
            supervised = model(**batch, latent_input="rollout", stop_supervision=supervision)
            torch.testing.assert_close(supervised.stop_loss, expected.mean(), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(supervised.loss, supervised.lm_loss + supervised.stop_loss)
        assert output.stop_loss is None


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_layout_keeps_every_position_once_and_lines_blocks_up(data):
    """Any mixture of chunks, blocks and padding: columns are unique per row, in order, and blocks start together."""
    rows = data.draw(
        st.lists(
            st.tuples(
                st.sampled_from(["left", "right"]),
                st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), max_size=3),  # (text, slots) pairs
                st.integers(0, 3),  # text after the last block
            ),
            min_size=1,
            max_size=4,
        )
    )
    flat = [[kind for text, slots in pairs for kind in [0] * text + [1] * slots] for _, pairs, _ in rows]
    flat = [kinds + [0] * tail for kinds, (_, _, tail) in zip(flat, rows)]
    width = max(map(len, flat))
    is_slot, kept = torch.zeros(len(rows), width, dtype=torch.bool), torch.zeros(len(rows), width, dtype=torch.bool)
    for index, ((side, _, _), kinds) in enumerate(zip(rows, flat)):
        begin = width - len(kinds) if side == "left" else 0
        is_slot[index, begin : begin + len(kinds)] = torch.tensor(kinds, dtype=torch.bool)
        kept[index, begin : begin + len(kinds)] = True
    layout = RolloutLayout.plan(is_slot, kept)
    total = sum(layout.chunk_widths) + sum(layout.block_widths)
    assert layout.source.shape == layout.filled.shape == (len(rows), total)
    # Which columns are blocks, by the plan's own widths.
    in_block, block_starts, column = torch.zeros(total, dtype=torch.bool), [], 0
    for chunk, block in zip(layout.chunk_widths, layout.block_widths):
        column += chunk
        in_block[column : column + block] = True
        block_starts += [column] if block else []
        column += block
    for index, (_, pairs, _) in enumerate(rows):
        columns = layout.column[index][kept[index]]
        assert columns.tolist() == sorted(set(columns.tolist()))
        assert layout.source[index][columns].tolist() == kept[index].nonzero()[:, 0].tolist()
        assert layout.filled[index].nonzero()[:, 0].tolist() == columns.tolist()
        assert in_block[columns].tolist() == is_slot[index][kept[index]].tolist()
        for number in range(len(pairs)):  # block k starts in the same column everywhere, its opener right before it
            assert layout.filled[index, block_starts[number]]
            assert layout.filled[index, block_starts[number] - 1]
