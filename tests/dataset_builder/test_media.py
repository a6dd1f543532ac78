"""Real videos, good, odd and broken: what comes out right, what is refused and why, and that the rest goes on."""

import io
import json
import os
import struct
import zipfile
from fractions import Fraction

import av
import numpy as np
import pytest
from datasets import load_dataset

from dataset_builder.thought_video import encode_video
from modeling_storms import decode_video

from ..conftest import moving_disc


def container(frames, times=None, format="mp4") -> bytes:
    """A file whose frames have the given times in milliseconds; without frames, one with an empty stream."""
    file = io.BytesIO()
    times = times if times is not None else [40 * index for index in range(len(frames))]
    with av.open(file, "w", format=format) as output:
        stream = output.add_stream("libx264", rate=25)
        stream.height, stream.width = (96, 128) if len(frames) == 0 else frames.shape[1:3]
        stream.pix_fmt, stream.time_base = "yuv420p", Fraction(1, 1000)
        stream.codec_context.time_base = Fraction(1, 1000)
        for pixels, milliseconds in zip(frames, times):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = milliseconds, Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def audio_only() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=16000)
        for index in range(16):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 1024 * index
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def claims_four_hours(data: bytes) -> bytes:
    """An MP4 file whose headers say that it lasts four hours."""
    data = bytearray(data)
    for box, offset in ((b"mvhd", 16), (b"mdhd", 16), (b"tkhd", 20)):
        at = data.find(box) + 4 + offset
        scale = struct.unpack(">I", data[at - 4 : at])[0] if box != b"tkhd" else 1000
        data[at : at + 4] = struct.pack(">I", 4 * 3600 * scale)
    return bytes(data)


def turned(data: bytes) -> bytes:
    """An MP4 file with a phone's mark that it is to be shown turned by a quarter."""
    data = bytearray(data)
    at = data.find(b"tkhd") + 4 + 40
    data[at : at + 36] = struct.pack(">9I", 0, 0x10000, 0, 0xFFFF0000, 0, 0, 0, 0, 0x40000000)
    return bytes(data)


def test_broken_videos_are_refused_with_their_reason_and_the_rest_goes_on(build, tmp_path, videos):
    good = encode_video(moving_disc(), 12)
    expected = {
        "corrupt.mp4": "undecodable",
        "cut.mp4": "undecodable",
        "empty.mp4": "undecodable",
        "text.mp4": "undecodable",
        "audio.mp4": "undecodable",
        "no-frames.mp4": "undecodable",
        "one-frame.mp4": "too_few_frames",
        "slow.mkv": "too_few_frames",
        "tiny.mp4": "too_small",
        "lost.mp4": "video_not_found",
        "folder.mp4": "video_not_found",
        "frozen.mp4": "no_motion",
    }
    middle = len(good) // 2
    folder = videos(
        {
            "good.mp4": good,
            "corrupt.mp4": good[:middle] + os.urandom(middle),
            "cut.mp4": good[:900],
            "empty.mp4": b"",
            "text.mp4": b"This is not a video.\n" * 50,
            "audio.mp4": audio_only(),
            "no-frames.mp4": container(np.empty((0, 96, 128, 3), np.uint8)),
            "one-frame.mp4": container(moving_disc(1)),
            "slow.mkv": container(moving_disc(4), [0, 1_000_000, 2_000_000, 14_400_000], "matroska"),
            "tiny.mp4": encode_video(moving_disc(height=50, width=50), 12),
            "lost.mp4": good,
            "folder.mp4": good,
            "frozen.mp4": encode_video(np.repeat(moving_disc()[:1], 24, axis=0), 12),
            "also-good.mp4": encode_video(moving_disc(seed=1), 12),
        }
    )
    (folder / "lost.mp4").unlink()
    (folder / "folder.mp4").unlink()
    (folder / "folder.mp4").mkdir()
    (tmp_path / "secret.mp4").write_bytes(good)
    os.symlink(tmp_path / "secret.mp4", folder / "link.mp4")
    with (folder / "questions.jsonl").open("a") as file:
        for name in ("link.mp4", "../secret.mp4"):
            file.write(json.dumps({"id": name, "video": name, "question": "Why?", "answer": "so"}) + "\n")
    ledger = build("build", "--source", "local_folder", "--video_root", folder)
    reasons = {row["id"]: row["reason"] for row in ledger["rejected_rows"]}
    assert reasons == {
        **{name.split(".")[0]: reason for name, reason in expected.items()},
        "link.mp4": "outside_video_root",
        "../secret.mp4": "outside_video_root",
    }
    assert all(row["detail"] for row in ledger["rejected_rows"])
    assert str(tmp_path) not in json.dumps(ledger)
    assert load_dataset(str(tmp_path / "out"), split="train")["id"][:] == ["good", "also-good"]


