"""The `simulated` source: rows about procedural worlds, whose clips and thought videos are exact and free."""

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..schema import LETTERS, MULTIPLE_CHOICE, SPLITS
from .worlds import WORLDS, Scene, World


def scene_of(scene_json: str) -> Scene:
    """Rebuild the scene of a row from its `scene` column: the same in any process and any order.

    Args:
        scene_json (`str`): what `list_rows` wrote, all dials included, so that later defaults don't change old rows.
    Raises:
        ValueError: if it names a world or a dial that isn't known, or a dial's value is out of range.
    """
    scene = json.loads(scene_json)
    world = _make_world(scene["world"], scene["dials"])
    seed = (scene["seed"], scene["world"], scene["split"], scene["index"])
    return world.sample(_make_rng(*seed, "scene"), scene["answer_idx"])


def list_rows(
    worlds: Sequence[str],
    num_rows: int,
    seed: int,
    split_fractions: Mapping[str, float],
    dials: Mapping[str, Mapping[str, Any]] | None = None,
    shuffle_options: bool = True,
) -> Iterator[dict[str, Any]]:
    """List rows, worlds in turn and splits one after another, without rendering anything.

    Within a split and a world, letters and answers are each balanced to within one from the first row to any later
    one, and each pair of a letter and an answer is equally frequent after every `num_answers ** 2` rows. A row depends
    on the seed, its world, dials, split and index alone: more rows or other worlds don't change it, and no two rows
    share random numbers.

    Args:
        worlds (`Sequence[str]`): names in `WORLDS`, each once.
        num_rows (`int`): rows in all, at least 1.
        split_fractions (`Mapping[str, float]`): part of the rows in each split, for example
            `{"train": 0.8, "validation": 0.1, "test": 0.1}`; whole rows go to the largest remainders.
        dials (`Mapping[str, Mapping]`, *optional*): values by world that differ from the world's defaults, for example
            `{"shell_game": {"num_swaps": 6}}`.
        shuffle_options (`bool`): False keeps each world's own order, for example left, middle, right: a letter then
            always means the same, and which option is where need not be read.
    Returns:
        An iterator over rows: the contract's columns that a source knows, `split`, `scene`, `source_plan` and
        `video_stat`.
    Raises:
        ValueError: on an unknown world, dial or split, fewer than 1 row, or fractions that aren't from 0 to 1 and 1 in
            all. Raised by the call, not by the first row.
    """
    if num_rows < 1:
        raise ValueError(f"Saw num_rows={num_rows}, expected at least 1.")
    if not worlds or len(set(worlds)) != len(worlds):
        raise ValueError(f"Saw worlds {list(worlds)}, expected at least one, each once. Known: {', '.join(WORLDS)}.")
    dials = dials or {}
    made = {name: _make_world(name, dials.get(name, {})) for name in (*worlds, *dials)}
    split_sizes = _split_sizes(num_rows, split_fractions)
    return _rows([made[name] for name in worlds], seed, split_sizes, shuffle_options)


def _rows(
    worlds: Sequence[World], seed: int, split_sizes: Mapping[str, int], shuffle_options: bool
) -> Iterator[dict[str, Any]]:
    row_idx = 0
    for split, size in split_sizes.items():
        indices: Counter[str] = Counter()
        for _ in range(size):
            world = worlds[row_idx % len(worlds)]
            yield _row(world, seed, split, indices[world.name], shuffle_options)
            indices[world.name] += 1
            row_idx += 1


def _row(world: World, seed: int, split: str, index: int, shuffle_options: bool) -> dict[str, Any]:
    answer_idx, letter_idx = _balanced_answer(world, seed, split, index)
    scene_json = json.dumps(
        {
            "world": world.name,
            "dials": dataclasses.asdict(world),
            "seed": seed,
            "split": split,
            "index": index,
            "answer_idx": answer_idx,
        },
        sort_keys=True,
    )
    scene = scene_of(scene_json)
    options = list(scene.options)
    if shuffle_options:
        wrong = [*scene.options[:answer_idx], *scene.options[answer_idx + 1 :]]
        options = [str(one) for one in _make_rng(seed, world.name, split, index, "options").permutation(wrong)]
        options.insert(letter_idx, scene.options[answer_idx])
    else:
        letter_idx = answer_idx
    row_id = f"simulated-{world.name}-{seed}-{split}-{index:05d}"
    return {
        "id": row_id,
        "source": "simulated",
        "video_id": row_id,
        "video_path": f"{world.name}/{row_id}.mp4",
        "video_start": None,
        "video_end": None,
        "question": scene.question,
        "options": options,
        "answer": LETTERS[letter_idx],
        "problem_type": MULTIPLE_CHOICE,
        "license": "apache-2.0",
        "split": split,
        "scene": scene_json,
        "source_plan": scene.plan,
        "video_stat": "",
    }


def _balanced_answer(world: World, seed: int, split: str, index: int) -> tuple[int, int]:
    """The row's answer and letter: each once in a block of `num_answers` rows, each pair once in as many blocks."""
    num = world.num_answers
    square, block = index // num**2, index // num
    answer_idx = _make_rng(seed, world.name, split, block, "answers").permutation(num)[index % num]
    shift = _make_rng(seed, world.name, split, square, "letters").permutation(num)[block % num]
    return int(answer_idx), int((answer_idx + shift) % num)


def _make_rng(*parts: str | int) -> np.random.Generator:
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))


def _make_world(name: str, dials: Mapping[str, Any]) -> World:
    if name not in WORLDS:
        raise ValueError(f"Saw world {name!r}, expected one of {', '.join(WORLDS)}.")
    known = [field.name for field in dataclasses.fields(WORLDS[name])]
    unknown = sorted(set(dials) - set(known))
    if unknown:
        raise ValueError(f"World {name!r}: saw dials {', '.join(unknown)}, expected some of {', '.join(known)}.")
    return WORLDS[name](**dials)


def _split_sizes(num_rows: int, fractions: Mapping[str, float]) -> dict[str, int]:
    """Whole rows by split, in the order of `SPLITS`; what rounding down leaves goes to the largest remainders."""
    unknown = sorted(set(fractions) - set(SPLITS))
    in_range = all(0 <= fraction <= 1 for fraction in fractions.values())
    if unknown or not in_range or not math.isclose(sum(fractions.values()), 1, abs_tol=1e-6):
        raise ValueError(
            f"Saw split fractions {dict(fractions)}, expected numbers from 0 to 1 and 1 in all for some of the splits "
            f"{', '.join(SPLITS)}."
        )
    shares = {split: num_rows * fractions[split] for split in SPLITS if fractions.get(split)}
    sizes = {split: math.floor(share + 1e-9) for split, share in shares.items()}
    by_remainder = sorted(shares, key=lambda split: sizes[split] - shares[split])
    for split in by_remainder[: num_rows - sum(sizes.values())]:
        sizes[split] += 1
    return sizes
