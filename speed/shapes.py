"""Models by size, with random weights, and what their shapes say about the work of an answer.

`tiny`, `small`, `narrow`, `eighth` (the 3B model's depths and proportions at an eighth of its widths) and `slice`
(four layers of the 3B's language model, as wide as they are) are for CPUs; `tiny_280`, `tiny_448` and `narrow_448` are
some of them with larger frames, of which 32 make 1,600 and 4,096 visual tokens, the latter as with the releases. `3b`
and `7b` have the shapes of Qwen2.5-VL's releases, and are made on the device in its own precision: nothing is
downloaded. Figures do not depend on what weights hold.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch

from modeling_storms import StormsConfig, StormsForConditionalGeneration, StormsProcessor
from recipes.init_checkpoint import build_tiny_base, convert

from .harness import Work


@dataclass(frozen=True)
class Size:
    """A model to measure on.

    Args:
        text (`dict`), vision (`dict`): what differs from the tiny configuration.
        frame (`tuple`): height and width of its video frames, multiples of 28; two frames give a token for each 28 x
            28 pixels.
        tied (`bool`): whether input and output embeddings are one.
        num_train_rows, num_train_frames (`int`): of a training step.
    """

    text: dict[str, Any]
    vision: dict[str, Any]
    frame: tuple[int, int]
    tied: bool = False
    num_train_rows: int = 4
    num_train_frames: int = 16


def _released(hidden_size: int, intermediate_size: int, layers: int, heads: int, kv_heads: int, vocab: int) -> Size:
    text = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": hidden_size,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    return Size(text, vision, (448, 448), tied=hidden_size == 2048, num_train_rows=2)


_NARROW = Size(
    {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 12,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 24, 24]},
    },
    {"out_hidden_size": 512},
    (140, 196),
)

SIZES = {
    "tiny": Size({}, {}, (56, 84)),
    "tiny_280": Size({}, {}, (280, 280)),
    "tiny_448": Size({}, {}, (448, 448)),
    "small": Size(
        {
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]},
        },
        {"out_hidden_size": 256},
        (196, 280),
    ),
    "narrow": _NARROW,
    "narrow_448": replace(_NARROW, frame=(448, 448)),
    "eighth": Size(
        {
            "hidden_size": 256,
            "intermediate_size": 1376,
            "num_hidden_layers": 36,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        },
        {
            "depth": 32,
            "hidden_size": 160,
            "intermediate_size": 428,
            "num_heads": 4,
            "out_hidden_size": 256,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        (140, 196),
        tied=True,
    ),
    "slice": replace(_released(2048, 11008, 4, 16, 2, 151936), vision={"out_hidden_size": 2048}, frame=(56, 84)),
    "3b": _released(2048, 11008, 36, 16, 2, 151936),
    "7b": _released(3584, 18944, 28, 28, 4, 152064),
}


@cache
def _tiny() -> tuple[StormsConfig, StormsProcessor, Any]:
    model, processor = convert(*build_tiny_base())
    return model.config, processor, model.generation_config


def make_config(name: str, **changes: Any) -> StormsConfig:
    """The configuration of a size, with the tiny tokenizer's ids, and `changes` to it."""
    size, values = SIZES[name], _tiny()[0].to_dict()
    values["tie_word_embeddings"] = size.tied
    values["text_config"] |= {**size.text, "layer_types": None}
    values["vision_config"] |= size.vision
    for key in ("model_type", "architectures", "transformers_version", "auto_map", "dtype"):
        values.pop(key, None)
    return StormsConfig(**{**values, **changes})


def build(name: str, device: str, dtype: torch.dtype, **changes: Any) -> StormsForConditionalGeneration:
    """A model of a size with random weights, made where it will run; `changes` as for `make_config`."""
    torch.manual_seed(0)
    with torch.device(device):
        model = StormsForConditionalGeneration._from_config(make_config(name, **changes), dtype=dtype)
    model.generation_config = copy.deepcopy(_tiny()[2])
    return model.eval()


def make_processor(name: str) -> StormsProcessor:
    """The tiny processor, which leaves a size's frames as large as they are."""
    processor = copy.deepcopy(_tiny()[1])
    height, width = SIZES[name].frame
    processor.video_processor.size = {"shortest_edge": 56 * 56, "longest_edge": height * width}
    return processor


def video_inputs(name: str, num_frames: int, batch_size: int = 1, seed: int = 0, **reduction: int) -> dict[str, Any]:
    """A question about a video of random frames, as `generate` takes it; the same in each row of the batch."""
    frames = np.random.default_rng(seed).integers(0, 255, (num_frames, *SIZES[name].frame, 3), dtype=np.uint8)
    messages = [{"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": "Why?"}]}]
    metadata = {"total_num_frames": num_frames, "fps": 2.0, "frames_indices": list(range(num_frames))}
    inputs = make_processor(name).apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"video_metadata": [metadata], "do_sample_frames": False, **reduction},
    )
    repeated = {key: torch.as_tensor(value) for key, value in inputs.items()}
    return {
        key: value if key == "token_reduction" else value.repeat(batch_size, *[1] * (value.ndim - 1))
        for key, value in repeated.items()
    }


