"""Thought videos: short clips that show the dynamics a question is about, and their encoding as MP4."""

import hashlib
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image
from transformers.utils import logging

from modeling_storms.video_storms import DecodedVideoMetadata, VideoDecodeError, decode_video

from .schema import Rejected, is_machine_path


logger = logging.get_logger(__name__)

PROMPT = Path(__file__).parent / "prompts" / "thought_video.txt"
MAX_PROMPT_TOKENS = 512  # what Wan's text encoder was trained with; diffusers cuts off the rest


def encode_video(frames: np.ndarray, fps: float) -> bytes:
    """Encode frames as an MP4 file (H.264, yuv420p, BT.709) that is the same for the same frames.

    Args:
        frames (`np.ndarray` of shape `(num_frames, height, width, 3)`): uint8 RGB, at least one frame. An odd side
            gains one pixel, a repeat of its last row or column, as yuv420p has no odd sides. decord 0.6 can't read
            widths up to 16, nor 24, 48 and 72.
        fps (`float`): frames a second, whole or not (29.97 becomes 30000/1001).

    Returns:
        The file's bytes: no time or machine in its metadata, and one encoder thread, as x264's result changes with
        their number.

    Raises:
        ValueError: if `frames` has another shape or type, is empty, or `fps` is not a positive finite number.
    """
    import av
    from av.codec.context import Flags
    from av.video.reformatter import ColorRange, Colorspace

    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape or frames.dtype != np.uint8:
        raise ValueError(
            f"Found frames of shape {frames.shape} and type {frames.dtype}, expected (num_frames, height, width, 3) "
            "uint8 RGB with at least one frame."
        )
    if not (np.isfinite(fps) and fps > 0):
        raise ValueError(f"Found fps={fps}, expected a positive number of frames a second.")
    rate = Fraction(fps).limit_denominator(1001)
    _, height, width, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")

    with TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"  # a real file: to move the index to the front, FFmpeg opens it a second time
        options = {"movflags": "+faststart", "fflags": "+bitexact"}
        with av.open(str(path), "w", options=options) as container:
            # Macroblock-tree rate control reads memory it has not written: equal frames came out as up to 7 files.
            options = {"crf": "17", "x264-params": "mbtree=0"}
            stream = container.add_stream("libx264", rate=rate, options=options)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt, stream.thread_count, stream.time_base = "yuv420p", 1, 1 / rate
            stream.codec_context.flags |= Flags.bitexact
            stream.codec_context.colorspace = stream.codec_context.color_primaries = 1  # BT.709
            stream.codec_context.color_trc, stream.codec_context.color_range = 1, ColorRange.MPEG
            for frame_idx, pixels in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                    format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
                )
                frame.pts, frame.time_base = frame_idx, 1 / rate
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path.read_bytes()


class ThoughtVideoGenerator(Protocol):
    """Makes one row's thought video. A stage wraps it; nothing heavy is loaded before the first `generate`."""

    inputs: ClassVar[tuple[str, ...]]  # columns of a row that it reads beside `id`
    num_gpus: ClassVar[int]

    def settings(self) -> dict[str, Any]:
        """Everything that decides a result beside the row: JSON values, no paths of this machine."""
        ...

    def generate(self, row: dict[str, Any]) -> tuple[np.ndarray, float, dict[str, Any]]:
        """Frames `(num_frames, height, width, 3)` uint8 RGB, frames a second, and details to record (seed, sizes).

        Raises:
            Rejected: if this row can have no thought video.
        """
        ...


