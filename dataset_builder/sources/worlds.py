"""Procedural worlds: clips with questions that only the order of their frames can answer, and exact thought videos.

A scene of each world is drawn for an answer that the caller chooses. What an observer without dynamics sees of the
scene is then distributed alike under every answer: each world's docstring says for which observers, and why. Observers
are: the question alone; one frame, at a known or an unknown position in the clip; the bag of frames, which is all
frames in an unknown order.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageDraw


HEIGHT, WIDTH = 112, 168
FPS = 12
COLORS = {
    "red": (214, 39, 40),
    "yellow": (235, 190, 20),
    "green": (30, 150, 60),
    "cyan": (0, 185, 200),
    "blue": (35, 90, 220),
    "purple": (150, 60, 190),
}

Color = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One clip with its question, its answer and its thought video; every frame is a pure function of its index.

    Attributes:
        question (`str`): without options.
        options (`tuple[str, ...]`): answers in the world's own order, which the caller shuffles.
        answer_idx (`int`): position of the right one in `options`.
        plan (`str`): what moves, when (seconds from the clip's first frame), and why the answer follows.
        num_frames, thought_num_frames (`int`): lengths of the clip and of the thought video, both at `fps`.
        ground, ink (`tuple`): colours of the background and of lines on it, RGB from 0 to 255.
    """

    question: str
    options: tuple[str, ...]
    answer_idx: int
    plan: str
    num_frames: int
    thought_num_frames: int
    ground: Color
    ink: Color
    fps: float = float(FPS)

    def frame(self, frame_idx: int) -> np.ndarray:
        """The clip's frame at `frame_idx` (0 to `num_frames - 1`): `(HEIGHT, WIDTH, 3)`, `uint8`."""
        _check_index(frame_idx, self.num_frames)
        image = Image.new("RGB", (WIDTH, HEIGHT), self.ground)
        self._paint(ImageDraw.Draw(image), frame_idx)
        return np.array(image)

    def thought_frame(self, frame_idx: int) -> np.ndarray:
        """The thought video's frame at `frame_idx` (0 to `thought_num_frames - 1`): `(HEIGHT, WIDTH, 3)`, `uint8`."""
        _check_index(frame_idx, self.thought_num_frames)
        image = Image.new("RGB", (WIDTH, HEIGHT), self.ground)
        self._paint_thought(ImageDraw.Draw(image), frame_idx)
        return np.array(image)

    def frames(self) -> np.ndarray:
        """The whole clip: `(num_frames, HEIGHT, WIDTH, 3)`, `uint8`."""
        return np.stack([self.frame(frame_idx) for frame_idx in range(self.num_frames)])

    def thought_frames(self) -> np.ndarray:
        """The whole thought video: `(thought_num_frames, HEIGHT, WIDTH, 3)`, `uint8`."""
        return np.stack([self.thought_frame(frame_idx) for frame_idx in range(self.thought_num_frames)])

    def _paint(self, draw: ImageDraw.ImageDraw, frame_idx: int) -> None:
        raise NotImplementedError

    def _paint_thought(self, draw: ImageDraw.ImageDraw, frame_idx: int) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class World:
    """A family of scenes; its fields are dials of difficulty.

    Raises:
        ValueError: if a dial has another type than its default, or a value outside its range.
    """

    name: ClassVar[str]

    @property
    def num_answers(self) -> int:
        """Number of options of every scene of this world."""
        raise NotImplementedError

    def sample(self, rng: np.random.Generator, answer_idx: int) -> Scene:
        """Draw a scene whose answer is option `answer_idx` (0 to `num_answers - 1`) in the world's own order."""
        raise NotImplementedError

    def _check_dials(self, **bounds: tuple[float, float]) -> None:
        for field in dataclasses.fields(self):
            value, (low, high) = getattr(self, field.name), bounds[field.name]
            types = (int,) if isinstance(field.default, int) else (int, float)
            if type(value) not in types or not low <= value <= high:
                expected = f"{'a whole number' if types == (int,) else 'a number'} from {low} to {high}"
                raise ValueError(f"World {self.name!r}: saw {field.name}={value!r}, expected {expected}.")


