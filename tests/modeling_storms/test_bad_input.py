"""What would be silently wrong is an error that says what was seen, what was expected and what to do."""

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList

from modeling_storms import StormsConfig, StormsForConditionalGeneration
from modeling_storms.latent_storms import LatentOptions


def ids(model, *parts):
    """Ids by name: words are ids, 'start', 'pad', 'end' the latent tokens."""
    return torch.tensor([[getattr(model.latent_tokens, part) if isinstance(part, str) else part for part in parts]])


class TestGenerate:
    @pytest.mark.parametrize("mode", ["auto", "force", "off"])
    def test_a_closed_block_in_the_prompt(self, model, mode):
        prompt = ids(model, 5, "start", "pad", "pad", "end", 6)
        with pytest.raises(ValueError, match=r"Row 0 .* position 1.*Remove closed blocks"):
            model.generate(input_ids=prompt, max_new_tokens=3, latent_mode=mode)

    def test_a_block_left_open_after_some_slots(self, model):
        with pytest.raises(ValueError, match="hidden states of a block"):
            model.generate(input_ids=ids(model, 5, "start", "pad", "pad"), max_new_tokens=3)

    def test_an_open_prompt_with_the_mode_off(self, model):
        with pytest.raises(ValueError, match="not with latent_mode='off'"):
            model.generate(input_ids=ids(model, 5, "start"), max_new_tokens=3, latent_mode="off")

    def test_a_cut_off_block_that_is_not_wholly_in_the_cache(self, model, prompts):
        inputs = prompts("text")
        out = model.generate(
            **inputs, max_new_tokens=4, latent_mode="force", latent_size=8, return_dict_in_generate=True
        )
        with pytest.raises(ValueError, match="hidden states of a block"):
            model.generate(input_ids=out.sequences, past_key_values=out.past_key_values, max_new_tokens=3)

    def test_a_cache_that_saw_the_video_under_a_bottleneck(self, model, prompts):
        inputs = prompts("video")
        is_video = inputs["input_ids"][0] == model.config.video_token_id
        last = int(is_video.nonzero()[-1])
        media = {name: inputs[name] for name in ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")}
        options = {"max_new_tokens": 4, "latent_mode": "force", "latent_size": 2, "latent_bottleneck": True}
        texts = {name: inputs[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
        for extra, is_refused in ((0, False), (1, True)):
            part = {name: value[:, : last + 1 + extra] for name, value in texts.items()}
            cache = model(**part, **media, use_cache=True).past_key_values
            if is_refused:
                with pytest.raises(ValueError, match="ends with its last visual token"):
                    model.generate(**texts, past_key_values=cache, **options)
            else:
                model.generate(**texts, past_key_values=cache, **options)
        cache = model(**part, **media, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="ids of the whole prompt"):
            model.generate(input_ids=inputs["input_ids"][:, -3:], past_key_values=cache, **options)

    @pytest.mark.parametrize("mode", ["auto", "off"])
    @pytest.mark.parametrize("with_mask", [True, False])
    def test_a_batch_padded_on_the_right(self, model, mode, with_mask):
        prompt = torch.tensor([[5, 6, 7], [5, 6, model.generation_config.pad_token_id]])
        mask = {"attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])} if with_mask else {}
        with pytest.raises(ValueError, match=r"Rows \[1\] .*padding_side = 'left'"):
            model.generate(input_ids=prompt, max_new_tokens=3, latent_mode=mode, **mask)

    @pytest.mark.parametrize("mode", ["auto", "off"])
    def test_missing_mm_token_type_ids(self, model, prompts, mode):
        inputs = {k: v for k, v in prompts("video").items() if k != "mm_token_type_ids"}
        with pytest.raises(ValueError, match="mm_token_type_ids"):
            model.generate(**inputs, max_new_tokens=3, latent_mode=mode)

    @pytest.mark.parametrize(
        ("option", "named"),
        [
            ({"use_cache": False}, "use_cache=False"),
            ({"num_beams": 2}, "beam_search"),
            ({"num_beams": 2, "do_sample": True}, "beam_sample"),
            ({"prompt_lookup_num_tokens": 2}, "assisted_generation"),
            ({"guidance_scale": 2.0}, "guidance_scale"),
            ({"custom_generate": lambda *args, **kwargs: None}, "custom_generate"),
            ({"cache_implementation": "paged"}, "paged"),
            ({"latent_bottleneck": True, "prefill_chunk_size": 4}, "prefill_chunk_size"),
            ({"latent_bottleneck": True, "inputs_embeds": torch.zeros(1, 3, 64)}, "inputs_embeds"),
        ],
    )
    @pytest.mark.parametrize("mode", ["auto", "force"])
    def test_ways_of_decoding_that_would_lose_states(self, model, prompts, option, named, mode):
        with pytest.raises(ValueError, match=rf"latent_mode='{mode}' does not work with .*{named}"):
            model.generate(**prompts("text"), max_new_tokens=3, latent_mode=mode, **option)

    def test_an_assistant_model(self, model, reference, prompts):
        with pytest.raises(ValueError, match="assisted_generation"):
            model.generate(**prompts("text"), max_new_tokens=3, assistant_model=reference)

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"latent_mode": "on"}, "latent_mode is 'on'"),
            ({"latent_stop": "never"}, "latent_stop is 'never'"),
            ({"latent_size": 0}, "latent_size is 0"),
            ({"latent_size": -1}, "latent_size is -1"),
            ({"latent_size": 2.5}, "latent_size is 2.5"),
            ({"latent_size": True}, "latent_size is True"),
            ({"max_latent_blocks": 0}, "max_latent_blocks is 0"),
            ({"latent_bottleneck": "yes"}, "latent_bottleneck is 'yes'"),
            ({"latent_bottleneck": True, "latent_mode": "off"}, "without seeing the video"),
        ],
    )
    def test_options_that_mean_nothing(self, model, prompts, options, named):
        with pytest.raises(ValueError, match=named):
            LatentOptions(**options)
        with pytest.raises(ValueError, match=named):
            model.generate(**prompts("text"), max_new_tokens=3, **options)

    def test_off_leaves_out_a_default_that_is_about_blocks(self, model, prompts):
        asked = {"max_new_tokens": 3, "latent_mode": "off"}
        expected = model.generate(**prompts("text", "video"), **asked)
        model.generation_config.latent_bottleneck = True
        assert torch.equal(model.generate(**prompts("text", "video"), **asked), expected)

    @pytest.mark.parametrize("mode", ["auto", "force", "off"])
    def test_continuous_batching(self, model, mode):
        model.generation_config.latent_mode = mode
        with pytest.raises(ValueError, match="Continuous batching"):
            model.generate_batch([[5, 6, 7]], max_new_tokens=3)

    def test_training_mode_with_checkpointing(self, model, prompts):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        with pytest.raises(ValueError, match=r"Call model\.eval\(\) first"):
            model.generate(**prompts("text"), max_new_tokens=3, latent_mode="force")
        model.eval()
        assert model.generate(**prompts("text"), max_new_tokens=3, latent_mode="force") is not None

    @pytest.mark.parametrize(("mode", "intervention"), [("off", lambda states, index: states), ("force", 3)])
    def test_an_intervention_that_cannot_be_called(self, model, prompts, mode, intervention):
        with pytest.raises(ValueError, match="must be a callable, and there must be slots"):
            model.generate(**prompts("text"), max_new_tokens=3, latent_mode=mode, latent_intervention=intervention)

    def test_misspelt_options_are_not_swallowed(self, model, prompts):
        with pytest.raises(ValueError, match="latent_sizes"):
            model.generate(**prompts("text"), max_new_tokens=3, latent_sizes=4)

    def test_a_model_without_latent_ids(self, model, prompts):
        model.config.latent_pad_token_id = None
        with pytest.raises(ValueError, match="init_checkpoint"):
            model.generate(**prompts("text"), max_new_tokens=3)

    @pytest.mark.parametrize("mode", ["off", "force"])
    def test_processors_of_the_user_are_kept(self, model, prompts, mode):
        seen = []
        processors = LogitsProcessorList([lambda input_ids, scores: seen.append(1) or scores])
        out = model.generate(**prompts("text"), max_new_tokens=3, latent_mode=mode, logits_processor=processors)
        assert len(seen) == 3 == out.shape[1] - prompts("text")["input_ids"].shape[1]


