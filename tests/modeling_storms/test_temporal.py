"""Long video: the projector equals its recurrence, the reducer plain loops; what works without works with them."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import layer_norm, silu, softplus
from torch.profiler import ProfilerActivity, profile

from modeling_storms import StormsForConditionalGeneration, StormsProcessor
from modeling_storms.modeling_storms import StormsModel, _plan_passes
from modeling_storms.temporal_storms import TemporalProjector, TokenReducer
from tests.conftest import PROJECTOR, REDUCED, ask, with_reduction

from .conftest import MIXED, variants
from .reference import reduce_by_loops


def scan(mixer, tokens):
    """Mamba-2 (Dao and Gu, 2024), one token after the other: `(length, hidden)` -> the same."""
    inner, state_size, num_heads, head_dim = (
        mixer.intermediate_size,
        mixer.ssm_state_size,
        mixer.num_heads,
        mixer.head_dim,
    )
    kernel, weight, bias = mixer.conv_kernel_size, mixer.conv1d.weight[:, 0], mixer.conv1d.bias
    decay = -mixer.A_log.exp()
    state = torch.zeros(num_heads, head_dim, state_size)
    window = torch.zeros(kernel, len(weight))
    outputs = []
    for token in tokens:
        gate, mixed, step = (mixer.in_proj.weight @ token).split([inner, inner + 2 * state_size, num_heads])
        window = torch.cat([window[1:], mixed[None]])
        x, b, c = silu((window.T * weight).sum(1) + bias).split([inner, state_size, state_size])
        step = softplus(step + mixer.dt_bias)
        x = x.view(num_heads, head_dim)
        state = state * (step * decay).exp()[:, None, None] + (step[:, None] * x)[..., None] * b
        y = (state @ c + mixer.D[:, None] * x).reshape(-1) * silu(gate)
        y = y * torch.rsqrt(y.pow(2).mean() + mixer.norm.variance_epsilon) * mixer.norm.weight
        outputs.append(mixer.out_proj.weight @ y)
    return torch.stack(outputs)


@torch.no_grad()
@pytest.mark.parametrize("length", [7, 8, 17, 40])
def test_scanning_in_segments_changes_nothing(length):
    torch.manual_seed(0)
    projector = TemporalProjector(32, {**PROJECTOR, "chunk_size": 4})
    for parameter in projector.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    media, shapes = [torch.randn(one, 32) for one in (length, 5, length, 5, length)], []
    expected = [projector([one])[0] for one in media]
    mixer = projector.layers[0].forward_mixer
    mixer.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape[:2]))
    for segment_size in (1, 8, 11, 20):
        shapes.clear()
        for found, other in zip(projector(media, segment_size), expected):
            torch.testing.assert_close(found, other, atol=1e-6, rtol=1e-5)
        assert sum(map(math.prod, shapes)) == sum(map(len, media))
        assert max(map(math.prod, shapes)) <= max(segment_size, 4)
    with torch.enable_grad():  # which a cache between segments would cut
        shapes.clear()
        projector(media, 1)
        assert sorted(shapes) == [(2, 5), (3, length)]


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 5, 300])  # 300: more than a chunk of the scan
@pytest.mark.parametrize("training", [False, True])
def test_the_projector_is_the_recurrence_in_both_directions(length, training):
    torch.manual_seed(0)
    projector = TemporalProjector(32, PROJECTOR).train(training)
    for parameter in projector.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    tokens = torch.randn(length, 32)
    expected = tokens
    for layer in projector.layers:
        normed = layer_norm(expected, (32,), layer.norm.weight, layer.norm.bias)
        backward = scan(layer.backward_mixer, normed.flip(0)).flip(0)
        expected = expected + scan(layer.forward_mixer, normed) + backward
    # Sums of 300 terms in another order: 2e-5 at worst was seen.
    # Another video of that length shares the pass, one of another length has its own.
    found, _, alone = projector([tokens, torch.randn(length, 32), tokens[: length // 2 + 1]])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(alone, projector([tokens[: length // 2 + 1]])[0])
    if length > 1:
        changed = tokens.clone()
        changed[-1] = -changed[-1]
        assert (projector([changed])[0][0] - found[0]).abs().max() > 1e-7, "the first token hears of the last"


@settings(deadline=None, max_examples=150)
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(1, 7)),
    k=st.integers(1, 5),
    p=st.sampled_from([1, 4, 9, 16]),
    s=st.integers(1, 4),
)
def test_reduction_is_that_of_plain_loops(grid, k, p, s):
    tokens = torch.randn(math.prod(grid), 6, dtype=torch.float64)
    reducer = TokenReducer(k, p, s)
    left = reducer(tokens, grid)
    torch.testing.assert_close(left, reduce_by_loops(tokens, grid, k, p, s))
    steps, height, width = grid
    side = math.isqrt(p)
    expected = (math.ceil(math.ceil(steps / k) / s), math.ceil(height / side), math.ceil(width / side))
    assert reducer.grid(*grid) == expected
    assert len(left) == math.prod(expected)
    times = [np.mean(range(begin, min(begin + k, steps))) for begin in range(0, steps, k)][::s]
    assert reducer.step_times(steps) == times
    # Space and time commute; sampling comes last in time.
    apart = TokenReducer(spatial_pool=p)(tokens, grid)
    apart = TokenReducer(k)(apart, TokenReducer(spatial_pool=p).grid(*grid))
    apart = TokenReducer(temporal_sampling=s)(apart, TokenReducer(k, p).grid(*grid))
    torch.testing.assert_close(left, apart)


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ({"temporal_pool": 0}, "temporal_pool is 0"),
        ({"temporal_sampling": 1.5}, "temporal_sampling is 1.5"),
        ({"spatial_pool": 8}, "must be a square number"),
    ],
)
def test_a_reduction_that_cannot_be_is_refused(model, numbers, told):
    with pytest.raises(ValueError, match=told):
        TokenReducer(**numbers)
    if "1.5" not in told:  # of the wrong type, which every config refuses
        with pytest.raises(ValueError, match=told):
            type(model.config)(**{**model.config.to_dict(), **numbers})


def test_options_that_the_projector_does_not_know_are_refused():
    with pytest.raises(ValueError, match=r"\['depth'\], but knows num_layers"):
        TemporalProjector(64, {"depth": 2})
    with pytest.raises(ValueError, match="a multiple of head_dim"):
        TemporalProjector(64, {"head_dim": 48})


@pytest.mark.parametrize("chunk_size", [1, 40, 1000, 10**6])
def test_passes_hold_every_step_once_and_no_more_than_fits(chunk_size):
    grids = [[3, 4, 6], [1, 4, 4], [10, 2, 2]]
    passes = _plan_passes(grids, chunk_size)
    for video, (steps, height, width) in enumerate(grids):
        parts = [part for one in passes for part in one if part[0] == video]
        assert sum(part[1] for part in parts) == steps
        assert all(part[2:] == (height, width) for part in parts)
    for one in passes:
        patches = sum(math.prod(part[1:]) for part in one)
        assert patches <= chunk_size or (len(one) == 1 and one[0][1] == 1)
    assert [part[0] for one in passes for part in one] == sorted(part[0] for one in passes for part in one)


@torch.no_grad()
def test_the_vision_tower_in_passes_gives_the_same_features(model, prompts):
    inputs = prompts("video", "video", "both", num_frames=12)
    names = ("pixel_values_videos", "video_grid_thw")
    whole = model.get_video_features(*(inputs[name] for name in names)).pooler_output
    counted = []
    tower = model.model.visual.forward
    model.model.visual.forward = lambda pixels, **kwargs: (counted.append(len(pixels)), tower(pixels, **kwargs))[1]
    for chunk_size in (1, 60, 200):
        counted.clear()
        model.config.vision_chunk_size = chunk_size
        parts = model.get_video_features(*(inputs[name] for name in names)).pooler_output
        assert max(counted) <= max(chunk_size, int(inputs["video_grid_thw"][:, 1:].prod(-1).max()))
        for one, other in zip(whole, parts):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def run_counting_bytes(call, folder):
    """What a call returns, and the most bytes of tensors it held at once, those inside of operations included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        result = call()
    run.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    found = [event for event in events if event["name"] == "[memory]"]
    first = min(found, key=lambda event: event["ts"])["args"]
    before = first["Total Allocated"] - first["Bytes"]
    return result, max(event["args"]["Total Allocated"] for event in found) - before


