"""The builder's stages: each one callable class, batch of columns in, batch of columns out.

The same class runs under every engine, and by itself: `Dataset.map(KeyframeStage(...), batched=True)`.
"""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from modeling_storms.video_storms import DecodedVideoMetadata, VideoDecodeError, decode_video

from .keyframes import choose_keyframes
from .plans import write_plan
from .schema import Rejected, SchemaError, check_columns
from .teacher import KEYFRAMES, REASONING_PLAN, Teacher, TeacherRequest
from .thought_video import ThoughtVideoGenerator, encode_video, open_keyframe
from .validate import Thresholds, TowerSimilarity, check, score, signature


MIN_SIDE = 56  # pixels; two merged patches of Qwen2.5-VL
JPEG_QUALITY = 95
MAX_PLAN_CHARACTERS = 4000


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, the same for equal values whatever their key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Stage:
    """A step from columns to columns, one row at a time, so that a row's result never depends on its batch.

    A subclass states what it reads (`inputs`) and writes (`outputs`) and implements `process`. Nothing heavy is
    loaded before the first row: engines ship instances to their workers.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1  # raise it when the code changes what a row becomes
    inputs: ClassVar[tuple[str, ...]]
    outputs: ClassVar[tuple[str, ...]]
    concurrency: int = 1  # rows in flight at once in one worker; more than 1 where a row mostly waits
    num_gpus: int = 0  # GPUs a worker holds

    def settings(self) -> dict[str, Any]:
        """Everything that decides a row's result beside its inputs: JSON values, no paths, no keys."""
        return {}

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what this stage is, beside its inputs. Computed once: settings may read files."""
        return digest([self.name, self.version, self.settings()])

    def process(self, row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """One row's `outputs`, and details (seed, scores, `usage`) that are recorded with it.

        Raises:
            Rejected: if the row can't go on.
        """
        raise NotImplementedError

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """Columns `inputs` (and `id`) in; columns `outputs`, `details` and `rejection` (JSON or None) out."""
        results: dict[str, list] = {name: [] for name in (*self.outputs, "details", "rejection")}
        for values in zip(*batch.values()):
            row = dict(zip(batch, values))
            rejection = None
            try:
                columns, details = self.process(row)
                check_columns(columns, row["id"])
            except SchemaError as error:
                columns, details = dict.fromkeys(self.outputs), {}
                rejection = {"reason": "breaks_contract", "detail": str(error), "transient": False}
            except Rejected as refused:
                columns = dict.fromkeys(self.outputs)
                details = refused.details
                rejection = {"reason": refused.reason, "detail": refused.detail, "transient": refused.transient}
            for name in self.outputs:
                results[name].append(columns[name])
            results["details"].append(json.dumps(details, sort_keys=True))
            results["rejection"].append(None if rejection is None else json.dumps(rejection, sort_keys=True))
        return results


class VideoStage(Stage):
    """Make sure that the source's video can be used: render a simulated one, open a real one.

    Args:
        video_root (`str`): folder that `video_path` is relative to; not used for simulated videos.
        max_video_seconds (`float`, *optional*): longer videos (or segments of them) are refused.
    """

    name = "videos"
    inputs = ("scene", "video_path", "video_stat", "video_start", "video_end")
    outputs = ("video", "video_num_frames", "video_fps")

    def __init__(self, video_root: str = ".", max_video_seconds: float | None = None):
        self.video_root, self.max_video_seconds = video_root, max_video_seconds

    def settings(self) -> dict[str, Any]:
        return {"max_video_seconds": self.max_video_seconds}

    def process(self, row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        if row["scene"]:
            from .sources.simulated import scene_of

            scene = scene_of(row["scene"])
            data = encode_video(scene.frames(), scene.fps)
            video = {"bytes": data, "path": None}
            return {"video": video, "video_num_frames": scene.num_frames, "video_fps": scene.fps}, {}
        if not row["video_stat"]:
            raise Rejected("video_not_found", f"there is no file {row['video_path']!r} in the video folder")
        # The first and last frames of the segment: files that are cut short fail at the last.
        frames, metadata = decode_source({**row, "video": None}, self.video_root, 2)
        if metadata.total_num_frames < 2:
            raise Rejected("too_few_frames", f"saw {metadata.total_num_frames} frame, expected 2 or more")
        if min(frames.shape[1:3]) < MIN_SIDE:
            raise Rejected("too_small", f"saw {frames.shape[2]}x{frames.shape[1]} pixels, expected {MIN_SIDE} a side")
        if metadata.fps < 1:
            raise Rejected("too_few_frames", f"saw {metadata.fps:.4f} frames a second, expected 1 or more")
        seconds = (row["video_end"] or metadata.duration) - (row["video_start"] or 0.0)
        if self.max_video_seconds is not None and seconds > self.max_video_seconds:
            raise Rejected("video_too_long", f"saw {seconds:.1f} s, expected at most {self.max_video_seconds} s")
        return {"video": None, "video_num_frames": metadata.total_num_frames, "video_fps": metadata.fps}, {}


class KeyframeStage(Stage):
    """A teacher picks the frames that matter to the question (STORMS, Sec. 3.2).

    Args:
        teacher (`Teacher`): who picks.
        video_root (`str`): see `VideoStage`.
        num_candidates (`int`): frames shown to the teacher, spread evenly over the video or its segment.
        max_keyframes (`int`): frames it may pick.
        max_attempts (`int`): times it is asked before the row is refused.
        concurrency (`int`): rows asked about at once.
    """

    name = "keyframes"
    inputs = (
        *("question", "options", "answer", "video", "video_path", "video_stat"),
        *("video_start", "video_end", "video_num_frames", "video_fps"),
    )
    outputs = ("keyframes", "keyframe_indices", "keyframe_timestamps")

    def __init__(
        self,
        teacher: Teacher,
        video_root: str = ".",
        num_candidates: int = 16,
        max_keyframes: int = 4,
        max_attempts: int = 3,
        concurrency: int = 1,
    ):
        self.teacher, self.video_root = teacher, video_root
        self.num_candidates, self.max_keyframes, self.max_attempts = num_candidates, max_keyframes, max_attempts
        self.concurrency = concurrency

    def settings(self) -> dict[str, Any]:
        return {
            "teacher": teacher_settings(self.teacher, KEYFRAMES),
            "num_candidates": self.num_candidates,
            "max_keyframes": self.max_keyframes,
        }

    def process(self, row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        frames, metadata = decode_source(row, self.video_root, self.num_candidates)
        request = request_of(row, frames, metadata.timestamps)
        chosen, details = choose_keyframes(self.teacher, request, self.max_keyframes, self.max_attempts)
        columns = {
            "keyframes": [{"bytes": encode_image(frames[position]), "path": None} for position in chosen],
            "keyframe_indices": [metadata.frames_indices[position] for position in chosen],
            "keyframe_timestamps": [metadata.timestamps[position] for position in chosen],
        }
        return columns, details


class PlanStage(Stage):
    """The same teacher writes how the answer follows from what moves; conditions the generated thought video.

    Args: see `KeyframeStage`.
    """

    name = "plans"
    inputs = ("question", "options", "answer", "keyframes", "keyframe_timestamps", "source_plan")
    outputs = ("reasoning_plan",)

    def __init__(self, teacher: Teacher, max_attempts: int = 3, concurrency: int = 1):
        self.teacher, self.max_attempts, self.concurrency = teacher, max_attempts, concurrency

    def settings(self) -> dict[str, Any]:
        return {"teacher": teacher_settings(self.teacher, REASONING_PLAN), "max_characters": MAX_PLAN_CHARACTERS}

    def process(self, row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        frames = np.stack([np.asarray(open_keyframe(keyframe)) for keyframe in row["keyframes"]])
        request = request_of(row, frames, row["keyframe_timestamps"])
        plan, details = write_plan(self.teacher, request, MAX_PLAN_CHARACTERS, self.max_attempts)
        return {"reasoning_plan": plan}, details


class ThoughtVideoStage(Stage):
    """Make the video that the latents shall be grounded in, and encode it.

    Args:
        generator (`ThoughtVideoGenerator`): `WanGenerator`, `SourceClipGenerator` or `SimulatedGenerator`.
    """

    name = "thought_videos"
    outputs = ("thought_video", "thought_video_fps", "thought_video_num_frames")

    def __init__(self, generator: ThoughtVideoGenerator):
        self.generator = generator
        self.inputs, self.num_gpus = generator.inputs, generator.num_gpus  # type: ignore[misc]  # one stage, several generators

    def settings(self) -> dict[str, Any]:
        return self.generator.settings()

    def process(self, row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        frames, fps, details = self.generator.generate(row)
        columns = {
            "thought_video": {"bytes": encode_video(frames, fps), "path": None},
            "thought_video_fps": fps,
            "thought_video_num_frames": len(frames),
        }
        return columns, details


class QualityStage(Stage):
    """Decode the thought video as a reader of the dataset would, score it, and refuse what fails a threshold.

    Args:
        thresholds (`Thresholds`): what a row must pass.
        tower (`TowerSimilarity`, *optional*): a vision tower that compares the thought video with the keyframes.
    """

    name = "quality"
    inputs = ("keyframes", "thought_video", "thought_video_fps", "thought_video_num_frames")
    outputs = ("signature",)

    def __init__(self, thresholds: Thresholds, tower: TowerSimilarity | None = None):
        self.thresholds, self.tower = thresholds, tower
        self.num_gpus = int(tower is not None and torch.cuda.is_available())

    def settings(self) -> dict[str, Any]:
        per_row = {field.name for field in fields(Thresholds)} - {"max_duplicate_distance"}
        limits = {name: getattr(self.thresholds, name) for name in sorted(per_row)}
        return {"thresholds": limits, "tower": self.tower.settings() if self.tower else None}

    def process(self, row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        try:
            frames, metadata = decode_video(row["thought_video"]["bytes"])
        except VideoDecodeError as error:
            raise Rejected("thought_video_undecodable", str(error)) from error
        recorded = (row["thought_video_num_frames"], row["thought_video_fps"])
        if len(frames) != recorded[0] or abs(metadata.fps / recorded[1] - 1) > 0.01:
            raise Rejected(
                "thought_video_undecodable",
                f"decoded {len(frames)} frames at {metadata.fps:.2f} fps, recorded {recorded[0]} at {recorded[1]}",
            )
        keyframes = [np.asarray(open_keyframe(keyframe)) for keyframe in row["keyframes"]]
        scores = score(frames, metadata.fps, keyframes)
        if self.tower is not None:
            scores["tower_similarity"] = self.tower(frames, keyframes)
        check(scores, self.thresholds)
        return {"signature": signature(frames)}, {"scores": scores}


def decode_source(
    row: dict[str, Any], video_root: str | Path, num_frames: int
) -> tuple[np.ndarray, DecodedVideoMetadata]:
    """Frames spread evenly over a row's source video, or over its segment, first and last frame included.

    Raises:
        Rejected: if it does not decode, or the segment holds no frame.
    """
    source: Any = row["video"]["bytes"] if row["video"] is not None else Path(video_root) / row["video_path"]
    try:
        return decode_video(source, segment_sampler(row["video_start"], row["video_end"], num_frames))
    except VideoDecodeError as error:
        # Up to here errors name the file as this machine knows it.
        raise Rejected("undecodable", str(error).replace(str(source), row["video_path"])) from error


def segment_sampler(
    start: float | None, end: float | None, num_frames: int
) -> Callable[[DecodedVideoMetadata], np.ndarray]:
    """Chooses `num_frames` frame indices, evenly from the first to the last frame between two times in seconds.

    Where there are fewer frames, each once. It is for `decode_video`.
    """

    def choose(metadata: DecodedVideoMetadata) -> np.ndarray:
        times: Any = metadata.frame_timestamps
        first = int(np.searchsorted(times, (start or 0.0) - 1e-3))
        last = int(np.searchsorted(times, np.inf if end is None else end - 1e-3)) - 1
        if first > last:
            raise Rejected(
                "bad_segment",
                f"saw start {start} and end {end} seconds, expected a part of the video's {metadata.duration:.1f}",
            )
        return np.unique(np.linspace(first, last, num_frames).round().astype(int))

    return choose


def teacher_settings(teacher: Teacher, task: str) -> dict[str, Any]:
    """A teacher's settings with the one prompt that the task uses: another task's prompt decides nothing here."""
    settings = teacher.settings()
    if "prompts" in settings:
        settings["prompts"] = {task: settings["prompts"][task]}
    return settings


def request_of(row: dict[str, Any], frames: np.ndarray, timestamps: list[float]) -> TeacherRequest:
    return TeacherRequest(
        question=row["question"],
        options=row["options"],
        answer=row["answer"],
        frames=frames,
        timestamps=list(timestamps),
        source_plan=row.get("source_plan", ""),
    )


def encode_image(frame: np.ndarray) -> bytes:
    """JPEG without colour subsampling, so that small coloured things keep their colour."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return file.getvalue()
