"""Quality scores of a thought video against its keyframes, what they must reach, and near-duplicates.

Scores are plain numbers that are stored with every row, so that a dataset can be filtered again without its videos.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModel

from modeling_storms.video_storms import uniform_frame_indices

from .schema import Rejected
from .thought_video import describe_model


GRID_SIDE = 64  # cells along the longer side: blur away codec and sensor noise, keep a lamp of a few pixels
SAMPLED_SIDE = 128  # pixels along the longer side, picked rather than averaged, as noise lives in single pixels
SIGNATURE_SHAPE = (8, 16, 16)  # moments, rows, columns


def _limit(default: float | None, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class Thresholds:
    """What a thought video's scores must reach. Each key of the YAML overrides one.

    Args:
        min_thought_seconds, max_thought_seconds (`float`): length.
        min_motion (`float`): mean change of brightness from frame to frame, 0 to 1. Measured: at most 2e-6 in encoded
            frozen videos, 4e-5 where a lamp of 10 pixels blinks once, 2e-4 to 0.03 in real clips.
        min_change (`float`): the most that any small area's brightness changes over the video, 0 to 1. Tells a
            blinking lamp (0.7) from noise over a frozen picture (0.007), whose `motion` may be the greater one. Up to
            0.06 in small frozen videos, whose first frame is coded worse than the rest; simulated ones from 0.13 on.
        max_first_frame_difference (`float`): between the first frame and the keyframe most like it, 0 to 1. Measured:
            0.005 after encoding, 0.1 at 20% more light, 0.25 to 0.5 between real scenes; from 0.03 on between
            simulated ones, whose plain backgrounds may be alike.
        min_brightness, max_brightness (`float`): mean over the video, 0 (black) to 1.
        max_flicker (`float`): mean change of the whole picture's brightness to and fro, 0 to 1. A strobe has
            1, one of half the light and 8 frames' period 0.05, real clips up to 0.006.
        max_noise (`float`): mean change to and fro of single pixels within three frames, 0 to 1. White noise has
            0.12 to 0.17, real clips up to 0.012.
        max_duplicate_distance (`float`): thought videos of one question whose thumbnails differ nowhere by more,
            0 to 1, are one. Measured: 0.008 after encoding, 0.02 to 0.17 where a lamp blinks once more.
        min_tower_similarity (`float`, *optional*): cosine between keyframes and frames in a vision tower's features.
    """

    min_thought_seconds: float = _limit(0.3, "Refuse shorter thought videos.")
    max_thought_seconds: float = _limit(600.0, "Refuse longer ones.")
    min_motion: float = _limit(5e-6, "Least mean change of brightness from frame to frame, 0 to 1.")
    min_change: float = _limit(0.08, "Least change that some small area must see, 0 to 1.")
    max_first_frame_difference: float = _limit(0.11, "Between the first frame and the nearest keyframe, 0 to 1.")
    min_brightness: float = _limit(0.02, "Refuse darker videos, 0 to 1.")
    max_brightness: float = _limit(0.98, "Refuse brighter ones.")
    max_flicker: float = _limit(0.03, "Brightness of the whole picture going to and fro, 0 to 1.")
    max_noise: float = _limit(0.05, "Single pixels going to and fro, 0 to 1.")
    max_duplicate_distance: float = _limit(0.015, "Thought videos of one question that differ less are one, 0 to 1.")
    min_tower_similarity: float | None = _limit(None, "Least cosine with the keyframes in the --tower's features.")


def score(frames: np.ndarray, fps: float, keyframes: Sequence[np.ndarray]) -> dict[str, float]:
    """Measure a thought video.

    Args:
        frames (`np.ndarray` of shape `(num_frames, height, width, 3)`): uint8 RGB, at least one frame.
        fps (`float`): frames a second.
        keyframes (`Sequence[np.ndarray]`): each `(height, width, 3)` uint8 RGB, of any size; at least one.

    Returns:
        `dict` of `num_frames`, `seconds` and the scores that `Thresholds` explains, all finite.
    """
    grey = _grey(frames)
    grid = np.stack(
        [_shrink(picture, *_grid_size(*grey.shape[1:])) for picture in grey]
    )  # (num_frames, rows, columns)
    stride = math.ceil(max(grey.shape[1:]) / SAMPLED_SIDE)
    brightness = grey.mean((1, 2))
    first = _shrink(grey[0], 32, 32)
    differences = [np.abs(first - _shrink(_grey(one[None])[0], 32, 32)).mean() for one in keyframes]
    scores = {
        "num_frames": len(frames),
        "seconds": len(frames) / fps,
        "motion": np.abs(np.diff(grid, axis=0)).mean() if len(frames) > 1 else 0.0,
        "change": np.ptp(grid, axis=0).max(),
        "first_frame_difference": min(differences),
        "brightness": brightness.mean(),
        "flicker": _flicker(brightness),
        "noise": _noise(grey[:, ::stride, ::stride]),
    }
    return {name: round(float(value), 6) for name, value in scores.items()}


def check(scores: Mapping[str, float], thresholds: Thresholds) -> None:
    """Refuse a thought video that misses a threshold; where it misses several, the first in this order.

    Raises:
        Rejected: too_short, too_long, too_dark, too_bright, flicker, noise, no_motion, first_frame_mismatch or
            unlike_keyframes; all scores are in its details.
        ValueError: if `min_tower_similarity` is set and the scores hold no `tower_similarity`.
    """
    if thresholds.min_tower_similarity is not None and "tower_similarity" not in scores:
        raise ValueError("Found min_tower_similarity, but no tower_similarity among the scores: name a tower as well.")
    for reason, name, option in (
        ("too_short", "seconds", "min_thought_seconds"),
        ("too_long", "seconds", "max_thought_seconds"),
        ("too_dark", "brightness", "min_brightness"),
        ("too_bright", "brightness", "max_brightness"),
        ("flicker", "flicker", "max_flicker"),
        ("noise", "noise", "max_noise"),
        ("no_motion", "motion", "min_motion"),
        ("no_motion", "change", "min_change"),
        ("first_frame_mismatch", "first_frame_difference", "max_first_frame_difference"),
        ("unlike_keyframes", "tower_similarity", "min_tower_similarity"),
    ):
        limit = getattr(thresholds, option)
        if limit is not None and (scores[name] < limit if option.startswith("min") else scores[name] > limit):
            raise Rejected(reason, f"{name} is {scores[name]:.4g}, {option} is {limit:.4g}", {"scores": dict(scores)})


def signature(frames: np.ndarray) -> list[int]:
    """Small grey thumbnails of a thought video, by which near-duplicates are found.

    Each thumbnail is the mean over an eighth of the video, rather than a frame of it: what happens for one frame only
    still shows, and two videos that differ in one blink of a lamp differ here.

    Args:
        frames (`np.ndarray` of shape `(num_frames, height, width, 3)`): uint8 RGB, at least one frame.

    Returns:
        2,048 values of 0 to 255: 8 thumbnails of 16 x 16, in order.
    """
    num_moments, rows, columns = SIGNATURE_SHAPE
    grey = _grey(frames)
    edges = np.arange(num_moments + 1) * len(frames) // num_moments
    moments = [grey[start : max(stop, start + 1)].mean(0) for start, stop in pairwise(edges)]
    thumbnails = _shrink(np.stack(moments), rows, columns)
    return (thumbnails * 255).round().astype(int).ravel().tolist()


def find_near_duplicates(rows: Sequence[tuple[str, str, Sequence[int]]], max_distance: float) -> dict[str, str]:
    """Rows whose thought video repeats an earlier row's of the same group.

    Two differ by what any cell of their thumbnails differs at most, not by the mean: simulated scenes of one kind
    share nearly every pixel. A row is compared with earlier rows that repeat none themselves.

    Args:
        rows (`Sequence[tuple[str, str, Sequence[int]]]`): id, group (the question) and `signature` of each, in an
            order that decides which of two repeats the other.
        max_distance (`float`): see `Thresholds.max_duplicate_distance`.

    Returns:
        `dict` from a row's id to the id of the first row that it repeats.
    """
    groups: dict[str, list[int]] = {}
    for row_idx, (_, group, _) in enumerate(rows):
        groups.setdefault(group, []).append(row_idx)
    duplicates: dict[str, str] = {}
    limit = max_distance * 255
    for row_indices in groups.values():
        kept = np.empty((len(row_indices), math.prod(SIGNATURE_SHAPE)), np.int16)
        kept_ids: list[str] = []
        for row_idx in row_indices:
            row_id, _, values = rows[row_idx]
            current = np.asarray(values, np.int16)
            # A few cells rule out nearly all: their greatest difference is at most that of all cells.
            few = np.abs(kept[: len(kept_ids), ::32] - current[::32]).max(1, initial=0)
            candidates = np.flatnonzero(few <= limit)
            same = candidates[np.abs(kept[candidates] - current).max(1, initial=0) <= limit]
            if len(same):
                duplicates[row_id] = kept_ids[same[0]]
            else:
                kept[len(kept_ids)] = current
                kept_ids.append(row_id)
    return duplicates


@dataclass
class TowerSimilarity:
    """How alike keyframes and a thought video are to a vision tower, loaded on first use.

    Args:
        model (`str`): Hub id or local folder of an image model that transformers loads (CLIP, SigLIP, DINOv2, ViT).
        revision (`str`, *optional*): commit of the Hub repository.
        num_frames (`int`): frames of the thought video to look at, spread evenly.
    """

    model: str
    revision: str | None = None
    num_frames: int = 8

    def __post_init__(self) -> None:
        self._loaded: tuple[Any, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}

    def settings(self) -> dict[str, Any]:
        """What decides a similarity: JSON values, no paths of this machine."""
        return {"model": describe_model(self.model), "revision": self.revision, "num_frames": self.num_frames}

    def __call__(self, frames: np.ndarray, keyframes: Sequence[np.ndarray]) -> float:
        """Mean over keyframes of the cosine with the frame most like each, -1 to 1.

        Args:
            frames (`np.ndarray` of shape `(num_frames, height, width, 3)`): uint8 RGB.
            keyframes (`Sequence[np.ndarray]`): each `(height, width, 3)` uint8 RGB.
        """
        shown = torch.stack(
            [self._features(frames[idx]) for idx in uniform_frame_indices(len(frames), self.num_frames)]
        )
        wanted = torch.stack([self._features(keyframe) for keyframe in keyframes])
        return round((wanted @ shown.T).amax(1).mean().item(), 6)

    @torch.no_grad()
    def _features(self, image: np.ndarray) -> torch.Tensor:
        """(height, width, 3) -> (hidden_size,), of length 1. One image at a time: a batch changes the last bits."""
        if self._loaded is None:
            processor = AutoImageProcessor.from_pretrained(self.model, revision=self.revision)
            model = AutoModel.from_pretrained(self.model, revision=self.revision, dtype=torch.float32).eval()
            self._loaded = processor, model.to("cuda" if torch.cuda.is_available() else "cpu")
        processor, model = self._loaded
        pixel_values = processor(images=image, return_tensors="pt")["pixel_values"].to(model.device)
        if hasattr(model, "get_image_features"):
            features = model.get_image_features(pixel_values=pixel_values).pooler_output
        else:
            features = model(pixel_values=pixel_values).last_hidden_state.mean(1)
        return torch.nn.functional.normalize(features[0].float(), dim=0).cpu()


def _grey(frames: np.ndarray) -> np.ndarray:
    """(num_frames, height, width, 3) uint8 -> (num_frames, height, width) float32, 0 to 1 (ITU-R BT.709 weights)."""
    weights = np.array([0.2126, 0.7152, 0.0722], np.float32) / np.float32(255)
    return np.stack([frame @ weights for frame in frames])  # one by one: a whole clip in float32 RGB takes 400 MB


def _shrink(pictures: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """(..., height, width) -> (..., rows, columns), each the mean of what it covers, parts of pixels included."""
    height, width = pictures.shape[-2:]
    return _overlaps(height, rows) @ pictures @ _overlaps(width, columns).T


def _overlaps(size: int, cells: int) -> np.ndarray:
    """(cells, size): which share of a cell each pixel covers. Pillow's box filter rounds to whole pixels."""
    pixels, edges = np.arange(size), np.arange(cells + 1)[:, None] * size / cells
    covered = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
    return (covered.clip(0) * cells / size).astype(np.float32)


def _grid_size(height: int, width: int) -> tuple[int, int]:
    scale = min(1.0, GRID_SIDE / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _flicker(brightness: np.ndarray) -> float:
    """Mean change per frame beyond the one way from darkest to brightest: 0 for a fade, however long or steep."""
    if len(brightness) < 3:
        return 0.0
    return max(0.0, np.abs(np.diff(brightness)).sum() - np.ptp(brightness)) / (len(brightness) - 2)


def _noise(pixels: np.ndarray) -> float:
    """Mean over pixels and frames of what goes up and comes down again, or down and up, by the next frame."""
    if len(pixels) < 3:
        return 0.0
    steps = np.diff(pixels, axis=0)
    there, back = steps[:-1], steps[1:]
    return np.where(there * back < 0, np.minimum(np.abs(there), np.abs(back)), 0).mean()
