"""What stands around the model: evaluation, dataset builder, video decoding."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers.video_utils import VideoMetadata

from dataset_builder.__main__ import main as dataset_builder
from dataset_builder.sources.simulated import list_rows
from dataset_builder.stages import ThoughtVideoStage, VideoStage
from dataset_builder.thought_video import SimulatedGenerator, encode_video
from evaluation.answering import Answerer, encode_clip
from modeling_storms.video_storms import decode_video, uniform_frame_indices

from .generation import ANSWER_TOKENS, LATENT_SIZE, NUM_FRAMES
from .harness import Bench, Result, beside_floor, goal, summarize
from .shapes import SIZES, build, decode_work, make_processor, prefill_work, vision_work


NUM_CLIPS = 4
QUESTIONS = (
    "Which cup hides the ball? Answer with the letter of the option.",
    "Does the red car stop before the light changes, or after two seconds?",
    "Which happens first? Answer A, B, C or D.",
)
NUM_ROWS = 12


# ------------------------------------------------------------------ evaluation


def measure_evaluation(bench: Bench) -> list[Result]:
    """questions a second: three about each of four clips, with shared prefixes, compiled (see decode_step), without"""
    return [result for name in bench.models_or("narrow", "narrow_448") for result in _evaluation(bench, name)]


def _evaluation(bench: Bench, name: str) -> list[Result]:
    model, processor = build(name, bench.device, bench.dtype), make_processor(name)
    num_questions = NUM_CLIPS * len(QUESTIONS)
    num_new = LATENT_SIZE + 2 + ANSWER_TOKENS
    make = partial(
        Answerer,
        model,
        processor,
        max_new_tokens=ANSWER_TOKENS,
        batch_size=num_questions,
        latent_mode="force",
        latent_size=LATENT_SIZE,
        min_new_tokens=num_new,
    )
    answerer, compiled = make(), make(is_compiled=True)
    metadata = VideoMetadata(
        total_num_frames=NUM_FRAMES, fps=2.0, duration=NUM_FRAMES / 2, frames_indices=list(range(NUM_FRAMES))
    )
    videos = [
        np.random.default_rng(seed).integers(0, 255, (NUM_FRAMES, *SIZES[name].frame, 3), dtype=np.uint8)
        for seed in range(NUM_CLIPS)
    ]
    prepare = partial(encode_clip, processor, metadata=metadata, size=processor.video_processor.size)
    clips = [prepare(frames) for frames in videos]
    ways: dict[str, Callable[[], Any]] = {"shared": lambda: answerer.answer(clips, [QUESTIONS] * NUM_CLIPS)}
    if bench.is_cuda or bench.compile:
        ways["shared, compiled"] = lambda: compiled.answer(clips, [QUESTIONS] * NUM_CLIPS)
    ways |= {
        "each its own": lambda: answerer.answer(
            [clip for clip in clips for _ in QUESTIONS], [[text] for _ in clips for text in QUESTIONS]
        ),
        "preparing a clip": lambda: prepare(videos[0]),
    }
    shared = [way for way in ways if way.startswith("shared")]
    texts = {way: [reply.text for group in ways[way]() for reply in group] for way in (*shared, "each its own")}
    if bench.dtype.itemsize == 4 and any(found != texts["shared"] for found in texts.values()):
        raise RuntimeError("The ways give other answers, so their times can't be compared.")
    seconds = bench.measure(ways, f"evaluation with {name}")

    # The floor: vision tower and prefixes, then questions behind them, then a step for each token but the first.
    config, itemsize, peaks = model.config, bench.dtype.itemsize, bench.peaks
    grids, prefix = clips[0].media["video_grid_thw"].tolist(), len(clips[0].input_ids)
    longest = max(len(answerer._suffix(text)) for text in QUESTIONS)
    answering = prefill_work(config, longest, num_questions, itemsize, prefix).floor(peaks)
    context = prefix + longest
    num_steps = LATENT_SIZE + ANSWER_TOKENS - 1  # the markers run with what is before them
    answering += sum(decode_work(config, context + n, num_questions, itemsize).floor(peaks) for n in range(num_steps))
    results = []
    for way, num_prefixes in (*((way, NUM_CLIPS) for way in shared), ("each its own", num_questions)):
        floor = answering + vision_work(config, grids, num_prefixes).floor(peaks)
        floor += prefill_work(config, prefix, num_prefixes, itemsize).floor(peaks)
        result: Result = {
            "workload": f"evaluation, {len(QUESTIONS)} questions about each of {NUM_CLIPS} clips, {NUM_FRAMES} frames",
            "model": f"{name}, {way}",
            "visual_tokens": clips[0].record["num_video_tokens"],
            **summarize({"each its own": seconds["each its own"], "this": seconds[way]}, "this", "each its own"),
        }
        median = result["median_seconds"]["this"]
        result["questions_per_second"] = num_questions / median
        # Decoding and resizing run in worker processes beside the model: so many hide behind it.
        preparing = summarize({"a": seconds["preparing a clip"], "b": seconds[way]}, "a", "b")["ratio"]
        result["workers_to_keep_up"] = NUM_CLIPS * preparing
        result |= beside_floor(median, floor)
        if way == shared[-1]:
            result |= goal("part of the floor", result["of_floor"], at_least=0.5)
        results.append(result)
    return results


# ------------------------------------------------------------------ dataset builder


def measure_builder(bench: Bench) -> list[Result]:
    """rows a second of the dataset builder, one process, against rendering and encoding alone"""
    worlds = ("shell_game", "order")
    datasets.disable_progress_bars()
    stages = (VideoStage(), ThoughtVideoStage(SimulatedGenerator()))

    def render(world: str) -> None:
        for row in list_rows([world], NUM_ROWS, 0, {"train": 1.0}):
            for stage in stages:
                stage.process(row)

    def make(world: str) -> None:
        flags = ["--source", "simulated", "--world", world, "--num_rows", str(NUM_ROWS), "--num_workers", "1"]
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
            dataset_builder(["build", *flags, "--output", folder])

    results = []
    try:
        for world in worlds:
            ways = {"rendering and encoding": partial(render, world), "builder": partial(make, world)}
            for way in ways.values():
                way()
            seconds = bench.measure(ways, f"the builder on {world}")
            result = {
                "workload": f"builder, {NUM_ROWS} rows of a simulated world, against rendering and encoding alone",
                "model": world,
                **summarize(seconds, "builder", "rendering and encoding"),
            }
            median = result["median_seconds"]
            result["rows_per_second"] = NUM_ROWS / median["builder"]
            result |= beside_floor(median["builder"], median["rendering and encoding"])
            results.append(result)
    finally:
        datasets.enable_progress_bars()
    return results


# ------------------------------------------------------------------ video files


def measure_decode(bench: Bench) -> list[Result]:
    """frames a second of decode_video against decord's own; --videos"""
    with tempfile.TemporaryDirectory() as folder:
        videos = bench.videos or list(clips(Path(folder)))
        return [_decode(bench, video, count) for video in videos for count in (None, 16)]


