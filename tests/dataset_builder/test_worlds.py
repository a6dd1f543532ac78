"""Worlds and their rows: what is drawn, listed and asked agrees with what the frames show."""

import dataclasses
import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dataset_builder.schema import LETTERS, check_columns
from dataset_builder.sources.simulated import list_rows, scene_of
from dataset_builder.sources.worlds import COLORS, WORLDS, Bounce, Collide, Order, ShellGame, Speed


SPLITS = {"train": 0.7, "validation": 0.1, "test": 0.2}


def scenes(world, num_scenes=60, seed=3, **dials):
    return [scene_of(row["scene"]) for row in list_rows([world], num_scenes, seed, {"train": 1.0}, {world: dials})]


def blob(frame, color):
    """Centre `(x, y)` and size in pixels of what has exactly this colour; None if nothing has."""
    codes = np.array([65536, 256, 1], np.uint32)
    ys, xs = np.nonzero(frame @ codes == color @ codes)
    return (xs.mean(), ys.mean(), len(xs)) if len(xs) else None


# -- rows


def test_rows_meet_the_contract_and_hold_the_scene_they_came_from():
    for row in list_rows(list(WORLDS), 25, 1, SPLITS):
        check_columns(row, row["id"])
        scene = scene_of(row["scene"])
        assert row["question"] == scene.question
        assert sorted(row["options"]) == sorted(scene.options)
        assert row["options"]["ABCDEF".index(row["answer"])] == scene.options[scene.answer_idx]
        assert row["source_plan"] == scene.plan
        assert row["video_path"] == f"{json.loads(row['scene'])['world']}/{row['id']}.mp4"


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 48, 200])
def test_rows_are_as_many_as_asked_with_worlds_in_turn_and_splits_by_largest_remainder(num_rows):
    rows = list(list_rows(list(WORLDS), num_rows, 1, SPLITS))
    assert len(rows) == num_rows
    worlds = [json.loads(row["scene"])["world"] for row in rows]
    assert worlds == list(itertools.islice(itertools.cycle(WORLDS), num_rows))
    sizes = Counter(row["split"] for row in rows)
    assert all(abs(sizes[split] - fraction * num_rows) < 1 for split, fraction in SPLITS.items())


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("num_rows", [11, 100, 144])
def test_letters_and_answers_are_balanced_within_one_in_every_split(world, num_rows):
    rows = list(list_rows([world], num_rows, 5, SPLITS))
    num_answers = WORLDS[world]().num_answers
    for split in SPLITS:
        chosen = [row for row in rows if row["split"] == split]
        letters = Counter(row["answer"] for row in chosen)
        answers = Counter(json.loads(row["scene"])["answer_idx"] for row in chosen)
        for counts, names in ((letters, "ABCDEF"[:num_answers]), (answers, range(num_answers))):
            seen = [counts[name] for name in names]
            assert sum(seen) == len(chosen)
            assert max(seen) - min(seen) <= 1


@pytest.mark.parametrize("world", WORLDS)
def test_options_in_the_worlds_own_order_are_the_same_rows(world):
    shuffled, kept = (
        list(list_rows([world], 24, 5, {"train": 1.0}, shuffle_options=is_shuffled)) for is_shuffled in (True, False)
    )
    for row, other in zip(shuffled, kept, strict=True):
        scene = scene_of(other["scene"])
        assert other["options"] == list(scene.options)
        assert sorted(row["options"]) == sorted(other["options"])
        right = [one["options"][LETTERS.index(one["answer"])] for one in (row, other)]
        assert right == [scene.options[scene.answer_idx]] * 2
        assert {name: row[name] for name in row if name not in ("options", "answer")} == {
            name: other[name] for name in other if name not in ("options", "answer")
        }


@pytest.mark.parametrize("world", WORLDS)
def test_letters_do_not_depend_on_answers(world):
    num_answers = WORLDS[world]().num_answers
    rows = list_rows([world], 4 * num_answers**2, 5, {"train": 1})
    pairs = Counter((row["answer"], json.loads(row["scene"])["answer_idx"]) for row in rows)
    assert set(pairs.values()) == {4}
    assert len(pairs) == num_answers**2


def test_no_two_rows_or_splits_share_a_scene():
    rows = list(list_rows(list(WORLDS), 300, 1, SPLITS))
    assert len({row["id"] for row in rows}) == 300
    assert len({row["source_plan"] for row in rows if "bounce" in row["id"]}) == 300 // len(WORLDS)
    firsts = {}
    for split in SPLITS:
        for seed in (1, 2):
            row = next(list_rows(["collide"], 1, seed, {split: 1.0}))
            firsts[split, seed] = scene_of(row["scene"]).frame(0).tobytes()
    assert len(set(firsts.values())) == 6


