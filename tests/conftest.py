"""Tiny models, prompts and clips shared by all tests. Nothing is downloaded."""

import os
import tempfile


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Each process keeps the remote code that it loads for itself: names of folders repeat.
    modules = f"storms-modules-{os.environ['PYTEST_XDIST_TESTRUNUID']}-{os.environ['PYTEST_XDIST_WORKER']}"
    os.environ["HF_MODULES_CACHE"] = os.path.join(tempfile.gettempdir(), modules)

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset_builder.thought_video import encode_video
from modeling_storms import StormsForConditionalGeneration, StormsProcessor
from recipes.init_checkpoint import build_tiny_base, convert


REAL_CLIPS = Path(__file__).parents[2] / "shared" / "clips"
QUESTIONS = ("Which cup moves?", "Does the red car stop before the light changes, or after two seconds?", "Why?")


PROJECTOR = {"num_layers": 2, "state_size": 8, "head_dim": 16}
REDUCED = {"temporal_pool": 2, "spatial_pool": 4, "temporal_sampling": 2}


def ask(processor, video, text="Why?", **processor_kwargs):
    """Model inputs of one question about a video."""
    messages = [{"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": text}]}]
    return processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=processor_kwargs,
    )


def moving_disc(num_frames=24, height=96, width=128, seed=0) -> np.ndarray:
    """A disc that crosses a patterned background, `(num_frames, height, width, 3)`."""
    generator = np.random.default_rng(seed)
    shade = generator.integers(60, 200, (-(-height // 16), -(-width // 16), 3), dtype=np.uint8)
    background = shade.repeat(16, 0).repeat(16, 1)[:height, :width]
    frames = np.repeat(background[None], num_frames, axis=0)
    rows, columns = np.mgrid[:height, :width]
    for frame_idx, frame in enumerate(frames):
        x = width * (frame_idx + 0.5) / num_frames
        frame[(rows - height / 2) ** 2 + (columns - x) ** 2 < (height / 6) ** 2] = (220, 30, 30)
    return frames


def bouncing_ball(num_frames=24, height=112, width=168) -> np.ndarray:
    """A red ball that bounces on a grey floor. The seeds of tests of generation were chosen for these pixels."""
    rows, columns = np.mgrid[:height, :width]
    frames = np.full((num_frames, height, width, 3), 230, dtype=np.uint8)
    frames[:, rows > height - 16] = 120
    for frame_idx, frame in enumerate(frames):
        x = 12 + (width - 24) * frame_idx / (num_frames - 1)
        y = height - 24 - 0.6 * height * abs(math.cos(2.5 * frame_idx / 12))
        frame[(rows - y) ** 2 + (columns - x) ** 2 < 10**2] = (210, 40, 30)
    return frames


def enliven(model, factor: float = 4.0):
    """Larger weights: at initialisation all states are nearly the same, and wrong masks would not show."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data.mul_(factor) if parameter.ndim > 1 else parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def with_reduction(model, processor, projector=None, **reduction):
    """A model with the same weights that reduces tokens, behind a projector that does something; its processor."""
    config = copy.deepcopy(model.config)
    config.temporal_projector = projector
    for name, value in reduction.items():
        setattr(config, name, value)
    torch.manual_seed(2)  # for the new projector, too
    changed = StormsForConditionalGeneration(config).eval()
    found = changed.load_state_dict(model.state_dict(), strict=False)
    assert not found.unexpected_keys
    assert all("temporal_projector" in name for name in found.missing_keys)
    changed.generation_config = copy.deepcopy(model.generation_config)
    for parameter in changed.model.temporal_projector.parameters() if projector else ():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    own = copy.deepcopy(processor)
    for name, value in reduction.items():
        setattr(own.video_processor, name, value)
    return changed, own


@pytest.fixture(scope="session")
def pair():
    """The plain class and the STORMS class with the same weights, and the processor."""
    base, processor = build_tiny_base()
    base = enliven(base)
    reference = copy.deepcopy(base)
    model, processor = convert(base, processor)
    reference.load_state_dict(model.state_dict())  # with the latent tokens' embeddings
    return reference, model, processor


@pytest.fixture
def reference(pair):
    return pair[0]


@pytest.fixture
def model(pair) -> StormsForConditionalGeneration:
    """A copy that a test may change."""
    return copy.deepcopy(pair[1])


@pytest.fixture(scope="session")
def processor(pair) -> StormsProcessor:
    return pair[2]


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "bounce.mp4"
    path.write_bytes(encode_video(bouncing_ball(), 12))
    return path


@pytest.fixture(scope="session")
def short_clip(tmp_path_factory) -> Path:
    """Five frames of another size."""
    path = tmp_path_factory.mktemp("clips") / "short.mp4"
    path.write_bytes(encode_video(moving_disc(5, 84, 112), 4))
    return path


@pytest.fixture
def real_clips() -> Path:
    if not REAL_CLIPS.is_dir():
        pytest.skip("the folder of real clips is not beside this checkout")
    return REAL_CLIPS


def prompts_of(processor, clip, short_clip, num_frames=4):
    """Makes model inputs of a batch, by kind of prompt: `prompts("video", "text")` has two rows."""
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 255, (56, 84, 3), dtype=np.uint8))
    media = {
        "text": [],
        "image": [{"type": "image", "image": image}],
        "video": [{"type": "video", "video": str(clip)}],
        "short": [{"type": "video", "video": str(short_clip)}],
        "both": [{"type": "image", "image": image}, {"type": "video", "video": str(clip)}],
    }

    def build(*kinds: str, num_frames: int = num_frames):
        conversations = [
            [{"role": "user", "content": [*media[kind], {"type": "text", "text": QUESTIONS[row % len(QUESTIONS)]}]}]
            for row, kind in enumerate(kinds)
        ]
        return processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"num_frames": num_frames, "padding": True},
        )

    return build


@pytest.fixture(scope="session")
def prompts(processor, clip, short_clip):
    return prompts_of(processor, clip, short_clip)