@dataclass(frozen=True)
class ShellGame(World):
    """Identical cups change places, two at a time; one hides a ball that is shown only at the start.

    At chance, exactly, with at least as many swaps as cups: the question, the last frame (all cups look alike), any
    frame at a known position, the bag of frames, and even all swaps in order without the start. For an observer of the
    bag knows the start and which pairs swap, but not in which order; an observer of the swaps knows the permutation,
    but not the start. So the pairs are drawn first, without regard to the answer; then the permutation, uniformly from
    as many as there are cups, all of which some order of these pairs gives and which take each start to each end once
    (a coset of a regular group); then the order, uniformly from those that give the permutation. The start is what the
    permutation takes to the answer. Given start and pairs, all answers are equally likely, and so they are given the
    ordered swaps. A sample of the frames keeps this if its stride divides `frames_per_swap`; else the phases that it
    catches can tell swaps apart.

    With fewer swaps than cups, pairs can't give all those permutations. Each swap is then drawn uniformly and on its
    own, and the start is again what the permutation takes to the answer. The question, the last frame and all swaps
    without the start are still at chance, exactly. The bag of frames is not: start and pairs together can rule answers
    out, and with one swap they give the answer. A frame that shows the start is at chance with 3 cups, not with 4: the
    ball ends under its first cup with probability 1/2, 1/3 or 5/18 after 1, 2 or 3 swaps.

    Thought video: the same clip, with the ball seen through its cup.

    Args:
        num_cups (`int`): 3 or 4.
        num_swaps (`int`): 1 to 10; with fewer than `num_cups`, the bag of frames tells something (see above).
        frames_per_swap (`int`): at 12 frames a second; fewer is faster.
    """

    name: ClassVar[str] = "shell_game"

    num_cups: int = 3
    num_swaps: int = 4
    frames_per_swap: int = 8

    def __post_init__(self) -> None:
        self._check_dials(num_cups=(3, 4), num_swaps=(1, 10), frames_per_swap=(4, 48))

    @property
    def num_answers(self) -> int:
        return self.num_cups

    def sample(self, rng: np.random.Generator, answer_idx: int) -> "ShellGameScene":
        swaps, permutation = _draw_swaps(rng, self.num_cups, self.num_swaps)
        start = permutation.index(answer_idx)

        names = ["left", "middle", "right"]
        options = tuple(f"{name} cup" for name in names)
        if self.num_cups > 3:
            names = [f"cup {cup + 1}" for cup in range(self.num_cups)]
            options = tuple(f"{name} from the left" for name in names)
        steps, ball = [], start
        for swap_idx, (low, high) in enumerate(swaps):
            ball = {low: high, high: low}.get(ball, ball)
            seconds = (_INTRO_FRAMES + swap_idx * self.frames_per_swap) / FPS
            steps.append(f"at {seconds:.1f} s {names[low]} and {names[high]} swap, ball at {names[ball]}")
        plan = (
            f"The ball starts under the {options[start]}. Then {'; '.join(steps)}. It ends under the {options[ball]}."
        )

        ground, ink = _draw_ground(rng)
        spacing = WIDTH / self.num_cups
        num_frames = _INTRO_FRAMES + self.num_swaps * self.frames_per_swap + _REST_FRAMES
        cup_color, ball_color = rng.permutation(list(COLORS))[:2]
        return ShellGameScene(
            question="A ball is hidden under a cup, and the cups change places. Where is the ball at the end?",
            options=options,
            answer_idx=answer_idx,
            plan=plan,
            num_frames=num_frames,
            thought_num_frames=num_frames,
            ground=ground,
            ink=ink,
            start=start,
            swaps=tuple(swaps),
            frames_per_swap=self.frames_per_swap,
            spots=tuple(spacing * (cup + 0.5) + rng.uniform(-0.08, 0.08) * spacing for cup in range(self.num_cups)),
            floor=rng.uniform(82, 92),
            cup_size=(rng.uniform(0.48, 0.6) * spacing, rng.uniform(30, 38)),
            cup_color=COLORS[cup_color],
            ball_color=COLORS[ball_color],
        )


_INTRO_FRAMES, _LIFTED_FRAMES, _REST_FRAMES = 12, 6, 4
# By number of cups, permutations that take each start to each end once; all even, as swaps reach just one parity.
_REGULAR_GROUPS: dict[int, list[tuple[int, ...]]] = {
    3: [(0, 1, 2), (1, 2, 0), (2, 0, 1)],
    4: [(0, 1, 2, 3), (1, 0, 3, 2), (2, 3, 0, 1), (3, 2, 1, 0)],
}


@dataclass(frozen=True, kw_only=True)
class ShellGameScene(Scene):
    """A scene of `ShellGame`: cups on a table, and a ball under one of them."""

    start: int  # the ball's cup
    swaps: tuple[tuple[int, int], ...]  # spots whose cups swap, in order
    frames_per_swap: int
    spots: tuple[float, ...]  # x in pixels
    floor: float  # y in pixels
    cup_size: tuple[float, float]
    cup_color: Color
    ball_color: Color

    def cups_at(self, frame_idx: int) -> tuple[list[tuple[float, float]], int]:
        """Middle of each cup's foot, `(x, y)` in pixels, from back to front, and which of them has the ball."""
        moving, phase = divmod(frame_idx - _INTRO_FRAMES, self.frames_per_swap)
        ball = self.start
        for low, high in self.swaps[: max(moving, 0)]:
            ball = {low: high, high: low}.get(ball, ball)
        feet = [(x, self.floor) for x in self.spots]
        order = list(range(len(feet)))
        if moving < 0:
            lowered = max(0, frame_idx - _LIFTED_FRAMES + 1) / (_INTRO_FRAMES - _LIFTED_FRAMES)
            feet[ball] = (feet[ball][0], self.floor - 26 * (1 - lowered))
        elif moving < len(self.swaps):
            low, high = self.swaps[moving]
            angle = math.pi * (phase + 1) / self.frames_per_swap
            middle, reach = (self.spots[low] + self.spots[high]) / 2, (self.spots[high] - self.spots[low]) / 2
            x, depth = reach * math.cos(angle), 12 * math.sin(angle)
            feet[low] = (middle - x, self.floor + depth)  # the left cup passes in front
            feet[high] = (middle + x, self.floor - depth)
            order.sort(key=lambda cup: (feet[cup][1], cup))
        return [feet[cup] for cup in order], order.index(ball)

    def _paint(self, draw: ImageDraw.ImageDraw, frame_idx: int, see_through: bool = False) -> None:
        feet, ball_cup = self.cups_at(frame_idx)
        width, height = self.cup_size
        draw.line((0, self.floor + 14, WIDTH, self.floor + 14), fill=self.ink)
        ball_x, ball_y = feet[ball_cup]
        if frame_idx < _INTRO_FRAMES:
            ball_y = self.floor
            _disc(draw, ball_x, ball_y - 7, 6, self.ball_color)
        for x, y in feet:
            top = y - height
            draw.polygon(
                [(x - width * 0.32, top), (x + width * 0.32, top), (x + width / 2, y), (x - width / 2, y)],
                fill=self.cup_color,
                outline=self.ink,
            )
            draw.rectangle((x - width / 2 - 1, y - 5, x + width / 2 + 1, y), fill=self.cup_color, outline=self.ink)
        if see_through:
            _disc(draw, ball_x, ball_y - 7, 6, self.ball_color)

    def _paint_thought(self, draw: ImageDraw.ImageDraw, frame_idx: int) -> None:
        self._paint(draw, frame_idx, see_through=True)


