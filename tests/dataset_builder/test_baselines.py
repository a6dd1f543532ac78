"""Observers without dynamics are at chance on every world, and the same classifiers with dynamics are not."""

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pytest

from dataset_builder.sources.simulated import list_rows, scene_of
from dataset_builder.sources.worlds import (
    COLORS,
    WORLDS,
    BounceScene,
    CollideScene,
    ColorSwapScene,
    OrderScene,
    Scene,
    ShellGameScene,
    SpeedScene,
)


NUM_ROWS, NUM_FOLDS, SIGMAS = 2000, 5, 3.5
CELLS = np.arange(0, 112, 8), np.arange(0, 168, 8)
# Every few frames, to save time: by a stride that divides a swap's or a lamp's frames, or the same from either end of
# the clip, as a sample that tells swaps apart or the direction of time is no bag.
BAGS = {
    "shell_game": range(3, 48, 4),
    "bounce": range(0, 49, 4),
    "order": range(3, 48, 4),
    "speed": range(1, 48, 5),
    "collide": range(0, 49, 4),
    "color_swap": range(3, 48, 4),
}
OBSERVERS = ("first frame", "last frame", "frame at a known index", "bag of frames")


def ridge(train: np.ndarray, targets: np.ndarray, test: np.ndarray) -> np.ndarray:
    train, test = (np.hstack([one, np.ones((len(one), 1))]) for one in (train, test))
    return test @ np.linalg.solve(train.T @ train + 10 * np.eye(train.shape[1]), train.T @ targets)


def kernel_ridge(train: np.ndarray, targets: np.ndarray, test: np.ndarray) -> np.ndarray:
    from_train, from_test = squared_distances(train, train), squared_distances(test, train)
    scale = np.median(from_train) / 4 + 1e-9
    weights = np.linalg.solve(np.exp(-from_train / scale) + 0.3 * np.eye(len(train)), targets - targets.mean(0))
    return np.exp(-from_test / scale) @ weights


def nearest_neighbours(train: np.ndarray, targets: np.ndarray, test: np.ndarray) -> np.ndarray:
    nearest = np.argpartition(squared_distances(test, train), 15, axis=1)[:, :15]
    return targets[nearest].mean(1)


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0)


CLASSIFIERS = (ridge, kernel_ridge, nearest_neighbours)


def scores(features: np.ndarray, answers: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """Cross-validated accuracy of each classifier, fitted to each group of rows apart (another question, another fit).

    Folds are runs of neighbouring rows: answers are balanced in each run, so that no fold tells about another's.
    """
    spread = features.std(0)
    features = (features - features.mean(0))[:, spread > 1e-9] / spread[spread > 1e-9]
    if not features.shape[1]:
        features = np.zeros((len(features), 1))
    targets = np.eye(answers.max() + 1)[answers]
    accuracies = {}
    for classifier in CLASSIFIERS:
        is_right = np.zeros(len(answers), bool)
        for group in set(groups.tolist()):
            rows = np.flatnonzero(groups == group)
            for fold in np.array_split(rows, NUM_FOLDS):
                rest = np.setdiff1d(rows, fold)
                guesses = classifier(features[rest], targets[rest], features[fold]).argmax(1)
                is_right[fold] = guesses == answers[fold]
        accuracies[classifier.__name__] = float(is_right.mean())
    return accuracies


def assert_at_chance(accuracies: dict[str, float], num_answers: int) -> None:
    chance = 1 / num_answers
    band = SIGMAS * math.sqrt(chance * (1 - chance) / NUM_ROWS)
    # Rows with the same few features have the same neighbours and the same guess: over eight seeds of `color_swap`,
    # the accuracy of nearest neighbours varied 1.6 times as much as that of independent guesses, about chance.
    bands = {name: 1.6 * band if name == "nearest_neighbours" else band for name in accuracies}
    assert all(abs(accuracies[name] - chance) < bands[name] for name in bands), (accuracies, chance, bands)


@dataclass(frozen=True)
class Sample:
    rows: list[dict]
    scenes: list[Scene]
    answers: np.ndarray
    groups: np.ndarray  # what the question asks about, for worlds that ask different things


@lru_cache(maxsize=1)
def sample(world: str) -> Sample:
    rows = list(list_rows([world], NUM_ROWS, 11, {"train": 1.0}))
    scenes = [scene_of(row["scene"]) for row in rows]
    kinds = [(asked_dot(scene) if isinstance(scene, SpeedScene) else 0) for scene in scenes]
    return Sample(rows, scenes, np.array([scene.answer_idx for scene in scenes]), np.array(kinds))


def asked_dot(scene: SpeedScene) -> int:
    names = {color: name for name, color in COLORS.items()}
    if "faster" in scene.question:
        return -1
    return [names[color] in scene.question for color in scene.colors].index(True)


def one_hot(idx: int, num: int) -> list[float]:
    return [float(idx == one) for one in range(num)]


def circle(*turns: float) -> list[float]:
    return [part for turn in turns for part in (math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn))]


