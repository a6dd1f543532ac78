import math
import pickle
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dataset_builder.schema import Rejected, check_columns
from dataset_builder.thought_video import SourceClipGenerator, encode_video
from dataset_builder.validate import Thresholds, TowerSimilarity, check, find_near_duplicates, score, signature
from modeling_storms.video_storms import decode_video


FRACTIONS = ("motion", "change", "first_frame_difference", "brightness", "flicker", "noise")
videos = hnp.arrays(np.uint8, st.tuples(st.integers(1, 6), st.integers(1, 90), st.integers(1, 90), st.just(3)))


def lamp(num_blinks: int, radius: int = 5, period: int = 8, num_frames: int = 60) -> np.ndarray:
    """A small dark lamp on a plain wall, lit for a few frames at a time."""
    rows, columns = np.mgrid[:112, :168]
    bulb = (rows - 50) ** 2 + (columns - 80) ** 2 < radius**2
    frames = np.full((num_frames, 112, 168, 3), 200, np.uint8)
    frames[:, bulb] = 60
    for frame_idx in range(num_blinks * period):
        if frame_idx % period < max(1, period // 3):
            frames[frame_idx, bulb] = (250, 250, 60)
    return frames


def cups(num_frames: int = 40) -> np.ndarray:
    """Two of three cups change places on a plain table."""
    frames = np.full((num_frames, 112, 168, 3), 225, np.uint8)
    for frame_idx in range(num_frames):
        shift = round(50 * frame_idx / (num_frames - 1))
        for x, colour in ((20 + shift, (200, 40, 30)), (70 - shift, (30, 60, 200)), (120, (30, 160, 60))):
            frames[frame_idx, 70:95, x : x + 20] = colour
    return frames


def street(num_frames: int = 40) -> np.ndarray:
    """A textured scene with something that moves across it."""
    rows, columns = np.mgrid[:96, :160]
    wall = 90 + 60 * np.sin(rows / 7) * np.cos(columns / 11) + 0.3 * rows
    frames = np.repeat(wall[None, ..., None], 3, -1).repeat(num_frames, 0)
    for frame_idx in range(num_frames):
        frames[frame_idx, 50:80, 3 * frame_idx : 3 * frame_idx + 25] = (220, 180, 40)
    return frames.astype(np.uint8)


def through_a_file(frames: np.ndarray) -> np.ndarray:
    return decode_video(encode_video(frames, 8))[0]


def reason(frames: np.ndarray, keyframe: np.ndarray, fps: float = 8, **thresholds) -> str | None:
    scores = score(frames, fps, [keyframe])
    try:
        check(scores, Thresholds(**thresholds))
    except Rejected as refused:
        return refused.reason if refused.details == {"scores": scores} else "without its scores"
    return None


@pytest.mark.parametrize(
    "frames", [cups(), street(), lamp(1), lamp(7), lamp(5, radius=3), lamp(30, period=2)], ids=range(6)
)
def test_small_clips_pass(frames):
    assert reason(frames, frames[0]) is None
    assert reason(through_a_file(frames), frames[0]) is None


def test_real_clips_pass_and_their_ruins_do_not(real_clips):
    names = ("nasa_13013.mp4", "yoga.mp4", "flipping_a_pancake.mkv")
    first = {name: decode_video(real_clips / name, lambda metadata: [5])[0][0] for name in names}
    for name in names:
        row = {"id": name, "video": None, "video_path": name, "video_start": None, "video_end": None}
        row["keyframe_indices"] = [5, 120, 280]
        frames, fps, _ = SourceClipGenerator(real_clips, max_side=320).generate(row)
        assert reason(frames, first[name], fps) is None
        assert reason(through_a_file(frames), first[name]) is None
        assert reason(through_a_file(frames[:1].repeat(16, 0)), first[name]) == "no_motion"
        dimmed = frames.copy()
        dimmed[1::2] //= 3
        assert reason(dimmed, first[name]) == "flicker"
        for other in names:
            assert other == name or reason(frames, first[other]) == "first_frame_mismatch"


def test_a_frozen_video_is_refused_through_codec_and_noise():
    frozen = street()[:1].repeat(30, 0)
    noise = np.random.default_rng(0).normal(0, 2, frozen.shape)
    assert reason(frozen, frozen[0]) == "no_motion"
    assert reason(through_a_file(frozen), frozen[0]) == "no_motion"
    assert reason(np.clip(frozen + noise, 0, 255).astype(np.uint8), frozen[0]) == "no_motion"
    assert (
        score(frozen + noise.astype(np.uint8) % 5, 8, [frozen[0]])["motion"] > score(lamp(1), 8, lamp(1)[:1])["motion"]
    )


def test_black_white_strobing_and_noisy_videos_are_refused():
    frames = street()
    assert reason(np.zeros_like(frames), frames[0]) == "too_dark"
    assert reason(np.full_like(frames, 255), frames[0]) == "too_bright"
    for period in (2, 4, 8):
        strobe = frames.copy()
        strobe[np.arange(len(frames)) % period >= period // 2] //= 2
        assert reason(strobe, frames[0]) == "flicker"
    for height, width in ((96, 160), (360, 640)):
        noise = np.random.default_rng(0).integers(0, 256, (12, height, width, 3), np.uint8)
        assert reason(noise, noise[0]) == "noise"
        assert reason(through_a_file(noise), noise[0]) == "noise"


def test_a_fade_is_no_flicker():
    levels = np.linspace(250, 10, 12).astype(np.uint8)
    fade = np.broadcast_to(levels[:, None, None, None], (12, 20, 30, 3))
    assert score(fade, 8, [fade[0]])["flicker"] == 0


def test_the_first_frame_may_be_any_keyframe_of_any_size():
    frames = street()
    keyframes = [cups()[0], np.repeat(np.repeat(frames[0], 3, 0), 3, 1)]
    assert score(frames, 8, keyframes)["first_frame_difference"] < 0.01
    assert reason(frames, keyframes[0]) == "first_frame_mismatch"


def test_length_counts_in_seconds():
    frames = cups()
    assert score(frames, 16, [frames[0]]) | {"seconds": 2.5, "num_frames": 40.0} == score(frames, 16, [frames[0]])
    assert reason(frames, frames[0], fps=150) == "too_short"
    assert reason(frames, frames[0], fps=0.05) == "too_long"
    assert reason(frames, frames[0], fps=0.1, max_thought_seconds=1000) is None


def test_scores_agree_with_their_definitions():
    frames = np.random.default_rng(0).integers(0, 256, (9, 40, 60, 3), np.uint8)
    scores = score(frames, 8, [frames[3]])
    grey = (frames / 255) @ [0.2126, 0.7152, 0.0722]
    assert scores["brightness"] == pytest.approx(grey.mean(), abs=1e-5)
    assert scores["motion"] == pytest.approx(np.abs(grey[1:] - grey[:-1]).mean(), abs=1e-5)
    assert scores["change"] == pytest.approx((grey.max(0) - grey.min(0)).max(), abs=1e-5)
    means = grey.mean((1, 2))
    travelled = sum(abs(after - before) for before, after in pairwise(means))
    assert scores["flicker"] == pytest.approx((travelled - (means.max() - means.min())) / 7, abs=1e-5)
    returns = [
        min(abs(b - a), abs(c - b)) if (b - a) * (c - b) < 0 else 0
        for a, b, c in zip(grey[:-2].ravel(), grey[1:-1].ravel(), grey[2:].ravel())
    ]
    assert scores["noise"] == pytest.approx(np.mean(returns), abs=1e-5)


@given(frames=videos, keyframes=st.lists(videos, min_size=1, max_size=2), fps=st.floats(0.1, 240))
@settings(max_examples=60, deadline=None)
def test_any_frames_have_finite_scores_and_a_signature(frames, keyframes, fps):
    scores = score(frames, fps, [one[0] for one in keyframes])
    assert all(type(value) is float and math.isfinite(value) for value in scores.values())
    assert all(0 <= scores[name] <= 1 for name in FRACTIONS)
    marks = signature(frames)
    assert len(marks) == 2048
    check_columns({"signature": marks}, "row")


def test_a_tower_threshold_needs_a_tower():
    scores = score(cups(), 8, [cups()[0]])
    with pytest.raises(ValueError, match="name a tower"):
        check(scores, Thresholds(min_tower_similarity=0.5))
    check(scores | {"tower_similarity": 0.6}, Thresholds(min_tower_similarity=0.5))
    with pytest.raises(Rejected, match=r"unlike_keyframes: tower_similarity is 0.4, min_tower_similarity is 0.5"):
        check(scores | {"tower_similarity": 0.4}, Thresholds(min_tower_similarity=0.5))


class TestNearDuplicates:
    distance = Thresholds().max_duplicate_distance

    def test_a_copy_is_found_and_one_blink_more_is_none(self):
        rows = [
            ("three", "How often?", signature(lamp(3))),
            ("four", "How often?", signature(lamp(4))),
            ("three again", "How often?", signature(through_a_file(lamp(3)))),
            ("three elsewhere", "When?", signature(lamp(3))),
            ("larger", "How often?", signature(np.repeat(np.repeat(lamp(4), 2, 1), 2, 2))),
        ]
        assert find_near_duplicates(rows, self.distance) == {"three again": "three", "larger": "four"}

    def test_a_row_repeats_the_first_that_stays(self):
        # b repeats a and goes; c is near b only, so it stays.
        rows = [(name, "q", [value] * 2048) for name, value in (("a", 100), ("b", 103), ("c", 106), ("d", 105))]
        assert find_near_duplicates(rows, 3 / 255) == {"b": "a", "d": "c"}
        assert find_near_duplicates([], 0.1) == {}

    @given(
        st.lists(st.tuples(st.sampled_from("pq"), st.integers(0, 2047), st.integers(0, 60)), max_size=12),
        st.integers(0, 40),
    )
    @settings(max_examples=50, deadline=None)
    def test_equals_comparing_all(self, cells, limit):
        rows = []
        for row_idx, (group, cell, value) in enumerate(cells):
            marks = [30] * 2048
            marks[cell] = value
            rows.append((str(row_idx), group, marks))
        expected: dict[str, str] = {}
        for row_idx, (row_id, group, marks) in enumerate(rows):
            for earlier_id, earlier_group, earlier in rows[:row_idx]:
                alike = max(abs(a - b) for a, b in zip(marks, earlier)) <= limit
                if group == earlier_group and earlier_id not in expected and alike:
                    expected[row_id] = earlier_id
                    break
        assert find_near_duplicates(rows, limit / 255) == expected

    def test_five_thousand_rows_take_seconds(self):
        marks = np.random.default_rng(0).integers(0, 256, (5000, 2048))
        marks[4000:] = marks[:1000]
        rows = [(str(row_idx), "q", one.tolist()) for row_idx, one in enumerate(marks)]
        start = time.perf_counter()
        assert find_near_duplicates(rows, self.distance) == {str(4000 + idx): str(idx) for idx in range(1000)}
        assert time.perf_counter() - start < 30  # measured 1.2 s


@pytest.fixture(scope="module", params=["vit", "clip"])
def tower(request, tmp_path_factory):
    import torch
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPTextConfig,
        CLIPVisionConfig,
        ViTConfig,
        ViTImageProcessor,
        ViTModel,
    )

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if request.param == "vit":
        ViTModel(ViTConfig(**sizes, image_size=32, patch_size=16)).save_pretrained(folder)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    else:
        text, vision = CLIPTextConfig(**sizes), CLIPVisionConfig(**sizes, image_size=32, patch_size=16)
        config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
        CLIPModel(config).save_pretrained(folder)
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return str(folder)


def test_a_tower_prefers_the_keyframes_own_video(tower):
    similarity = TowerSimilarity(tower)
    frames, others = street(), np.random.default_rng(0).integers(0, 256, (8, 96, 160, 3), np.uint8)
    own = similarity(frames, [frames[0], frames[20]])
    assert own == pytest.approx(1, abs=1e-5)
    assert -1 <= similarity(others, [frames[0], frames[20]]) < own
    assert pickle.loads(pickle.dumps(similarity))(frames, [frames[3]]) == similarity(frames, [frames[3]])
    halves = [similarity(others, [frames[0]]), similarity(others, [frames[20]])]
    assert similarity(others, [frames[0], frames[20]]) == pytest.approx(sum(halves) / 2, abs=1e-5)


def test_a_build_scores_rows_by_a_tower_and_names_it_without_its_path(tower, build, tmp_path):
    flags = ("--world", "bounce", "--num_rows", 3, "--tower", tower, "--validation_fraction", 0, "--test_fraction", 0)
    ledger = build("build", *flags, "--min_tower_similarity", -1)
    assert ledger["scores"]["tower_similarity"]["min"] >= -1
    named = ledger["stages"]["quality"]["tower"]["model"]
    assert named.startswith(Path(tower).name + "@")
    assert str(Path(tower).parent) not in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(SystemExit, match="No row passed"):
        build("build", *flags, "--min_tower_similarity", 1.5)
    with pytest.raises(SystemExit, match="--min_tower_similarity needs --tower"):
        build("build", "--min_tower_similarity", 0.5)