def _draw_swaps(
    rng: np.random.Generator, num_cups: int, num_swaps: int
) -> tuple[list[tuple[int, int]], tuple[int, ...]]:
    """Swaps and their permutation: where each cup ends. See `ShellGame` for what they tell and what not."""
    pairs = list(combinations(range(num_cups), 2))
    if num_swaps < num_cups:  # each on its own
        swaps = [pairs[pair_idx] for pair_idx in rng.integers(len(pairs), size=num_swaps)]
        permutation = tuple(range(num_cups))
        for low, high in swaps:
            permutation = _swap_ends(permutation, low, high)
        return swaps, permutation
    while True:
        counts = tuple(int(count) for count in rng.multinomial(num_swaps, [1 / len(pairs)] * len(pairs)))
        num_orders = _num_orders(counts, num_cups)
        reachable = sorted(num_orders)
        first = reachable[rng.integers(len(reachable))]
        coset = [tuple(first[cup] for cup in element) for element in _REGULAR_GROUPS[num_cups]]
        if all(permutation in num_orders for permutation in coset):
            break
    permutation = coset[rng.integers(len(coset))]
    return [pairs[pair_idx] for pair_idx in _draw_order(rng, counts, permutation)], permutation


@lru_cache(maxsize=10_000)
def _num_orders(counts: tuple[int, ...], num_cups: int) -> dict[tuple[int, ...], int]:
    """How many orders of a multiset of swaps give each permutation; `permutation[start]` is where a cup ends."""
    if not any(counts):
        return {tuple(range(num_cups)): 1}
    totals: dict[tuple[int, ...], int] = {}
    for pair_idx, (low, high) in enumerate(combinations(range(num_cups), 2)):
        if counts[pair_idx]:
            for permutation, num in _num_orders(_without(counts, pair_idx), num_cups).items():
                swapped = _swap_ends(permutation, low, high)
                totals[swapped] = totals.get(swapped, 0) + num
    return totals


def _draw_order(rng: np.random.Generator, counts: tuple[int, ...], permutation: tuple[int, ...]) -> list[int]:
    """Draw one of the orders that give `permutation`, all equally likely, from the last swap to the first."""
    pairs = list(combinations(range(len(permutation)), 2))
    order: list[int] = []
    while any(counts):
        nums = [
            _num_orders(_without(counts, idx), len(permutation)).get(_swap_ends(permutation, *pair), 0) if count else 0
            for idx, (pair, count) in enumerate(zip(pairs, counts))
        ]
        last = int(rng.choice(len(pairs), p=np.array(nums) / sum(nums)))
        counts, permutation = _without(counts, last), _swap_ends(permutation, *pairs[last])
        order.insert(0, last)
    return order


def _without(counts: tuple[int, ...], pair_idx: int) -> tuple[int, ...]:
    return (*counts[:pair_idx], counts[pair_idx] - 1, *counts[pair_idx + 1 :])


def _swap_ends(permutation: tuple[int, ...], low: int, high: int) -> tuple[int, ...]:
    return tuple({low: high, high: low}.get(end, end) for end in permutation)


@dataclass(frozen=True)
class Bounce(World):
    """A ball bounces in a box without gravity: in which half will it be some time after the clip?

    At chance, exactly: the question, the first and the last frame, a frame at an unknown position, the bag of frames.
    - The bag: `seconds_ahead` after the clip and as long before it the ball is in different halves (other trajectories
      are drawn again), and the answer decides whether time runs forwards or backwards. Both have the same frames.
    - The last frame: unfolded at the walls, sideways motion is steady and has a period of two box widths. One width
      per `seconds_ahead` more speed mirrors the ball at the time that is asked about and, as the clip is twice as long
      as `seconds_ahead`, at the time before it too: the answer flips, the last frame stays. Speeds have the density of
      half a sine wave, three such steps wide, where the middle one of three speeds a step apart is as likely as the
      outer two together, which have the other answer. The first frame: by reversal.
    Nearly: a frame at a known position between the ends. The best guess is right for 51 % of the rows on average, and
    for 53 % a sixth of the clip from either end, where `margin` is felt (55 % with a `margin` of 0.05).

    Thought video: what comes next, from the clip's last frame to the time that is asked about.

    Args:
        seconds_ahead (`float`): how far ahead the question looks, a multiple of 1/12 s; the clip is twice as long.
        slowest (`float`): the least horizontal speed, in box widths per `seconds_ahead`; the fastest is 3 more.
        margin (`float`): least distance of the answer from the middle line, in box widths.
    """

    name: ClassVar[str] = "bounce"

    seconds_ahead: float = 2.0
    slowest: float = 0.4
    margin: float = 0.03

    def __post_init__(self) -> None:
        self._check_dials(seconds_ahead=(0.5, 10.0), slowest=(0.0, 3.0), margin=(0.0, 0.1))
        _check_frames(self.name, "seconds_ahead", self.seconds_ahead)

    @property
    def num_answers(self) -> int:
        return 2

    def sample(self, rng: np.random.Generator, answer_idx: int) -> "BounceScene":
        ahead = self.seconds_ahead
        while True:
            start = rng.uniform(0, 2)
            sine = math.asin(rng.uniform(-1, 1)) / math.pi + 0.5  # density: half a sine wave on [0, 1]
            speed = (self.slowest + 3 * sine) / ahead
            after, before = _fold(start + speed * 3 * ahead) - 0.5, _fold(start - speed * ahead) - 0.5
            if after * before < 0 and min(abs(after), abs(before)) > self.margin:
                break
        is_reversed = (after > 0) != (answer_idx == 1)
        num_frames = 2 * round(ahead * FPS) + 1
        ground, ink = _draw_ground(rng)
        left, top = rng.uniform(6, 14), rng.uniform(6, 14)
        scene = BounceScene(
            question=f"A ball bounces off the walls of a box. In which half of the box is it {ahead:g} seconds after "
            "the video ends?",
            options=("left half", "right half"),
            answer_idx=answer_idx,
            plan="",
            num_frames=num_frames,
            thought_num_frames=round(ahead * FPS) + 1,
            ground=ground,
            ink=ink,
            start=(start, rng.uniform(0, 2)),
            velocity=(speed, rng.uniform(0.2, 0.6)),
            is_reversed=is_reversed,
            box=(left, top, WIDTH - left, HEIGHT - top),
            radius=rng.uniform(5, 8),
            color=COLORS[str(rng.choice(list(COLORS)))],
        )
        return dataclasses.replace(scene, plan=_bounce_plan(scene))