def test_odd_videos_come_out_right(build, tmp_path, videos):
    disc = moving_disc(24)
    varying = [40 * index if index < 12 else 480 + 200 * (index - 12) for index in range(24)]
    folder = videos(
        {
            "portrait.mp4": encode_video(moving_disc(height=160, width=96), 12),
            "turned.mp4": turned(encode_video(disc, 12)),
            "varying.mp4": container(disc, varying),
            "varying.mkv": container(disc, varying, "matroska"),
            "late.mkv": container(disc, [8000 + 40 * index for index in range(24)], "matroska"),
            "hours.mp4": claims_four_hours(container(disc)),
            "stream.ts": container(disc, format="mpegts"),
            "odd name, with spaces é.mp4": encode_video(moving_disc(seed=3), 12),
        }
    )
    lines = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    # Questions of their own: some of these are one clip in many files, which is a near-duplicate otherwise.
    text = "".join(json.dumps({**x, "id": x["video"], "question": f"{x['video']}?"}) + "\n" for x in lines)
    (folder / "questions.jsonl").write_text(text)
    build("build", "--source", "local_folder", "--video_root", folder, "--num_candidates", 24)
    rows = {row["id"]: row for row in load_dataset(str(tmp_path / "out"), split="train")}
    assert len(rows) == 8
    assert rows["portrait.mp4"]["keyframes"][0].size == (96, 160)
    assert rows["turned.mp4"]["keyframes"][0].size == (96, 128)
    for name in ("varying.mp4", "varying.mkv"):
        expected = [varying[index] / 1000 for index in rows[name]["keyframe_indices"]]
        assert rows[name]["keyframe_timestamps"] == pytest.approx(expected, abs=2e-3)
    for name in ("late.mkv", "hours.mp4", "stream.ts"):
        row = rows[name]
        assert row["keyframe_timestamps"] == pytest.approx([i / 25 for i in row["keyframe_indices"]], abs=2e-3)
        assert row["thought_video_fps"] == pytest.approx(25, rel=0.05)
    for row in rows.values():
        clip = decode_video(folder / row["video_path"])[0]
        for keyframe, index in zip(row["keyframes"], row["keyframe_indices"]):
            assert np.abs(np.asarray(keyframe).astype(int) - clip[index]).mean() < 3


def test_a_segment_is_all_that_is_used(build, tmp_path, videos):
    folder = videos({"long.mp4": encode_video(moving_disc(120), 12)}, start=4.0, end=6.0)
    with (folder / "questions.jsonl").open("a") as file:
        line = {"video": "long.mp4", "question": "When?", "answer": "never", "start": 20, "end": 25}
        file.write(json.dumps({**line, "id": "after"}) + "\n")
    ledger = build("build", "--source", "local_folder", "--video_root", folder)
    assert ledger["reasons"] == {"bad_segment": 1}
    (row,) = load_dataset(str(tmp_path / "out"), split="train")
    assert (row["video_start"], row["video_end"]) == (4.0, 6.0)
    assert all(4.0 <= seconds <= 6.0 for seconds in row["keyframe_timestamps"])
    assert row["thought_video_num_frames"] / row["thought_video_fps"] <= 2.1


def test_segments_and_clips_follow_the_clock_where_the_frame_rate_varies(build, tmp_path, videos):
    # Four seconds at 5 frames a second, then four at 25.
    times = [200 * index for index in range(20)] + [4000 + 40 * index for index in range(100)]
    disc = moving_disc(120)
    folder = videos({"varying.mkv": container(disc, times, "matroska")}, start=1.0, end=6.0)
    build("build", "--source", "local_folder", "--video_root", folder, "--clip_margin_seconds", 9)
    (row,) = load_dataset(str(tmp_path / "out"), split="train")
    assert row["keyframe_timestamps"] == pytest.approx([times[i] / 1000 for i in row["keyframe_indices"]], abs=2e-3)
    assert all(1.0 <= seconds < 6.0 for seconds in row["keyframe_timestamps"])
    # The thought video is the clip from the first keyframe to the segment's end, as it was seen.
    seconds = 6.0 - row["keyframe_timestamps"][0]
    assert row["thought_video_num_frames"] / row["thought_video_fps"] == pytest.approx(seconds, abs=0.2)
    thought, metadata = decode_video(row["thought_video"]["bytes"])
    for frame, moment in zip(thought, metadata.timestamps):
        shown = max(i for i, time in enumerate(times) if time / 1000 <= row["keyframe_timestamps"][0] + moment + 0.02)
        assert abs(int(np.abs(disc.astype(int) - frame).mean((1, 2, 3)).argmin()) - shown) <= 2


