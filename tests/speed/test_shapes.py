"""Floors: FLOPs against torch's own count, bytes against real tensors, and what is measured against known sizes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, StaticCache
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from modeling_storms import StormsForConditionalGeneration
from speed.generation import TOOL_ROUNDS, answer_memory, latent, reforward, solver_works, tool_loop
from speed.harness import Bench, PeakMemory, Peaks, Work, goal, summarize
from speed.shapes import (
    answer_works,
    build,
    cache_bytes,
    decode_work,
    language_bytes,
    language_flops,
    make_config,
    projector_flops,
    video_inputs,
    vision_flops,
)


@pytest.fixture(scope="module")
def model():
    return build("tiny", "cpu", torch.float32)


def count(run):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_language_flops_are_those_torch_counts(model):
    text = model.config.get_text_config()
    ids = torch.randint(0, 300, (1, 40))
    cache = DynamicCache(config=model.config)
    counted = count(lambda: model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1))
    # Torch counts the whole square of queries and keys, of which causal attention needs the lower half.
    unneeded = text.num_hidden_layers * 4 * text.hidden_size * (40 * 40 - 40 * 41 / 2)
    assert language_flops(model.config, 40) == counted - unneeded
    # A later token attends to all 41 positions, and torch counts as much.
    counted = count(lambda: model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True))
    assert language_flops(model.config, 1, context=40) == counted


@pytest.mark.parametrize("grid", [(1, 8, 8), (3, 12, 20), (2, 10, 14)])  # one window; cut ones; odd merged sides
def test_vision_flops_are_those_torch_counts(model, grid):
    tower = Qwen2_5_VisionTransformerPretrainedModel._from_config(model.config.vision_config).eval()
    pixels = torch.randn(grid[0] * grid[1] * grid[2], 1176)
    counted = count(lambda: tower(pixels, grid_thw=torch.tensor([grid])))
    assert vision_flops(model.config, [grid]) == counted


def test_projector_flops_hold_both_directions_projections():
    model = build("tiny", "cpu", torch.float32, temporal_projector={"num_layers": 2, "expand": 2})
    weights = [
        weight.numel()
        for name, weight in model.model.temporal_projector.named_parameters()
        if name.endswith("proj.weight")
    ]
    assert len(weights) == 2 * 2 * 2  # layers, directions, in and out
    recurrence = 2 * 2 * 6 * (2 * 64) * 64  # layers, directions, operations (decay, add, read), channels, states
    assert projector_flops(model.config, 10) == 10 * (2 * sum(weights) + recurrence)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_step_are_those_of_the_tensors_it_reads(dtype):
    model = build("tiny", "cpu", dtype)
    parts = (model.model.language_model.layers, model.model.language_model.norm, model.lm_head)
    real = sum(weight.nbytes for part in parts for weight in part.parameters())
    assert language_bytes(model.config, dtype.itemsize) == real
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.randint(0, 300, (3, 17)), past_key_values=cache, use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(model.config, 17, dtype.itemsize, batch_size=3) == held
    step = decode_work(model.config, 16, 3, dtype.itemsize)
    assert (step.bytes, step.flops) == (real + held, 3 * language_flops(model.config, 1, 16))


def test_a_floor_is_the_longer_of_computing_and_moving():
    peaks = Peaks(bandwidth=100.0, flops=1000.0, dtype="float32")
    assert Work(flops=500.0, bytes=20.0).floor(peaks) == 0.5
    assert Work(flops=500.0, bytes=80.0).floor(peaks) == 0.8
    config = make_config("7b")
    # By hand: 28 layers of 3584 x (3584 + 512 + 512 + 3584) + 3 x 3584 x 18944, biases and norms, the head.
    layer = 3584 * 8192 + 4608 + 3 * 3584 * 18944 + 2 * 3584
    assert language_bytes(config, 2) == 2 * (28 * layer + 3584 + 3584 * 152064) == 14_141_238_272
    assert cache_bytes(config, 1, 2) == 57_344


def test_works_of_an_answer_grow_by_a_step_for_each_token(model):
    grids = [[2, 4, 6]]
    few, more = (answer_works(model.config, grids, 50, count, 1, 4) for count in (3, 5))
    assert few == more[: len(few)]
    assert [one.bytes for one in more[2:]] == [decode_work(model.config, 50 + n, 1, 4).bytes for n in range(4)]


def test_what_the_shapes_say_in_the_readme():
    peaks, config = Peaks(bandwidth=4.3e12, flops=790e12, dtype="bfloat16"), make_config("7b")
    prompt = video_inputs("7b", 32)
    assert int((prompt["input_ids"] == config.video_token_id).sum()) == 4096

    def floor(new_tokens, batch_size=1):
        grids, length = prompt["video_grid_thw"].tolist(), prompt["input_ids"].shape[1]
        return sum(work.floor(peaks) for work in answer_works(config, grids, length, new_tokens, batch_size, 2))

    assert [f"{floor(18, size) / floor(8, size):.2f}" for size in (1, 8, 32)] == ["1.27", "1.05", "1.02"]
    assert f"{floor(520) / floor(18):.1f}" == "11.7"
    length = prompt["input_ids"].shape[1]
    parallel = floor(10) + sum(work.floor(peaks) for work in solver_works(config, length, 3, 1, 2))
    assert f"{parallel / floor(8):.2f}, {floor(520) / parallel:.1f}" == "1.14, 13.1"


@pytest.mark.parametrize(("name", "num_weights"), [("3b", 3_754_622_976), ("7b", 8_292_166_656)])
def test_sizes_are_those_of_the_releases(name, num_weights):
    with torch.device("meta"):
        model = StormsForConditionalGeneration(make_config(name))
    assert sum(weight.numel() for weight in model.parameters()) == num_weights
    assert video_inputs("7b", 2)["video_grid_thw"].tolist() == [[1, 32, 32]]


@pytest.mark.parametrize("is_static", [False, True])
def test_a_tool_loop_answers_as_one_pass_over_all_it_has_seen(model, is_static):
    inputs, clip = video_inputs("tiny", 8, 2), video_inputs("tiny", 4, 2, seed=1)
    cache = StaticCache(config=model.config, max_cache_len=400) if is_static else DynamicCache(config=model.config)
    ids, logits = tool_loop(model, inputs, clip, cache, num_tokens=3)
    prompt = ids[:, :-8]  # all but the answer
    is_video = prompt == model.config.video_token_id
    # Rows' videos in order, the question's and then the tool's.
    order = [(inputs, 0), *[(clip, 0)] * TOOL_ROUNDS, (inputs, 1), *[(clip, 1)] * TOOL_ROUNDS]
    pixels = [given["pixel_values_videos"].chunk(2)[row] for given, row in order]
    whole = model(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        mm_token_type_ids=is_video * 2,
        pixel_values_videos=torch.cat(pixels),
        video_grid_thw=torch.cat([given["video_grid_thw"][row : row + 1] for given, row in order]),
        second_per_grid_ts=torch.cat([given["second_per_grid_ts"][row : row + 1] for given, row in order]),
    )
    assert is_video.sum(1).tolist() == [4 * 6 + 3 * 2 * 6] * 2
    torch.testing.assert_close(logits, whole.logits[:, -1], atol=1e-5, rtol=1e-4)


def test_reforwarding_gives_the_states_of_generate(model):
    inputs = video_inputs("tiny", 8, 2)
    out = model.generate(**inputs, **latent(4), return_dict_in_generate=True)
    torch.testing.assert_close(reforward(model, inputs, 4), torch.stack(out.latent_states), atol=1e-5, rtol=1e-4)


def test_peak_memory_is_what_was_alive_at_once():
    with PeakMemory(Bench()) as memory:
        kept = torch.ones(1 << 20)
        for _ in range(3):
            torch.ones(1 << 19)
        assert kept.numel() == 1 << 20
    assert memory.bytes == (4 << 20) + (2 << 20)


def test_memory_of_an_answer_is_within_its_formula():
    model, inputs = build("small", "cpu", torch.float32), video_inputs("small", 16)
    with PeakMemory(Bench()) as memory:
        model.generate(**inputs, **latent(4))
    assert 0.8 < memory.bytes / answer_memory(model.config, inputs, 4 + 2 + 8, 4) < 1.1


def test_ratios_are_of_rounds_and_goals_are_told():
    result = summarize({"a": [2.0, 9.0, 4.0], "b": [1.0, 3.0, 1.0]}, "a", "b")
    assert (result["rounds"], result["ratio"], result["median_seconds"]) == (3, 3.0, {"a": 4.0, "b": 1.0})
    assert summarize({"a": [2.0], "b": [1.0]}, "a", "b")["ratio_quartiles"] == [2.0, 2.0]
    assert goal("x", 1.2, at_most=1.15)["goal"] == {"what": "x at most 1.15", "value": 1.2, "reached": False}
    assert goal("x", 0.7, at_least=0.7)["goal"]["reached"]


def test_rounds_stop_when_their_time_is_up_and_their_order_alternates():
    order = []
    bench = Bench(rounds=4, seconds=60)
    seconds = bench.measure({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, "")
    assert "".join(order) == "abbaabba"
    assert [len(values) for values in seconds.values()] == [4, 4]
    assert len(Bench(rounds=4, seconds=0).measure({"a": lambda: None}, "")["a"]) == 1
