"""Answers: what a block costs beside text, tools and re-forwarding, and how near each is to the machine's limit."""

import copy
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import Cache, CompileConfig, DynamicCache, StaticCache

from evaluation.clock import StepTimes
from recipes.init_checkpoint import build_tiny_base, convert

from .harness import Bench, PeakMemory, Result, Work, beside_floor, console, goal, summarize
from .shapes import (
    answer_works,
    build,
    cache_bytes,
    decode_work,
    prefill_work,
    video_inputs,
    vision_work,
)


LATENT_SIZE = 8
NUM_PASSES = 3  # of the parallel solver
BLOCK, PARALLEL = f"latent, K = {LATENT_SIZE}", f"latent, K = {LATENT_SIZE}, Jacobi"
REFORWARD = f"{LATENT_SIZE + 1} passes"
ANSWER_TOKENS = 8
TOOL_ROUNDS, TOOL_TOKENS, TOOL_FRAMES = 3, 200, 8
NUM_FRAMES = 32


def fixed(num_tokens: int, **options: Any) -> dict[str, Any]:
    """Options of `generate` for an answer of so many new tokens, whatever they are."""
    return {"min_new_tokens": num_tokens, "max_new_tokens": num_tokens, "latent_mode": "off", **options}


def latent(latent_size: int = LATENT_SIZE, **options: Any) -> dict[str, Any]:
    """A forced block, its two markers, and the answer."""
    return fixed(latent_size + 2 + ANSWER_TOKENS, latent_mode="force", latent_size=latent_size, **options)


def jacobi(num_passes: int = NUM_PASSES) -> dict[str, Any]:
    return latent(latent_solver="jacobi", jacobi_iterations=num_passes)


# ------------------------------------------------------------------ off mode


def measure_off_mode(bench: Bench) -> list[Result]:
    """generate: the plain class against latent_mode="off"; --num_layers, --new_tokens"""
    return [_off_mode(bench, num_layers) for num_layers in bench.num_layers]


def _off_mode(bench: Bench, num_layers: int) -> Result:
    """The plain class suppresses the same three ids, so that both do the same work."""
    base, processor = build_tiny_base(num_hidden_layers=num_layers)
    model, _ = convert(base, processor)
    plain = copy.deepcopy(base)
    plain.load_state_dict(model.state_dict())
    tokens = model.latent_tokens
    model, plain = model.to(bench.device), plain.to(bench.device)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, 300, (1, 64), generator=generator).to(bench.device)
    shared = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "max_new_tokens": bench.new_tokens,
        "min_new_tokens": bench.new_tokens,
    }
    ways = {
        "plain": lambda: plain.generate(**shared, suppress_tokens=[tokens.start, tokens.pad, tokens.end]),
        "off": lambda: model.generate(**shared, latent_mode="off"),
    }
    if ways["plain"]().tolist() != ways["off"]().tolist():
        raise RuntimeError("The two ways decode different tokens, so their times can't be compared.")
    seconds = bench.measure(ways, f"plain against off, {num_layers} layers")
    return {
        "workload": "generate, off mode against the plain class",
        "model": f"{num_layers} layers, hidden 64",
        "new_tokens": bench.new_tokens,
        **summarize(seconds, "off", "plain"),
    }


# ------------------------------------------------------------------ answers


def measure_answer(bench: Bench) -> list[Result]:
    """an answer about 32 frames: direct, latent (both solvers), text reasoning, a tool loop, K + 1 passes"""
    results = []
    for name in bench.models_or("tiny", "tiny_280", "tiny_448"):
        model = build(name, bench.device, bench.dtype)
        for batch_size in bench.batch_sizes or ((1,) if name.startswith("tiny_") else (1, 8, 32)):
            results += _answer(bench, name, model, batch_size)
        del model
    return results