class TestForward:
    def test_slots_without_latent_input(self, model):
        with pytest.raises(ValueError, match=r"Rows \[0\] .*latent_input='rollout'"):
            model(input_ids=ids(model, 5, "start", "pad", "end", 6))

    def test_slots_with_an_empty_cache_and_without_latent_input(self, model):
        with pytest.raises(ValueError, match="nothing would fill them"):
            model(input_ids=ids(model, 5, "start", "pad", "end", 6), past_key_values=DynamicCache())

    def test_counts_that_would_scale_losses_with_accumulation(self, model):
        sequence = ids(model, 5, "start", "pad", "pad", "end", 6)
        labels = sequence.masked_fill(sequence == model.latent_tokens.pad, -100)
        kwargs = {"input_ids": sequence, "latent_input": "rollout", "num_items_in_batch": 8}
        for option in ({"latent_targets": torch.zeros(1, 2, 64)}, {"stop_supervision": "pad"}):
            with pytest.raises(ValueError, match="num_slots_in_batch"):
                model(**kwargs, labels=labels, **option)
        with pytest.raises(ValueError, match="labels hold token labels at latent slots"):
            model(**kwargs, labels=sequence)
        assert model(**kwargs, labels=labels).loss > 0
        # A count that is this batch's own says that this is the whole batch.
        whole = {**kwargs, "num_items_in_batch": int((labels != -100).sum()), "labels": labels}
        counted = model(**whole, stop_supervision="pad", num_slots_in_batch=2)
        torch.testing.assert_close(model(**whole, stop_supervision="pad").loss, counted.loss)

    def test_stop_supervision_of_logits_not_computed(self, model):
        sequence = ids(model, 5, "start", "pad", "end", 6)
        with pytest.raises(ValueError, match="leave logits_to_keep at 0"):
            model(input_ids=sequence, latent_input="rollout", stop_supervision="pad", logits_to_keep=1)

    @pytest.mark.parametrize("shape", [(1, 1, 64), (1, 3, 64), (1, 2, 32), (2, 2, 64), (2, 64)])
    @pytest.mark.parametrize("latent_input", ["rollout", "teacher_forced"])
    def test_targets_of_the_wrong_count_or_width(self, model, shape, latent_input):
        sequence = ids(model, 5, "start", "pad", "pad", "end", 6)
        with pytest.raises(ValueError, match=r"latent_targets has shape .* needs \(1, 2, 64\)"):
            model(input_ids=sequence, latent_input=latent_input, latent_targets=torch.zeros(shape))

    def test_teacher_forcing_without_targets(self, model):
        with pytest.raises(ValueError, match="latent_targets, but got none"):
            model(input_ids=ids(model, 5, "start", "pad", "end", 6), latent_input="teacher_forced")

    @pytest.mark.parametrize("parts", [("pad", "pad", 5), (5, "pad", "end"), (5, "start", "pad", "end", "pad")])
    def test_a_slot_outside_a_block(self, model, parts):
        with pytest.raises(ValueError, match="a slot follows"):
            model(input_ids=ids(model, *parts), latent_input="rollout")

    def test_an_unknown_latent_input(self, model):
        with pytest.raises(ValueError, match="latent_input is 'free'"):
            model(input_ids=ids(model, 5, "start", "pad", "end", 6), latent_input="free")

    def test_an_unknown_stop_supervision(self, model):
        with pytest.raises(ValueError, match="stop_supervision is 'end'"):
            model(input_ids=ids(model, 5, "start", "pad", "end", 6), latent_input="rollout", stop_supervision="end")

    def test_a_bottleneck_of_nobody_is_none(self, model):
        assert model(input_ids=ids(model, 5, 6), latent_bottleneck=False).logits.shape[1] == 2

    @pytest.mark.parametrize(
        "option",
        [
            {"latent_targets": torch.zeros(1, 1, 64)},
            {"latent_bottleneck": True},
            {"latent_bottleneck": torch.tensor([True, False])},
            {"stop_supervision": "pad"},
        ],
    )
    def test_training_options_without_latent_input(self, model, option):
        with pytest.raises(ValueError, match="need latent_input"):
            model(input_ids=ids(model, 5, 6), **option)

    def test_a_cache_in_a_training_pass(self, model):
        cache = model(input_ids=ids(model, 5, 6), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="without past_key_values"):
            model(input_ids=ids(model, 5, "start", "pad"), latent_input="rollout", past_key_values=cache)

    @pytest.mark.parametrize("latent_input", [None, "rollout"])
    def test_missing_mm_token_type_ids(self, model, prompts, latent_input):
        inputs = {k: v for k, v in prompts("video").items() if k != "mm_token_type_ids"}
        with pytest.raises(ValueError, match="mm_token_type_ids"):
            model(**inputs, latent_input=latent_input)

    def test_a_video_after_a_block(self, model, prompts):
        inputs = prompts("video")
        block = ids(model, 5, "start", "pad", "end")
        inputs["input_ids"] = torch.cat([block, inputs["input_ids"]], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (4, 0))
        with pytest.raises(ValueError, match=r"visual token at position .* after a latent block"):
            model(**inputs, latent_input="rollout")

    def test_hidden_states_of_a_rollout(self, model):
        with pytest.raises(ValueError, match="can't return hidden_states"):
            model(input_ids=ids(model, 5, "start", "pad", "end"), latent_input="rollout", output_hidden_states=True)

    def test_a_bottleneck_without_a_block(self, model):
        for parts in ((5, 6), (5, "start", "end", 6)):
            with pytest.raises(ValueError, match=r"rows \[0\].*no latent slots"):
                model(input_ids=ids(model, *parts), latent_input="rollout", latent_bottleneck=True)

    def test_a_bottleneck_with_flash_attention(self, model):
        model.config.text_config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
            model(input_ids=ids(model, 5, "start", "pad", "end"), latent_input="rollout", latent_bottleneck=True)
        with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
            model.generate(input_ids=ids(model, 5, 6), latent_mode="force", latent_bottleneck=True, max_new_tokens=2)

    @pytest.mark.parametrize("value", [0.5, 1, torch.tensor([0.3]), torch.tensor([True, False])])
    def test_a_bottleneck_that_is_no_choice_of_rows(self, model, value):
        with pytest.raises(ValueError, match="one boolean for each of the 1 rows"):
            model(input_ids=ids(model, 5, "start", "pad", "end"), latent_input="rollout", latent_bottleneck=value)

    def test_an_attention_mask_of_another_shape(self, model):
        sequence = ids(model, 5, "start", "pad", "end")
        with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 1, 4, 4\).*needs .*\(1, 4\)"):
            model(input_ids=sequence, attention_mask=torch.ones(1, 1, 4, 4), latent_input="rollout")


class TestConfig:
    def test_latent_size_zero(self):
        with pytest.raises(ValueError, match="latent_size is 0"):
            StormsConfig(latent_size=0)

    @pytest.mark.parametrize("token_ids", [(1, 2, None), (1, 2, 2)])
    def test_token_ids_that_are_not_three(self, token_ids):
        names = ("latent_start_token_id", "latent_pad_token_id", "latent_end_token_id")
        with pytest.raises(ValueError, match="three different ids"):
            StormsConfig(**dict(zip(names, token_ids)))

    def test_the_plain_config_is_valid_and_makes_a_plain_model(self, model):
        names = ("latent_start_token_id", "latent_pad_token_id", "latent_end_token_id")
        config = StormsConfig(**{**model.config.to_dict(), **dict.fromkeys(names)})
        plain = StormsForConditionalGeneration(config)
        assert plain(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, config.text_config.vocab_size)