@dataclass(frozen=True, kw_only=True)
class BounceScene(Scene):
    """A scene of `Bounce`: a ball in a box with a dashed middle line."""

    start: tuple[float, float]  # unfolded position at time 0, in ranges of the ball's centre
    velocity: tuple[float, float]  # the same a second
    is_reversed: bool
    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels
    radius: float
    color: Color

    def position_at(self, frame_idx: int) -> tuple[float, float]:
        """The ball's centre, from 0 (left, top) to 1 (right, bottom); frames past the clip's end continue it."""
        seconds = (self.num_frames - 1 - frame_idx if self.is_reversed else frame_idx) / FPS
        return (
            _fold(self.start[0] + self.velocity[0] * seconds),
            _fold(self.start[1] + self.velocity[1] * seconds),
        )

    def _paint(self, draw: ImageDraw.ImageDraw, frame_idx: int) -> None:
        left, top, right, bottom = self.box
        draw.rectangle(self.box, outline=self.ink, width=2)
        for dash in range(round(top), round(bottom), 8):
            draw.line((WIDTH / 2, dash, WIDTH / 2, dash + 3), fill=self.ink)
        x, y = self.position_at(frame_idx)
        inset = self.radius + 2
        x, y = left + inset + x * (right - left - 2 * inset), top + inset + y * (bottom - top - 2 * inset)
        _disc(draw, x, y, self.radius, self.color)

    def _paint_thought(self, draw: ImageDraw.ImageDraw, frame_idx: int) -> None:
        self._paint(draw, self.num_frames - 1 + frame_idx)


def _bounce_plan(scene: BounceScene) -> str:
    end_idx = scene.num_frames - 1
    end, end_seconds = scene.position_at(end_idx)[0], end_idx / FPS
    speed = scene.velocity[0]
    unfolded = scene.start[0] + (0 if scene.is_reversed else speed * end_seconds)
    moves_right = (unfolded % 2 < 1) != scene.is_reversed
    asked_seconds = end_seconds + (scene.thought_num_frames - 1) / FPS
    wall, seconds, hits = moves_right, end_seconds + (1 - end if moves_right else end) / speed, []
    while seconds < asked_seconds:
        hits.append(f"the {'right' if wall else 'left'} wall at {seconds:.1f} s")
        wall, seconds = not wall, seconds + 1 / speed
    asked = scene.position_at(end_idx + scene.thought_num_frames - 1)[0]
    return (
        f"The ball crosses the box sideways at {speed:.2f} widths a second. When the video ends, at "
        f"{end_seconds:.1f} s, it is {end:.0%} of the way from left to right and moves "
        f"{'right' if moves_right else 'left'}. It then hits {' and '.join(hits) if hits else 'no side wall'}. "
        f"At {asked_seconds:.1f} s it is {asked:.0%} of the way: in the {scene.options[scene.answer_idx]}."
    )


def _fold(unfolded: float) -> float:
    """Position between two walls at 0 and 1 of a ball that would be at `unfolded` without walls."""
    unfolded %= 2
    return 2 - unfolded if unfolded > 1 else unfolded