def _decode(bench: Bench, video: Path, num_frames: int | None) -> Result:
    """Open a file and decode frames spread evenly (all: None), decord by itself against `decode_video`."""
    from decord import VideoReader  # the baseline

    def choose(total_num_frames: int) -> np.ndarray:
        return uniform_frame_indices(total_num_frames, num_frames or total_num_frames)

    def bare() -> np.ndarray:
        reader = VideoReader(str(video))
        return reader.get_batch(choose(len(reader))).asnumpy()

    def ours() -> np.ndarray:
        return decode_video(video, lambda metadata: choose(metadata.total_num_frames))[0]

    frames = ours()
    if not np.array_equal(frames, bare()):
        raise RuntimeError(f"{video.name}: the two ways decode different frames, so their times can't be compared.")
    shown = "all" if num_frames is None else str(num_frames)
    seconds = bench.measure({"decord": bare, "ours": ours}, f"decord against ours, {video.name}, {shown}")
    return {
        "workload": "decode, frame rate of decode_video against decord's own",
        "video": f"{frames.shape[2]}x{frames.shape[1]}, {shown} frames",
        **summarize(seconds, "decord", "ours"),  # of times, so that it is ours / decord of rates
    }


def clips(folder: Path) -> Iterator[Path]:
    """H.264 clips of three sizes: a disc that moves over noise."""
    for height, width, num_frames in ((112, 168, 48), (360, 640, 120), (720, 1280, 60)):
        generator = np.random.default_rng(0)
        background = generator.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        rows, columns = np.mgrid[:height, :width]
        frames = np.repeat(background[None], num_frames, axis=0)
        for frame_idx, frame in enumerate(frames):
            x = width * (frame_idx + 0.5) / num_frames
            frame[(rows - height / 2) ** 2 + (columns - x) ** 2 < (height / 6) ** 2] = (210, 40, 30)
        path = folder / f"{width}x{height}.mp4"
        path.write_bytes(encode_video(frames, 30))
        yield path
