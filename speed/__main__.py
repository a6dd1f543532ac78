"""Measure what our code costs against the libraries it stands on.

    python -m speed                      # all workloads
    python -m speed off_mode             # generate: the plain class against latent_mode="off", narrow models
    python -m speed decode --videos *.mp4    # frames a second: decord by itself against decode_video
    python -m speed train_step           # a training step of SFT, Stage I and II, and K+1 passes
    python -m speed long_video           # an answer by module, with token reduction
    python -m speed off_mode --device cuda --rounds 50 --output speed/results

Every figure is a ratio of two ways measured in turns in one run: absolute times of shared processors are noise.
"""

import argparse
import copy
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dataset_builder.thought_video import encode_video
from evaluation.clock import ModuleClock
from modeling_storms import StormsForConditionalGeneration
from modeling_storms.video_storms import decode_video, uniform_frame_indices
from recipes.collator import IGNORED, TARGET_MEDIA, StormsCollator
from recipes.init_checkpoint import build_tiny_base, convert
from recipes.targets import encode_targets


WORKLOADS = ("off_mode", "train_step", "decode", "long_video")
REDUCTIONS: dict[str, dict[str, int]] = {
    "none": {},
    "4x temporal": {"temporal_pool": 4},
    "4x spatial": {"spatial_pool": 4},
    "4x temporal, 2x sampling": {"temporal_pool": 4, "temporal_sampling": 2},
    "16x both": {"temporal_pool": 4, "spatial_pool": 4},
}


def measure_off_mode(device: str, num_layers: int, rounds: int, new_tokens: int) -> dict[str, Any]:
    """Seconds of one greedy `generate`, plain class against the mixin with `latent_mode="off"`, same weights.

    The plain class suppresses the same three ids, so that both do the same work. Each round times both, in an order
    that alternates; the ratio is the median over rounds of each round's own ratio.
    """
    base, processor = build_tiny_base(num_hidden_layers=num_layers)
    model, _ = convert(base, processor)
    plain = copy.deepcopy(base)
    plain.load_state_dict(model.state_dict())
    tokens = model.latent_tokens
    model, plain = model.to(device), plain.to(device)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, 300, (1, 64), generator=generator).to(device)
    shared = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
    }
    ways = {
        "plain": lambda: plain.generate(**shared, suppress_tokens=[tokens.start, tokens.pad, tokens.end]),
        "off": lambda: model.generate(**shared, latent_mode="off"),
    }
    if ways["plain"]().tolist() != ways["off"]().tolist():
        raise RuntimeError("The two ways decode different tokens, so their times can't be compared.")
    seconds = measure_in_turns(ways, rounds, f"plain against off, {num_layers} layers", device != "cpu")
    return {
        "workload": "generate, off mode against the plain class",
        "model": f"{num_layers} layers, hidden 64",
        "new_tokens": new_tokens,
        **summarize(seconds, "off", "plain"),
    }


def measure_train_step(device: str, rounds: int, latent_size: int = 8) -> list[dict[str, Any]]:
    """Seconds of one training step (loss, backward pass, AdamW) of each stage against SFT, on the same rows.

    `naive` is Stage II as it is done without a cache: the whole sequence once more for every slot.
    """
    base, processor = build_tiny_base(num_hidden_layers=4, hidden_size=256)
    model, processor = convert(base, processor, latent_size=latent_size)
    model.model.visual.requires_grad_(False)
    model = model.to(device).train()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.0)
    ways: dict[str, Callable[[], Any]] = {}
    batches = {stage: _training_batch(processor, stage, latent_size) for stage in ("sft", "stage1", "stage2")}
    batches = {stage: {name: one.to(device) for name, one in batch.items()} for stage, batch in batches.items()}
    media = [batches["stage1"].pop(name) for name in TARGET_MEDIA]

    def encode() -> torch.Tensor:
        pixels, grid_thw, media_per_row = media
        return encode_targets(model, pixels, grid_thw, media_per_row, latent_size)

    stored = encode()

    def step(loss: torch.Tensor) -> float:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    def train(stage: str, **inputs: Any) -> float:
        batch = batches[stage]
        kept = torch.nn.functional.pad(batch["labels"][:, 1:] != IGNORED, (0, 1))
        return step(model(**batch, **inputs, logits_to_keep=kept, use_cache=False).loss)

    def naive() -> float:
        batch = {name: one for name, one in batches["stage2"].items() if name != "labels"}
        states = torch.zeros_like(stored)
        for slot in range(latent_size):
            found = model(**batch, latent_input="teacher_forced", latent_targets=states, logits_to_keep=1)
            states = torch.cat([states[:, :slot], found.latent_states[:, slot : slot + 1], states[:, slot + 1 :]], 1)
        batch["labels"] = batches["stage2"]["labels"]
        kept = torch.nn.functional.pad(batch["labels"][:, 1:] != IGNORED, (0, 1))
        found = model(**batch, latent_input="teacher_forced", latent_targets=states, logits_to_keep=kept)
        return step(found.lm_loss)

    teacher_forced: dict[str, Any] = {"latent_input": "teacher_forced"}
    ways["sft"] = lambda: train("sft")
    ways["stage1, cached"] = lambda: train("stage1", latent_targets=stored, **teacher_forced)
    ways["stage1, on the fly"] = lambda: train("stage1", latent_targets=encode(), **teacher_forced)
    ways["stage2"] = lambda: train("stage2", latent_input="rollout")
    ways[f"naive, {latent_size + 1} passes"] = naive
    if abs(ways["stage2"]() - naive()) > 1e-4:
        raise RuntimeError("Stage II and the naive way have different losses, so their times can't be compared.")
    for way in ways.values():
        way()
    length = batches["sft"]["input_ids"].shape[1]
    seconds = measure_in_turns(ways, rounds, "a training step of each stage", device != "cpu")
    return [
        {
            "workload": "training step, each stage against SFT",
            "model": name,
            "batch": f"hidden 256, 4 layers, 4 rows of {length} tokens, K = {latent_size}",
            **summarize({"sft": seconds["sft"], "stage": seconds[name]}, "stage", "sft"),
        }
        for name in ways
        if name != "sft"
    ]