# ------------------------------------------------------------------ what shapes say


def language_flops(config: Any, new_tokens: int, context: int = 0, num_logits: int = 1) -> float:
    """Of running `new_tokens` of one row behind `context` cached ones, each attending to itself and what is before it;
    logits of `num_logits` positions."""
    text = config.get_text_config()
    head_dim = text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    weights = text.hidden_size * (2 * queries + 2 * keys) + 3 * text.hidden_size * text.intermediate_size
    seen = new_tokens * context + new_tokens * (new_tokens + 1) / 2
    layers = text.num_hidden_layers * (2 * weights * new_tokens + 4 * queries * seen)
    return layers + 2 * text.hidden_size * text.vocab_size * num_logits


def vision_flops(config: Any, grids: Sequence[Sequence[int]]) -> float:
    """Of the vision tower and its merger on videos of `(steps, height, width)` patches; windows attend to themselves,
    in full layers each step does."""
    vision = config.vision_config
    width, merge = vision.hidden_size, vision.spatial_merge_size
    side = vision.window_size // merge // vision.patch_size  # of a window, in merged tokens
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    flops = 0.0
    for steps, rows, columns in grids:
        patches = steps * rows * columns
        flops += 2 * patches * patch * width
        flops += vision.depth * 2 * patches * (4 * width**2 + 3 * width * vision.intermediate_size)
        # A window of h x w patches has (h * w)^2 pairs, so the sum over windows is a product of two sums.
        heights, widths = (
            [min(side * merge, whole - begin) for begin in range(0, whole, side * merge)] for whole in (rows, columns)
        )
        windows = steps * sum(one**2 for one in heights) * sum(one**2 for one in widths)
        full = steps * (rows * columns) ** 2
        num_full = len(vision.fullatt_block_indexes)
        flops += 4 * width * (num_full * full + (vision.depth - num_full) * windows)
        merged, wide = patches / merge**2, width * merge**2
        flops += 2 * merged * (wide**2 + wide * vision.out_hidden_size)
    return flops


def projector_flops(config: Any, num_tokens: int) -> float:
    """Of the temporal projector on one video: projections, and a recurrence that updates and reads each state once."""
    hidden = config.get_text_config().hidden_size
    options = {"num_layers": 1, "state_size": 64, "head_dim": 64, "expand": 1, **(config.temporal_projector or {})}
    inner = options["expand"] * hidden
    projections = hidden * (2 * inner + 2 * options["state_size"] + inner // options["head_dim"]) + inner * hidden
    return options["num_layers"] * 2 * num_tokens * (2 * projections + 6 * inner * options["state_size"])


def language_bytes(config: Any, itemsize: int) -> int:
    """Weights that a decoding step reads: decoder layers, norms and output head."""
    text = config.get_text_config()
    hidden, head_dim = text.hidden_size, text.hidden_size // text.num_attention_heads
    keys = 2 * text.num_key_value_heads * head_dim
    layer = hidden * (2 * hidden + keys) + hidden + keys  # projections, biases of queries, keys and values
    layer += 3 * hidden * text.intermediate_size + 2 * hidden
    return itemsize * (text.num_hidden_layers * layer + hidden + hidden * text.vocab_size)


def cache_bytes(config: Any, length: int, itemsize: int, batch_size: int = 1) -> int:
    """Keys and values of `length` positions."""
    text = config.get_text_config()
    keys = text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
    return 2 * itemsize * batch_size * text.num_hidden_layers * length * keys


def decode_work(config: Any, context: int, batch_size: int, itemsize: int) -> Work:
    """Of one decoding step: all weights once, the cache of `context` positions once."""
    return Work(
        flops=batch_size * language_flops(config, 1, context),
        bytes=language_bytes(config, itemsize) + cache_bytes(config, context + 1, itemsize, batch_size),
    )


def prefill_work(config: Any, new_tokens: int, batch_size: int, itemsize: int, context: int = 0) -> Work:
    """Of the language model's pass over a prompt."""
    return Work(
        flops=batch_size * language_flops(config, new_tokens, context),
        bytes=language_bytes(config, itemsize) + cache_bytes(config, context + new_tokens, itemsize, batch_size),
    )


def vision_work(config: Any, grids: Sequence[Sequence[int]], batch_size: int) -> Work:
    return Work(flops=batch_size * vision_flops(config, grids))


def answer_works(config: Any, grids: Any, prompt: int, new_tokens: int, batch_size: int, itemsize: int) -> list[Work]:
    """Of an answer of `new_tokens` (slots count like text) about videos: vision tower, prompt, and one step for each
    token but the first."""
    steps = [decode_work(config, prompt + step, batch_size, itemsize) for step in range(new_tokens - 1)]
    return [vision_work(config, grids, batch_size), prefill_work(config, prompt, batch_size, itemsize), *steps]
