"""A second backbone with the mixin, and ways to make an untrained model open and close blocks."""

import copy

import pytest
import torch
from transformers import GenerationConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from modeling_storms import LatentReasoningMixin
from tests.conftest import PROJECTOR, REDUCED, prompts_of, with_reduction

from .reference import LoopReference


# Models that many tests run with: the plain one, with a projector, with reductions, with both. Where the last has
# them, images are pooled too.
VARIANTS = {
    "plain": {},
    "projector": {"projector": PROJECTOR},
    "reduced": REDUCED,
    "both": {"projector": PROJECTOR, "temporal_pool": 3, "spatial_pool": 4, "pool_images": True},
}
MIXED = ("video", "short", "both", "image")  # videos of different lengths and sizes, with and without an image


def variants(names, plain, others):
    """Parametrises a test: with the cases `plain` on the plain model, with `others` on each of the other variants."""
    cases = [("plain", *case) for case in plain]
    cases += [(variant, *case) for variant in list(VARIANTS)[1:] for case in others]
    return pytest.mark.parametrize(("variant", *names), cases, indirect=["variant"])


@pytest.fixture
def variant(request):
    return getattr(request, "param", "plain")


@pytest.fixture(scope="session")
def built(pair, clip, short_clip):
    """Reference, model and prompts of each variant."""
    found = {}
    for name, options in VARIANTS.items():
        model, processor = with_reduction(pair[1], pair[2], **options)
        if options:
            model.config.vision_config.tokens_per_second = 50  # a video's time then outruns the text behind it
        reference = LoopReference.of(pair[0], model) if options else pair[0]
        # Of 12 frames in 6 grid steps several are left.
        found[name] = reference, model, prompts_of(processor, clip, short_clip, 12 if options else 4)
    return found


@pytest.fixture
def reference(built, variant):
    return built[variant][0]


@pytest.fixture
def model(built, variant):
    """A copy that a test may change."""
    return copy.deepcopy(built[variant][1])


@pytest.fixture
def prompts(built, variant):
    return built[variant][2]


def latent_ids(model):
    return model.latent_tokens.start, model.latent_tokens.pad, model.latent_tokens.end


def eager_to(model, start: float | None = None, end: float | None = None, seed: int = 0):
    """Change the output rows of latent tokens, so that an untrained model opens or closes blocks now and then."""
    tokens, generator = model.latent_tokens, torch.Generator().manual_seed(seed)
    for token_id, scale in ((tokens.start, start), (tokens.end, end)):
        if scale is not None:
            row = torch.randn(model.lm_head.weight.shape[1], generator=generator)
            model.lm_head.weight.data[token_id] = scale * row
    return model


def same_weights(reference, model):
    reference = copy.deepcopy(reference)
    reference.load_state_dict(model.state_dict())
    return reference


def one_grid_step(inputs, config):
    """Cut every video to its first temporal grid step: Qwen3-VL wants a placeholder run of its own for each step."""
    grids, pixels, offset = inputs["video_grid_thw"], [], 0
    merge = config.vision_config.spatial_merge_size**2
    keep = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    runs = iter(grids)
    for row, ids in enumerate(inputs["input_ids"]):
        places = (ids == config.video_token_id).nonzero()[:, 0]
        if len(places):
            grid = next(runs)
            keep[row, places[int(grid[1:].prod()) // merge :]] = False
    width = int(keep.sum(1).max())
    for grid in grids:
        pixels.append(inputs["pixel_values_videos"][offset : offset + int(grid[1:].prod())])
        offset += int(grid.prod())
    cut = {"pixel_values_videos": torch.cat(pixels), "video_grid_thw": grids.clone()}
    cut["video_grid_thw"][:, 0] = 1
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        rows = [value[kept] for value, kept in zip(inputs[name], keep)]
        cut[name] = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    return {name: value for name, value in {**inputs, **cut}.items() if name != "second_per_grid_ts"}


class TinyQwen3Storms(LatentReasoningMixin, Qwen3VLForConditionalGeneration):
    """The mixin on a second backbone, whose vision features also enter deeper layers."""


@pytest.fixture
def qwen3(pair):
    """Tiny Qwen3-VL, plain and with the mixin, same weights, vocabulary and image tokens as the first backbone."""
    _, storms, _ = pair
    text = storms.config.text_config
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": text.vocab_size,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            "bos_token_id": 0,
            "eos_token_id": text.eos_token_id,
            "pad_token_id": 0,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 14,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
        **{
            name: getattr(storms.config, name)
            for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        },
    )
    for name in ("latent_start_token_id", "latent_pad_token_id", "latent_end_token_id"):
        setattr(config, name, getattr(storms.config, name))
    torch.manual_seed(0)
    model = TinyQwen3Storms(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(4)
    model.generation_config = GenerationConfig(
        eos_token_id=storms.generation_config.eos_token_id, pad_token_id=0, do_sample=False
    )
    reference = Qwen3VLForConditionalGeneration(config).eval()
    reference.load_state_dict(model.state_dict())
    return reference, model