def test_an_archive_of_videos_is_a_folder(build, tmp_path, videos):
    folder = videos({"deep/a.mp4": encode_video(moving_disc(), 12)})
    with zipfile.ZipFile(tmp_path / "videos.zip", "w") as file:
        file.write(folder / "deep" / "a.mp4", "deep/a.mp4")
        file.writestr(zipfile.ZipInfo("../evil.mp4"), b"evil")
    questions = folder / "questions.jsonl"
    flags = ("--source", "local_folder", "--video_root", tmp_path / "videos.zip", "--questions", questions)
    ledger = build("build", *flags)
    assert (ledger["accepted"], ledger["reasons"]) == (1, {"unsafe_archive_member": 1})
    build("publish")  # without the archive's questions being read again
    assert not list(tmp_path.rglob("evil.mp4"))


def test_a_replaced_video_is_looked_at_again(build, videos):
    folder = videos({"a.mp4": b"a broken download", "b.mp4": encode_video(moving_disc(), 12)})
    flags = ("--source", "local_folder", "--video_root", folder)
    assert build("build", *flags)["reasons"] == {"undecodable": 1}
    (folder / "a.mp4").write_bytes(encode_video(moving_disc(seed=1), 12))
    assert build("build", *flags)["accepted"] == 2


def test_a_video_replaced_by_another_of_the_same_shape_leaves_nothing_of_the_first(build, tmp_path, videos):
    frames = moving_disc()
    folder = videos({"a.mp4": encode_video(frames, 12)}, license="mit")
    flags = ("--source", "local_folder", "--video_root", folder)
    build("build", *flags)
    folder = videos({"a.mp4": encode_video((frames * 0.8).astype(np.uint8), 12)}, license="mit")
    build("build", *flags)
    build("build", *flags, output="fresh")
    rows = [load_dataset(str(tmp_path / name), split="train")[0] for name in ("out", "fresh")]
    assert rows[0]["thought_video"] == rows[1]["thought_video"]
    (folder / "a.mp4").write_bytes(encode_video(frames, 12))
    with pytest.raises(SystemExit, match="changed since its row was built"):
        build("publish", "--embed_video", True, output="fresh")


def test_details_name_a_file_as_its_row_does(build, tmp_path, videos, monkeypatch):
    folder = videos({"good.mp4": encode_video(moving_disc(), 12), "bad.v.mp4": b"not a video"})
    monkeypatch.chdir(folder)
    ledger = build("build", "--source", "local_folder", "--video_root", ".")
    (row,) = ledger["rejected_rows"]
    assert row["detail"].startswith("bad.v.mp4: 0 frames decoded")
    assert "ffmpeg -i IN OUT.mp4" in row["detail"]


def test_real_clips_come_out_right(build, tmp_path, real_clips):
    clips = {
        "nasa_13013.mp4": (390, 29.97),
        "flipping_a_pancake.mkv": (310, 30),
        "yoga.mp4": (300, 30),
        "edge_cases/non_zero_start.mp4": (12, 30),
    }
    broken = {"edge_cases/corrupted.mp4": "undecodable", "edge_cases/unordered.mov": "too_small"}
    lines = [{"id": name, "video": name, "question": "What happens?", "answer": "?"} for name in (*clips, *broken)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ("--source", "local_folder", "--video_root", real_clips, "--questions", tmp_path / "questions.jsonl")
    ledger = build("build", *flags)
    assert {row["id"]: row["reason"] for row in ledger["rejected_rows"]} == broken
    rows = {row["id"]: row for row in load_dataset(str(tmp_path / "out"), split="train")}
    assert list(rows) == list(clips)
    for name, row in rows.items():
        num_frames, fps = clips[name]
        indices = row["keyframe_indices"]
        assert 1 <= len(indices) <= 4
        assert indices[-1] < num_frames
        assert row["keyframe_timestamps"] == pytest.approx([index / fps for index in indices], abs=0.02)
        clip, _ = decode_video(real_clips / name, lambda metadata, i=indices: i)
        thought, metadata = decode_video(row["thought_video"]["bytes"])
        assert len(thought) == row["thought_video_num_frames"] <= 64
        assert metadata.fps == pytest.approx(row["thought_video_fps"], rel=0.01)
        for keyframe, frame in zip(row["keyframes"], clip):
            assert np.abs(np.asarray(keyframe).astype(int) - frame).mean() < 4
        assert np.abs(thought[0].astype(int) - clip[0]).mean() < 4  # it begins with the first keyframe