@dataclass(frozen=True)
class Order(World):
    """Lamps light up one at a time, round and round in a fixed order: which comes after the one that is asked about?

    At chance, exactly: the question, any frame at a known position, the bag of frames. A frame shows one lit lamp, and
    the bag shows each lamp lit equally often, because the clip is a whole number of rounds; the round starts at a
    uniformly random phase, lamps switch without fading, and their places and colours are drawn without regard to the
    order.

    Thought video: one round, three times slower, from the lamp that is asked about (ringed), with an arrow from each
    lamp to the next.

    Args:
        num_lamps (`int`): 3 to 6.
        num_rounds (`int`): rounds in the clip.
        frames_per_lamp (`int`): how long each lamp is lit, at 12 frames a second.
    """

    name: ClassVar[str] = "order"

    num_lamps: int = 4
    num_rounds: int = 3
    frames_per_lamp: int = 4

    def __post_init__(self) -> None:
        self._check_dials(num_lamps=(3, len(COLORS)), num_rounds=(1, 20), frames_per_lamp=(1, 48))

    @property
    def num_answers(self) -> int:
        return self.num_lamps - 1

    def sample(self, rng: np.random.Generator, answer_idx: int) -> "OrderScene":
        names = list(COLORS)
        colors = [names[idx] for idx in sorted(rng.permutation(len(names))[: self.num_lamps])]
        asked = colors[rng.integers(self.num_lamps)]
        options = [color for color in colors if color != asked]
        answer = options[answer_idx]
        order = [asked, answer, *(str(color) for color in rng.permutation([c for c in options if c != answer]))]

        round_frames = self.num_lamps * self.frames_per_lamp
        phase = int(rng.integers(round_frames))
        first_lit = math.ceil(phase / round_frames) * round_frames - phase  # the asked lamp's first start in the clip
        times = [first_lit / FPS + lamp * self.frames_per_lamp / FPS for lamp in range(self.num_lamps)]
        steps = ", ".join(f"{color} at {seconds:.1f} s" for color, seconds in zip(order, times))
        ground, ink = _draw_ground(rng)
        turn, reach = rng.uniform(0, 2 * math.pi), rng.uniform(32, 38)
        angles = [turn + 2 * math.pi * spot / self.num_lamps for spot in rng.permutation(self.num_lamps)]
        return OrderScene(
            question=f"Coloured lamps light up one after another, always in the same order. Which lamp lights up "
            f"right after the {asked} lamp?",
            options=tuple(f"the {color} lamp" for color in options),
            answer_idx=answer_idx,
            plan=f"The lamps light up in this order, round and round: {steps}. So {answer} follows {asked}.",
            num_frames=self.num_rounds * round_frames,
            thought_num_frames=3 * round_frames,
            ground=ground,
            ink=ink,
            colors=tuple(COLORS[color] for color in order),
            places=tuple((WIDTH / 2 + 1.5 * reach * math.cos(a), HEIGHT / 2 + reach * math.sin(a)) for a in angles),
            phase=phase,
            frames_per_lamp=self.frames_per_lamp,
        )


@dataclass(frozen=True, kw_only=True)
class OrderScene(Scene):
    """A scene of `Order`: lamps around the middle of the frame, dim unless lit."""

    colors: tuple[Color, ...]  # in the order in which the lamps light up, the asked one first
    places: tuple[tuple[float, float], ...]  # of the same lamps, in pixels
    phase: int  # frames since the asked lamp lit up, at frame 0
    frames_per_lamp: int

    def lit_at(self, frame_idx: int) -> int:
        """Which lamp is lit, counted from the asked one in the order in which they light up."""
        return (frame_idx + self.phase) // self.frames_per_lamp % len(self.colors)

    def _paint(self, draw: ImageDraw.ImageDraw, frame_idx: int) -> None:
        self._paint_lamps(draw, self.lit_at(frame_idx))

    def _paint_lamps(self, draw: ImageDraw.ImageDraw, lit: int) -> None:
        for lamp, (color, (x, y)) in enumerate(zip(self.colors, self.places)):
            if lamp == lit:
                _disc(draw, x, y, 13, (255, 255, 255))
                _disc(draw, x, y, 11, color)
            else:
                _disc(draw, x, y, 9, tuple(round(0.45 * one + 0.55 * back) for one, back in zip(color, self.ground)))

    def _paint_thought(self, draw: ImageDraw.ImageDraw, frame_idx: int) -> None:
        lit = frame_idx // (3 * self.frames_per_lamp)
        self._paint_lamps(draw, lit)
        x, y = self.places[0]
        draw.ellipse((x - 16, y - 16, x + 16, y + 16), outline=self.ink, width=2)
        for (from_x, from_y), (to_x, to_y) in zip(self.places[:lit], self.places[1:]):
            length = math.hypot(to_x - from_x, to_y - from_y)
            along_x, along_y = (to_x - from_x) / length, (to_y - from_y) / length
            tip_x, tip_y = to_x - 14 * along_x, to_y - 14 * along_y
            draw.line((from_x + 17 * along_x, from_y + 17 * along_y, tip_x, tip_y), fill=self.ink, width=2)
            foot_x, foot_y = tip_x - 7 * along_x, tip_y - 7 * along_y
            wing_x, wing_y = -5 * along_y, 5 * along_x
            draw.polygon(
                [(tip_x, tip_y), (foot_x + wing_x, foot_y + wing_y), (foot_x - wing_x, foot_y - wing_y)], fill=self.ink
            )