def lamps_by_option(scene: OrderScene) -> list[int]:
    """Lamps in an order that the question tells: the asked one, then the options."""
    names = {color: name for name, color in COLORS.items()}
    by_option = {f"the {names[color]} lamp": lamp for lamp, color in enumerate(scene.colors)}
    return [0, *(by_option[option] for option in scene.options)]


def seen_at(scene: Scene, frame_idx: int) -> list[float]:
    """All that one frame shows, exactly."""
    if isinstance(scene, ShellGameScene):
        feet, ball = scene.cups_at(frame_idx)
        cups = [part for foot in sorted(feet) for part in foot]
        start = one_hot(scene.start, 3) if frame_idx < 12 else [0.0] * 3
        return [*start, *(one - scene.floor for one in cups[1::2]), *cups[::2]]
    if isinstance(scene, ColorSwapScene):
        pairs = ((0, 1), (0, 2), (1, 2), None)
        return [
            *one_hot(pairs.index(scene.signal_at(frame_idx)), 4),
            *(one_hot(scene.start, 3) if frame_idx < scene.frames_per_swap else [0.0] * 3),
        ]
    if isinstance(scene, BounceScene):
        return list(scene.position_at(frame_idx))
    if isinstance(scene, OrderScene):
        return one_hot(lamps_by_option(scene).index(scene.lit_at(frame_idx)), len(scene.colors))
    if isinstance(scene, SpeedScene):
        return circle(*(scene.turns_at(dot, frame_idx / scene.fps) for dot in (0, 1)))
    assert isinstance(scene, CollideScene)
    ball, ring = scene.turns_at(frame_idx)
    return circle(ball, ring, ball - ring)


def seen_in_bag(scene: Scene) -> list[float]:
    """What frames without their order tell: all but the direction of time, or but the order of the swaps or lamps."""
    last_idx = scene.num_frames - 1
    if isinstance(scene, (ShellGameScene, ColorSwapScene)):
        counts = [scene.swaps.count(pair) for pair in ((0, 1), (0, 2), (1, 2))]
        return one_hot(scene.start * 125 + counts[0] * 25 + counts[1] * 5 + counts[2], 375)
    if isinstance(scene, OrderScene):
        lit = [scene.lit_at(frame_idx) for frame_idx in range(scene.num_frames)]
        return [float(lit.count(lamp)) for lamp in lamps_by_option(scene)]
    if isinstance(scene, SpeedScene):  # time turned so that the first dot moves clockwise
        turned = scene.ways[0] < 0
        starts = [scene.turns_at(dot, last_idx / scene.fps if turned else 0.0) for dot in (0, 1)]
        faster = 1 if (scene.faster_at_end == 0) != turned else -1
        swap = (scene.swap_seconds * scene.fps / last_idx - 0.5) * (-1 if turned else 1)
        return [*circle(*starts), scene.ways[0] * scene.ways[1], faster, swap, faster * swap, *scene.speeds]
    if isinstance(scene, BounceScene):  # time turned so that the ball starts on the left of where it ends
        ends = sorted([scene.position_at(0), scene.position_at(last_idx)])
        return [*ends[0], *ends[1], *scene.velocity, *circle(*(one * scene.velocity[0] for one in (1, 2, 4)))]
    assert isinstance(scene, CollideScene)  # time turned so that the ball gains on the half ring
    turned = (scene.speeds[0] > scene.speeds[1]) == scene.is_reversed
    (from_ball, from_ring), (to_ball, to_ring) = (
        scene.turns_at(idx) for idx in ((last_idx, 0) if turned else (0, last_idx))
    )
    return [*circle(from_ball - from_ring, to_ball - to_ring), abs(scene.speeds[0] - scene.speeds[1])]


def seen_with_dynamics(scene: Scene) -> list[float]:
    """What an observer of motion could work out, so that a simple classifier gets the answer from it."""
    if isinstance(scene, (ShellGameScene, ColorSwapScene)):
        ball = scene.start
        for low, high in scene.swaps:
            ball = high if ball == low else low if ball == high else ball
        return one_hot(ball, 3)
    if isinstance(scene, OrderScene):
        lit = [scene.lit_at(frame_idx) for frame_idx in range(scene.num_frames)]
        nexts = [after for before, after in pairwise(lit) if before == 0 and after != 0]
        return one_hot(lamps_by_option(scene).index(nexts[0]), len(scene.colors))
    if isinstance(scene, SpeedScene):
        step = 3 / scene.fps
        late = (scene.num_frames - 1) / scene.fps
        paths = [scene.turns_at(dot, late) - scene.turns_at(dot, late - step) for dot in (0, 1)]
        return [*paths, abs(paths[0]) - abs(paths[1])]
    last_idx = scene.num_frames - 1 + scene.thought_num_frames - 1
    return seen_at(scene, last_idx)