@dataclass
class SourceClipGenerator:
    """The true clip around the keyframes: what happened, instead of what a model imagines.

    From the first keyframe, which is its first frame, to `margin_seconds` after the last, at real speed: every n-th
    frame at the source's fps / n. It begins earlier only where the video ends within `min_seconds`.
    If fps = 25; keyframes 10 and 90; margin_seconds = 1; max_frames = 64, the clip is frames 10, 12, ..., 114 at 12.5.

    Args:
        video_root (`str` or `PathLike`): folder that `video_path` is relative to.
        max_frames (`int`): upper limit of the clip's frames, at least 2.
        margin_seconds (`float`): what follows the last keyframe.
        min_seconds (`float`): the shortest clip, where the video has as much.
        max_side (`int`): pixels; a larger frame is scaled down, a smaller one is left as it is.
    """

    inputs: ClassVar[tuple[str, ...]] = (
        *("video", "video_path", "video_stat", "video_start", "video_end", "keyframe_indices"),
    )
    num_gpus: ClassVar[int] = 0

    video_root: str | PathLike
    max_frames: int = 64
    margin_seconds: float = 1.0
    min_seconds: float = 1.0
    max_side: int = 640

    def __post_init__(self) -> None:
        if self.max_frames < 2 or self.max_side < 2 or self.margin_seconds < 0 or self.min_seconds < 0:
            raise ValueError(
                f"Found max_frames={self.max_frames}, max_side={self.max_side}, margin_seconds={self.margin_seconds}, "
                f"min_seconds={self.min_seconds}: expected at least 2 frames, 2 pixels and no negative seconds."
            )

    def settings(self) -> dict[str, Any]:
        options = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "video_root"}
        return {"generator": "source_clip", **options}

    def generate(self, row: dict[str, Any]) -> tuple[np.ndarray, float, dict[str, Any]]:
        embedded = row["video"]
        path = Path(self.video_root) / row["video_path"]
        try:
            frames, metadata = decode_video(
                path if embedded is None else embedded["bytes"], lambda metadata: self._indices(row, metadata)
            )
        except VideoDecodeError as error:
            raise Rejected("undecodable", str(error).replace(str(path), row["video_path"])) from error
        indices, times = metadata.frames_indices, metadata.timestamps
        fps, steps = (len(indices) - 1) / (times[-1] - times[0]), np.unique(np.diff(indices))
        if len(steps) == 1 and abs(metadata.fps / steps[0] / fps - 1) < 0.02:
            fps = metadata.fps / int(steps[0])  # the exact rate: containers round times
        return self._fit(frames), fps, {"first_frame": indices[0], "last_frame": indices[-1]}

    def _indices(self, row: dict[str, Any], metadata: DecodedVideoMetadata) -> np.ndarray:
        times = metadata.frame_timestamps
        assert times is not None
        first, last = row["keyframe_indices"][0], row["keyframe_indices"][-1]
        if last >= metadata.total_num_frames:
            raise Rejected(
                "undecodable",
                f"keyframe {last} of {row['video_path']!r}, which has {metadata.total_num_frames} frames: the file is "
                "not the one that the keyframes were picked from",
            )
        tick = 1 / metadata.fps  # how long a frame is shown
        min_seconds = max(self.min_seconds, 2 * tick)
        end = times[-1] + tick
        if row["video_end"] is not None:
            end = min(end, max(row["video_end"], times[last] + tick))
        end = min(end, max(times[last] + tick + self.margin_seconds, times[first] + min_seconds))
        stop = int(np.searchsorted(times, end - 1e-3))
        earliest = min(first, int(np.searchsorted(times, (row["video_start"] or 0) - 1e-3)))
        start = max(earliest, min(first, int(np.searchsorted(times, end - min_seconds - 1e-3))))
        if stop - start < 2:
            raise Rejected("too_short", f"{stop - start} frame between video_start and video_end, expected at least 2")
        indices = np.arange(start, stop, math.ceil((stop - start) / self.max_frames))
        steps = np.diff(times[indices])
        if steps.max() > 1.5 * steps.mean():  # the frame rate varies: at each moment, the frame that is shown then
            moments = np.linspace(times[start], times[stop - 1], len(indices))
            indices = np.searchsorted(times, moments + 1e-3, side="right") - 1
        return indices

    def _fit(self, frames: np.ndarray) -> np.ndarray:
        height, width = frames.shape[1:3]
        if max(height, width) <= self.max_side:
            return frames
        scale = self.max_side / max(height, width)
        size = [max(2, round(side * scale / 2) * 2) for side in (width, height)]
        return np.stack([np.asarray(Image.fromarray(frame).resize(size)) for frame in frames])


