"""`generate` against the plain class and against a reference without cache, batch or library decoding."""

import itertools
from itertools import product
from types import MappingProxyType

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CompileConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.generation.streamers import BaseStreamer

from .conftest import MIXED, eager_to, latent_ids, one_grid_step, same_weights, variants
from .reference import reference_generate, single_rows


# Two ways to sum the same float32 products (batch or alone, cache or none) were seen to differ by up to 4e-6.
STATE_TOLERANCE = 1e-5


def assert_equals_reference(model, reference, inputs, out, max_new_tokens, mode, size, **options):
    """Every row of `out` equals the reference run on that row alone."""
    eos = set(model.generation_config.eos_token_id)
    runs = []
    for index, row in enumerate(single_rows(inputs, model.config)):
        run = reference_generate(reference, row, latent_ids(model), max_new_tokens, mode, size, eos=eos, **options)
        new_ids = out.sequences[index, inputs["input_ids"].shape[1] :].tolist()
        assert new_ids[: len(run.new_ids)] == run.new_ids
        assert set(new_ids[len(run.new_ids) :]) <= {model.generation_config.pad_token_id}
        assert int(out.latent_lengths[index]) == len(run.states) == len(out.latent_states[index])
        assert out.latent_stop_reasons[index] == run.stop_reason
        if run.states:
            torch.testing.assert_close(
                out.latent_states[index], torch.stack(run.states), atol=STATE_TOLERANCE, rtol=STATE_TOLERANCE
            )
        runs.append(run)
    return runs


class TestOffMode:
    @variants(["kinds"], [[("text",)], [("image",)], [("video",)], [("video", "text", "both")]], [[MIXED]])
    @pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9}])
    def test_off_equals_the_plain_class(self, model, reference, prompts, kinds, sampling):
        eager_to(model, start=0.5, seed=1)  # a latent id would be chosen often
        reference = same_weights(reference, model)
        inputs = prompts(*kinds)
        torch.manual_seed(0)
        out = model.generate(**inputs, max_new_tokens=24, latent_mode="off", **sampling)
        torch.manual_seed(0)
        expected = reference.generate(**inputs, max_new_tokens=24, suppress_tokens=list(latent_ids(model)), **sampling)
        assert out.tolist() == expected.tolist()

    def test_off_would_differ_without_suppression(self, model, reference, prompts):
        eager_to(model, start=0.5, seed=1)
        reference = same_weights(reference, model)
        inputs = prompts("video", "text", "both")
        assert (reference.generate(**inputs, max_new_tokens=24) == model.latent_tokens.start).any()

    def test_off_reports_no_block(self, model, prompts):
        out = model.generate(
            **prompts("text", "video"), max_new_tokens=3, latent_mode="off", return_dict_in_generate=True
        )
        assert out.latent_lengths.tolist() == [0, 0]
        assert out.latent_stop_reasons == ["none", "none"]
        assert [tuple(states.shape) for states in out.latent_states] == [(0, 64), (0, 64)]

    def test_off_allows_beam_search_and_drafts(self, model, reference, prompts):
        inputs, suppressed = prompts("video"), list(latent_ids(model))
        for way in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 2}, {"assistant_model": reference}):
            out = model.generate(**inputs, max_new_tokens=8, latent_mode="off", **way)
            expected = reference.generate(**inputs, max_new_tokens=8, suppress_tokens=suppressed, **way)
            assert out.tolist() == expected.tolist(), way