def measure_long_video(device: str, num_frames: int, rounds: int, latent_size: int = 8) -> list[dict[str, Any]]:
    """Seconds of each module of one latent answer, with more and more token reduction, on the same video.

    The vision tower is narrow and the language model 12 layers of 512, so that shares are not those of a 7B model.
    """
    base, processor = build_tiny_base(num_hidden_layers=12, hidden_size=512)
    processor.video_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 140 * 196}
    model, processor = convert(base, processor, latent_size=latent_size)
    config = copy.deepcopy(model.config)
    config.temporal_projector = {}
    weights = model.state_dict()
    model = StormsForConditionalGeneration(config).to(device).eval()
    model.load_state_dict(weights, strict=False)
    frames = np.random.default_rng(0).integers(0, 255, (num_frames, 140, 196, 3), dtype=np.uint8)
    messages = [{"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": "Why?"}]}]
    metadata = {"total_num_frames": num_frames, "fps": 2.0, "frames_indices": list(range(num_frames))}
    ways: dict[str, Callable[[], Any]] = {}
    clocks: dict[str, dict[str, list[float]]] = {}
    tokens = {}
    for name, reduction in REDUCTIONS.items():
        inputs = processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"video_metadata": [metadata], "do_sample_frames": False, **reduction},
        ).to(device)
        tokens[name] = int((inputs["input_ids"] == config.video_token_id).sum())
        clocks[name] = {}
        ways[name] = partial(_time_modules, model, inputs, reduction, latent_size, clocks[name])
    for name, way in ways.items():
        way()
        clocks[name].clear()
    seconds = measure_in_turns(ways, rounds, f"an answer about {num_frames} frames", device != "cpu")
    whole = next(iter(ways))
    return [
        {
            "workload": "latent answer about a long video, with token reduction against none",
            "model": f"{num_frames} frames, {name}",
            "visual_tokens": tokens[name],
            "modules": {part: statistics.median(clock) for part, clock in clocks[name].items()},
            "prefill_ratio": statistics.median(
                before / after for before, after in zip(clocks[whole]["prefill"], clocks[name]["prefill"])
            ),
            **summarize({"none": seconds[whole], "reduced": seconds[name]}, "reduced", "none"),
        }
        for name in ways
    ]


def _time_modules(model: Any, inputs: Any, reduction: Any, latent_size: int, clock: Any) -> None:
    """One forced block and eight tokens; adds the seconds of each module to `clock`."""
    timed = ModuleClock(model)
    options = {"latent_mode": "force", "max_new_tokens": latent_size + 10, "min_new_tokens": latent_size + 10}
    with timed.running() as passes:
        sequences = model.generate(**inputs, **reduction, **options)
    timed.add_passes(passes, sequences[:, inputs["input_ids"].shape[1] :])
    for name, one in timed.seconds.items():
        clock.setdefault(name, []).append(one)


def _training_batch(processor: Any, stage: str, latent_size: int) -> dict[str, torch.Tensor]:
    """Four rows of one simulated clip each, about 600 tokens."""
    processor.video_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 196 * 280}
    collator = StormsCollator(processor, stage, latent_size=latent_size)
    rows = []
    for seed in range(4):
        frames = np.random.default_rng(seed).integers(0, 255, (16, 196, 280, 3), dtype=np.uint8)
        clip = {"bytes": encode_video(frames, 12), "path": None}
        question = {"id": str(seed), "question": "Which cup hides the ball?", "options": ["left", "right"]}
        rows.append({**question, "answer": "A", "video": clip, "thought_video": clip})
    batch = collator(rows)
    del batch["row_seeds"]
    return batch