@pytest.mark.parametrize("world", WORLDS)
def test_question_and_options_do_not_tell_the_letter(world):
    rows = sample(world).rows
    texts = [[row["question"], *(f"{place}: {option}" for place, option in enumerate(row["options"]))] for row in rows]
    columns = {text: idx for idx, text in enumerate(sorted({text for one in texts for text in one}))}
    features = np.zeros((NUM_ROWS, len(columns)))
    for row_idx, one in enumerate(texts):
        features[row_idx, [columns[text] for text in one]] = 1
    letters = np.array(["ABCDEF".index(row["answer"]) for row in rows])
    accuracies = scores(features, letters, np.zeros(NUM_ROWS))
    assert_at_chance(accuracies, len(rows[0]["options"]))


@pytest.mark.parametrize("world", WORLDS)
def test_state_of_frames_without_order_is_at_chance_and_with_dynamics_is_not(world):
    drawn = sample(world)
    known = np.random.default_rng(5).integers(0, drawn.scenes[0].num_frames, NUM_ROWS)
    features = {
        "first frame": [seen_at(scene, 0) for scene in drawn.scenes],
        "last frame": [seen_at(scene, scene.num_frames - 1) for scene in drawn.scenes],
        "frame at a known index": [[*seen_at(one, int(idx)), idx / 10] for one, idx in zip(drawn.scenes, known)],
        "bag of frames": [seen_in_bag(scene) for scene in drawn.scenes],
    }
    num_answers = WORLDS[world]().num_answers
    for observer in OBSERVERS:
        accuracies = scores(np.array(features[observer], float), drawn.answers, drawn.groups)
        print(f"{world:>10} state {observer}: {accuracies}")
        assert_at_chance(accuracies, num_answers)
    dynamics = np.array([seen_with_dynamics(scene) for scene in drawn.scenes])
    accuracies = scores(dynamics, drawn.answers, drawn.groups)
    print(f"{world:>10} state with dynamics: {accuracies}")
    assert max(accuracies.values()) > 0.95, accuracies


def test_swaps_in_order_without_the_start_do_not_tell_the_cup():
    drawn = sample("shell_game")
    cells = [int("".join(str(low + high - 1) for low, high in scene.swaps), 3) for scene in drawn.scenes]
    features = np.array([one_hot(cell, 81) for cell in cells])
    assert_at_chance(scores(features, drawn.answers, drawn.groups), 3)


def masks(scene: Scene, frame: np.ndarray) -> np.ndarray:
    """Where a frame has each colour that matters, in cells of 8 x 8 pixels: `(num_colors, 14, 21)`."""
    if isinstance(scene, ShellGameScene):
        colors = [scene.ball_color, scene.cup_color]
    elif isinstance(scene, BounceScene):
        colors = [scene.color]
    elif isinstance(scene, OrderScene):
        colors = [scene.colors[lamp] for lamp in lamps_by_option(scene)]
    elif isinstance(scene, ColorSwapScene):
        colors = [COLORS[name] for name in scene.options]
    else:
        assert isinstance(scene, SpeedScene | CollideScene)
        colors = list(scene.colors)
    red, green, blue = np.moveaxis(frame, -1, 0)
    is_color = [(red == one[0]) & (green == one[1]) & (blue == one[2]) for one in colors]
    return np.stack([np.add.reduceat(np.add.reduceat(one, CELLS[0], 0, int), CELLS[1], 1) for one in is_color]) / 64


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_pixels_of_frames_without_order_are_at_chance_and_of_the_thought_video_are_not(world):
    drawn = sample(world)
    known = np.random.default_rng(5).integers(0, drawn.scenes[0].num_frames, NUM_ROWS)
    features: dict[str, list[np.ndarray]] = {observer: [] for observer in (*OBSERVERS, "thought video")}
    for scene, idx in zip(drawn.scenes, known):
        features["first frame"].append(masks(scene, scene.frame(0)).ravel())
        features["last frame"].append(masks(scene, scene.frame(scene.num_frames - 1)).ravel())
        features["frame at a known index"].append(np.append(masks(scene, scene.frame(int(idx))).ravel(), idx / 10))
        bag = np.stack([masks(scene, scene.frame(frame_idx)) for frame_idx in BAGS[world]])
        features["bag of frames"].append(np.concatenate([bag.mean(0).ravel(), bag.std(0).ravel()]))
        shown = scene.thought_num_frames - 1
        if isinstance(scene, OrderScene):  # when the second lamp lights up
            shown = scene.thought_num_frames // len(scene.colors)
        features["thought video"].append(masks(scene, scene.thought_frame(shown)).ravel())
    num_answers = WORLDS[world]().num_answers
    for observer in OBSERVERS:
        accuracies = scores(np.array(features[observer], float), drawn.answers, drawn.groups)
        print(f"{world:>10} pixels {observer}: {accuracies}")
        assert_at_chance(accuracies, num_answers)
    accuracies = scores(np.array(features["thought video"], float), drawn.answers, drawn.groups)
    print(f"{world:>10} pixels thought video: {accuracies}")
    assert max(accuracies.values()) > 1 / num_answers + 0.2, accuracies