def test_more_rows_other_worlds_and_other_splits_leave_a_row_as_it_is():
    few = {row["id"]: row for row in list_rows(["speed"], 10, 1, {"train": 0.5, "test": 0.5})}
    many = {row["id"]: row for row in list_rows(list(WORLDS), 200, 1, SPLITS)}
    assert set(few) <= set(many)
    assert all(many[row_id] == row for row_id, row in few.items())


def test_scenes_are_the_same_in_another_process_and_in_another_order():
    rows = list(list_rows(list(WORLDS), 10, 4, {"train": 1.0}))
    code = (
        "import hashlib, json, sys\n"
        "from dataset_builder.sources.simulated import scene_of\n"
        "for scene in reversed([scene_of(one) for one in json.load(sys.stdin)]):\n"
        "    print(hashlib.sha256(scene.frame(20).tobytes() + scene.thought_frame(20).tobytes()).hexdigest())\n"
    )
    there = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([row["scene"] for row in rows]),
        cwd=Path(__file__).parents[2],
        env={"PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
        check=True,
    )
    code_here = code.replace("json.load(sys.stdin)", "scenes").replace("print(", "lines.append(")
    lines = []
    exec(code_here, {"scenes": [row["scene"] for row in rows], "lines": lines})
    assert there.stdout.split() == lines
    assert len(set(lines)) == 10


def test_dials_reach_the_scene_and_stay_in_its_json():
    row = next(list_rows(["shell_game"], 1, 1, {"train": 1.0}, {"shell_game": {"num_swaps": 6}}))
    assert json.loads(row["scene"])["dials"] == {"num_cups": 3, "num_swaps": 6, "frames_per_swap": 8}
    assert scene_of(row["scene"]).num_frames == ShellGame().sample(np.random.default_rng(0), 0).num_frames + 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"worlds": ["shellgame"]}, "expected one of shell_game, bounce"),
        ({"worlds": []}, "at least one"),
        ({"worlds": ["bounce", "bounce"]}, "each once"),
        ({"num_rows": 0}, "at least 1"),
        ({"split_fractions": {"train": 0.5}}, "1 in all"),
        ({"split_fractions": {"train": 1.5, "test": -0.5}}, "from 0 to 1"),
        ({"split_fractions": {"dev": 1.0}}, "train, validation, test"),
        ({"split_fractions": {"train": float("nan")}}, "from 0 to 1"),
        ({"dials": {"order": {"lamps": 4}}}, "expected some of num_lamps"),
        ({"dials": {"orders": {}}}, "expected one of"),
    ],
)
def test_wrong_arguments_are_named_by_the_call_itself(arguments, message):
    good = {"worlds": ["order"], "num_rows": 1, "seed": 1, "split_fractions": {"train": 1.0}}
    with pytest.raises(ValueError, match=message):
        list_rows(**{**good, **arguments})


@pytest.mark.parametrize(
    ("world", "dials", "message"),
    [
        (ShellGame, {"num_cups": 2}, "num_cups=2, expected a whole number from 3 to 4"),
        (ShellGame, {"num_swaps": 0}, "num_swaps=0, expected a whole number from 1 to 10"),
        (ShellGame, {"num_swaps": 4.5}, "whole number"),
        (Bounce, {"seconds_ahead": "2"}, "expected a number"),
        (Bounce, {"margin": float("nan")}, "margin=nan"),
        (Bounce, {"seconds_ahead": 1.23}, "multiple of 1/12 s"),
        (Order, {"num_lamps": 7}, "from 3 to 6"),
        (Speed, {"ratio": 1.0}, "from 1.1"),
        (Collide, {"margin": 0.3}, "from 0.0 to 0.1"),
    ],
)
def test_dials_out_of_range_are_named(world, dials, message):
    with pytest.raises(ValueError, match=message):
        world(**dials)


# -- scenes


@pytest.mark.parametrize("world", WORLDS)
def test_frames_have_the_stated_shape_and_are_pure(world):
    (scene,) = scenes(world, 1)
    frames, thought_frames = scene.frames(), scene.thought_frames()
    assert frames.shape == (scene.num_frames, 112, 168, 3)
    assert thought_frames.shape == (scene.thought_num_frames, 112, 168, 3)
    assert frames.dtype == thought_frames.dtype == np.uint8
    assert (scene.frame(17) == frames[17]).all()
    assert (scene.thought_frame(9) == thought_frames[9]).all()
    for frame_idx in (-1, scene.num_frames):
        with pytest.raises(IndexError, match="expected 0 to"):
            scene.frame(frame_idx)


