"""Where a prompt's time goes: vision tower, temporal projector, language model; and what token reduction saves."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from evaluation.clock import ModuleClock

from .generation import ANSWER_TOKENS, LATENT_SIZE, NUM_FRAMES, fixed, latent
from .harness import Bench, Result, Work, beside_floor, goal, summarize
from .shapes import answer_works, build, prefill_work, projector_flops, video_inputs, vision_work


REDUCTIONS: dict[str, dict[str, int]] = {
    "none": {},
    "4x temporal": {"temporal_pool": 4},
    "4x spatial": {"spatial_pool": 4},
    "4x temporal, 2x sampling": {"temporal_pool": 4, "temporal_sampling": 2},
    "16x both": {"temporal_pool": 4, "spatial_pool": 4},
}


def measure_prefill(bench: Bench) -> list[Result]:
    """a prompt of 32 frames by module: vision tower, temporal projector, language model"""
    results = []
    for name in bench.models_or("narrow"):
        model = build(name, bench.device, bench.dtype, temporal_projector={})
        for batch_size in bench.batch_sizes or (1, 8):
            results += _prefill(bench, name, model, batch_size)
        del model
    return results


def _prefill(bench: Bench, name: str, model: Any, batch_size: int) -> list[Result]:
    inputs = {key: value.to(bench.device) for key, value in video_inputs(name, NUM_FRAMES, batch_size).items()}
    clocks: dict[str, list[float]] = {"vision tower": [], "projector": [], "language": []}

    def run() -> None:
        timed = ModuleClock(model, bench.clock)
        with timed.running() as passes:
            model.generate(**inputs, **fixed(1))
        for part in ("vision tower", "projector"):
            clocks[part].append(timed.seconds[part])
        clocks["language"].append(sum(passes.seconds))

    if not bench.try_out({f"{name}, batch {batch_size}": run}):
        return []
    for clock in clocks.values():
        clock.clear()
    seconds = bench.measure({"whole": run}, f"prefill of {name}, batch {batch_size}")["whole"]
    grids, prompt = inputs["video_grid_thw"][:1].tolist(), inputs["input_ids"].shape[1]
    num_tokens = int((inputs["input_ids"][0] == model.config.video_token_id).sum())
    floors = {
        "vision tower": vision_work(model.config, grids, batch_size).floor(bench.peaks),
        "projector": Work(flops=batch_size * projector_flops(model.config, num_tokens)).floor(bench.peaks),
        "language": prefill_work(model.config, prompt, batch_size, bench.dtype.itemsize).floor(bench.peaks),
    }
    without = [whole - part for whole, part in zip(seconds, clocks["projector"])]
    clocks["all but the projector"] = without
    floors["all but the projector"] = floors["vision tower"] + floors["language"]
    results = []
    for part, clock in clocks.items():
        result: Result = {
            "workload": f"a prompt of {NUM_FRAMES} frames by module, each against all but the projector",
            "model": f"{name}, batch {batch_size}, {part}",
            "prompt_tokens": prompt,
            **summarize({"whole": without, "this": clock}, "this", "whole"),
        }
        result |= beside_floor(result["median_seconds"]["this"], floors[part])
        if part == "all but the projector":
            result |= goal("part of the floor", result["of_floor"], at_least=0.55)
        results.append(result)
    return results


def measure_long_video(bench: Bench) -> list[Result]:
    """a latent answer by module, with token reduction against none; its growth with --frames"""
    results = []
    for name in bench.models_or("eighth"):
        found = [_long_video(bench, name, count) for count in bench.frames]
        # Without reduction: the floor grows with the frames and with what attention adds to that.
        begin, end = found[0][0], found[-1][0]
        if begin is not end:
            growth = end["median_seconds"]["none"] / begin["median_seconds"]["none"]
            growth /= end["floor_seconds"] / begin["floor_seconds"]
            end |= goal("growth with frames, times the floor's,", growth, at_most=1.1)
        results += [result for one in found for result in one]
    return results


def _long_video(bench: Bench, name: str, num_frames: int) -> list[Result]:
    model = build(name, bench.device, bench.dtype, temporal_projector={})
    clocks: dict[str, dict[str, list[float]]] = {}
    prompts: dict[str, Any] = {}
    for way, reduction in REDUCTIONS.items():
        inputs = video_inputs(name, num_frames, **reduction)
        prompts[way] = {key: value.to(bench.device) for key, value in inputs.items()}
        clocks[way] = {}

    def answer(way: str) -> None:
        timed = ModuleClock(model, bench.clock)
        with timed.running() as passes:
            options = {**REDUCTIONS[way], **latent(), "stopping_criteria": [passes]}
            sequences = model.generate(**prompts[way], **options)
        timed.add_steps(passes.seconds, sequences[:, prompts[way]["input_ids"].shape[1] :])
        for part, seconds in timed.seconds.items():
            clocks[way].setdefault(part, []).append(seconds)

    ways: dict[str, Callable[[], Any]] = {way: partial(answer, way) for way in REDUCTIONS}
    for way in ways:
        ways[way]()
        clocks[way].clear()
    seconds = bench.measure(ways, f"an answer about {num_frames} frames")
    whole = next(iter(ways))
    results = []
    for way in ways:
        inputs = prompts[way]
        num_tokens = int((inputs["input_ids"] == model.config.video_token_id).sum())
        result: Result = {
            "workload": "latent answer about a long video, with token reduction against none",
            "model": f"{name}, {num_frames} frames, {way}",
            "visual_tokens": num_tokens,
            "modules": {part: statistics.median(clock) for part, clock in clocks[way].items()},
            "prefill_ratio": statistics.median(
                before / after for before, after in zip(clocks[whole]["prefill"], clocks[way]["prefill"])
            ),
            **summarize({"none": seconds[whole], "reduced": seconds[way]}, "reduced", "none"),
        }
        grids, prompt = inputs["video_grid_thw"].tolist(), inputs["input_ids"].shape[1]
        new_tokens = LATENT_SIZE + ANSWER_TOKENS  # the markers run with what is before them
        works = answer_works(model.config, grids, prompt, new_tokens, 1, bench.dtype.itemsize)
        steps, height, width = grids[0]
        works.append(Work(flops=projector_flops(model.config, steps * height * width // 4)))
        result |= beside_floor(result["median_seconds"]["reduced"], sum(work.floor(bench.peaks) for work in works))
        if num_frames >= 128 and way in ("4x temporal", "4x spatial"):
            result |= goal("prefill, times faster", result["prefill_ratio"], at_least=3.5)
        results.append(result)
    return results
