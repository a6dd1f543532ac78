import io
import json
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dataset_builder.schema import Rejected, check_columns
from dataset_builder.thought_video import (
    SimulatedGenerator,
    SourceClipGenerator,
    WanGenerator,
    encode_video,
    keyframe_positions,
    open_keyframe,
    thought_prompt,
)
from modeling_storms.video_storms import decode_video

from .tiny_wan import build_tiny_wan


TINY = {"num_frames": 9, "max_area": 16 * 16, "num_inference_steps": 2}


def colours(num_frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Saturated halves that change in every frame."""
    palette = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)], np.uint8)
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    for frame_idx in range(num_frames):
        frames[frame_idx, :, : width // 2] = palette[frame_idx % 5]
        frames[frame_idx, :, width // 2 :] = palette[(frame_idx + 2) % 5]
    return frames


def numbered(num_frames: int, height: int = 32, width: int = 64) -> np.ndarray:
    """Frames that show their index: units in the left half's grey level, tens in the right half's."""
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    for frame_idx in range(num_frames):
        frames[frame_idx, :, : width // 2] = frame_idx % 10 * 25
        frames[frame_idx, :, width // 2 :] = frame_idx // 10 * 25
    return frames


def png(level: int, side: int = 32) -> dict:
    noise = np.random.default_rng(level).integers(0, 40, (side, side, 3))
    file = io.BytesIO()
    Image.fromarray((noise + level).astype(np.uint8)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


class TestEncoding:
    @given(
        num_frames=st.integers(1, 20),
        fps=st.sampled_from([0.5, 1, 2.4, 7.5, 8, 16, 23.976, 25, 30000 / 1001, 60, 240]),
        height=st.integers(1, 70),
        width=st.integers(74, 140),  # decord can't read some smaller ones
    )
    @settings(max_examples=25, deadline=None)
    def test_count_fps_and_size_come_back(self, num_frames, fps, height, width):
        frames, metadata = decode_video(encode_video(colours(num_frames, height, width), fps))
        assert frames.shape == (num_frames, height + height % 2, width + width % 2, 3)
        assert metadata.fps == pytest.approx(fps, rel=1e-4)

    def test_colours_come_back(self):
        frames = colours(10)
        decoded, _ = decode_video(encode_video(frames, 8))
        # Measured 0.7. Pixels converted by BT.601 in a file that says BT.709 give 8.
        assert np.abs(decoded.astype(int) - frames).mean() < 3

    def test_an_odd_side_repeats_its_last_row_and_column(self):
        frames = np.full((2, 31, 77, 3), 40, np.uint8)
        frames[:, -1], frames[:, :, -1] = 200, 200
        decoded, _ = decode_video(encode_video(frames, 8))
        assert decoded.shape == (2, 32, 78, 3)
        assert np.abs(decoded[:, -2:].astype(int) - 200).max() < 12
        assert np.abs(decoded[:, :, -2:].astype(int) - 200).max() < 12

    def test_same_frames_give_the_same_bytes_whatever_was_encoded_before(self):
        # With macroblock-tree rate control, 25 files of these frames came out as 18.
        rng = np.random.default_rng(0)
        rows, columns = np.mgrid[:96, :160]
        frames = np.empty((40, 96, 160, 3))
        frames[:] = (90 + 60 * np.sin(rows / 7) * np.cos(columns / 11) + 0.3 * rows)[..., None]
        for frame_idx in range(40):
            frames[frame_idx, 50:80, 3 * frame_idx : 3 * frame_idx + 25] = (220, 180, 40)
        noisy = (frames + rng.normal(0, 8, frames.shape)).clip(0, 255).astype(np.uint8)
        files = set()
        for _ in range(8):
            encode_video(rng.integers(0, 256, (6, *rng.integers(20, 200, 2), 3), np.uint8), 8)
            files.add(encode_video(noisy, 12))
        assert len(files) == 1

    def test_the_file_tells_nothing_but_its_frames(self):
        import av

        content = encode_video(colours(12), 8)
        check_columns({"thought_video": {"bytes": content, "path": None}}, "row")
        assert content.index(b"moov") < content.index(b"mdat")
        with av.open(io.BytesIO(content)) as container:
            stream = container.streams.video[0]
            assert set(container.metadata) == {"major_brand", "minor_version", "compatible_brands"}
            assert set(stream.metadata) == {"language", "handler_name"}
            assert stream.average_rate == Fraction(8)
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert (stream.codec_context.colorspace, stream.codec_context.color_range) == (1, 1)

    @pytest.mark.parametrize(
        ("frames", "fps", "message"),
        [
            (np.zeros((0, 8, 8, 3), np.uint8), 8, "at least one frame"),
            (np.zeros((8, 8, 3), np.uint8), 8, "shape"),
            (np.zeros((2, 8, 8, 4), np.uint8), 8, "shape"),
            (np.zeros((2, 8, 8, 3), np.float32), 8, "float32"),
            (np.zeros((2, 8, 8, 3), np.uint8), 0, "fps=0"),
            (np.zeros((2, 8, 8, 3), np.uint8), float("nan"), "fps=nan"),
        ],
    )
    def test_frames_that_are_none_are_refused(self, frames, fps, message):
        with pytest.raises(ValueError, match=message):
            encode_video(frames, fps)


class TestSourceClip:
    @pytest.fixture
    def row(self):
        video = {"bytes": encode_video(numbered(100), 10), "path": None}
        return {
            "id": "a",
            "video": video,
            "video_path": "clips/a.mp4",
            "video_start": None,
            "video_end": None,
            "keyframe_indices": [20, 40],
        }

    def shown(self, frames) -> list[int]:
        units, tens = (np.round(half.mean((1, 2, 3)) / 25) for half in np.split(frames, 2, axis=2))
        return (units + 10 * tens).astype(int).tolist()

    def test_begins_at_the_first_keyframe_and_ends_after_the_last(self, row):
        frames, fps, details = SourceClipGenerator("nowhere").generate(row)
        assert self.shown(frames) == list(range(20, 51))
        assert fps == pytest.approx(10)
        assert details == {"first_frame": 20, "last_frame": 50}

    def test_drops_frames_at_real_speed(self, row):
        frames, fps, _ = SourceClipGenerator("nowhere", max_frames=12).generate(row)
        assert self.shown(frames) == list(range(20, 51, 3))
        assert fps == pytest.approx(10 / 3)

    def test_begins_earlier_only_where_the_video_ends(self, row):
        row["keyframe_indices"] = [95]
        assert self.shown(SourceClipGenerator("nowhere").generate(row)[0]) == list(range(90, 100))
        row["keyframe_indices"] = [50]
        assert self.shown(SourceClipGenerator("nowhere", margin_seconds=0).generate(row)[0]) == list(range(50, 60))

    def test_stays_between_start_and_end(self, row):
        row |= {"video_start": 3.0, "video_end": 4.5, "keyframe_indices": [40]}
        assert self.shown(SourceClipGenerator("nowhere").generate(row)[0]) == list(range(35, 45))
        assert self.shown(SourceClipGenerator("nowhere", min_seconds=5).generate(row)[0]) == list(range(30, 45))

    @given(
        keyframes=st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True).map(sorted),
        start=st.one_of(st.none(), st.floats(0, 8)),
        seconds=st.one_of(st.none(), st.floats(0.1, 9)),
        max_frames=st.integers(2, 70),
        margin=st.floats(0, 5),
        least=st.floats(0, 20),
    )
    @settings(max_examples=200, deadline=None)
    def test_indices_are_evenly_spread_frames_of_the_video(self, keyframes, start, seconds, max_frames, margin, least):
        row = {
            "video_path": "a.mp4",
            "video_start": start,
            "video_end": None if seconds is None else (start or 0) + seconds,
            "keyframe_indices": keyframes,
        }
        generator = SourceClipGenerator("nowhere", max_frames=max_frames, margin_seconds=margin, min_seconds=least)
        _, metadata = decode_video(encode_video(numbered(1), 10))
        metadata.total_num_frames, metadata.frame_timestamps = 100, np.arange(100) / 10
        if seconds is not None and round(row["video_end"] * 10) - round((start or 0) * 10) < 2:
            return
        indices = generator._indices(row, metadata)
        assert 2 <= len(indices) <= max_frames
        assert 0 <= indices[0] <= keyframes[0]
        assert indices[-1] < 100
        assert len(set(np.diff(indices))) == 1

    def test_reads_the_file_under_its_root_and_scales_down_only(self, row, tmp_path):
        (tmp_path / "clips").mkdir()
        (tmp_path / row["video_path"]).write_bytes(encode_video(numbered(60, 90, 161), 10))
        row["video"] = None
        assert SourceClipGenerator(tmp_path, max_side=80).generate(row)[0].shape == (31, 44, 80, 3)
        assert SourceClipGenerator(tmp_path).generate(row)[0].shape == (31, 90, 162, 3)

    def test_what_has_no_clip_is_rejected_without_a_path_of_this_machine(self, row, tmp_path):
        generator = SourceClipGenerator(tmp_path)
        cases = [
            (row | {"video": None}, "undecodable"),
            (row | {"video": {"bytes": b"no video", "path": None}}, "undecodable"),
            (row | {"keyframe_indices": [100]}, "undecodable"),
            (row | {"keyframe_indices": [40], "video_start": 4.0, "video_end": 4.1}, "too_short"),
        ]
        for case, reason in cases:
            with pytest.raises(Rejected) as refused:
                generator.generate(case)
            assert refused.value.reason == reason
            assert str(tmp_path) not in str(refused.value)

    def test_settings_hold_no_path(self, tmp_path):
        generator = SourceClipGenerator(tmp_path)
        assert str(tmp_path) not in json.dumps(generator.settings())
        assert generator.settings()["max_frames"] == 64
        with pytest.raises(ValueError, match="max_frames=1"):
            SourceClipGenerator(tmp_path, max_frames=1)

    def test_real_clips(self, real_clips):
        for name in ("nasa_13013.mp4", "yoga.mp4"):
            row = {"id": name, "video": None, "video_path": name, "video_start": None, "video_end": None}
            row["keyframe_indices"] = [30, 90]
            frames, fps, _ = SourceClipGenerator(real_clips, max_side=160).generate(row)
            keyframe, metadata = decode_video(real_clips / name, lambda metadata: [30])
            assert np.array_equal(frames[0], np.asarray(Image.fromarray(keyframe[0]).resize(frames.shape[2:0:-1])))
            assert 30 < len(frames) <= 64
            assert len(frames) / fps == pytest.approx((91 + metadata.fps - 30) / metadata.fps, abs=2 / fps)


def test_a_simulated_scene_gives_its_own_thought_video():
    from dataset_builder.sources.simulated import list_rows, scene_of

    (row,) = list_rows(["shell_game"], 1, 0, {"train": 1.0})
    frames, fps, _ = SimulatedGenerator().generate({"id": row["id"], "scene": row["scene"]})
    scene = scene_of(row["scene"])
    assert np.array_equal(frames, scene.thought_frames())
    assert fps == scene.fps
    decoded, metadata = decode_video(encode_video(frames, fps))
    assert np.abs(decoded.astype(int) - frames).mean() < 3
    assert metadata.fps == pytest.approx(fps)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    return {name: build_tiny_wan(folder / name, name) for name in ("first", "first_last", "vace")}


@pytest.fixture(scope="module")
def generators(folders):
    return {name: WanGenerator(str(folder), conditioning=name, **TINY) for name, folder in folders.items()}


class TestWan:
    @pytest.fixture
    def row(self):
        return {
            "id": "a",
            "question": "Where does the $1 ball {go}?",
            "options": ["left", "right"],
            "answer": "B",
            "reasoning_plan": "The ball rolls over the edge.",
            "keyframes": [png(20), png(120), png(200)],
            "keyframe_timestamps": [1.0, 2.0, 5.0],
        }

    @pytest.mark.parametrize("conditioning", ["first", "first_last", "vace"])
    def test_a_row_depends_on_itself_seed_and_id_only(self, generators, folders, row, conditioning):
        alone = WanGenerator(str(folders[conditioning]), conditioning=conditioning, **TINY)
        alone = pickle.loads(pickle.dumps(alone))
        frames, fps, details = alone.generate(row)
        assert (frames.shape, frames.dtype, fps) == ((9, 16, 16, 3), np.uint8, 16)
        assert np.ptp(frames) > 0
        other = generators[conditioning].generate(row | {"id": "b"})[0]
        again, _, details_again = generators[conditioning].generate(row)
        assert np.array_equal(frames, again)
        assert details == details_again
        json.dumps(details)
        assert not np.array_equal(frames, other)
        generators[conditioning].seed = 1
        assert not np.array_equal(frames, generators[conditioning].generate(row)[0])
        generators[conditioning].seed = 0

    @pytest.mark.parametrize(("conditioning", "matter"), [("first", {0}), ("first_last", {0, 2}), ("vace", {0, 1, 2})])
    def test_the_conditioning_keyframes_reach_the_pipeline(self, generators, row, conditioning, matter):
        frames = generators[conditioning].generate(row)[0]
        for keyframe_idx in range(3):
            keyframes = list(row["keyframes"])
            keyframes[keyframe_idx] = png(80)
            changed = generators[conditioning].generate(row | {"keyframes": keyframes})[0]
            assert np.array_equal(frames, changed) == (keyframe_idx not in matter)

    def test_vace_places_keyframes_at_their_times(self, generators, row):
        assert keyframe_positions([2.0, 3.0, 6.0], 81) == [0, 20, 80]
        assert keyframe_positions([2.0], 81) == [0]
        keyframes = [open_keyframe(keyframe) for keyframe in row["keyframes"]]
        conditions = generators["vace"]._conditions(keyframes, row["keyframe_timestamps"])
        known = [position for position, mask in enumerate(conditions["mask"]) if mask.getextrema() == (0, 0)]
        assert known == [0, 2, 8]
        assert [conditions["video"][position] for position in known] == keyframes
        assert {conditions["video"][position].getextrema() for position in (1, 5)} == {((128, 128),) * 3}

    def test_the_pipeline_reads_question_and_plan_but_no_answer(self, generators, row, monkeypatch):
        generators["first"].generate(row)
        prompts = []
        encode = generators["first"]._pipeline.encode_prompt
        monkeypatch.setattr(
            generators["first"]._pipeline,
            "encode_prompt",
            lambda **kwargs: prompts.append((kwargs["prompt"], kwargs["negative_prompt"])) or encode(**kwargs),
        )
        generators["first"].generate(row)
        ((prompt, negative_prompt),) = prompts
        assert row["question"] in prompt
        assert row["reasoning_plan"] in prompt
        assert prompt == thought_prompt(row["question"], row["reasoning_plan"])
        assert not any(option in prompt for option in row["options"])
        assert negative_prompt == generators["first"].negative_prompt

    @given(st.text(), st.text())
    def test_no_text_breaks_the_prompt(self, question, plan):
        prompt = thought_prompt(question, plan)
        assert question in prompt
        assert plan in prompt

    def test_a_prompt_that_wan_cuts_off_is_named(self, generators, row, caplog):
        from transformers.utils import logging

        logging.enable_propagation()
        try:
            generators["first"].generate(row | {"reasoning_plan": "It rolls. " * 60})
        finally:
            logging.disable_propagation()
        assert "Wan reads 512 of them" in caplog.text

    def test_frames_follow_the_keyframe_within_the_area(self, folders, row):
        file = io.BytesIO()
        Image.new("RGB", (200, 100)).save(file, "PNG")
        row["keyframes"] = [{"bytes": file.getvalue(), "path": None}] * 3
        generator = WanGenerator(str(folders["first"]), **TINY | {"max_area": 32 * 64, "num_frames": 5})
        assert generator.generate(row)[0].shape == (5, 32, 64, 3)

    def test_options_that_change_the_weights_change_the_result(self, folders, generators, row):
        frames = generators["first"].generate(row)[0]
        for options in ({"fp8": True}, {"dtype": "float32"}, {"flow_shift": 8.0}):
            changed = WanGenerator(str(folders["first"]), **TINY, **options).generate(row)[0]
            assert changed.shape == frames.shape
            assert not np.array_equal(changed, frames)
        tiled = WanGenerator(str(folders["first"]), **TINY, vae_tiling=True).generate(row)[0]
        assert np.array_equal(tiled, frames)  # one tile covers it

    def test_settings_name_the_model_without_its_path(self, folders, tmp_path):
        settings = WanGenerator(str(folders["first"])).settings()
        assert str(folders["first"].parent) not in json.dumps(settings)
        assert settings["model"].startswith("first@")
        assert settings["model"] != WanGenerator(str(folders["vace"])).settings()["model"].replace("vace", "first")
        hub = WanGenerator(revision="abc").settings()
        assert (hub["model"], hub["revision"]) == ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "abc")
        assert {"seed", "prompt_hash", "num_inference_steps", "guidance_scale", "conditioning"} <= set(hub)
        assert "offload" not in hub

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"conditioning": "middle"}, "first, first_last, vace"),
            ({"dtype": "int8"}, "bfloat16"),
            ({"offload": "disk"}, "sequential"),
            ({"num_frames": 80}, "for example 81"),
            ({"num_frames": 1}, "for example 5"),
            ({"fps": 0}, "fps=0"),
            ({"model": "/no/such/folder"}, "no folder here"),
            ({"model": "wan"}, "no folder here"),
        ],
    )
    def test_options_that_can_not_work_are_refused_at_once(self, options, message):
        with pytest.raises(ValueError, match=message):
            WanGenerator(**options)

    def test_a_model_that_can_not_take_the_conditioning_is_refused(self, folders, row):
        for model, conditioning, message in (
            ("vace", "first", "needs a WanImageToVideoPipeline"),
            ("first", "vace", "needs a WanVACEPipeline"),
            ("first", "first_last", "trained for 'first'"),
            ("first_last", "first", "trained for 'first_last'"),
        ):
            with pytest.raises(ValueError, match=message):
                WanGenerator(str(folders[model]), conditioning=conditioning, **TINY).generate(row)

    def test_what_this_machine_lacks_is_named(self, folders, row, monkeypatch):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        with pytest.raises(ValueError, match="without a GPU"):
            WanGenerator(str(folders["first"]), offload="model", **TINY).generate(row)
        monkeypatch.setattr("dataset_builder.thought_video.find_spec", lambda name: None)
        with pytest.raises(ImportError, match="pip install ftfy"):
            WanGenerator(str(folders["first"]), **TINY).generate(row)