class SimulatedGenerator:
    """A simulated scene's own thought video, rendered from what the simulation knows."""

    inputs: ClassVar[tuple[str, ...]] = ("scene",)
    num_gpus: ClassVar[int] = 0

    def settings(self) -> dict[str, Any]:
        return {"generator": "simulated"}

    def generate(self, row: dict[str, Any]) -> tuple[np.ndarray, float, dict[str, Any]]:
        from .sources.simulated import scene_of

        scene = scene_of(row["scene"])
        return scene.thought_frames(), scene.fps, {}


@dataclass
class WanGenerator:
    """A video that a Wan model generates from keyframes, question and plan, through diffusers.

    A row's result depends on its own columns and `seed` only: rows run one at a time, each from noise seeded by its
    id, drawn on the CPU.

    Args:
        model (`str`): Hub id or local folder of a pipeline in diffusers' layout.
        revision (`str`, *optional*): commit of the Hub repository.
        conditioning (`str`): what the model is given. `"first"`: the first keyframe; `"first_last"`: also the last one
            (needs a model trained for it, such as Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers); `"vace"`: all keyframes, at
            their relative times in the clip (Wan-AI/Wan2.1-VACE-14B-diffusers).
        num_frames (`int`): 4k + 1, as the VAE packs 4 frames into one latent frame after the first.
        fps (`float`): frames a second of the result; Wan 2.1 was trained at 16.
        max_area (`int`): pixels of a frame, at most; its sides follow the first keyframe's aspect ratio.
        num_inference_steps (`int`), guidance_scale (`float`), negative_prompt (`str`): see diffusers.
        flow_shift (`float`, *optional*): the scheduler's, if not the model's own; Wan advises 3 for 480p, 5 for 720p.
        seed (`int`): combined with a row's id.
        dtype (`str`): of transformer and text encoder; the VAE and the image encoder stay in float32, as Wan needs.
        fp8 (`bool`): store the transformer's weights in float8, compute in `dtype`. Halves its memory.
        vae_tiling (`bool`): decode in tiles. Less memory, faint seams.
        offload (`str`): where weights wait: `"none"` (all on the GPU), `"model"`, `"group"` or `"sequential"` (each
            holds less on the GPU). Changes speed, not results.

    Raises:
        ValueError: on options that can't work.
    """

    inputs: ClassVar[tuple[str, ...]] = ("question", "reasoning_plan", "keyframes", "keyframe_timestamps")
    num_gpus: ClassVar[int] = 1

    model: str = "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"
    revision: str | None = None
    conditioning: str = "first"
    num_frames: int = 81
    fps: float = 16.0
    max_area: int = 480 * 832
    num_inference_steps: int = 30
    guidance_scale: float = 5.0
    negative_prompt: str = (
        "still picture, frozen, blurry, overexposed, washed out, compression artifacts, text, subtitles, watermark, "
        "deformed bodies, extra limbs, objects that appear or vanish, camera cuts"
    )
    flow_shift: float | None = None
    seed: int = 0
    dtype: str = "bfloat16"
    fp8: bool = False
    vae_tiling: bool = False
    offload: str = "none"

    def __post_init__(self) -> None:
        self._pipeline: Any = None
        for name, known in (
            ("conditioning", ("first", "first_last", "vace")),
            ("dtype", ("bfloat16", "float16", "float32")),
            ("offload", ("none", "model", "group", "sequential")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"Found {name}={getattr(self, name)!r}, expected one of {', '.join(known)}.")
        if self.num_frames < 5 or self.num_frames % 4 != 1:
            nearest = max(5, round((self.num_frames - 1) / 4) * 4 + 1)
            raise ValueError(f"Found num_frames={self.num_frames}, expected 4k + 1 from 5 on, for example {nearest}.")
        for name in ("fps", "max_area", "num_inference_steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Found {name}={getattr(self, name)!r}, expected more than 0.")
        if not Path(self.model).is_dir() and (is_machine_path(self.model) or self.model.count("/") != 1):
            raise ValueError(
                f"Found model={self.model!r}, which is no folder here, expected one in diffusers' layout or a Hub id "
                "such as Wan-AI/Wan2.1-I2V-14B-480P-Diffusers."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pipeline": None}

    def settings(self) -> dict[str, Any]:
        options = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "offload"}
        options["model"] = describe_model(self.model)
        prompt_hash = hashlib.sha256(PROMPT.read_bytes()).hexdigest()[:16]
        return {"generator": "wan", **options, "prompt_hash": prompt_hash}

    def generate(self, row: dict[str, Any]) -> tuple[np.ndarray, float, dict[str, Any]]:
        if self._pipeline is None:
            self._pipeline = self._load()
        pipeline = self._pipeline
        keyframes = [open_keyframe(keyframe) for keyframe in row["keyframes"]]
        width, height = self._size(*keyframes[0].size)
        keyframes = [keyframe.resize((width, height), Image.Resampling.LANCZOS) for keyframe in keyframes]
        prompt = thought_prompt(row["question"], row["reasoning_plan"])
        num_tokens = len(pipeline.tokenizer(prompt).input_ids)
        if num_tokens > MAX_PROMPT_TOKENS:
            logger.warning(f"{row['id']}: the prompt has {num_tokens} tokens, Wan reads {MAX_PROMPT_TOKENS} of them.")
        # A hash of both, so that seeds 0 and 1 share no noise between rows.
        noise_seed = int.from_bytes(hashlib.sha256(f"{self.seed}:{row['id']}".encode()).digest()[:4], "big")
        frames = pipeline(
            **self._conditions(keyframes, row["keyframe_timestamps"]),
            prompt=prompt,
            negative_prompt=self.negative_prompt,
            height=height,
            width=width,
            num_frames=self.num_frames,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(noise_seed),
            max_sequence_length=MAX_PROMPT_TOKENS,
            output_type="np",
        ).frames[0]
        if not np.isfinite(frames).all():
            raise Rejected("not_finite", f"the model's frames hold NaN; dtype is {self.dtype}, expected finite values")
        details = {"noise_seed": noise_seed, "width": width, "height": height, "prompt_tokens": num_tokens}
        return (frames * 255).round().astype(np.uint8), self.fps, details

    def _conditions(self, keyframes: list[Image.Image], timestamps: list[float]) -> dict[str, Any]:
        if self.conditioning == "first":
            return {"image": keyframes[0]}
        if self.conditioning == "first_last":
            return {"image": keyframes[0], "last_image": keyframes[-1]}
        size = keyframes[0].size
        video = [Image.new("RGB", size, (128, 128, 128))] * self.num_frames  # grey and white: to be generated
        mask = [Image.new("L", size, 255)] * self.num_frames
        for keyframe, position in zip(keyframes, keyframe_positions(timestamps, self.num_frames)):
            video[position], mask[position] = keyframe, Image.new("L", size, 0)
        return {"video": video, "mask": mask}

    def _size(self, width: int, height: int) -> tuple[int, int]:
        """The largest frame of about a keyframe's aspect ratio within `max_area` that splits into patches."""
        multiple = self._pipeline.vae_scale_factor_spatial * self._pipeline.transformer.config.patch_size[1]
        scale = math.sqrt(self.max_area / (width * height))
        width, height = (max(1, int(side * scale + 1e-6) // multiple) * multiple for side in (width, height))
        return width, height

    def _load(self) -> Any:
        import diffusers

        if find_spec("ftfy") is None:
            raise ImportError("Wan's pipelines clean their prompts with ftfy: pip install ftfy.")
        if self.offload != "none" and not torch.cuda.is_available():
            raise ValueError(f"Found offload={self.offload!r} without a GPU to load from; expected offload='none'.")
        name = "WanVACEPipeline" if self.conditioning == "vace" else "WanImageToVideoPipeline"
        pipeline_class = getattr(diffusers, name)
        config = pipeline_class.load_config(self.model, revision=self.revision)
        # Wan 2.2's 5B model is stored as a text-to-video pipeline, and takes an image as well.
        if config["_class_name"] != name and not (self.conditioning == "first" and config.get("expand_timesteps")):
            raise ValueError(
                f"Found a {config['_class_name']} in {self.model!r}, but conditioning={self.conditioning!r} needs a "
                f"{name}. Give another model or conditioning (first, first_last, vace)."
            )
        dtype = getattr(torch, self.dtype)
        pipeline = pipeline_class.from_pretrained(
            self.model,
            revision=self.revision,
            dtype={"default": dtype, "vae": torch.float32, "image_encoder": torch.float32},
        )
        transformer = pipeline.transformer.config
        if self.conditioning != "vace" and transformer.image_dim is not None:
            trained_for = "first" if transformer.pos_embed_seq_len is None else "first_last"
            if self.conditioning != trained_for:
                raise ValueError(
                    f"Found conditioning={self.conditioning!r}, but {self.model!r} was trained for {trained_for!r}. "
                    "Give that, or another model."
                )
        if self.flow_shift is not None:
            scheduler = pipeline.scheduler
            if "flow_shift" not in scheduler.config:
                raise ValueError(f"Found flow_shift={self.flow_shift}, but {type(scheduler).__name__} has none.")
            pipeline.scheduler = type(scheduler).from_config(scheduler.config, flow_shift=self.flow_shift)
        if self.fp8:
            for model in (pipeline.transformer, getattr(pipeline, "transformer_2", None)):
                if model is not None:
                    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
        if self.vae_tiling:
            pipeline.vae.enable_tiling()
        if self.offload == "model":
            pipeline.enable_model_cpu_offload()
        elif self.offload == "sequential":
            pipeline.enable_sequential_cpu_offload()
        elif self.offload == "group":
            pipeline.enable_group_offload(torch.device("cuda"), offload_type="leaf_level", use_stream=True)
        else:
            pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def describe_model(model: str) -> str:
    """A model's Hub id; for a local folder its name and a hash, as its path says nothing to anybody else.

    The hash is of every file's name, size and last 64 KiB: reading all weights would take minutes.
    """
    folder = Path(model)
    if not folder.is_dir():
        return model
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - 2**16))
            digest.update(f"{path.relative_to(folder).as_posix()} {size} ".encode() + file.read())
    return f"{folder.resolve().name}@{digest.hexdigest()[:16]}"


def thought_prompt(question: str, plan: str) -> str:
    """The text a generator is given: question and plan, never options or answer, so that it can't draw the answer."""
    return Template(PROMPT.read_text(encoding="utf-8")).substitute(question=question, plan=plan)


def keyframe_positions(timestamps: list[float], num_frames: int) -> list[int]:
    """Where keyframes go in a clip, at their relative times: 2.0, 3.0, 6.0 seconds in 81 frames -> 0, 20, 80.

    Args:
        timestamps (`list[float]`): ascending seconds.
        num_frames (`int`): the clip's length.
    """
    span = timestamps[-1] - timestamps[0]
    return [round((one - timestamps[0]) / span * (num_frames - 1)) if span > 0 else 0 for one in timestamps]


def open_keyframe(keyframe: Image.Image | Mapping[str, Any]) -> Image.Image:
    """A keyframe as an RGB image, whether its column is decoded (`datasets.Image()`) or still `{"bytes", "path"}`."""
    if not isinstance(keyframe, Image.Image):
        keyframe = Image.open(io.BytesIO(keyframe["bytes"]))
    return keyframe.convert("RGB")