@pytest.mark.parametrize("world", WORLDS)
def test_scenes_look_different(world):
    assert len({scene.frame(0).tobytes() for scene in scenes(world, 40)}) == 40


@pytest.mark.parametrize(
    ("world", "dials"),
    [
        ("shell_game", {"num_cups": 4, "num_swaps": 4}),
        ("shell_game", {"num_swaps": 3}),
        ("shell_game", {"num_swaps": 1}),
        ("shell_game", {"num_cups": 4, "num_swaps": 3}),
        ("shell_game", {"num_cups": 4, "num_swaps": 7, "frames_per_swap": 5}),
        ("bounce", {"seconds_ahead": 1.0, "margin": 0.0}),
        ("order", {"num_lamps": 3, "num_rounds": 1, "frames_per_lamp": 5}),
        ("order", {"num_lamps": 6}),
        ("speed", {"ratio": 1.2, "clip_seconds": 3.0, "swap_spread": 0.0}),
        ("collide", {"seconds_ahead": 3.0}),
    ],
)
def test_other_dials_give_scenes_with_every_answer(world, dials):
    for scene in scenes(world, 10, **dials):
        assert len(set(scene.options)) == len(scene.options)
        assert scene.options[scene.answer_idx] in scene.plan or world not in ("shell_game", "bounce")
        assert scene.frame(scene.num_frames - 1).any()
        assert scene.thought_frame(scene.thought_num_frames - 1).any()


# -- answers, found again from pixels


def test_shell_game_ball_shown_under_its_cup_can_be_followed_to_the_answer():
    for scene in scenes("shell_game"):
        ball = [blob(scene.thought_frame(idx), scene.ball_color) for idx in range(scene.thought_num_frames)]
        steps = [abs(after[0] - before[0]) for before, after in itertools.pairwise(ball)]
        assert max(steps) < 30  # the farthest swap, over 112 + 2 * 9 pixels in 8 frames, moves at most 25 in one
        nearest = np.argmin([abs(ball[-1][0] - x) for x in scene.spots])
        assert nearest == scene.answer_idx


def test_shell_game_clip_hides_the_ball_after_the_start_and_differs_from_the_thought_video_in_the_ball_only():
    for scene in scenes("shell_game", 10):
        assert abs(blob(scene.frame(0), scene.ball_color)[0] - scene.spots[scene.start]) < 1
        assert all(blob(scene.frame(idx), scene.ball_color) is None for idx in range(12, scene.num_frames))
        for idx in (0, 20, 40, scene.num_frames - 1):
            differs = (scene.frame(idx) != scene.thought_frame(idx)).any(-1)
            assert differs.sum() == (scene.thought_frame(idx)[differs] == scene.ball_color).all(-1).sum()


def test_color_swap_signals_take_the_shown_colour_to_the_answer_and_the_thought_video_shows_it_all_along():
    for scene in scenes("color_swap", num_swaps=5):
        colors = [COLORS[name] for name in scene.options]

        def lamp(frame, colors=tuple(colors)):
            return [blob(frame[:, :84], np.array(color)) for color in colors]

        lit = [one is not None for one in lamp(scene.frame(0))].index(True)
        for frame_idx in range(scene.num_frames):
            frame, thought = scene.frame(frame_idx), scene.thought_frame(frame_idx)
            if frame_idx >= 8:
                assert lamp(frame) == [None] * 3, "covered"
            shown = [idx for idx, color in enumerate(colors) if blob(frame[:, 84:], np.array(color))]
            if frame_idx % 8 == 0 and shown and lit in shown:
                lit = sum(shown) - lit
            assert [one is not None for one in lamp(thought)].index(True) == lit
            assert (frame[:, 84:] == thought[:, 84:]).all()
        assert lit == scene.answer_idx


def test_shell_game_starts_and_swapped_pairs_leave_every_cup_possible():
    ends = {}
    for scene in scenes("shell_game", 600):
        ends.setdefault((scene.start, tuple(sorted(scene.swaps))), set()).add(scene.answer_idx)
    for start, pairs in ends:
        reachable = set()
        for order in itertools.permutations(pairs):
            ball = start
            for low, high in order:
                ball = high if ball == low else low if ball == high else ball
            reachable.add(ball)
        assert reachable == {0, 1, 2}