WIDE = {"hidden_size": 128, "intermediate_size": 344, "num_heads": 8}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
FLAT = {"hidden_size": 64, "intermediate_size": 1024, "num_heads": 4}


@torch.no_grad()
@pytest.mark.parametrize(
    ("tower", "dtype", "projector"),
    [
        (WIDE, torch.float32, None),
        (WIDE, torch.bfloat16, None),
        (FLAT, torch.float32, None),
        (SMALL, torch.float32, {**PROJECTOR, "chunk_size": 128}),  # here it is the projector that takes most
    ],
)
def test_features_of_256_frames_take_no_more_memory_than_stated(model, tmp_path, tower, dtype, projector):
    config = copy.deepcopy(model.config)
    for name, value in tower.items():
        setattr(config.vision_config, name, value)
    config.temporal_projector, config.temporal_pool = projector, 4
    inner = StormsModel(config).to(dtype).eval()
    grids = torch.tensor([[128, 4, 4]])  # two frames a step
    pixels = torch.randn(int(grids.prod()), 1176)
    # The formula of `get_video_features`.
    v, m, b, c = tower["hidden_size"], tower["intermediate_size"], dtype.itemsize, 0
    patches, num_tokens, hidden_size = 8 * 4 * 4, len(pixels) // 4, 64
    bound = patches * (max((5 * b + 28) * v, (3 * v + 4 * m) * b) + 2 * b * 1176)
    if projector is not None:
        c, a, n = (projector[name] for name in ("chunk_size", "head_dim", "state_size"))
        h = hidden_size // a
        bound = max(bound, max(patches // 16, c) * (16 * c * h + 40 * h * (a + n)))
    bound += 3 * num_tokens * hidden_size * b

    def run(chunk_size):
        inner.config.vision_chunk_size = chunk_size
        return run_counting_bytes(lambda: inner.get_video_features(pixels, grids).pooler_output[0], tmp_path)

    (features, taken), (expected, whole) = run(patches), run(10**9)
    assert bound / 4 < taken <= bound < whole
    torch.testing.assert_close(features, expected)


# -- in the model


@torch.no_grad()
def test_a_new_projector_changes_nothing(model, processor, prompts, tmp_path):
    inputs = prompts("video", "both", "image")
    expected = model(**inputs).logits
    model.config.temporal_projector = PROJECTOR
    model.save_pretrained(tmp_path)  # of the model as it was: no weights of a projector
    loaded, info = StormsForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert {name for name in info["missing_keys"] if "temporal_projector" not in name} == set()
    assert loaded.model.temporal_projector is not None
    assert all(torch.isfinite(one).all() for one in loaded.parameters())
    torch.testing.assert_close(loaded(**inputs).logits, expected, atol=0, rtol=0)
    # And once trained, it is loaded as it is.
    for parameter in loaded.model.temporal_projector.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    changed = loaded(**inputs).logits
    assert (changed - expected).abs().max() > 1e-3
    loaded.save_pretrained(tmp_path / "trained")
    again = StormsForConditionalGeneration.from_pretrained(tmp_path / "trained")
    torch.testing.assert_close(again(**inputs).logits, changed, atol=0, rtol=0)


@pytest.mark.parametrize("num_frames", [4, 9, 12])
@pytest.mark.parametrize("reduction", [REDUCED, {"temporal_pool": 3}, {"spatial_pool": 9}, {"temporal_sampling": 2}])
def test_the_processor_writes_as_many_placeholders_as_tokens_are_left(pair, clip, num_frames, reduction):
    model, processor = with_reduction(pair[1], pair[2], **reduction)
    inputs = ask(processor, str(clip), num_frames=num_frames)
    steps, height, width = inputs["video_grid_thw"][0].tolist()
    k, p, s = (reduction.get(name, 1) for name in ("temporal_pool", "spatial_pool", "temporal_sampling"))
    side = math.isqrt(p)
    expected = math.ceil(math.ceil(steps / k) / s) * math.ceil(height / 2 / side) * math.ceil(width / 2 / side)
    assert int((inputs["input_ids"] == model.config.video_token_id).sum()) == expected
    features = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output
    assert [len(one) for one in features] == [expected]
    model(**inputs)


@torch.no_grad()
def test_numbers_of_model_and_processor_must_agree_and_can_be_changed_for_a_call(pair, clip):
    model, processor = with_reduction(pair[1], pair[2], temporal_pool=2)
    pooled = ask(processor, str(clip), num_frames=8)
    with pytest.raises(ValueError, match=r"by temporal_pool=1, .*, but the processor by temporal_pool=2"):
        pair[1](**pooled)
    with pytest.raises(ValueError, match=r"do not match.* The model reduces tokens by temporal_pool=2"):
        model(**ask(pair[2], str(clip), num_frames=8))
    with pytest.raises(ValueError, match=r"The prompt has 24 video tokens, but 12 are left where .* temporal_pool=2"):
        model.generate(**ask(pair[2], str(clip), num_frames=8), max_new_tokens=4)
    inputs = ask(processor, str(clip), num_frames=8, temporal_sampling=2, temporal_pool=1)
    assert inputs["input_ids"].shape == pooled["input_ids"].shape, "the number of placeholders tells nothing here"
    with pytest.raises(ValueError, match=r"by temporal_pool=2, .*, but the processor by temporal_pool=1"):
        model.generate(**inputs, max_new_tokens=4, latent_mode="off")
    sampled, own = with_reduction(pair[1], pair[2], temporal_sampling=2)
    options = {"max_new_tokens": 6, "latent_mode": "force", "latent_size": 2}
    expected = sampled.generate(**ask(own, str(clip), num_frames=8), **options)
    assert torch.equal(model.generate(**inputs, temporal_sampling=2, temporal_pool=1, **options), expected)
    assert model.model.reducer.temporal_pool == 2, "for that call only"


def test_the_numbers_are_saved_with_model_and_processor(pair, tmp_path):
    model, processor = with_reduction(pair[1], pair[2], PROJECTOR, **REDUCED, pool_images=True)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = StormsForConditionalGeneration.from_pretrained(tmp_path).config
    own = StormsProcessor.from_pretrained(tmp_path).video_processor
    for name, value in {**REDUCED, "pool_images": True}.items():
        assert getattr(config, name) == getattr(own, name) == value


def test_a_pooled_token_sits_at_its_groups_mean_time(pair, clip):
    model, processor = with_reduction(pair[1], pair[2], temporal_pool=2, temporal_sampling=2)
    plain = ask(pair[2], str(clip), num_frames=20)
    inputs = ask(processor, str(clip), num_frames=20)
    names = ("video_grid_thw", "second_per_grid_ts")
    media = {name: inputs[name] for name in names}
    row, _ = pair[1].model.get_rope_index(plain["input_ids"], plain["mm_token_type_ids"], **media)
    ours, deltas = model.model.get_rope_index(inputs["input_ids"], inputs["mm_token_type_ids"], **media)
    video = inputs["input_ids"][0] == model.config.video_token_id
    before = plain["input_ids"][0] == model.config.video_token_id
    rate = model.config.vision_config.tokens_per_second * float(inputs["second_per_grid_ts"][0])
    start = int(row[0, 0][before][0])
    # Ten steps: groups (0, 1), (2, 3), ...; every second group is left: 0.5, 4.5, 8.5.
    expected = sorted({start + math.floor(time * rate) for time in (0.5, 4.5, 8.5)})
    assert sorted(set(ours[0, 0][video].tolist())) == expected
    assert set(ours[1, 0][video].tolist()) == set(row[1, 0][before].tolist())
    # What comes before and after is where it was; what is generated follows the highest position.
    assert torch.equal(ours[:, 0][:, ~video], row[:, 0][:, ~before])
    assert int(deltas[0]) == int(ours.max()) + 1 - len(video)
    # Padding on the left changes nothing.
    padded = {name: torch.nn.functional.pad(inputs[name], (3, 0)) for name in ("input_ids", "mm_token_type_ids")}
    mask = torch.nn.functional.pad(torch.ones_like(inputs["input_ids"]), (3, 0))
    shifted, _ = model.model.get_rope_index(**padded, attention_mask=mask, **media)
    assert torch.equal(shifted[..., 3:], ours)


@torch.no_grad()
@variants([], [], [[]])
def test_a_mixed_batch_has_the_tokens_and_positions_of_plain_loops(model, reference, prompts):
    inputs = prompts(*MIXED, "text")
    media = {name: inputs[name] for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")}
    for is_flipped in (False, True):  # padded left, and right
        names = ("input_ids", "mm_token_type_ids", "attention_mask")
        ids, kinds, mask = (inputs[name].flip(1) if is_flipped else inputs[name] for name in names)
        found, deltas = model.model.get_rope_index(ids, kinds, **media, attention_mask=mask)
        expected, expected_deltas = reference.model.get_rope_index(ids, kinds, **media, attention_mask=mask)
        assert torch.equal(found[:, mask.bool()], expected[:, mask.bool()])
        assert torch.equal(deltas, expected_deltas)
    assert (deltas > 0).any(), "the test needs a video whose time goes beyond the text behind it"
    for name in ("get_video_features", "get_image_features"):
        pixels, grids = ("pixel_values_videos", "video") if "video" in name else ("pixel_values", "image")
        given = inputs[pixels], inputs[f"{grids}_grid_thw"]
        for one, other in zip(*(getattr(part.model, name)(*given).pooler_output for part in (model, reference))):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_images_are_scanned_over_space_and_pooled_only_if_asked(pair, prompts):
    model, _ = with_reduction(pair[1], pair[2], **REDUCED)
    inputs = prompts("image")
    plain = pair[1](**inputs).logits
    torch.testing.assert_close(model(**inputs).logits, plain, atol=0, rtol=0)
    pooled, own = with_reduction(pair[1], pair[2], **REDUCED, pool_images=True)
    features = pooled.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output[0]
    _, height, width = inputs["image_grid_thw"][0].tolist()
    assert len(features) == math.ceil(height / 4) * math.ceil(width / 4)
    assert own._num_left(inputs["image_grid_thw"][0], own._reducer({}).for_images) == len(features)