@dataclass(frozen=True)
class Speed(World):
    """Two dots go round on circular tracks and swap speeds near the middle of the clip.

    Asked is which dot is the faster one at the end, or which way round one of them moves.

    At chance, exactly: the question, any frame at a known position, the bag of frames. Phases are uniform and
    independent of the motion, so a frame shows uniform phases under either answer. Running time backwards flips both
    answers, gives the same bag, and is as likely: ways round, phases and the moment of the swap (symmetric about the
    middle) are drawn uniformly.

    Thought video: the same clip with each dot's path of the last half second drawn behind it.

    Args:
        ratio (`float`): the fast dot's speed over the slow dot's; nearer to 1 is harder.
        clip_seconds (`float`): a multiple of 1/12 s.
        swap_spread (`float`): the speeds swap at most this part of the clip away from its middle.
    """

    name: ClassVar[str] = "speed"

    ratio: float = 2.0
    clip_seconds: float = 4.0
    swap_spread: float = 0.15

    def __post_init__(self) -> None:
        self._check_dials(ratio=(1.1, 4.0), clip_seconds=(1.0, 20.0), swap_spread=(0.0, 0.4))
        _check_frames(self.name, "clip_seconds", self.clip_seconds)

    @property
    def num_answers(self) -> int:
        return 2

    def sample(self, rng: np.random.Generator, answer_idx: int) -> "SpeedScene":
        names = list(COLORS)
        colors = [names[idx] for idx in sorted(rng.permutation(len(names))[:2])]
        ways = [int(way) for way in rng.choice([1, -1], 2)]  # 1 is clockwise
        faster_at_end, asked = int(rng.integers(2)), int(rng.integers(2))
        asks_way = bool(rng.integers(2))
        if asks_way:
            question = f"Two dots move on circles. Which way round does the {colors[asked]} dot move?"
            options = ("clockwise", "counter-clockwise")
            ways[asked] = (1, -1)[answer_idx]
        else:
            question = "Two dots move on circles. Which dot moves faster at the end of the video?"
            options = (f"the {colors[0]} dot", f"the {colors[1]} dot")
            faster_at_end = answer_idx

        num_frames = round(self.clip_seconds * FPS)
        swap_seconds = (num_frames - 1) / FPS * (0.5 + rng.uniform(-1, 1) * self.swap_spread)
        slow = rng.uniform(0.2, 0.3)
        fast = slow * self.ratio
        turns = {1: "clockwise", -1: "counter-clockwise"}
        if asks_way:
            reason = f"the {colors[asked]} dot moves {turns[ways[asked]]} all the time"
        else:
            reason = f"the {colors[faster_at_end]} dot is the faster one at the end"
        ground, ink = _draw_ground(rng)
        on_left = int(rng.integers(2))
        return SpeedScene(
            question=question,
            options=options,
            answer_idx=answer_idx,
            plan=f"The {colors[0]} dot moves {turns[ways[0]]}, the {colors[1]} dot {turns[ways[1]]}. "
            f"Until {swap_seconds:.1f} s {colors[1 - faster_at_end]} makes {fast:.2f} turns a second and "
            f"{colors[faster_at_end]} {slow:.2f}; then they swap speeds. So {reason}.",
            num_frames=num_frames,
            thought_num_frames=num_frames,
            ground=ground,
            ink=ink,
            colors=tuple(COLORS[color] for color in colors),
            centers=tuple(
                (WIDTH * (0.25 + 0.5 * (dot != on_left)), HEIGHT / 2 + rng.uniform(-6, 6)) for dot in (0, 1)
            ),
            track_radius=rng.uniform(30, 36),
            phases=(rng.uniform(), rng.uniform()),
            ways=tuple(ways),
            speeds=(slow, fast),
            faster_at_end=faster_at_end,
            swap_seconds=swap_seconds,
        )


@dataclass(frozen=True, kw_only=True)
class SpeedScene(Scene):
    """A scene of `Speed`: two dots, each on a circle of its own."""

    colors: tuple[Color, ...]
    centers: tuple[tuple[float, float], ...]  # of the tracks, in pixels
    track_radius: float
    phases: tuple[float, float]  # at time 0, in turns
    ways: tuple[int, ...]  # 1 is clockwise, -1 counter-clockwise
    speeds: tuple[float, float]  # slow and fast, turns a second
    faster_at_end: int
    swap_seconds: float

    def turns_at(self, dot: int, seconds: float) -> float:
        """Where on its track a dot is, in turns clockwise from the right; not wrapped."""
        slow, fast = self.speeds
        early, late = (slow, fast) if dot == self.faster_at_end else (fast, slow)
        path = early * min(seconds, self.swap_seconds) + late * max(seconds - self.swap_seconds, 0)
        return self.phases[dot] + self.ways[dot] * path

    def _place(self, dot: int, seconds: float) -> tuple[float, float]:
        angle = 2 * math.pi * self.turns_at(dot, seconds)
        x, y = self.centers[dot]
        return x + self.track_radius * math.cos(angle), y + self.track_radius * math.sin(angle)

    def _paint(self, draw: ImageDraw.ImageDraw, frame_idx: int, trail_seconds: float = 0.0) -> None:
        seconds = frame_idx / FPS
        for dot, color in enumerate(self.colors):
            x, y = self.centers[dot]
            reach = self.track_radius
            draw.ellipse((x - reach, y - reach, x + reach, y + reach), outline=self.ink)
            if trail_seconds:
                past = np.linspace(max(0.0, seconds - trail_seconds), seconds, 12)
                draw.line([self._place(dot, float(one)) for one in past], fill=color, width=4)
            _disc(draw, *self._place(dot, seconds), 7, color)

    def _paint_thought(self, draw: ImageDraw.ImageDraw, frame_idx: int) -> None:
        self._paint(draw, frame_idx, trail_seconds=min(0.5, frame_idx / FPS))


