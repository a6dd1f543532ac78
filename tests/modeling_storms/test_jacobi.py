"""`latent_solver="jacobi"`: all slots of a block refined together, against plain loops and the sequential solver."""

import copy

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache, StoppingCriteria, StoppingCriteriaList

from .conftest import eager_to, one_grid_step, same_weights
from .test_generate import STATE_TOLERANCE, HostReads, Passes, assert_equals_reference


SIZE = 6
FORCED = {"latent_mode": "force", "latent_size": SIZE, "return_dict_in_generate": True}


def jacobi(iterations):
    return {"latent_solver": "jacobi", "jacobi_iterations": iterations}


def assert_same(out, expected):
    assert out.sequences.tolist() == expected.sequences.tolist()
    assert out.latent_lengths.tolist() == expected.latent_lengths.tolist()
    assert out.latent_stop_reasons == expected.latent_stop_reasons
    for states, others in zip(out.latent_states, expected.latent_states):
        torch.testing.assert_close(states, others, atol=STATE_TOLERANCE, rtol=STATE_TOLERANCE)


def distances(out, expected):
    """Largest difference of each slot's state, `(latent_size,)`."""
    states, others = (torch.stack(run.latent_states) for run in (out, expected))
    return (states - others).abs().amax((0, 2))


class TestAgainstReference:
    @pytest.mark.parametrize("iterations", [1, 3])
    @pytest.mark.parametrize("kinds", [("video",), ("video", "text", "both", "image")])
    def test_each_iteration_equals_plain_loops(self, model, reference, prompts, kinds, iterations):
        inputs = prompts(*kinds)
        out = model.generate(**inputs, max_new_tokens=SIZE + 6, **FORCED, **jacobi(iterations))
        assert_equals_reference(model, reference, inputs, out, SIZE + 6, "force", SIZE, iterations=iterations)

    @pytest.mark.parametrize(("mode", "max_blocks"), [("auto", 1), ("auto", 2), ("force", 2)])
    def test_rows_open_blocks_at_different_steps(self, model, reference, prompts, mode, max_blocks):
        eager_to(model, start=0.4, end=0.4, seed=3)
        reference = same_weights(reference, model)
        inputs = prompts("video", "text", "both", "image", "text", "video")
        options = {"latent_mode": mode, "latent_size": 3, "return_dict_in_generate": True}
        out = model.generate(**inputs, max_new_tokens=24, max_latent_blocks=max_blocks, **options, **jacobi(2))
        runs = assert_equals_reference(model, reference, inputs, out, 24, mode, 3, max_blocks=max_blocks, iterations=2)
        opened = [
            [step for step, token in enumerate(run.new_ids) if token == model.latent_tokens.start] for run in runs
        ]
        assert len({tuple(steps) for steps in opened}) > 2, "the test needs rows that open at different steps"
        assert max(len(steps) for steps in opened) == max_blocks

    def test_one_row_that_opens_its_block_itself_gains_as_much(self, model, reference, prompts):
        eager_to(model, start=0.4, seed=5)
        reference = same_weights(reference, model)
        inputs, options = prompts("both"), {"latent_size": 8, "return_dict_in_generate": True}
        with Passes(model) as passes:
            out = model.generate(**inputs, max_new_tokens=24, **options, **jacobi(2))
        (run,) = assert_equals_reference(model, reference, inputs, out, 24, "auto", 8, iterations=2)
        assert run.new_ids.index(model.latent_tokens.start) > 0, "the test needs a block that begins after some text"
        assert run.stop_reason == "budget"
        assert passes.widths.count(8) == 1
        assert passes.widths.count(9) == 1  # with the end
        assert len(passes.widths) == len(run.new_ids) - 9 + 2

    def test_prompts_of_which_some_are_open(self, model, reference, prompts):
        inputs = prompts("video", "text")
        opened = dict(inputs)
        for name, value in (("input_ids", model.latent_tokens.start), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            still_closed = torch.nn.functional.pad(inputs[name][1], (1, 0))
            opened[name] = torch.stack([torch.nn.functional.pad(inputs[name][0], (0, 1), value=value), still_closed])
        out = model.generate(**opened, max_new_tokens=SIZE + 6, **FORCED, **jacobi(2))
        first = out.sequences[:, opened["input_ids"].shape[1]].tolist()
        assert first == [model.latent_tokens.pad, model.latent_tokens.start]
        assert_equals_reference(model, reference, opened, out, SIZE + 6, "force", SIZE, iterations=2)

    @pytest.mark.parametrize("max_new_tokens", [1, 2, 3, SIZE + 1])
    def test_max_new_tokens_inside_a_block(self, model, reference, prompts, max_new_tokens):
        inputs = prompts("video", "text")
        for cache in ({}, {"cache_implementation": "static"}):
            out = model.generate(**inputs, max_new_tokens=max_new_tokens, **FORCED, **jacobi(2), **cache)
            assert out.latent_stop_reasons == ["length"] * 2
            assert_equals_reference(model, reference, inputs, out, max_new_tokens, "force", SIZE, iterations=2)


class TestAgainstSequential:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"latent_bottleneck": True},
            {"cache_implementation": "static"},
            {"cache_implementation": "static", "latent_bottleneck": True},
            {"do_sample": True, "num_return_sequences": 2},
            {"prefill_chunk_size": 16},
            {"repetition_penalty": 1.3, "output_scores": True},
            {"latent_size": 1},
        ],
    )
    def test_as_many_iterations_as_slots_give_the_same(self, model, prompts, options):
        inputs, options = prompts("video", "text", "both"), FORCED | {"max_new_tokens": SIZE + 6} | options
        torch.manual_seed(0)
        expected = model.generate(**inputs, **options)
        torch.manual_seed(0)
        assert_same(model.generate(**inputs, **options, **jacobi(SIZE)), expected)

    @pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"latent_bottleneck": True}])
    def test_after_i_iterations_the_first_i_slots_are_exact(self, model, prompts, options):
        inputs, options = prompts("video", "both"), FORCED | {"max_new_tokens": SIZE + 2} | options
        expected = model.generate(**inputs, **options)
        for iterations in (1, 2, 4):
            found = distances(model.generate(**inputs, **options, **jacobi(iterations)), expected)
            assert found[:iterations].max() < STATE_TOLERANCE
            assert found[iterations:].min() > 1000 * STATE_TOLERANCE

    def test_second_backbone(self, qwen3, prompts):
        _, model = qwen3
        inputs = one_grid_step(prompts("video", "text", "both"), model.config)
        expected = model.generate(**inputs, max_new_tokens=SIZE + 6, **FORCED)
        assert_same(model.generate(**inputs, max_new_tokens=SIZE + 6, **FORCED, **jacobi(SIZE)), expected)
        assert distances(model.generate(**inputs, max_new_tokens=SIZE + 2, **FORCED, **jacobi(2)), expected)[2] > 0.01

    def test_embeddings_without_ids(self, model, prompts):
        inputs, options = prompts("text"), FORCED | {"max_new_tokens": SIZE + 4} | jacobi(2)
        expected = model.generate(**inputs, **options)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        out = model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **options)
        assert out.sequences.tolist() == expected.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        torch.testing.assert_close(out.latent_states, expected.latent_states)

    def test_a_cache_that_holds_a_closed_block_can_be_continued(self, model, prompts):
        inputs = prompts("video")
        first = model.generate(**inputs, max_new_tokens=SIZE + 4, **FORCED, **jacobi(3))
        longer = model.generate(**inputs, max_new_tokens=SIZE + 8, **FORCED, **jacobi(3))
        continued = model.generate(
            input_ids=first.sequences, past_key_values=first.past_key_values, max_new_tokens=4, max_latent_blocks=1
        )
        assert continued.tolist() == longer.sequences.tolist()

    def test_a_criterion_that_stops_inside_a_block_leaves_no_column_behind(self, model, prompts):
        inputs = prompts("video")

        class AfterThree(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                done = input_ids.shape[1] == inputs["input_ids"].shape[1] + 3
                return torch.full((len(input_ids),), done, device=input_ids.device)

        stop = {"max_new_tokens": SIZE + 4, "stopping_criteria": StoppingCriteriaList([AfterThree()])}
        expected = model.generate(**inputs, **FORCED, **stop)
        out = model.generate(**inputs, **FORCED, **stop, **jacobi(SIZE))
        assert_same(out, expected)
        assert out.latent_lengths.tolist() == [2]
        assert out.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()


class TestCost:
    @pytest.mark.parametrize("iterations", [1, 3, SIZE + 2])
    @pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}])
    def test_a_block_takes_as_many_passes_as_iterations(self, model, prompts, iterations, options):
        inputs = prompts("video", "text")
        with Passes(model) as passes:
            model.generate(**inputs, max_new_tokens=SIZE + 4, **FORCED, **jacobi(iterations), **options)
        # Prompt and <|latent_start|>, the block, at last with <|latent_end|>, and the first of two tokens.
        block = [*[SIZE] * (min(iterations, SIZE) - 1), SIZE + 1]
        assert passes.widths == [inputs["input_ids"].shape[1] + 1, *block, 1]

    @pytest.mark.parametrize("options", [{}, {"latent_bottleneck": True}])
    def test_iterations_add_no_host_read(self, model, prompts, options):
        inputs, counts = prompts("video", "text"), []
        for solver in ({}, jacobi(1), jacobi(4)):
            with HostReads() as reads:
                model.generate(**inputs, max_new_tokens=SIZE + 6, **FORCED, **options, **solver)
            counts.append(reads.count)
        assert counts[0] >= counts[1] == counts[2]

    @pytest.mark.slow
    def test_compiled_decoding_compiles_once(self, model, prompts):
        inputs = prompts("video", "text")
        expected = model.generate(**inputs, max_new_tokens=SIZE + 6, **FORCED)
        compile_config = CompileConfig(mode="default", backend="aot_eager")
        compile_config._compile_all_devices = True  # transformers compiles on accelerators only, unless told
        compiled = {"cache_implementation": "static", "compile_config": compile_config, "max_new_tokens": SIZE + 6}
        torch._dynamo.reset()
        counters = torch._dynamo.utils.counters
        counters.clear()
        assert_same(model.generate(**inputs, **compiled, **FORCED, **jacobi(SIZE)), expected)
        # A single position, the whole block, and the block with its end.
        assert (counters["stats"]["unique_graphs"], dict(counters["graph_break"])) == (3, {})
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_same(model.generate(**inputs, **compiled, **FORCED, **jacobi(SIZE)), expected)


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"latent_solver": "newton"}, "latent_solver is 'newton', but must be one of 'sequential', 'jacobi'"),
            ({"jacobi_iterations": 0}, "jacobi_iterations is 0, but must be an integer of at least 1"),
            ({"latent_stop": "token"}, "latent_solver='jacobi' with latent_stop='token'"),
            ({"latent_intervention": lambda states, index: states}, "latent_intervention with latent_solver='jacobi'"),
            ({"output_logits": True, "return_dict_in_generate": True}, "output_logits"),
            ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
            ({"synced_gpus": True}, "synced_gpus or sharded weights"),
        ],
    )
    def test_what_can_not_be_right(self, model, prompts, options, message):
        with pytest.raises(ValueError, match=message):
            model.generate(**prompts("text"), max_new_tokens=4, **(jacobi(2) | options))

    def test_a_cache_that_can_not_be_rewound(self, model, prompts):
        config = copy.deepcopy(model.config.text_config)
        config.sliding_window, config.layer_types = 8, ["sliding_attention"] * config.num_hidden_layers
        for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=64)):
            with pytest.raises(ValueError, match=r"layers that can't take positions back .*SlidingWindowLayer"):
                model.generate(**prompts("text"), max_new_tokens=4, past_key_values=cache, **jacobi(2))

    def test_defaults_of_a_checkpoint_do_not_disturb_the_off_mode(self, model, prompts):
        model.generation_config.latent_solver, model.generation_config.latent_stop = "jacobi", "token"
        assert model.generate(**prompts("text"), max_new_tokens=2, latent_mode="off").shape[0] == 1
