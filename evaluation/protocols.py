"""Which frames of a video a model sees, and how large: named, because it moves results by points."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from transformers.video_utils import VideoMetadata

from modeling_storms.video_storms import (
    DecodedVideoMetadata,
    VideoDecodeError,
    VideoSource,
    decode_video,
    fps_frame_indices,
    uniform_frame_indices,
)


_UNIFORM = re.compile(r"uniform(\d+)")
_FPS = re.compile(r"fps(\d+(?:\.\d+)?)_max(\d+)")


@dataclass(frozen=True)
class Protocol:
    """How frames are sampled: `num_frames` spread over the clip, or `fps` a second up to `max_frames`.

    Args:
        num_frames (`int`, *optional*): frames of each clip; one that has fewer gives all it has.
        fps (`float`, *optional*): frames a second instead.
        max_frames (`int`, *optional*): with `fps`, the most of them; the rest is spread evenly.
        min_frame_pixels, max_frame_pixels (`int`, *optional*): area that frames are resized to, aspect ratio kept;
            the processor's own limits by default.
    """

    num_frames: int | None = None
    fps: float | None = None
    max_frames: int | None = None
    min_frame_pixels: int | None = None
    max_frame_pixels: int | None = None

    def __post_init__(self):
        least, most = self.min_frame_pixels, self.max_frame_pixels
        for name, value in (("min_frame_pixels", least), ("max_frame_pixels", most)):
            if value is not None and value < 1:
                raise ValueError(f"--{name}: saw {value}, expected 1 or more.")
        if least is not None and most is not None and least > most:
            raise ValueError(f"--min_frame_pixels is {least}, more than --max_frame_pixels {most}.")

    @classmethod
    def named(cls, name: str, **pixels: int | None) -> "Protocol":
        """The protocol that a name stands for: `uniform32`, `fps2_max32`, with any numbers.

        Raises:
            ValueError: if the name has neither form, or a number in it is zero.
        """
        if match := _UNIFORM.fullmatch(name):
            protocol = cls(num_frames=int(match[1]), **pixels)
        elif match := _FPS.fullmatch(name):
            protocol = cls(fps=float(match[1]), max_frames=int(match[2]), **pixels)
        else:
            raise ValueError(f"--protocol: saw {name!r}, expected a name like uniform32 or fps2_max32.")
        if 0 in (protocol.num_frames, protocol.fps, protocol.max_frames):
            raise ValueError(f"--protocol: saw {name!r}, expected numbers above 0.")
        return protocol

    @property
    def name(self) -> str:
        name = f"uniform{self.num_frames}" if self.fps is None else f"fps{self.fps:g}_max{self.max_frames}"
        name += "" if self.min_frame_pixels is None else f"_from{self.min_frame_pixels}px"
        return name + ("" if self.max_frame_pixels is None else f"_to{self.max_frame_pixels}px")

    def sample(self, metadata: VideoMetadata) -> np.ndarray:
        """Indices of the frames to show, of the `metadata.total_num_frames` of a clip."""
        if self.fps is not None:
            return fps_frame_indices(metadata.total_num_frames, metadata.fps, self.fps, self.max_frames or 1)
        return uniform_frame_indices(metadata.total_num_frames, self.num_frames or 1)

    def frame_size(self, size: dict[str, int]) -> dict[str, int]:
        """A video processor's pixel limits (`size`), with this protocol's in their place where it has any."""
        least, most = size["shortest_edge"], size["longest_edge"]
        if self.max_frame_pixels is not None:
            most, least = self.max_frame_pixels, min(least, self.max_frame_pixels)
        if self.min_frame_pixels is not None:
            least, most = self.min_frame_pixels, max(most, self.min_frame_pixels)
        return {"shortest_edge": least, "longest_edge": most}


def read_clip(
    source: VideoSource | Sequence[str],
    sample: Callable[[VideoMetadata], Any],
    start: float | None = None,
    end: float | None = None,
    video_fps: float | None = None,
) -> tuple[np.ndarray, DecodedVideoMetadata]:
    """Chosen frames of a video, or of the part of it from `start` to `end` as if that were all.

    Args:
        source (`str`, `PathLike`, `bytes` or `Sequence[str]`): a video file, its bytes, or image files in order.
        sample (`Callable`): from the clip's metadata (`total_num_frames`, `fps`) to indices of frames in it.
        start, end (`float`, *optional*): seconds from the video's first frame.
        video_fps (`float`, *optional*): of image files, which carry none.

    Returns:
        Frames `(num_frames, height, width, 3)`, uint8 RGB, and metadata of the clip: its own `total_num_frames`,
        `duration`, `frames_indices` and `timestamps`.

    Raises:
        VideoDecodeError: if a file is missing or broken, or image files differ in size.
        ValueError: if no frame lies between `start` and `end`.
    """
    first, clip_times = 0, np.zeros(0)

    def choose(metadata: VideoMetadata) -> Any:
        nonlocal first, clip_times
        times = getattr(metadata, "frame_timestamps", None)
        if times is None:
            times = np.arange(metadata.total_num_frames) / metadata.fps
        # A hair earlier: seconds were rounded on their way, and the frame at `end` belongs to what follows.
        first = int(np.searchsorted(times, (start or 0.0) - 1e-3))
        last = int(np.searchsorted(times, np.inf if end is None else end - 1e-3))
        if first >= last:
            raise ValueError(f"It asks for {start} to {end} seconds of a video of {metadata.duration:.1f} seconds.")
        clip_times = times[first:last] - times[first]
        return first + sample(VideoMetadata(total_num_frames=last - first, fps=metadata.fps))

    frames, metadata = (
        decode_video(source, choose)
        if isinstance(source, (str, bytes, PathLike))
        else _read_images(list(source), choose, video_fps)
    )
    clip = DecodedVideoMetadata(
        total_num_frames=len(clip_times),
        fps=metadata.fps,
        duration=len(clip_times) / metadata.fps,
        frames_indices=[int(index) - first for index in metadata.frames_indices],
        frame_timestamps=clip_times,
    )
    return frames, clip


def _read_images(
    files: list[str], choose: Callable[[VideoMetadata], Any], video_fps: float | None
) -> tuple[np.ndarray, VideoMetadata]:
    if not files or not video_fps:
        raise ValueError(f"Saw {len(files)} image files at {video_fps} a second, expected at least one and their fps.")
    metadata = VideoMetadata(total_num_frames=len(files), fps=video_fps, duration=len(files) / video_fps)
    metadata.frames_indices = [int(index) for index in choose(metadata)]
    try:
        images = [np.asarray(Image.open(files[index]).convert("RGB")) for index in metadata.frames_indices]
    except (OSError, UnidentifiedImageError) as error:
        raise VideoDecodeError(f"A frame can't be read: {error}. Check the file, or leave the video out.") from error
    if len({image.shape for image in images}) > 1:
        raise VideoDecodeError(
            f"{Path(files[0]).parent} holds frames of {sorted({image.shape[:2] for image in images})}, expected one "
            "size. Check the files, or leave the video out."
        )
    return np.stack(images), metadata