@pytest.mark.parametrize("num_cups", [3, 4])
@pytest.mark.parametrize("num_swaps", [1, 2])
def test_shell_game_with_fewer_swaps_than_cups_is_still_not_told_by_swaps_or_last_frame(num_cups, num_swaps):
    world, pairs = ShellGame(num_cups=num_cups, num_swaps=num_swaps), Counter()
    for seed in range(600):
        alike = [world.sample(np.random.default_rng([num_cups, num_swaps, seed]), idx) for idx in range(num_cups)]
        assert [scene.cups_at(scene.num_frames - 1)[1] for scene in alike] == list(range(num_cups))
        assert [scene.answer_idx for scene in alike] == list(range(num_cups))
        # All answers share swaps, colours and places, so given those the start is as uniform as the answer.
        assert sorted(scene.start for scene in alike) == list(range(num_cups))
        assert len({dataclasses.replace(scene, start=0, answer_idx=0, plan="") for scene in alike}) == 1
        pairs.update(alike[0].swaps)
        if seed < 3:
            last = alike[0].num_frames - 1
            other = dataclasses.replace(alike[0], start=alike[1].start)
            assert (other.frame(last) == alike[0].frame(last)).all()
            assert (other.thought_frame(last) != alike[0].thought_frame(last)).any()
    num_pairs = num_cups * (num_cups - 1) // 2
    expected = 600 * num_swaps / num_pairs
    assert len(pairs) == num_pairs
    assert all(abs(count - expected) < 5 * expected**0.5 for count in pairs.values())


def test_shell_game_ball_ends_under_its_first_cup_as_often_as_the_docstring_says():
    stays = {(3, 1): 1 / 3, (3, 2): 1 / 3, (4, 1): 1 / 2, (4, 2): 1 / 3, (4, 3): 5 / 18}
    for (num_cups, num_swaps), expected in stays.items():
        swaps = list(itertools.combinations(range(num_cups), 2))
        ends = [0] * num_cups
        for order in itertools.product(swaps, repeat=num_swaps):
            ball = 0
            for pair in order:
                ball = pair[1 - pair.index(ball)] if ball in pair else ball
            ends[ball] += 1
        assert ends[0] / sum(ends) == pytest.approx(expected)
        drawn = scenes("shell_game", 1200, num_cups=num_cups, num_swaps=num_swaps)
        assert np.mean([scene.start == scene.answer_idx for scene in drawn]) == pytest.approx(expected, abs=0.06)


def test_bounce_thought_video_continues_the_clip_and_ends_in_the_answer():
    for scene in scenes("bounce"):
        assert (scene.thought_frame(0) == scene.frame(scene.num_frames - 1)).all()
        x = blob(scene.thought_frame(scene.thought_num_frames - 1), scene.color)[0]
        middle = (scene.box[0] + scene.box[2]) / 2
        assert (x > middle) == (scene.answer_idx == 1)
        assert abs(x - middle) > 2


def test_bounce_answer_follows_from_speed_and_place_seen_in_the_clip():
    for scene in scenes("bounce"):
        width = scene.box[2] - scene.box[0] - 2 * scene.radius - 4
        xs = [(blob(frame, scene.color)[0] - scene.box[0] - scene.radius - 2) / width for frame in scene.frames()]
        steps = np.diff(xs)
        speed = np.median(np.abs(steps))  # most steps meet no wall
        x, step = xs[-1], speed * np.sign(steps[np.abs(np.abs(steps) - speed) < 0.02][-1])
        bounced_last = abs(abs(steps[-1]) - speed) > 0.02
        if bounced_last:
            step = -step
        for _ in range(scene.thought_num_frames - 1):
            x += step
            if not 0 <= x <= 1:
                x, step = (-x if x < 0 else 2 - x), -step
        if abs(x - 0.5) > 0.1:  # pixels are too coarse for the closest ones
            assert (x > 0.5) == (scene.answer_idx == 1)


def test_speed_backwards_is_a_scene_of_the_world_with_the_other_answers():
    for scene in scenes("speed", 30):
        end = (scene.num_frames - 1) / scene.fps
        turned = dataclasses.replace(
            scene,
            phases=tuple(scene.turns_at(dot, end) for dot in (0, 1)),
            ways=tuple(-way for way in scene.ways),
            faster_at_end=1 - scene.faster_at_end,
            swap_seconds=end - scene.swap_seconds,
        )
        assert turned.swap_seconds / end == pytest.approx(0.5, abs=0.15)
        for dot, seconds in itertools.product((0, 1), np.linspace(0, end, 7)):
            assert turned.turns_at(dot, seconds) == pytest.approx(scene.turns_at(dot, end - seconds))


