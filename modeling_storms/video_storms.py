# Copyright 2026 The STORMS team. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Decoding and frame sampling: the only place that opens a video (decord, imported on first use)."""

import io
import math
import urllib.request
from collections.abc import Callable
from os import PathLike, fspath
from typing import Any

import numpy as np
from transformers.utils import logging
from transformers.video_utils import VideoMetadata


logger = logging.get_logger(__name__)

VideoSource = str | PathLike | bytes


class VideoDecodeError(ValueError):
    """A video can't be used; names the file, how many frames decoded, and what to do."""


def uniform_frame_indices(total_num_frames: int, num_frames: int) -> np.ndarray:
    """`num_frames` indices spread evenly from the first frame on: 10 frames, 4 asked -> 0, 2, 5, 7.

    Args:
        total_num_frames (`int`): frames to choose from, at least 1.
        num_frames (`int`): frames to choose; more than there are gives each once.
    Returns:
        `np.ndarray` of shape `(min(num_frames, total_num_frames),)`, ascending, no repeats.
    """
    num_frames = min(num_frames, total_num_frames)
    return (np.arange(num_frames) * total_num_frames) // num_frames


def fps_frame_indices(total_num_frames: int, video_fps: float, fps: float, max_frames: int) -> np.ndarray:
    """Indices at about `fps` frames a second, at least one and at most `max_frames`, spread evenly.

    Args:
        total_num_frames (`int`): frames to choose from, at least 1.
        video_fps (`float`): frames a second of the video.
        fps (`float`): frames a second to choose.
        max_frames (`int`): upper limit.
    """
    num_frames = max(1, math.floor(total_num_frames / video_fps * fps))
    return uniform_frame_indices(total_num_frames, min(num_frames, max_frames))


def decode_video(
    source: VideoSource, sample_indices_fn: Callable[..., Any] | None = None
) -> tuple[np.ndarray, VideoMetadata]:
    """Decode the chosen frames of a video in any container that FFmpeg reads.

    Args:
        source (`str`, `PathLike` or `bytes`): a path, an `http(s)://` address, or a file's bytes.
        sample_indices_fn (`Callable`, *optional*): `(metadata=VideoMetadata) -> indices` of the frames to decode; all
            by default.

    Returns:
        Frames `(num_frames, height, width, 3)`, uint8 RGB, and their `VideoMetadata`, whose `fps` is the video's own
        and whose `frames_indices` count decoded frames from the first one.

    Raises:
        VideoDecodeError: if the file is missing, empty, corrupt or holds no frames. Never a partial result: frames
            that stand in for missing ones would be believed.
    """
    name = source if isinstance(source, str) else "<bytes>" if isinstance(source, bytes) else fspath(source)
    reader = _open(source, name)
    metadata = VideoMetadata(
        total_num_frames=len(reader),
        fps=float(reader.get_avg_fps()),
        duration=len(reader) / float(reader.get_avg_fps()),
        video_backend="decord",
    )
    indices = np.arange(len(reader)) if sample_indices_fn is None else np.asarray(sample_indices_fn(metadata=metadata))
    try:
        frames = reader.get_batch(indices).asnumpy()
    except Exception as error:
        # decord raises its own class on bad packets and RuntimeError elsewhere; neither says how far it got.
        raise VideoDecodeError(
            f"{name}: only {_count_decodable(source, name)} of {len(reader)} frames decode, then the data is invalid. "
            "Re-encode the file (ffmpeg -i IN -c:v libx264 OUT.mp4) or leave it out."
        ) from error
    metadata.frames_indices = indices.tolist()
    metadata.height, metadata.width = frames.shape[1:3]
    return frames, metadata


def _open(source: VideoSource, name: str) -> Any:
    try:
        from decord import VideoReader, cpu
    except ImportError as error:
        raise ImportError("Reading videos needs decord: pip install decord (eva-decord on Apple silicon).") from error
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(source, timeout=60) as response:
                source = response.read()
        except OSError as error:
            raise VideoDecodeError(
                f"{name}: 0 frames decoded, the download failed: {error}. Check the URL."
            ) from error
    try:
        # One thread: FFmpeg's own threads make little difference at sampled frames and a lot beside data workers.
        reader = VideoReader(
            io.BytesIO(source) if isinstance(source, bytes) else fspath(source), cpu(0), num_threads=1
        )
        num_frames = len(reader)
    except Exception as error:
        raise VideoDecodeError(
            f"{name}: 0 frames decoded, FFmpeg can't open it. Check that the file exists, is not empty or cut short, "
            "and is a video."
        ) from error
    if num_frames == 0:
        raise VideoDecodeError(f"{name}: 0 frames decoded, the file holds no video frames. Leave it out.")
    return reader


def _count_decodable(source: VideoSource, name: str) -> int:
    reader = _open(source, name)
    for count in range(len(reader)):
        try:
            reader.next()
        except Exception:
            return count
    return len(reader)


__all__ = ["VideoDecodeError", "decode_video", "fps_frame_indices", "uniform_frame_indices"]