def _answer(bench: Bench, name: str, model: Any, batch_size: int) -> list[Result]:
    inputs = {key: value.to(bench.device) for key, value in video_inputs(name, NUM_FRAMES, batch_size).items()}
    clip = {key: value.to(bench.device) for key, value in video_inputs(name, TOOL_FRAMES, batch_size, 1).items()}

    # One length of cache for all ways: another one would be compiled anew.
    shown = clip["input_ids"].shape[1]
    thinking = max(TOOL_ROUNDS * (TOOL_TOKENS + shown), *bench.text_tokens, LATENT_SIZE + 2)
    length = inputs["input_ids"].shape[1] + thinking + ANSWER_TOKENS

    def cache() -> Cache:
        if bench.static_cache:
            return StaticCache(config=model.config.get_text_config(), max_cache_len=length)
        return DynamicCache(config=model.config)

    def generate(**options: Any) -> Callable[[], Any]:
        return lambda: model.generate(**inputs, **options, past_key_values=cache())

    ways: dict[str, Callable[[], Any]] = {"direct": generate(**fixed(ANSWER_TOKENS))}
    ways |= {BLOCK: generate(**latent()), PARALLEL: generate(**jacobi())}
    for count in bench.text_tokens:
        ways[f"text of {count} tokens"] = generate(**fixed(count + ANSWER_TOKENS))
    ways["tool loop"] = lambda: tool_loop(model, inputs, clip, cache(), TOOL_TOKENS)
    ways[REFORWARD] = partial(reforward, model, inputs)
    floors = _answer_floors(bench, model.config, inputs, clip, batch_size)

    # 1. Warm up on less: a long text repeats the direct answer's steps.
    short: dict[str, Callable[[], Any]] = {
        "direct": ways["direct"],
        BLOCK: ways[BLOCK],
        PARALLEL: ways[PARALLEL],
        REFORWARD: partial(reforward, model, inputs, 1),
    }
    short["tool loop"] = lambda: tool_loop(model, inputs, clip, cache(), 2)
    fitting = bench.try_out(short)
    if not {"direct", BLOCK} <= fitting.keys():
        return []
    # 2. Ways that take a moment in many rounds, the long ones beside the same two in the few that there is time for.
    quick = [way for way in ("direct", BLOCK, PARALLEL, REFORWARD) if way in fitting]
    slow = [way for way in ways if way not in quick and (way in fitting or way not in short)]
    measured: dict[str, dict[str, list[float]]] = {}
    for group in (quick, slow):
        turns = dict.fromkeys(["direct", BLOCK, *group])
        seconds = bench.measure({way: ways[way] for way in turns}, f"answers of {name}, batch {batch_size}")
        measured |= {way: {**seconds, "this": seconds[way]} for way in group}
    # 3. Each way beside the direct one, the latent one, and its floor.
    results = []
    for way in (way for way in ways if way in measured):
        seconds = measured[way]
        result: Result = {
            "workload": f"an answer of {ANSWER_TOKENS} tokens about {NUM_FRAMES} frames, each way against direct",
            "model": f"{name}, batch {batch_size}, {way}",
            "prompt_tokens": inputs["input_ids"].shape[1],
            **summarize({"direct": seconds["direct"], "this": seconds["this"]}, "this", "direct"),
        }
        result["over_latent"] = summarize(seconds, "this", BLOCK)["ratio"]
        result |= beside_floor(result["median_seconds"]["this"], floors[way])
        if batch_size == 1 and way in (BLOCK, PARALLEL):
            result |= goal("times direct", result["ratio"], at_most=1.15)
        if batch_size == 1 and way == "text of 512 tokens":
            result |= goal("times latent", result["over_latent"], at_least=8)
        results.append(result)
    return results


def _answer_floors(bench: Bench, config: Any, inputs: Any, clip: Any, batch_size: int) -> dict[str, float]:
    """Seconds that each way takes at least."""
    itemsize, prompt = bench.dtype.itemsize, inputs["input_ids"].shape[1]
    grids = inputs["video_grid_thw"][:1].tolist()

    def floor(works: Sequence[Work]) -> float:
        return sum(work.floor(bench.peaks) for work in works)

    def text(count: int) -> float:
        return floor(answer_works(config, grids, prompt, count, batch_size, itemsize))

    # A block's markers run with the prompt and with the last slot.
    floors = {"direct": text(ANSWER_TOKENS), BLOCK: text(LATENT_SIZE + ANSWER_TOKENS)}
    floors[PARALLEL] = text(ANSWER_TOKENS) + floor(solver_works(config, prompt, NUM_PASSES, batch_size, itemsize))
    floors |= {f"text of {count} tokens": text(count + ANSWER_TOKENS) for count in bench.text_tokens}
    whole = floor(answer_works(config, grids, prompt, 1, batch_size, itemsize))
    floors[REFORWARD] = (LATENT_SIZE + 1) * whole
    works = answer_works(config, grids, prompt, TOOL_TOKENS, batch_size, itemsize)
    shown = int((clip["input_ids"][0] == config.video_token_id).sum()) + 2
    context = prompt + TOOL_TOKENS
    for turn in range(TOOL_ROUNDS):
        works += [vision_work(config, clip["video_grid_thw"][:1].tolist(), batch_size)]
        works += [prefill_work(config, shown + 1, batch_size, itemsize, context - 1)]
        count = ANSWER_TOKENS if turn == TOOL_ROUNDS - 1 else TOOL_TOKENS
        works += [decode_work(config, context + shown + step, batch_size, itemsize) for step in range(count - 1)]
        context += shown + count
    floors["tool loop"] = floor(works)
    return floors