@pytest.mark.parametrize("world", ["bounce", "collide"])
def test_the_bag_of_frames_is_that_of_a_scene_with_the_other_answer(world):
    for scene in scenes(world, 100):
        turned = dataclasses.replace(scene, is_reversed=not scene.is_reversed)
        assert (turned.frames() == scene.frames()[::-1]).all()
        last = turned.thought_frame(turned.thought_num_frames - 1)
        assert answer_in(last, turned, world) == 1 - scene.answer_idx


def answer_in(frame, scene, world):
    if world == "bounce":
        return int(blob(frame, scene.color)[0] > (scene.box[0] + scene.box[2]) / 2)
    return int(not touches(frame, scene))


def touches(frame, scene):
    """Whether at most a pixel, as a diagonal step leaves one, is between the ball's pixels and the half ring's."""
    ball, ring = (np.argwhere((frame == np.array(color, np.uint8)).all(-1)) for color in scene.colors)
    return ((ball[:, None] - ring[None]) ** 2).sum(-1).min() <= 2


def test_order_answer_lights_up_after_the_asked_lamp_in_clip_and_thought_video():
    names = {color: name for name, color in COLORS.items()}
    for scene in scenes("order"):
        asked = next(name for name in COLORS if f"after the {name} lamp" in scene.question)
        lit = []
        for frame in scene.frames():
            sizes = {color: blob(frame, color) for color in scene.colors}
            (only,) = [names[color] for color, seen in sizes.items() if seen]
            lit.append(only)
        counts = Counter(lit)
        assert set(counts.values()) == {scene.num_frames // len(scene.colors)}
        nexts = {after for before, after in itertools.pairwise(lit) if before == asked != after}
        assert [f"the {name} lamp" for name in nexts] == [scene.options[scene.answer_idx]]
        shown = [blob(scene.thought_frame(idx), COLORS[asked]) is not None for idx in (0, 11, 12)]
        assert shown == [True, True, False]
        assert blob(scene.thought_frame(12), COLORS[next(iter(nexts))])


def test_speed_answer_is_how_the_dots_are_seen_to_move():
    names = {color: name for name, color in COLORS.items()}
    kinds = set()
    for scene in scenes("speed"):
        assert (scene.thought_frame(0) == scene.frame(0)).all()
        tracks = []
        for color, (center_x, center_y) in zip(scene.colors, scene.centers):
            dots = [blob(frame, color) for frame in scene.frames()]
            tracks.append(np.unwrap([np.arctan2(y - center_y, x - center_x) for x, y, _ in dots]))
        late = [abs(track[-1] - track[-10]) for track in tracks]
        early = [abs(track[9] - track[0]) for track in tracks]
        assert (late[0] > late[1]) == (early[0] < early[1])
        if "faster" in scene.question:
            answer = f"the {names[scene.colors[int(np.argmax(late))]]} dot"
        else:
            dot = next(dot for dot, color in enumerate(scene.colors) if f"the {names[color]} dot" in scene.question)
            answer = "clockwise" if tracks[dot][-1] > tracks[dot][0] else "counter-clockwise"
        assert scene.options[scene.answer_idx] == answer
        kinds.add("faster" in scene.question)
    assert kinds == {True, False}


def test_speed_trails_are_longer_behind_the_dot_that_is_faster_at_the_end():
    for scene in scenes("speed", 30):
        last = scene.thought_frame(scene.thought_num_frames - 1)
        sizes = [blob(last, color)[2] for color in scene.colors]
        assert int(np.argmax(sizes)) == scene.faster_at_end


def test_collide_thought_video_continues_the_clip_and_ends_in_the_answer():
    for scene in scenes("collide", 200):
        last = scene.thought_frame(scene.thought_num_frames - 1)
        assert touches(last, scene) == (scene.options[scene.answer_idx] == "yes")
        assert (scene.thought_frame(0) == scene.frame(scene.num_frames - 1)).all()


def test_plans_give_the_numbers_that_the_frames_show():
    for scene in scenes("bounce", 20):
        percent = int(scene.plan.split("s it is ")[-1].split("%")[0])
        end = scene.position_at(scene.num_frames - 1 + scene.thought_num_frames - 1)[0]
        assert percent == round(100 * end)
        before, after = (scene.position_at(scene.num_frames - 1 + step)[0] for step in (0, 1))
        if 0.15 < before < 0.85:
            assert f"moves {'right' if after > before else 'left'}" in scene.plan
        walls = scene.plan.count("wall at")
        xs = np.array([scene.position_at(scene.num_frames - 1 + step / 20)[0] for step in range(24 * 20 + 1)])
        assert walls == (np.diff(np.sign(np.diff(xs))) != 0).sum()
    for scene in scenes("collide", 20):
        assert scene.plan.endswith("they touch." if scene.answer_idx == 0 else "they do not touch.")