class TestAgainstReference:
    @variants(
        ["kinds", "size"],
        product([("text",), ("image",), ("video",), ("video", "text", "both", "image")], [1, 8]),
        [[MIXED, 3]],
    )
    def test_forced_block_equals_cache_free_reference(self, model, reference, prompts, kinds, size):
        inputs = prompts(*kinds)
        out = model.generate(
            **inputs, max_new_tokens=size + 8, latent_mode="force", latent_size=size, return_dict_in_generate=True
        )
        assert_equals_reference(model, reference, inputs, out, size + 8, "force", size)

    def test_long_block_equals_cache_free_reference(self, model, reference, prompts):
        inputs = prompts("video")
        out = model.generate(
            **inputs, max_new_tokens=40, latent_mode="force", latent_size=32, return_dict_in_generate=True
        )
        assert_equals_reference(model, reference, inputs, out, 40, "force", 32)
        assert out.latent_lengths.tolist() == [32]

    @variants(["max_blocks", "stop"], product([1, 2, 3], ["budget", "token"]), [[2, "token"]])
    def test_rows_open_and_close_blocks_at_different_steps(self, model, reference, prompts, max_blocks, stop):
        eager_to(model, start=0.4, end=0.4, seed=3)
        reference = same_weights(reference, model)
        inputs = prompts("video", "text", "both", "image", "text", "short", "text", "image")
        out = model.generate(
            **inputs,
            max_new_tokens=30,
            latent_size=3,
            latent_stop=stop,
            max_latent_blocks=max_blocks,
            return_dict_in_generate=True,
        )
        runs = assert_equals_reference(model, reference, inputs, out, 30, "auto", 3, stop=stop, max_blocks=max_blocks)
        start = model.latent_tokens.start
        first = {run.new_ids.index(start) for run in runs if start in run.new_ids}
        assert len(first) > 1, "the test needs rows that open at different steps"
        assert any(start not in run.new_ids for run in runs), "the test needs a row that never opens"
        assert max(run.new_ids.count(start) for run in runs) == max_blocks
        if stop == "token":
            assert any(run.stop_reason == "token" for run in runs), "the test needs a block that ends early"

    def test_second_backbone_equals_cache_free_reference(self, qwen3, prompts):
        reference, model = qwen3
        inputs = one_grid_step(prompts("video", "text", "both"), model.config)
        out = model.generate(
            **inputs, max_new_tokens=10, latent_mode="force", latent_size=4, return_dict_in_generate=True
        )
        assert_equals_reference(model, reference, inputs, out, 10, "force", 4)