@dataclass(frozen=True)
class Collide(World):
    """A ball and a half ring turn about one centre at steady speeds: will they touch some time after the clip?

    At chance, exactly: the question, the first and the last frame, a frame at an unknown position, the bag of frames.
    - The bag: of the times `seconds_ahead` after the clip and as long before it, they touch at just one (other motions
      are drawn again), and the answer decides whether time runs forwards or backwards. Both have the same frames.
    - The last frame: each turns at a speed that is uniform over half a turn per `seconds_ahead` either way. What one
      does relative to the other in `seconds_ahead` is therefore uniform over the circle. Half a turn more exchanges
      touching and not touching at the time that is asked about and, as the clip is twice as long as `seconds_ahead`,
      at the time before it too, so it flips the answer and no more. The first frame: by reversal.
    Nearly: a frame at a known position between the ends. The best guess is right for 51 % of the rows on average, and
    for 54 % a sixth of the clip from either end, where `margin` is felt (56 % with a `margin` of 0.03).

    Why not two balls that meet after the clip or not, but never within it: frames in which they are close are then
    rare except near the end, and a frame shortly before the end told the answer of 3 rows in 4.

    Thought video: what comes next, from the clip's last frame to the time that is asked about.

    Args:
        seconds_ahead (`float`): how far ahead the question looks, a multiple of 1/12 s; the clip is twice as long.
        margin (`float`): least angle, in turns, between the ball and the nearer end of the half ring in the answer.
    """

    name: ClassVar[str] = "collide"

    seconds_ahead: float = 2.0
    margin: float = 0.02

    def __post_init__(self) -> None:
        self._check_dials(seconds_ahead=(0.5, 10.0), margin=(0.0, 0.1))
        _check_frames(self.name, "seconds_ahead", self.seconds_ahead)

    @property
    def num_answers(self) -> int:
        return 2

    def sample(self, rng: np.random.Generator, answer_idx: int) -> "CollideScene":
        ahead = self.seconds_ahead
        while True:
            phases, speeds = rng.uniform(0, 1, 2), rng.uniform(-0.5, 0.5, 2) / ahead
            after, before = (_apart(float((phases + speeds * s) @ (1, -1))) - 0.25 for s in (3 * ahead, -ahead))
            if after * before < 0 and min(abs(after), abs(before)) > self.margin:
                break
        is_reversed = (after < 0) != (answer_idx == 0)
        num_frames = 2 * round(ahead * FPS) + 1
        ground, ink = _draw_ground(rng)
        names = [str(name) for name in rng.permutation(list(COLORS))[:2]]
        scene = CollideScene(
            question=f"The {names[0]} ball and the {names[1]} half ring turn around one point, each at a steady "
            f"speed. Do they touch {ahead:g} seconds after the video ends?",
            options=("yes", "no"),
            answer_idx=answer_idx,
            plan="",
            num_frames=num_frames,
            thought_num_frames=round(ahead * FPS) + 1,
            ground=ground,
            ink=ink,
            center=(WIDTH / 2 + rng.uniform(-20, 20), HEIGHT / 2 + rng.uniform(-3, 3)),
            phases=(float(phases[0]), float(phases[1])),
            speeds=(float(speeds[0]), float(speeds[1])),
            is_reversed=is_reversed,
            colors=(COLORS[names[0]], COLORS[names[1]]),
        )
        return dataclasses.replace(scene, plan=_collide_plan(scene, names))


@dataclass(frozen=True, kw_only=True)
class CollideScene(Scene):
    """A scene of `Collide`: a ball on a circle, a half ring inside it."""

    center: tuple[float, float]  # in pixels
    phases: tuple[float, float]  # of the ball and of the half ring's middle at time 0, in turns
    speeds: tuple[float, float]  # turns a second, clockwise above 0
    is_reversed: bool
    colors: tuple[Color, Color]

    def turns_at(self, frame_idx: int) -> tuple[float, float]:
        """Ball and half ring's middle, in turns clockwise from the right; frames past the clip's end continue it."""
        seconds = (self.num_frames - 1 - frame_idx if self.is_reversed else frame_idx) / FPS
        return self.phases[0] + self.speeds[0] * seconds, self.phases[1] + self.speeds[1] * seconds

    def _paint(self, draw: ImageDraw.ImageDraw, frame_idx: int) -> None:
        x, y = self.center
        ball, ring = self.turns_at(frame_idx)
        draw.ellipse((x - 46, y - 46, x + 46, y + 46), outline=self.ink)
        degrees = 360 * (ring % 1)
        draw.arc((x - 42, y - 42, x + 42, y + 42), degrees - 90, degrees + 90, fill=self.colors[1], width=8)
        angle = 2 * math.pi * ball
        _disc(draw, x + 46 * math.cos(angle), y + 46 * math.sin(angle), 4.5, self.colors[0])

    def _paint_thought(self, draw: ImageDraw.ImageDraw, frame_idx: int) -> None:
        self._paint(draw, self.num_frames - 1 + frame_idx)


def _apart(turns: float) -> float:
    """The angle between two directions that are `turns` apart, from 0 to half a turn."""
    return abs((turns + 0.5) % 1 - 0.5)


def _collide_plan(scene: CollideScene, names: list[str]) -> str:
    end_idx = scene.num_frames - 1
    asked_idx = end_idx + scene.thought_num_frames - 1
    turns = []
    for speed in scene.speeds:
        speed = -speed if scene.is_reversed else speed
        turns.append(f"{abs(speed) * 360:.0f} degrees a second {'clockwise' if speed > 0 else 'counter-clockwise'}")
    apart = []
    for frame_idx in (end_idx, asked_idx):
        ball, ring = scene.turns_at(frame_idx)
        apart.append(f"{_apart(ball - ring) * 360:.0f} degrees")
    touches = scene.options[scene.answer_idx] == "yes"
    return (
        f"The {names[0]} ball turns {turns[0]}, the {names[1]} half ring {turns[1]}. When the video ends, at "
        f"{end_idx / FPS:.1f} s, the ball is {apart[0]} from the half ring's middle; at {asked_idx / FPS:.1f} s it is "
        f"{apart[1]} from it. That is {'less' if touches else 'more'} than 90 degrees, so they "
        f"{'touch' if touches else 'do not touch'}."
    )