def measure_decode(video: Path, num_frames: int | None, rounds: int) -> dict[str, Any]:
    """Seconds to open a file and decode frames spread evenly (all: None), decord by itself against `decode_video`."""
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
    seconds = measure_in_turns({"decord": bare, "ours": ours}, rounds, f"decord against ours, {video.name}, {shown}")
    result = summarize(seconds, "decord", "ours")  # of times, so that it is ours / decord of rates
    return {
        "workload": "decode, frame rate of decode_video against decord's own",
        "video": f"{frames.shape[2]}x{frames.shape[1]}, {shown} frames",
        **result,
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


def measure_in_turns(
    ways: dict[str, Callable[[], Any]], rounds: int, description: str, synchronize: bool = False
) -> dict[str, list[float]]:
    """Seconds of each way in each round, in an order that alternates."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for index in track(range(rounds), description=description):
        for name in list(ways) if index % 2 == 0 else reversed(list(ways)):
            begin = time.perf_counter()
            ways[name]()
            if synchronize:
                torch.accelerator.synchronize()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def summarize(seconds: dict[str, list[float]], over: str, under: str) -> dict[str, Any]:
    """Median over rounds of each round's own ratio `over / under`, and its quartiles."""
    ratios = [a / b for a, b in zip(seconds[over], seconds[under])]
    return {
        "rounds": len(ratios),
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
    }


def write(name: str, results: list[dict[str, Any]], device: str, output: Path) -> None:
    """Write a workload's JSON and print its table."""
    device_name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine() + " CPU"
    record = {
        "command": " ".join(["python -m speed", *sys.argv[1:]]),
        "machine": {"device": device_name, "threads": torch.get_num_threads()},
        "versions": {package: version(package) for package in ("torch", "transformers", "decord")},
        "results": results,
    }
    path = output / f"{name}_{device.split(':')[0]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    ways = list(results[0]["median_seconds"])
    table = Table("", *ways, "ratio", "quartiles", title=results[0]["workload"])
    for result in results:
        low, high = result["ratio_quartiles"]
        table.add_row(
            result.get("model") or result["video"],
            *(f"{result['median_seconds'][way] * 1e3:.1f} ms" for way in ways),
            f"{result['ratio']:.3f}",
            f"{low:.3f} to {high:.3f}",
        )
    Console().print(table, f"Written to {path}", sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", metavar="workload", help=f"{', '.join(WORKLOADS)} (default: all)")
    parser.add_argument("--device", default="cpu", help="torch device of all but decode (default: %(default)s)")
    parser.add_argument(
        "--num_layers",
        type=int,
        nargs="+",
        default=[3, 36],
        help="off_mode: decoder layers of the narrow models; the 3B model has 36 (default: 3 36)",
    )
    parser.add_argument("--new_tokens", type=int, default=64, help="off_mode: tokens to generate (default: 64)")
    parser.add_argument("--videos", type=Path, nargs="+", help="decode: files (default: clips encoded on the spot)")
    parser.add_argument(
        "--frames", type=int, nargs="+", default=[32, 128], help="long_video: frames of the video (default: 32 128)"
    )
    parser.add_argument("--rounds", type=int, default=40, help="paired measurements (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("speed/results"), help="folder for JSON (%(default)s)")
    arguments = parser.parse_args()
    workloads = arguments.workloads or WORKLOADS
    if unknown := set(workloads) - set(WORKLOADS):
        parser.error(f"unknown workload {sorted(unknown)}: expected some of {', '.join(WORKLOADS)}")
    if "off_mode" in workloads:
        results = [
            measure_off_mode(arguments.device, num_layers, arguments.rounds, arguments.new_tokens)
            for num_layers in arguments.num_layers
        ]
        write("off_mode", results, arguments.device, arguments.output)
    if "train_step" in workloads:
        results = measure_train_step(arguments.device, arguments.rounds)
        write("train_step", results, arguments.device, arguments.output)
    if "long_video" in workloads:
        results = [
            one
            for num_frames in arguments.frames
            for one in measure_long_video(arguments.device, num_frames, arguments.rounds)
        ]
        write("long_video", results, arguments.device, arguments.output)
        table = Table("", "visual tokens", *results[0]["modules"], "prefill, times faster")
        for one in results:
            parts = [f"{seconds * 1e3:.0f} ms" for seconds in one["modules"].values()]
            table.add_row(one["model"], str(one["visual_tokens"]), *parts, f"{one['prefill_ratio']:.2f}")
        Console().print(table)
    if "decode" in workloads:
        with tempfile.TemporaryDirectory() as folder:
            videos = arguments.videos or list(clips(Path(folder)))
            results = [measure_decode(video, n, arguments.rounds) for video in videos for n in (None, 16)]
        write("decode", results, "cpu", arguments.output)


if __name__ == "__main__":
    main()