class TestStopReasons:
    def test_forced_at_the_budget(self, model, prompts):
        out = model.generate(
            **prompts("video"), max_new_tokens=12, latent_mode="force", latent_size=8, return_dict_in_generate=True
        )
        assert (out.latent_lengths.tolist(), out.latent_stop_reasons) == ([8], ["budget"])

    @pytest.mark.parametrize(("max_new_tokens", "num_slots"), [(1, 0), (2, 1), (5, 4), (9, 8)])
    def test_max_new_tokens_inside_a_block(self, model, reference, prompts, max_new_tokens, num_slots):
        inputs = prompts("video", "text")
        out = model.generate(
            **inputs, max_new_tokens=max_new_tokens, latent_mode="force", latent_size=8, return_dict_in_generate=True
        )
        assert out.latent_lengths.tolist() == [num_slots] * 2
        assert out.latent_stop_reasons == ["length"] * 2
        assert_equals_reference(model, reference, inputs, out, max_new_tokens, "force", 8)

    def test_model_ends_its_own_block(self, model, prompts):
        head = model.lm_head.weight.data
        head[model.latent_tokens.end] = 0
        inputs = prompts("text")
        kwargs = {"max_new_tokens": 8, "latent_mode": "force", "latent_size": 4, "return_dict_in_generate": True}
        states = model.generate(**inputs, **kwargs).latent_states[0]
        head[model.latent_tokens.end] = 100 * states[2]  # the state that is fed to slot 3: chosen instead of slot 3
        out = model.generate(**inputs, latent_stop="token", **kwargs)
        assert out.latent_stop_reasons == ["token"]
        assert int(out.latent_lengths[0]) < 4

    def test_no_block(self, model, prompts):
        model.lm_head.weight.data[model.latent_tokens.start] = 0
        out = model.generate(**prompts("text"), max_new_tokens=5, return_dict_in_generate=True)
        assert (out.latent_lengths.tolist(), out.latent_stop_reasons) == ([0], ["none"])

    def test_open_prompt_starts_with_a_slot(self, model, reference, prompts):
        inputs = prompts("video", "text")
        opened = dict(inputs)
        for name, value in (("input_ids", model.latent_tokens.start), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            opened[name] = torch.nn.functional.pad(inputs[name], (0, 1), value=value)
        kwargs = {"latent_mode": "force", "latent_size": 4, "return_dict_in_generate": True}
        out = model.generate(**opened, max_new_tokens=9, **kwargs)
        forced = model.generate(**inputs, max_new_tokens=10, **kwargs)
        assert out.sequences.tolist() == forced.sequences.tolist()
        assert out.latent_lengths.tolist() == [4, 4]
        assert_equals_reference(model, reference, opened, out, 9, "force", 4)


class TestCaches:
    @variants([], [[]], [[]])
    def test_static_cache_gives_the_same(self, model, prompts):
        inputs = prompts("video", "text", "both", "short")
        kwargs = {"max_new_tokens": 14, "latent_mode": "force", "latent_size": 5, "return_dict_in_generate": True}
        dynamic = model.generate(**inputs, **kwargs)
        static = model.generate(**inputs, cache_implementation="static", **kwargs)
        assert static.sequences.tolist() == dynamic.sequences.tolist()
        for one, other in zip(static.latent_states, dynamic.latent_states):
            torch.testing.assert_close(one, other, atol=STATE_TOLERANCE, rtol=STATE_TOLERANCE)

    @variants(["chunk"], [[7], [16]], [[7]])
    def test_chunked_prefill_gives_the_same(self, model, prompts, chunk):
        inputs = prompts("video", "text", "both", "short")
        kwargs = {"max_new_tokens": 14, "latent_mode": "force", "latent_size": 5, "return_dict_in_generate": True}
        whole = model.generate(**inputs, **kwargs)
        chunked = model.generate(**inputs, prefill_chunk_size=chunk, **kwargs)
        assert chunked.sequences.tolist() == whole.sequences.tolist()
        for one, other in zip(chunked.latent_states, whole.latent_states):
            torch.testing.assert_close(one, other, atol=STATE_TOLERANCE, rtol=STATE_TOLERANCE)

    def test_a_cache_that_holds_a_closed_block_can_be_continued(self, model, prompts):
        inputs = prompts("video")
        first = model.generate(
            **inputs, max_new_tokens=8, latent_mode="force", latent_size=3, return_dict_in_generate=True
        )
        longer = model.generate(
            **inputs, max_new_tokens=12, latent_mode="force", latent_size=3, return_dict_in_generate=True
        )
        continued = model.generate(
            input_ids=first.sequences, past_key_values=first.past_key_values, max_new_tokens=4, max_latent_blocks=1
        )
        assert continued.tolist() == longer.sequences.tolist()

    @pytest.mark.slow
    @variants([], [[]], [[]])
    def test_compiled_decoding_does_not_recompile_between_latent_and_text_steps(self, model, prompts):
        inputs = prompts("video", "text")
        kwargs = {"max_new_tokens": 14, "latent_mode": "force", "latent_size": 5, "return_dict_in_generate": True}
        plain = model.generate(**inputs, **kwargs)
        compile_config = CompileConfig(mode="default")
        compile_config._compile_all_devices = True  # transformers compiles on accelerators only, unless told
        torch._dynamo.reset()
        counters = torch._dynamo.utils.counters
        counters.clear()
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled = model.generate(**inputs, cache_implementation="static", compile_config=compile_config, **kwargs)
        assert (counters["stats"]["unique_graphs"], dict(counters["graph_break"])) == (1, {})
        assert compiled.sequences.tolist() == plain.sequences.tolist()
        for one, other in zip(compiled.latent_states, plain.latent_states):
            torch.testing.assert_close(one, other, atol=STATE_TOLERANCE, rtol=STATE_TOLERANCE)


class TestSampling:
    NUM_DRAWS = 2000

    @staticmethod
    def constant_state_model(model, probability):
        """Every state is the same vector e, so that p(<|latent_end|>) is `probability` at every position.

        Layers add nothing, embeddings are e, and the output head reads e's one coordinate: the end's logit is
        log(p / (1 - p)), one other token's is 0, the rest have none to speak of.
        """
        width = model.config.text_config.hidden_size
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.data.zero_()
            layer.mlp.down_proj.weight.data.zero_()
        model.model.language_model.norm.weight.data.fill_(1.0)
        embeds, head = model.get_input_embeddings().weight.data, model.lm_head.weight.data
        embeds.zero_()
        embeds[:, 0] = width**0.5
        head.zero_()
        head[:, 0] = -50.0
        head[7, 0] = 0.0
        odds = torch.tensor(probability / (1 - probability))
        head[model.latent_tokens.end, 0] = odds.log() / width**0.5
        return model

    def ending_rate(self, model, seed, size=1, **options):
        """How often a block ends before its first slot, and before its second where it was not ended at once."""
        torch.manual_seed(seed)
        ids = torch.full((self.NUM_DRAWS, 2), 7)
        ids[:, -1] = model.latent_tokens.start
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=size + 1,
            latent_stop="token",
            latent_size=size,
            do_sample=True,
            return_dict_in_generate=True,
            **options,
        )
        return out.latent_lengths

    @pytest.mark.parametrize("probability", [0.3, 0.7])
    def test_a_block_ends_as_often_as_the_model_says(self, model, probability):
        self.constant_state_model(model, probability)
        lengths = self.ending_rate(model, seed=0, size=2)
        for slots, draws in ((0, self.NUM_DRAWS), (1, int((lengths >= 1).sum()))):
            rate = int((lengths == slots).sum()) / draws
            z = (rate - probability) / (probability * (1 - probability) / draws) ** 0.5
            assert abs(z) < 3, (slots, rate, z)

    @pytest.mark.parametrize("temperature", [0.5, 2.0])
    def test_temperature_applies_first(self, model, temperature):
        self.constant_state_model(model, 0.7)
        tempered = 1 / (1 + (0.3 / 0.7) ** (1 / temperature))
        rate = float((self.ending_rate(model, seed=1, temperature=temperature) == 0).float().mean())
        z = (rate - tempered) / (tempered * (1 - tempered) / self.NUM_DRAWS) ** 0.5
        assert abs(z) < 3, (rate, tempered, z)

    @pytest.mark.parametrize("option", [{"top_k": 1}, {"top_p": 0.5}])
    @pytest.mark.parametrize(("probability", "rate"), [(0.3, 0.0), (0.7, 1.0)])
    def test_top_k_and_top_p_apply_first(self, model, option, probability, rate):
        self.constant_state_model(model, probability)
        assert float((self.ending_rate(model, seed=2, **option) == 0).float().mean()) == rate

    def test_sampled_answers_are_reproducible_and_differ(self, model, prompts):
        inputs = prompts("video")
        kwargs = {"max_new_tokens": 12, "latent_mode": "force", "latent_size": 3, "do_sample": True}
        torch.manual_seed(0)
        out = model.generate(**inputs, num_return_sequences=3, return_dict_in_generate=True, **kwargs)
        torch.manual_seed(0)
        again = model.generate(**inputs, num_return_sequences=3, return_dict_in_generate=True, **kwargs)
        assert out.sequences.tolist() == again.sequences.tolist()
        assert len({tuple(row) for row in out.sequences.tolist()}) > 1
        assert out.latent_lengths.tolist() == [3, 3, 3]
        assert len(out.latent_states) == len(out.latent_stop_reasons) == 3


