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
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging
from transformers.video_utils import VideoMetadata


logger = logging.get_logger(__name__)

VideoSource = str | PathLike | bytes


class VideoDecodeError(ValueError):
    """A video can't be used; names the file, how many frames decoded, and what to do."""


@dataclass
class DecodedVideoMetadata(VideoMetadata):
    """Metadata with frames' times by the file's own clock: where its frame rate varies, index / fps errs.

    Attributes:
        frame_timestamps (`np.ndarray` of shape `(total_num_frames,)`): seconds from the video's first frame.
    """

    frame_timestamps: np.ndarray | None = None

    @property
    def timestamps(self) -> list[float]:
        if self.frame_timestamps is None or self.frames_indices is None:
            return super().timestamps
        return self.frame_timestamps[self.frames_indices].tolist()


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
) -> tuple[np.ndarray, DecodedVideoMetadata]:
    """Decode the chosen frames of a video in any container that FFmpeg reads.

    Decoding is decord's. Containers that it misreads or can't open (MPEG .ts and .mpg among them) are first put into
    another one, which needs PyAV.

    Args:
        source (`str`, `PathLike` or `bytes`): a path, an `http(s)://` address, or a file's bytes.
        sample_indices_fn (`Callable`, *optional*): `(metadata=VideoMetadata) -> indices` of the frames to decode; all
            by default.

    Returns:
        Frames `(num_frames, height, width, 3)`, uint8 RGB, and their metadata, whose `fps` is the video's own (the
        mean one where it varies) and whose `frames_indices` count decoded frames from the first one.

    Raises:
        VideoDecodeError: if the file is missing, empty, corrupt or holds no frames. Never a partial result: frames
            that stand in for missing ones would be believed.
        ValueError: if no frame is chosen, or one the video does not have.
    """
    name = source if isinstance(source, str) else "<bytes>" if isinstance(source, bytes) else fspath(source)
    reader = _open(source, name)
    fps, times = _clock(reader)
    metadata = DecodedVideoMetadata(
        total_num_frames=len(reader),
        fps=fps,
        duration=len(reader) / fps,
        video_backend="decord",
        frame_timestamps=times,
    )
    indices = np.arange(len(reader)) if sample_indices_fn is None else np.asarray(sample_indices_fn(metadata=metadata))
    if len(indices) == 0 or indices.min() < 0 or indices.max() >= len(reader):
        raise ValueError(f"{name}: frames {indices.tolist()} were chosen, but must be some of 0 to {len(reader) - 1}.")
    try:
        frames = reader.get_batch(indices).asnumpy()
    except Exception as error:
        # decord raises its own class on bad packets and RuntimeError elsewhere; neither says how far it got.
        raise VideoDecodeError(
            f"{name}: only {_count_decodable(source, name)} of {len(reader)} frames decode, then "
            "decord can't go on. Re-encode the file (ffmpeg -i IN -c:v libx264 OUT.mp4) or leave it out."
        ) from error
    metadata.frames_indices = indices.tolist()
    metadata.height, metadata.width = frames.shape[1:3]
    return frames, metadata


def _clock(reader: Any) -> tuple[float, np.ndarray]:
    """Mean frames a second, and each frame's seconds from the first one.

    Both are the header's, unless the frames' own times contradict it, as they do where the rate varies: containers
    round times, and some (MPEG) leave a few out.
    """
    fps = float(reader.get_avg_fps())
    times = reader.get_frame_timestamp(range(len(reader)))[:, 0]
    times = times - times[0]
    by_times = (len(times) - 1) / float(times[-1]) if times[-1] > 0 else fps
    fps = by_times if abs(by_times / fps - 1) > 0.02 else fps
    even = np.arange(len(times)) / fps
    return fps, times if np.abs(times - even).max() > 1.5 / fps else even


def _open(source: VideoSource, name: str) -> Any:
    try:
        from decord import VideoReader, cpu
    except ImportError as error:
        raise ImportError("Reading videos needs decord: pip install decord (eva-decord on Apple silicon).") from error
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(source, timeout=60) as response:
                source = response.read()
        except (OSError, HTTPException) as error:
            raise VideoDecodeError(
                f"{name}: 0 frames decoded, the download failed: {error}. Check the URL."
            ) from error
    elif not isinstance(source, bytes) and not Path(source).is_file():
        raise VideoDecodeError(f"{name}: 0 frames decoded, there is no such file. Check the path.")
    # decord misreads MPEG streams without an error (frames lost, repeated or shifted), and can't open some containers
    # that FFmpeg reads. Their packets, put into another container, it decodes right.
    is_mpeg = _is_mpeg_stream(source)
    try:
        reader = _read(VideoReader, cpu, _remux(source, name) if is_mpeg else source)
    except ImportError:
        raise
    except Exception as error:
        try:
            reader = None if is_mpeg else _read(VideoReader, cpu, _remux(source, name))
        except Exception:
            reader = None
        if reader is None:
            raise VideoDecodeError(
                f"{name}: 0 frames decoded, it can't be opened. Check that the file is not empty or cut short, and is "
                "a video; convert animated images and raw streams (ffmpeg -i IN OUT.mp4)."
            ) from error
    if len(reader) == 0:
        raise VideoDecodeError(f"{name}: 0 frames decoded, the file holds no video frames. Leave it out.")
    return reader


def _read(reader_class: Any, cpu: Any, source: VideoSource) -> Any:
    file = io.BytesIO(source) if isinstance(source, bytes) else fspath(source)
    return reader_class(file, cpu(0), num_threads=1 if _is_worker() else 0)


def _is_worker() -> bool:
    """Whether this process is one of several that another one started: there, threads of each add up."""
    modules = (
        sys.modules.get(name) for name in ("multiprocessing", "multiprocess")
    )  # the second is that of `datasets`
    return any(module is not None and module.parent_process() is not None for module in modules)


def _is_mpeg_stream(source: VideoSource) -> bool:
    """A transport stream (packets of 188 bytes, or 192 on discs, that begin with 0x47) or a program stream."""
    try:
        if isinstance(source, bytes):
            start = source[:400]
        else:
            with Path(source).open("rb") as file:
                start = file.read(400)
    except OSError:
        return False  # said better when the file is opened
    if len(start) < 400:
        return False
    syncs = ((0, 188, 376), (4, 196, 388))
    return start.startswith(b"\x00\x00\x01\xba") or any(all(start[at] == 0x47 for at in sync) for sync in syncs)


def _remux(source: VideoSource, name: str) -> bytes:
    """The first video stream's packets in a Matroska file, without decoding them."""
    try:
        import av
    except ImportError as error:
        raise ImportError(
            f"{name}: reading this container needs PyAV: pip install av. Or convert it: ffmpeg -i IN -c copy OUT.mp4."
        ) from error
    output = io.BytesIO()
    file = io.BytesIO(source) if isinstance(source, bytes) else fspath(source)
    with av.open(file, "r") as reader, av.open(output, "w", format="matroska") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for packet in reader.demux(reader.streams.video[0]):
            if packet.dts is not None:  # the last one is empty: it only flushes a decoder
                packet.stream = stream
                writer.mux(packet)
    return output.getvalue()


def _count_decodable(source: VideoSource, name: str) -> int:
    """Frames before the first bad packet, less up to three: decord's threads drop what they have in hand."""
    reader = _open(source, name)
    for count in range(len(reader)):
        try:
            reader.next()
        except Exception:
            return count
    return len(reader)


__all__ = ["VideoDecodeError", "decode_video", "fps_frame_indices", "uniform_frame_indices"]