@dataclass(frozen=True)
class ColorSwap(World):
    """A lamp is covered while signals of two colours each tell it to change: which colour does it have at the end?

    The shell game with colours in place of places: a lamp of one of a signal's colours takes the other. At chance are
    the same observers, for the same reason (see `ShellGame`; `num_colors` is its `num_cups`). Its state is one colour
    for the whole frame, which survives averaging over a frame's tokens; where a ball is does not.

    Thought video: the same clip, with the lamp uncovered; it changes with the signal.

    Args:
        num_colors (`int`): 3 or 4.
        num_swaps (`int`): 1 to 30 signals; with fewer than `num_colors`, the bag of frames tells something.
        frames_per_swap (`int`): at 12 frames a second, also of the start, when the lamp is shown, and of the end. A
            signal is off for the last quarter.
    """

    name: ClassVar[str] = "color_swap"

    num_colors: int = 3
    num_swaps: int = 4
    frames_per_swap: int = 8

    def __post_init__(self) -> None:
        self._check_dials(num_colors=(3, 4), num_swaps=(1, 30), frames_per_swap=(4, 48))

    @property
    def num_answers(self) -> int:
        return self.num_colors

    def sample(self, rng: np.random.Generator, answer_idx: int) -> "ColorSwapScene":
        swaps, permutation = _draw_swaps(rng, self.num_colors, self.num_swaps)
        start = permutation.index(answer_idx)
        names = ("red", "green", "blue", "purple")[: self.num_colors]
        steps, lit = [], start
        for swap_idx, (low, high) in enumerate(swaps):
            lit = {low: high, high: low}.get(lit, lit)
            seconds = (swap_idx + 1) * self.frames_per_swap / FPS
            steps.append(f"at {seconds:.1f} s {names[low]} and {names[high]} swap, lamp {names[lit]}")
        ground, ink = _draw_ground(rng)
        num_frames = (self.num_swaps + 2) * self.frames_per_swap
        return ColorSwapScene(
            question="A lamp is covered. Signals show two colours each: a lamp of one takes the other. "
            "Which colour does the lamp have at the end?",
            options=names,
            answer_idx=answer_idx,
            plan=f"The lamp starts {names[start]}. Then {'; '.join(steps)}. It ends {names[lit]}.",
            num_frames=num_frames,
            thought_num_frames=num_frames,
            ground=ground,
            ink=ink,
            start=start,
            swaps=tuple(swaps),
            frames_per_swap=self.frames_per_swap,
            radius=rng.uniform(24, 32),
        )


_UNLIT = (96, 96, 96)  # about as bright as the colours, so that nothing flickers


@dataclass(frozen=True, kw_only=True)
class ColorSwapScene(Scene):
    """A scene of `ColorSwap`: a lamp on the left, a signal on the right."""

    start: int  # the lamp's colour, an option
    swaps: tuple[tuple[int, int], ...]  # colours that swap, in order
    frames_per_swap: int
    radius: float  # of the lamp, in pixels

    def lit_at(self, frame_idx: int) -> int:
        """The lamp's colour, an option, whether it is covered or not."""
        lit = self.start
        for low, high in self.swaps[: frame_idx // self.frames_per_swap]:
            lit = {low: high, high: low}.get(lit, lit)
        return lit

    def signal_at(self, frame_idx: int) -> tuple[int, int] | None:
        """The two colours that a signal shows, low option first; None while it is off."""
        segment, phase = divmod(frame_idx, self.frames_per_swap)
        is_on = 1 <= segment <= len(self.swaps) and phase < self.frames_per_swap - self.frames_per_swap // 4
        return self.swaps[segment - 1] if is_on else None

    def _paint(self, draw: ImageDraw.ImageDraw, frame_idx: int, see_through: bool = False) -> None:
        is_seen = see_through or frame_idx < self.frames_per_swap
        color = COLORS[self.options[self.lit_at(frame_idx)]] if is_seen else _UNLIT
        _disc(draw, WIDTH / 4, HEIGHT / 2, self.radius, color)
        signal = self.signal_at(frame_idx)
        for place in (0, 1):
            shown = _UNLIT if signal is None else COLORS[self.options[signal[place]]]
            top = HEIGHT / 2 - 34 + 36 * place
            draw.rectangle((WIDTH * 3 / 4 - 26, top, WIDTH * 3 / 4 + 26, top + 32), fill=shown)

    def _paint_thought(self, draw: ImageDraw.ImageDraw, frame_idx: int) -> None:
        self._paint(draw, frame_idx, see_through=True)


def _draw_ground(rng: np.random.Generator) -> tuple[Color, Color]:
    """A light or dark background, slightly tinted, and a colour for lines on it."""
    is_dark = bool(rng.integers(2))
    shade = rng.uniform(20, 60) if is_dark else rng.uniform(200, 240)
    ground = tuple(round(shade + tint) for tint in rng.uniform(-12, 12, 3))
    return ground, (215, 215, 215) if is_dark else (50, 50, 50)


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, color: Any) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)


def _check_index(frame_idx: int, num_frames: int) -> None:
    if not 0 <= frame_idx < num_frames:
        raise IndexError(f"Saw frame index {frame_idx}, expected 0 to {num_frames - 1}.")


def _check_frames(world: str, dial: str, seconds: float) -> None:
    if abs(seconds * FPS - round(seconds * FPS)) > 1e-9:
        raise ValueError(f"World {world!r}: saw {dial}={seconds!r}, expected a multiple of 1/{FPS} s: a whole frame.")


WORLDS: dict[str, type[World]] = {world.name: world for world in (ShellGame, Bounce, Order, Speed, Collide, ColorSwap)}