@torch.no_grad()
def tool_loop(model: Any, inputs: Any, clip: Any, cache: Cache, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds of text, after each of which frames are encoded and put into the context, then the answer (LongVT,
    Video-Thinker). Keys and values are kept throughout, which is more than a tool server would do.

    Args:
        inputs, clip (`dict`): as of `video_inputs`; of the clip only its video is used.
        cache (`Cache`): an empty one.
        num_tokens (`int`): text of each round.

    Returns:
        `tuple` of the whole sequence `(batch, length)` and the logits of the answer's first token.
    """
    config = model.config
    ids, types = inputs["input_ids"], inputs["mm_token_type_ids"]
    grids, times = [inputs["video_grid_thw"]], [inputs["second_per_grid_ts"]]
    batch_size = len(ids)
    shown = int((clip["input_ids"][0] == config.video_token_id).sum())
    one_row = [config.vision_start_token_id, *[config.video_token_id] * shown, config.vision_end_token_id]
    added = torch.tensor([one_row], device=ids.device).expand(batch_size, -1)
    media = {name: inputs[name] for name in ("pixel_values_videos", "video_grid_thw")}
    for turn in range(TOOL_ROUNDS + 1):
        # Rows' videos one after another, as positions are computed from them.
        grid = torch.stack(grids, 1).flatten(0, 1)
        seconds = torch.stack(times, 1).flatten(0, 1)
        mask = torch.ones_like(ids)
        vision, _ = model.model.get_rope_index(
            ids, mm_token_type_ids=types, video_grid_thw=grid, second_per_grid_ts=seconds, attention_mask=mask
        )
        text = torch.arange(ids.shape[1], device=ids.device).expand(1, batch_size, -1)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            position_ids=torch.cat([text, vision]),
            past_key_values=cache,
            **media,
            **fixed(ANSWER_TOKENS if turn == TOOL_ROUNDS else num_tokens),
            return_dict_in_generate=True,
            output_logits=turn == TOOL_ROUNDS,
        )
        ids = out.sequences
        if turn < TOOL_ROUNDS:
            types = torch.nn.functional.pad(types, (0, ids.shape[1] - types.shape[1]))
            types = torch.cat([types, (added == config.video_token_id) * 2], dim=1)
            ids = torch.cat([ids, added], dim=1)
            media = {name: clip[name] for name in ("pixel_values_videos", "video_grid_thw")}
            grids.append(clip["video_grid_thw"])
            times.append(clip["second_per_grid_ts"])
    return ids, out.logits[0]


@torch.no_grad()
def reforward(model: Any, inputs: Any, latent_size: int = LATENT_SIZE) -> torch.Tensor:
    """A block as peers without a cache fill it: the whole sequence once more for every slot, and once for the answer's
    first token. The answer's other tokens are not counted.

    Returns:
        `torch.Tensor` of shape `(batch, latent_size, hidden_size)`: the states, those of `generate`.
    """
    tokens = model.latent_tokens
    ids = inputs["input_ids"]
    block = torch.tensor([[tokens.start, *[tokens.pad] * latent_size, tokens.end]], device=ids.device)
    room = (0, latent_size + 2)
    batch = {name: value for name, value in inputs.items() if name != "input_ids"}
    batch["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], room, value=1)
    batch["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], room)
    batch["input_ids"] = torch.cat([ids, block.expand(len(ids), -1)], dim=1)
    states = ids.new_zeros(len(ids), latent_size, model.config.get_text_config().hidden_size, dtype=model.dtype)
    for slot in range(latent_size + 1):
        found = model(**batch, latent_input="teacher_forced", latent_targets=states, logits_to_keep=1)
        if slot < latent_size:
            states[:, slot] = found.latent_states[:, slot]
    return states


# ------------------------------------------------------------------ slots, one after another or all at once


def measure_solver(bench: Bench) -> list[Result]:
    """a block of eight slots in 1 to 8 Jacobi passes, against one slot after another"""
    results = []
    for name in bench.models_or("narrow"):
        model = build(name, bench.device, bench.dtype)
        for batch_size in bench.batch_sizes or (1, 8):
            results += _solver(bench, name, model, batch_size)
        del model
    return results


def _solver(bench: Bench, name: str, model: Any, batch_size: int) -> list[Result]:
    prompt, itemsize = video_inputs(name, NUM_FRAMES)["input_ids"].shape[1], bench.dtype.itemsize
    # As many ids as a prompt about a video has, which run once: a slot does not depend on where its keys came from.
    ids = torch.randint(0, 300, (batch_size, prompt), device=bench.device)
    prefix = DynamicCache(config=model.config)
    with torch.no_grad():
        model.model(input_ids=ids[:, :-1], past_key_values=prefix, use_cache=True)
    shared = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    counts = (1, 2, 3, 4, 6, LATENT_SIZE)
    options = {"sequential": latent()} | {f"{count} passes": jacobi(count) for count in counts}
    blocks: dict[str, list[float]] = {way: [] for way in options}

    def generate(way: str) -> None:
        times = StepTimes(bench.clock)
        model.generate(**shared, **options[way], past_key_values=copy.deepcopy(prefix), stopping_criteria=[times])
        # Up to the pass of the last slot, with which `<|latent_end|>` runs; `<|latent_start|>` ran with the prompt.
        blocks[way].append(sum(times.seconds[1 : LATENT_SIZE + 2]))

    ways = bench.try_out({way: partial(generate, way) for way in options})
    for found in blocks.values():
        found.clear()
    bench.measure(ways, f"blocks of {name}, batch {batch_size}")
    slots = [decode_work(model.config, prompt + 1 + slot, batch_size, itemsize) for slot in range(LATENT_SIZE)]
    results = []
    for way in ways:
        works = slots
        if way != "sequential":
            works = solver_works(model.config, prompt, int(way.split()[0]), batch_size, itemsize)
        result: Result = {
            "workload": f"a block of {LATENT_SIZE} slots, in passes over all of them, against one after another",
            "model": f"{name}, batch {batch_size}, {way}",
            "context": prompt,
            **summarize({"sequential": blocks["sequential"], "this": blocks[way]}, "this", "sequential"),
        }
        floor = sum(work.floor(bench.peaks) for work in works)
        results.append(result | beside_floor(result["median_seconds"]["this"], floor))
    return results


def solver_works(config: Any, prompt: int, num_passes: int, batch_size: int, itemsize: int) -> list[Work]:
    """Of the passes over a block's slots."""
    return [prefill_work(config, LATENT_SIZE, batch_size, itemsize, prompt + 1)] * num_passes


# ------------------------------------------------------------------ the number of slots


def measure_latent_size(bench: Bench) -> list[Result]:
    """an answer with 1 to 16 slots: the slope against a decoding step, memory against its formula"""
    return [result for name in bench.models_or("narrow") for result in _latent_size(bench, name)]


def _latent_size(bench: Bench, name: str) -> list[Result]:
    sizes = (1, 2, 4, 8, 16)
    model = build(name, bench.device, bench.dtype)
    inputs = {key: value.to(bench.device) for key, value in video_inputs(name, NUM_FRAMES).items()}
    ways = {f"K = {size}": partial(model.generate, **inputs, **latent(size)) for size in sizes}
    extra = sizes[-1] - sizes[0]
    ways["short"] = partial(model.generate, **inputs, **fixed(ANSWER_TOKENS))
    ways["long"] = partial(model.generate, **inputs, **fixed(ANSWER_TOKENS + extra))
    for way in ways.values():
        way()
    seconds = bench.measure(ways, f"{name} by number of slots")
    # 1. The slope over K in each round, against that of text in the same round.
    rounds = range(len(seconds["short"]))
    slopes, fits = [], []
    for index in rounds:
        times = [seconds[f"K = {size}"][index] for size in sizes]
        fit = statistics.linear_regression(sizes, times)
        slopes.append(fit.slope)
        fits.append(statistics.correlation(sizes, times) ** 2)
    steps = [(seconds["long"][index] - seconds["short"][index]) / extra for index in rounds]
    prompt = inputs["input_ids"].shape[1]
    slope = {
        "workload": "a slot against a token of text",
        "model": f"{name}, slope over K = {', '.join(map(str, sizes))}",
        **summarize({"token": steps, "slot": slopes}, "slot", "token"),
        "r_squared": statistics.median(fits),
    }
    floor = decode_work(model.config, prompt, 1, bench.dtype.itemsize).floor(bench.peaks)
    slope |= beside_floor(slope["median_seconds"]["slot"], floor)
    slope |= goal("slope, times a step of text,", slope["ratio"], at_most=1.1)
    # 2. Memory, at the largest K.
    with PeakMemory(bench) as memory:
        ways[f"K = {sizes[-1]}"]()
    formula = answer_memory(model.config, inputs, sizes[-1] + 2 + ANSWER_TOKENS, bench.dtype.itemsize)
    slope |= {"memory_bytes": memory.bytes, "memory_formula_bytes": formula}
    slope["memory_of_formula"] = memory.bytes / formula
    console.print(
        f"{name}: memory of an answer is {slope['memory_of_formula']:.2f} times its formula (goal: at most 1.1)"
    )
    return [slope]


def answer_memory(config: Any, inputs: Any, new_tokens: int, itemsize: int) -> int:
    """Bytes that an answer needs beside weights and inputs: `cache + merged video + the larger of two activations`.

    In the vision tower the pixels in its own precision, and for each patch its rotated queries and keys in float32 and
    three states; in the language model for each token three vectors of the feed-forward layer's width and five states.
    """
    text, vision = config.get_text_config(), config.vision_config
    batch_size, prompt = inputs["input_ids"].shape
    patches = inputs["pixel_values_videos"].shape[0]
    at_once = min(patches, config.vision_chunk_size)
    merged = int((inputs["input_ids"] == config.video_token_id).sum()) * text.hidden_size * itemsize
    tower = at_once * (max(3 * vision.intermediate_size, 9 * vision.hidden_size) + 5 * vision.hidden_size) * itemsize
    tower += inputs["pixel_values_videos"].numel() * (itemsize if itemsize < 4 else 0)
    language = batch_size * prompt * (3 * text.intermediate_size + 5 * text.hidden_size) * itemsize
    return cache_bytes(config, prompt + new_tokens, itemsize, batch_size) + merged + max(tower, language)


# ------------------------------------------------------------------ decoding steps


def measure_decode_step(bench: Bench) -> list[Result]:
    """a decoding step: growing cache, static, compiled (on GPUs, or with --compile); its matrix products alone"""
    results = []
    for name in bench.models_or("narrow", "slice"):
        model = build(name, bench.device, bench.dtype)
        for batch_size in bench.batch_sizes or (1, 8):
            results += _decode_step(bench, name, model, batch_size)
            torch.compiler.reset()
        del model
    return results


def _decode_step(bench: Bench, name: str, model: Any, batch_size: int) -> list[Result]:
    num_steps = 32
    inputs = {key: value.to(bench.device) for key, value in video_inputs(name, NUM_FRAMES, batch_size).items()}
    prompt = inputs["input_ids"].shape[1]
    # The prompt's ids alone: a step does not depend on where its keys came from.
    ids = torch.randint(0, 300, (batch_size, prompt), device=bench.device)
    shared = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **fixed(num_steps)}
    options: dict[str, dict[str, Any]] = {
        "growing cache": {},
        "static cache": {"cache_implementation": "static", "disable_compile": True},
    }
    if bench.is_cuda or bench.compile:
        compiling = CompileConfig() if bench.is_cuda else CompileConfig(mode="default")
        compiling._compile_all_devices = True
        options["static, compiled"] = {"cache_implementation": "static", "compile_config": compiling}
    layers = [module for module in model.model.language_model.modules() if isinstance(module, torch.nn.Linear)]
    layers.append(model.lm_head)
    vectors = {
        width: torch.randn(batch_size, 1, width, device=bench.device, dtype=bench.dtype)
        for width in {layer.in_features for layer in layers}
    }
    products = "matrix products alone"
    steps: dict[str, list[float]] = {way: [] for way in (*options, products)}

    def generate(way: str) -> None:
        times = StepTimes(bench.clock)
        model.generate(**shared, **options[way], stopping_criteria=[times])
        steps[way].append(statistics.median(times.seconds[2:]))  # after the prompt's, and the first's preparations

    @torch.no_grad()
    def multiply() -> None:
        seconds = []
        for _ in range(num_steps // 4):
            begin = bench.clock()
            for layer in layers:
                layer(vectors[layer.in_features])
            seconds.append(bench.clock() - begin)
        steps[products].append(statistics.median(seconds))

    ways = bench.try_out({**{way: partial(generate, way) for way in options}, products: multiply})
    for way in ways:
        ways[way]()  # once more: a second call may compile again
        steps[way].clear()
    bench.measure(ways, f"steps of {name}, batch {batch_size}")
    floor = decode_work(model.config, prompt + num_steps // 2, batch_size, bench.dtype.itemsize).floor(bench.peaks)
    results = []
    for way in ways:
        result: Result = {
            "workload": "a decoding step of generate, against one with a growing cache",
            "model": f"{name}, batch {batch_size}, {way}",
            "context": prompt,
            **summarize({"growing": steps["growing cache"], "this": steps[way]}, "this", "growing"),
        }
        result |= beside_floor(result["median_seconds"]["this"], floor)
        if way == list(options)[-1]:
            result |= goal("part of the floor", result["of_floor"], at_least=0.7)
        results.append(result)
    return results
