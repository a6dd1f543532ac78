"""Targets of Stage I: visual tokens of a thought video, pooled to one vector a slot."""

import hashlib
from typing import Any

import torch

from modeling_storms import StormsForConditionalGeneration
from modeling_storms.modeling_storms import pool_thought_video

from .arguments import StormsTrainingArguments


def encode_targets(
    model: StormsForConditionalGeneration,
    pixels: torch.Tensor,
    grid_thw: torch.Tensor,
    media_per_row: torch.Tensor,
    latent_size: int | None,
    tower: torch.nn.Module | None = None,
) -> torch.Tensor:
    """Targets of a batch, from pixels.

    Args:
        model (`StormsForConditionalGeneration`): whose vision tower encodes.
        pixels (`torch.Tensor` of shape `(num_patches, patch_dim)`): of all rows' videos or images.
        grid_thw (`torch.LongTensor` of shape `(num_media, 3)`).
        media_per_row (`torch.LongTensor` of shape `(batch,)`): how many of them each row has.
        latent_size (`int`, *optional*): K; None for no pooling.
        tower (`torch.nn.Module`, *optional*): encodes instead of the model's own.

    Returns:
        `torch.Tensor` of shape `(batch, K, hidden_size)`, float32, without gradient; zero after a row's last target.
    """
    features = iter(model.get_target_features(pixels, grid_thw, tower))
    rows = [torch.cat([next(features) for _ in range(count)]) for count in media_per_row.tolist()]
    return torch.nn.utils.rnn.pad_sequence([pool_thought_video(row, latent_size) for row in rows], batch_first=True)


def target_settings(
    model: StormsForConditionalGeneration, processor: Any, arguments: StormsTrainingArguments
) -> dict[str, Any]:
    """Everything that decides a stored target: JSON values, the same on any machine."""
    videos, source = processor.video_processor, arguments.target_source
    size = dict(processor.image_processor.size if source == "keyframes" else videos.size)
    sampling = {
        "thought_video": {"num_target_frames": arguments.num_target_frames},
        "keyframes": {},
        "self_distilled": {"num_frames": videos.num_frames, "fps": videos.fps},
    }
    return {
        "tower": str(model.config.vision_config.model_type),
        "tower_revision": tower_revision(model),
        "latent_size": arguments.latent_size,
        "target_source": source,
        **sampling[source],
        "pixels": [int(size["shortest_edge"]), int(size["longest_edge"])],
    }


def tower_revision(model: StormsForConditionalGeneration) -> str:
    """A hash of the vision tower's weights, in bfloat16: the same however they were stored or loaded."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.model.visual.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to(torch.bfloat16).contiguous().view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
