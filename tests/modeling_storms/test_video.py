"""Decoding: the right frames, the right times, and errors that name the file."""

import functools
import sys
import threading
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_storms import VideoDecodeError, decode_video
from modeling_storms.video_storms import fps_frame_indices, uniform_frame_indices


def grey_clip(path, num_frames, fps=10, codec="libx264"):
    """A clip whose frame k is grey level 5 + 5k: a decoded frame tells its own index."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb8" if codec == "gif" else "yuv420p"
        stream.bit_rate = 4_000_000
        for k in range(num_frames):
            frame = np.full((48, 64, 3), 5 + 5 * k, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def levels(frames):
    return ((frames.mean((1, 2, 3)) - 5) / 5).round().astype(int).tolist()


@pytest.mark.parametrize(
    ("ending", "codec"),
    [
        ("mp4", "libx264"),
        ("mkv", "libx264"),
        ("mov", "mpeg4"),
        ("avi", "mpeg4"),
        ("webm", "libvpx"),
        ("flv", "flv"),
        ("wmv", "wmv2"),
        ("asf", "mpeg4"),
        ("mpg", "mpeg2video"),
        ("ts", "mpeg2video"),
        ("ts", "libx264"),
        ("m2ts", "libx264"),
    ],
)
def test_chosen_frames_are_the_ones_decoded_in_any_container(tmp_path, ending, codec):
    path = grey_clip(tmp_path / f"clip.{ending}", 40, codec=codec)
    chosen = [0, 3, 17, 18, 39]
    frames, metadata = decode_video(path, lambda metadata: chosen)
    assert levels(frames) == chosen
    assert frames.shape == (5, 48, 64, 3)
    assert frames.dtype == np.uint8
    assert metadata.frames_indices == chosen
    assert (metadata.total_num_frames, metadata.height, metadata.width) == (40, 48, 64)
    assert metadata.fps == pytest.approx(10, rel=1e-3)
    assert metadata.timestamps == pytest.approx([0, 0.3, 1.7, 1.8, 3.9], rel=1e-3)


@pytest.mark.parametrize("chosen", [[], [-1], [0, 12], [100]])
def test_frames_the_video_does_not_have_are_an_error(tmp_path, chosen):
    path = grey_clip(tmp_path / "clip.mp4", 12)
    with pytest.raises(ValueError, match=r"clip\.mp4: frames .* must be some of 0 to 11"):
        decode_video(path, lambda metadata: chosen)


def test_what_cannot_be_opened_says_how_to_convert_it(tmp_path):
    with pytest.raises(VideoDecodeError, match=r"moving\.gif: 0 frames decoded.*convert animated images"):
        decode_video(grey_clip(tmp_path / "moving.gif", 8, codec="gif"))


def test_mpeg_streams_without_pyav_are_refused_not_misread(tmp_path, monkeypatch):
    path = grey_clip(tmp_path / "clip.ts", 30, codec="mpeg2video")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"clip\.ts: reading this container needs PyAV"):
        decode_video(path)


def test_bytes_and_paths_decode_the_same(tmp_path):
    path = grey_clip(tmp_path / "clip.mp4", 12)
    by_path, _ = decode_video(path)
    by_bytes, _ = decode_video(path.read_bytes())
    stream = grey_clip(tmp_path / "clip.ts", 12)
    assert levels(decode_video(stream.read_bytes())[0]) == levels(decode_video(stream)[0]) == list(range(12))
    assert levels(by_path) == list(range(12))
    assert np.array_equal(by_path, by_bytes)


def test_a_served_file_decodes(tmp_path):
    grey_clip(tmp_path / "clip.mp4", 6)
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/"
        assert levels(decode_video(url + "clip.mp4")[0]) == list(range(6))
        with pytest.raises(VideoDecodeError, match=r"missing\.mp4: 0 frames decoded, the download failed"):
            decode_video(url + "missing.mp4")
    finally:
        server.shutdown()


@pytest.mark.parametrize("content", [None, b"", b"not a video at all", b"\x00" * 5000])
def test_missing_empty_and_foreign_files_are_named(tmp_path, content):
    path = tmp_path / "broken.mp4"
    if content is not None:
        path.write_bytes(content)
    reason = "there is no such file" if content is None else "Check that the file is not empty"
    with pytest.raises(VideoDecodeError, match=rf"broken\.mp4: 0 frames decoded.*{reason}"):
        decode_video(path)


def test_a_cut_file_is_named(tmp_path):
    whole = grey_clip(tmp_path / "whole.mp4", 30).read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VideoDecodeError, match=r"cut\.mp4: 0 frames decoded"):
        decode_video(path)


def test_a_broken_stream_is_named(tmp_path):
    packets = b"".join(b"\x47" + bytes(187) for _ in range(20))  # transport packets that carry nothing
    for name, content in (("broken.ts", packets), ("broken.mpg", b"\x00\x00\x01\xba" + b"\xff" * 4000)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VideoDecodeError, match=f"{name}: 0 frames decoded"):
            decode_video(tmp_path / name)


def test_a_cut_download_is_named():
    class Cut(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"only this")

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Cut)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(VideoDecodeError, match=r"clip\.mp4: 0 frames decoded, the download failed"):
            decode_video(f"http://127.0.0.1:{server.server_port}/clip.mp4")
    finally:
        server.shutdown()


@pytest.mark.parametrize("ending", ["mp4", "ts"])
def test_a_file_without_video_is_named(tmp_path, ending):
    path = tmp_path / f"sound.{ending}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        for _ in range(30):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
            frame.rate = 8000
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoDecodeError, match=rf"sound\.{ending}: 0 frames decoded"):
        decode_video(path)


def test_corrupt_data_says_how_many_frames_decode(tmp_path):
    path = grey_clip(tmp_path / "rotten.mkv", 40)
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    for packet in packets[20:]:  # spoil the second half's data, leaving the container readable
        begin = data.find(bytes(packet))
        data[begin + 4 : begin + packet.size] = b"\xff" * (packet.size - 4)
    path.write_bytes(bytes(data))
    with pytest.raises(VideoDecodeError, match=r"rotten\.mkv: only \d+ of 40 frames decode"):
        decode_video(path)


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_times_are_the_files_own_where_the_frame_rate_varies(tmp_path, ending):
    milliseconds = [0, 40, 80, 500, 1000, 1040, 3000]
    path = tmp_path / f"varying.{ending}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for time in milliseconds:
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 100, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, stream.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    _, metadata = decode_video(path, lambda metadata: [1, 3, 6])
    assert metadata.timestamps == pytest.approx([0.04, 0.5, 3.0], abs=1e-3)
    assert metadata.fps == pytest.approx(6 / 3.0, rel=0.01)  # whatever the header says


@given(total=st.integers(1, 2000), wanted=st.integers(1, 600))
def test_uniform_indices_are_spread_evenly(total, wanted):
    indices = uniform_frame_indices(total, wanted)
    assert len(indices) == min(total, wanted)
    assert indices[0] == 0
    assert indices[-1] < total
    steps = np.diff(indices)
    assert (steps > 0).all()
    assert len(steps) == 0 or steps.max() - steps.min() <= 1


@given(total=st.integers(1, 5000), video_fps=st.floats(1, 120), fps=st.floats(0.1, 60), max_frames=st.integers(1, 768))
def test_fps_indices_never_exceed_the_limit_or_the_video(total, video_fps, fps, max_frames):
    indices = fps_frame_indices(total, video_fps, fps, max_frames)
    assert 1 <= len(indices) <= min(max_frames, total)
    assert len(indices) <= max(1, total / video_fps * fps)


class TestRealClips:
    """Footage from elsewhere: several streams, a header that says 0 frames, odd timestamps, broken data."""

    @pytest.mark.parametrize(
        ("name", "num_frames", "fps"),
        [
            ("nasa_13013.mp4", 390, 29.97),
            ("flipping_a_pancake.mkv", 310, 30),
            ("yoga.mp4", 300, 30),
            ("edge_cases/non_zero_start.mp4", 12, 30),
            ("edge_cases/unordered.mov", 4, 32),
        ],
    )
    def test_they_decode(self, real_clips, name, num_frames, fps):
        frames, metadata = decode_video(
            real_clips / name, lambda metadata: uniform_frame_indices(metadata.total_num_frames, 8)
        )
        assert len(frames) == min(8, num_frames)
        assert metadata.total_num_frames == num_frames
        assert metadata.fps == pytest.approx(fps, rel=1e-3)

    def test_frames_equal_a_sequential_decode_by_another_library(self, real_clips):
        chosen = [0, 1, 37, 38, 150, 299]
        frames, _ = decode_video(real_clips / "yoga.mp4", lambda metadata: chosen)
        with av.open(str(real_clips / "yoga.mp4")) as container:
            every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        for frame, index in zip(frames, chosen):
            errors = [np.abs(frame.astype(int) - other.astype(int)).mean() for other in every]
            assert int(np.argmin(errors)) == index

    def test_broken_data_says_how_many_frames_decode(self, real_clips):
        with pytest.raises(VideoDecodeError, match=r"corrupted\.mp4: only 2[5-8] of 50 frames decode.*Re-encode"):
            decode_video(real_clips / "edge_cases/corrupted.mp4")