class Recorder(LogitsProcessor):
    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.clone())
        return scores


class ListStreamer(BaseStreamer):
    def __init__(self):
        self.values, self.ended = [], False

    def put(self, value):
        self.values.append(value)

    def end(self):
        self.ended = True


class TestLatentIdsStayInside:
    def test_text_streamer_streams_the_decoded_answer(self, model, processor, prompts):
        inputs = prompts("video")
        streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=False)
        out = model.generate(**inputs, max_new_tokens=16, latent_mode="force", latent_size=4, streamer=streamer)
        new_ids = out[0, inputs["input_ids"].shape[1] :]
        assert (new_ids == model.latent_tokens.pad).sum() == 4
        assert "".join(streamer) == processor.decode(new_ids, skip_special_tokens=False)
        assert "latent" not in processor.decode(new_ids, skip_special_tokens=False)
        assert "latent" not in processor.batch_decode(out, skip_special_tokens=False)[0]
        assert "latent" not in processor.post_process_image_text_to_text(out, skip_special_tokens=False)[0]

    def test_streamer_of_a_batch_sees_no_latent_id(self, model, prompts):
        eager_to(model, start=0.4, end=0.4, seed=3)
        streamer = ListStreamer()
        inputs = prompts("video", "text", "both", "image")
        out = model.generate(**inputs, max_new_tokens=20, latent_size=3, max_latent_blocks=2, streamer=streamer)
        assert (out == model.latent_tokens.pad).any()
        assert streamer.ended
        assert not any(model.latent_tokens.isin(value).any() for value in streamer.values)
        for row, ids in enumerate(out[:, inputs["input_ids"].shape[1] :]):
            text = ids[~model.latent_tokens.isin(ids)].tolist()
            streamed = [int(value[row]) for value in streamer.values[1:]]
            pad = model.generation_config.pad_token_id
            assert [i for i in streamed if i != pad] == [i for i in text if i != pad]

    @pytest.mark.parametrize("kinds", [("video",), ("video", "text", "both", "image")])
    def test_penalties_see_the_text_alone(self, model, prompts, kinds):
        eager_to(model, start=0.4, end=0.4, seed=3)
        inputs, recorder = prompts(*kinds), Recorder()
        penalty = 1.7
        out = model.generate(
            **inputs,
            max_new_tokens=20,
            latent_mode="force",
            latent_size=3,
            repetition_penalty=penalty,
            logits_processor=LogitsProcessorList([recorder]),
            output_scores=True,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens, prompt_length, checked = model.latent_tokens, inputs["input_ids"].shape[1], 0
        for step, (seen, scores, logits) in enumerate(zip(recorder.seen, out.scores, out.logits)):
            assert not tokens.isin(seen).any()
            for row in range(len(seen)):
                ids = out.sequences[row, : prompt_length + step]
                text = ids[~tokens.isin(ids)]
                assert seen[row, -len(text) :].tolist() == text.tolist()  # contiguous, for n-grams
                if int(ids[-1]) in (tokens.start, tokens.pad) or step == 0:
                    continue  # the rules of the block decide
                expected = RepetitionPenaltyLogitsProcessor(penalty)(text[None], logits[row : row + 1].clone())[0]
                expected[[tokens.start, tokens.pad, tokens.end]] = -torch.inf
                torch.testing.assert_close(scores[row], expected, atol=0, rtol=0)
                checked += 1
        assert checked > 10

    def test_no_repeat_ngrams_across_a_block(self, model, prompts):
        inputs = prompts("text")
        kwargs = {"max_new_tokens": 30, "no_repeat_ngram_size": 2, "latent_mode": "force", "latent_size": 3}
        out = model.generate(**inputs, **kwargs)[0]
        text = out[~model.latent_tokens.isin(out)].tolist()
        bigrams = list(itertools.pairwise(text))
        prompt = set(zip(inputs["input_ids"][0].tolist(), inputs["input_ids"][0].tolist()[1:]))
        new = bigrams[inputs["input_ids"].shape[1] - 1 :]
        assert len(new) == len(set(new))
        assert not prompt & set(new)

    def test_raw_logits_are_left_as_they_were(self, model, prompts):
        inputs = prompts("text")
        out = model.generate(
            **inputs,
            max_new_tokens=6,
            latent_size=2,
            latent_mode="force",
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert all(torch.isfinite(logits).all() for logits in out.logits)


class TestIntervention:
    def test_sees_every_slot_once_in_order_and_is_obeyed(self, model, reference, prompts):
        eager_to(model, start=0.4, end=0.4, seed=3)
        inputs = prompts("video", "text", "both", "image", "text", "video")
        calls = []

        def replace(states, slot_index):
            assert states.shape == (len(slot_index), 64)
            calls.append((states.clone(), slot_index.clone()))
            return states * 0 + slot_index[:, None] + torch.arange(64) / 64 + len(calls)

        out = model.generate(
            **inputs,
            max_new_tokens=24,
            latent_size=3,
            max_latent_blocks=2,
            latent_intervention=replace,
            return_dict_in_generate=True,
        )
        # Replay by the ids: at each step, the rows whose new id is a slot, in batch order.
        new_ids = out.sequences[:, inputs["input_ids"].shape[1] :]
        call, seen = 0, [0] * len(new_ids)
        for step in range(new_ids.shape[1]):
            rows = (new_ids[:, step] == model.latent_tokens.pad).nonzero()[:, 0].tolist()
            if not rows:
                continue
            _states, slot_index = calls[call]
            call += 1
            for position, row in enumerate(rows):
                assert int(slot_index[position]) == seen[row] % 3
                expected = slot_index[position] + torch.arange(64) / 64 + call
                torch.testing.assert_close(out.latent_states[row][seen[row]], expected)
                seen[row] += 1
        assert call == len(calls) > 3
        assert seen == out.latent_lengths.tolist()

    def test_what_it_returns_is_what_is_fed(self, model, prompts):
        inputs = prompts("video", "text")
        kwargs = {"max_new_tokens": 12, "latent_mode": "force", "latent_size": 4, "return_dict_in_generate": True}
        plain = model.generate(**inputs, **kwargs)
        donor = torch.stack(plain.latent_states).flip(0)  # each row is fed the other's states
        swapped = model.generate(**inputs, latent_intervention=lambda states, index: donor[:, index[0]], **kwargs)
        torch.testing.assert_close(torch.stack(swapped.latent_states), donor)
        same = model.generate(**inputs, latent_intervention=lambda states, index: states, **kwargs)
        assert same.sequences.tolist() == plain.sequences.tolist()
        # And the forward pass with those vectors in the slots says the same answer.
        ids = swapped.sequences
        grown = ids.shape[1] - inputs["input_ids"].shape[1]
        rest = {k: inputs[k] for k in ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")}
        logits = model(
            input_ids=ids,
            attention_mask=torch.nn.functional.pad(inputs["attention_mask"], (0, grown), value=1),
            mm_token_type_ids=torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, grown)),
            latent_input="teacher_forced",
            latent_targets=donor,
            **rest,
        ).logits
        chosen = logits[:, -8:-1].clone()
        chosen[..., list(latent_ids(model))] = -torch.inf
        assert chosen.argmax(-1)[:, 1:].tolist() == ids[:, -6:].tolist()

    def test_a_wrong_shape_is_an_error(self, model, prompts):
        with pytest.raises(ValueError, match="latent_intervention returned"):
            model.generate(
                **prompts("text"), max_new_tokens=4, latent_mode="force", latent_intervention=lambda s, i: s[:, :3]
            )


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a value: on an accelerator each would be a synchronisation."""

    METHODS = ("tolist", "cpu", "numpy")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal.default", "unique")
        self.count += any(name in str(func) for name in waits)
        if "aten.index" in str(func) and isinstance(args[1], (list, tuple)):  # a mask's size is read on the host
            self.count += any(index is not None and index.dtype == torch.bool for index in args[1])
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for name in self.METHODS:
            self.patch.setattr(torch.Tensor, name, self.counting(getattr(torch.Tensor, name)))
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def counting(self, method):
        def counted(*args, **kwargs):
            self.count += 1
            return method(*args, **kwargs)

        return counted


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x[0].item(),
        lambda x: bool(x[0] > 0),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
    ],
)
def test_the_counter_sees_every_kind_of_host_read(read):
    with HostReads() as reads:
        read(torch.ones(3))
    assert reads.count >= 1


class TestHotPath:
    @staticmethod
    def reads_per_step(generate):
        counts = []
        for new_tokens in (12, 22):
            with HostReads() as reads:
                generate(max_new_tokens=new_tokens, min_new_tokens=new_tokens)
            counts.append(reads.count)
        return (counts[1] - counts[0]) / 10

    @pytest.mark.parametrize(
        "options",
        [
            {"latent_mode": "force", "latent_size": 40},
            {"latent_mode": "force", "latent_size": 40, "cache_implementation": "static"},
            {"latent_mode": "force", "latent_size": 3, "max_latent_blocks": 4},
            {"latent_mode": "auto", "latent_stop": "token", "repetition_penalty": 1.2},
            {"latent_mode": "force", "latent_size": 40, "do_sample": True, "latent_stop": "token"},
            {"latent_mode": "off"},
        ],
    )
    def test_no_host_read_beyond_the_librarys_own(self, model, reference, prompts, options):
        inputs = prompts("video", "text")
        plain = {name: value for name, value in options.items() if not name.startswith(("latent", "max_latent"))}
        own = self.reads_per_step(lambda **kwargs: reference.generate(**inputs, **plain, **kwargs))
        ours = self.reads_per_step(lambda **kwargs: model.generate(**inputs, **options, **kwargs))
        assert 0 < own == ours

    def test_an_intervention_is_seen_by_the_counter(self, model, prompts):
        inputs, options = prompts("text"), {"latent_mode": "force", "latent_size": 40}
        own = self.reads_per_step(lambda **kwargs: model.generate(**inputs, **options, **kwargs))
        read = {"latent_intervention": lambda states, slot_index: states + float(slot_index[0])}
        assert self.reads_per_step(lambda **kwargs: model.generate(**inputs, **options, **read, **kwargs)) > own


class Passes:
    """Counts passes of the language model, and the positions of each."""

    def __init__(self, model):
        self.model, self.widths = model.model.language_model, []

    def __enter__(self):
        self.hook = self.model.register_forward_pre_hook(
            lambda module, args, kwargs: self.widths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        )
        return self

    def __exit__(self, *error):
        self.hook.remove()


class TestRunningAhead:
    """`<|latent_start|>` runs with the prompt and `<|latent_end|>` with the last slot, where nothing else can come."""

    @staticmethod
    def widths(model, inputs, **options):
        options = {"latent_mode": "force", "latent_size": 3, "max_new_tokens": 7} | options
        with Passes(model) as passes:
            model.generate(**inputs, **options)
        return passes.widths

    @pytest.mark.parametrize(
        "options", [{}, {"cache_implementation": "static"}, {"latent_bottleneck": True}, {"do_sample": True}]
    )
    def test_a_block_takes_as_many_passes_as_slots(self, model, prompts, options):
        inputs = prompts("video", "text")
        assert self.widths(model, inputs, **options) == [inputs["input_ids"].shape[1] + 1, 1, 1, 2, 1]

    @pytest.mark.parametrize(
        "options",
        [
            {"latent_stop": "token"},
            {"return_dict_in_generate": True, "output_logits": True},
            {"return_dict_in_generate": True, "output_hidden_states": True},
            {"logits_processor": LogitsProcessorList([Recorder()])},
        ],
    )
    def test_not_where_a_step_is_looked_at_or_has_a_choice(self, model, prompts, options):
        inputs = prompts("video", "text")
        assert self.widths(model, inputs, **options)[:3] == [inputs["input_ids"].shape[1], 1, 1]

    def test_an_open_prompt_ends_its_block_with_the_last_slot(self, model, prompts):
        inputs = prompts("text")
        for name, value in (("input_ids", model.latent_tokens.start), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, 1), value=value)
        assert self.widths(model, inputs, latent_mode="auto") == [inputs["input_ids"].shape[1], 1, 1, 2, 1, 1]

    def test_a_prompt_in_chunks_is_left_as_it_is(self, model, prompts):
        assert self.widths(model, prompts("text"), prefill_chunk_size=8)[-5:] == [1, 1, 1, 2, 1]

    @pytest.mark.parametrize("num_new", [1, 2, 4, 5])
    def test_a_criterion_that_stops_leaves_no_column_behind(self, model, prompts, num_new):
        inputs = prompts("video")
        length = inputs["input_ids"].shape[1] + num_new

        class AfterSome(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                return torch.full((len(input_ids),), input_ids.shape[1] == length, device=input_ids.device)

        for cache in ({}, {"cache_implementation": "static"}):
            out = model.generate(
                **inputs,
                **cache,
                latent_mode="force",
                latent_size=3,
                max_new_tokens=8,
                stopping_criteria=StoppingCriteriaList([AfterSome()]),
                return_dict_in_generate=True,
            )
            assert out.sequences.shape[1] == length
            assert int(out.past_key_values.get_seq_length()) == length - 1


class TestHead:
    """The output head is not run for what the rules of a block fix, and nothing else changes."""

    OPTIONS = MappingProxyType(
        {"latent_mode": "force", "latent_size": 4, "max_new_tokens": 10, "return_dict_in_generate": True}
    )
    # The start, four slots and the end are fixed, four tokens of text are not.
    SKIPPED = 6

    @staticmethod
    def generate(model, inputs, **options):
        """What `generate` returns, and the number of rows of logits it computed."""
        rows = []
        hook = model.lm_head.register_forward_hook(lambda module, args, logits: rows.append(logits[..., 0].numel()))
        out = model.generate(**inputs, **options)
        hook.remove()
        return out, sum(rows)

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"do_sample": True, "repetition_penalty": 1.3},
            {"latent_bottleneck": True},
            {"cache_implementation": "static", "disable_compile": True},
        ],
    )
    def test_is_left_out_inside_a_block_and_nothing_changes(self, model, prompts, options):
        inputs, options = prompts("video", "text", "both"), self.OPTIONS | {"output_scores": True} | options
        torch.manual_seed(0)
        out, rows = self.generate(model, inputs, **options)
        torch.manual_seed(0)
        expected, all_rows = self.generate(model, inputs, output_logits=True, **options)
        assert (rows, all_rows) == (3 * (10 - self.SKIPPED), 3 * 10)
        assert out.sequences.tolist() == expected.sequences.tolist()
        # Where logits are looked at, markers have passes of their own: the same sums in another order.
        for name in ("scores", "latent_states"):
            for one, other in zip(out[name], expected[name], strict=True):
                torch.testing.assert_close(one, other, atol=STATE_TOLERANCE, rtol=STATE_TOLERANCE)

    def test_open_prompts_are_known_in_auto_mode(self, model, prompts):
        inputs = prompts("video", "text")
        for name, value in (("input_ids", model.latent_tokens.start), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, 1), value=value)
        options = self.OPTIONS | {"latent_mode": "auto"}
        assert self.generate(model, inputs, **options)[1] == 2 * (10 - self.SKIPPED + 1)
        # The second row's prompt is not open: what comes after it is free, at every step.
        inputs["input_ids"][1, -1] = 7
        assert self.generate(model, inputs, **options)[1] == 2 * 10
        # Or is forced open one step later.
        assert self.generate(model, inputs, **self.OPTIONS)[1] == 2 * (10 - self.SKIPPED + 1)

    @pytest.mark.parametrize("options", [{"latent_stop": "token"}, {"latent_mode": "auto"}, {"latent_mode": "off"}])
    def test_runs_where_a_row_has_a_choice(self, model, prompts, options):
        assert self.generate(model, prompts("video", "text"), **(self.OPTIONS | options))[1] == 2 * 10

    def test_a_logits_processor_of_ones_own_sees_logits(self, model, prompts):
        recorder = Recorder()
        processors = LogitsProcessorList([recorder])
        inputs = prompts("text")
        assert self.generate(model, inputs, logits_processor=processors, **self.OPTIONS)[1] == len(recorder.seen) == 10


def test_embeddings_without_ids_decode_like_the_ids(model, prompts):
    inputs = prompts("text")
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    for options in ({"latent_mode": "force"}, {"latent_mode": "auto"}, {"latent_mode": "off"}):
        options |= {"max_new_tokens": 9, "latent_size": 3, "repetition_penalty": 1.0}
        by_ids = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        by_embeds = model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **options)
        assert by_embeds.tolist() == by_ids.tolist()


class TestOptions:
    def test_generation_config_holds_the_defaults(self, model, prompts):
        inputs = prompts("text")
        model.generation_config.latent_mode, model.generation_config.latent_size = "force", 2
        assert model.generate(**inputs, max_new_tokens=8, return_dict_in_generate=True).latent_lengths.tolist() == [2]
        config = GenerationConfig(max_new_tokens=8, return_dict_in_generate=True)
        assert model.generate(**inputs, generation_config=config).latent_lengths.tolist() == [2]
        config.latent_size = 3
        assert model.generate(**inputs, generation_config=config).latent_lengths.tolist() == [3]
        out = model.generate(**inputs, max_new_tokens=8, latent_size=4, return_dict_in_generate=True)
        assert out.latent_lengths.tolist() == [4]

    def test_config_gives_the_size_where_nothing_else_does(self, model, prompts):
        model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
        model.config.latent_size = 5
        out = model.generate(**prompts("text"), max_new_tokens=9, latent_mode="force", return_dict_in_generate=True)
        assert out.latent_lengths.tolist() == [5]

    def test_plain_tensor_without_return_dict(self, model, prompts):
        out = model.generate(**prompts("text"), max_new_tokens=4, latent_mode="force")
        assert isinstance(out, torch.Tensor)
