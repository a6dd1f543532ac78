"""Benchmarks as they are published, in small: read whole, or refused with what is wrong."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dataset_builder.__main__ import main as dataset_builder
from dataset_builder.thought_video import encode_video
from evaluation.benchmarks import BENCHMARKS, Subtitle, load_benchmark
from evaluation.benchmarks.files import Files
from evaluation.benchmarks.longvideobench import parse_subtitles
from evaluation.benchmarks.mvbench import FOLDERS
from evaluation.benchmarks.videomme import parse_srt
from evaluation.parsing import parse_choice
from evaluation.prompts import prompt_names, prompt_text
from evaluation.protocols import read_clip
from tests.hub.server import loopback_hub

from ..conftest import moving_disc


@pytest.fixture(scope="session")
def video() -> bytes:
    return encode_video(moving_disc(num_frames=9, height=32, width=40), 3)


# -- small copies of what is published


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")


def write_zip(path: Path, members: dict[str, bytes | str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (32, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


SRT = """\N{BYTE ORDER MARK}1
00:00:00,000 --> 00:00:01,200
<font color="white" size=".72c">Hi guys,</font>

2
00:00:01,200 --> 00:00:02,500
<font color="white" size=".72c">I'm going to show you</font>
<font color="white" size=".72c">how to bake.</font>
"""


def videomme(root, video, change=list):
    row = {
        "video_id": "001",
        "duration": "short",
        "domain": "Knowledge",
        "sub_category": "Humanity & History",
        "url": "https://example.org/watch?v=aBc-1",
        "videoID": "aBc-1",
        "question_id": "001-1",
        "task_type": "Counting Problem",
        "question": "How many discs are there?",
        "options": ["A. One.", "B. Two.", "C. Three.", "D. None."],
        "answer": "A",
    }
    rows = [
        row,
        row | {"question_id": "001-2", "question": "What moves?", "answer": "C"},
        row | {"question_id": "002-1", "videoID": "AbC-1", "duration": "long", "answer": "D"},
    ]
    write(root / "videomme" / "test-00000-of-00001.parquet", change(rows))
    write_zip(root / "videos_chunked_01.zip", {"data/aBc-1.mp4": video})
    write_zip(root / "videos_chunked_02.zip", {"data/AbC-1.MP4": video + bytes(9)})
    write_zip(root / "subtitle.zip", {"subtitle/aBc-1.srt": SRT})
    return ["One.", "Three.", "None."]


def mvbench(root, video, change=list):
    """The Hub's branch `video`: clips are cut out already."""
    for task in BENCHMARKS["mvbench"].counts:
        row = {
            "video": f"{task}_1.mp4",
            "question": "What happened?",
            "candidates": ["It fell.", "It rose.", "A"],
            "answer": "It rose.",
            "start": 1.0,
            "end": 2.0,
        }
        rows = [row, row | {"answer": "A"}]
        write(root / "json" / f"{task}.json", change(rows) if task == "action_sequence" else rows)
    write_zip(root / "video.zip", {f"{folders[0]}/{task}_1.mp4": video for task, folders in FOLDERS.items()})
    return ["It rose.", "A"] * 20


def tempcompass(root, video, change=list):
    row = {"video_id": "1034419625", "dim": "action"}
    tables = {
        "multi-choice": {"question": "What is it doing?\nA. rolling\nB. flying", "answer": "B. flying"},
        "yes_no": {"question": "Is it rolling?", "answer": "no"},
        "caption_matching": {
            "question": "Which caption matches the video better?\nCaption A: It flies.\nCaption B: It rolls.",
            "answer": "Caption B: It rolls.",
        },
        "captioning": {
            "question": "Please write a caption.\nInformation A: {'action': 'rolling'}\nGenerated Caption:",
            "answer": "A. rolling",
            "mc_question": "What is it doing?\nA. rolling\nB. flying",
            "mc_answer": "A. rolling",
        },
    }
    for task, columns in tables.items():
        rows = [row | columns]
        write(root / task / "test-00000-of-00001.parquet", change(rows) if task == "multi-choice" else rows)
    write_zip(root / "tempcompass_videos.zip", {"videos/1034419625.mp4": video, "__MACOSX/videos/._1.mp4": "x"})
    return ["flying", "no", "It rolls."]


def mmvu(root, video, change=list):
    row = {
        "id": "validation_0",
        "video": "https://huggingface.co/datasets/yale-nlp/MMVU/resolve/main/videos/Art/0.mp4",
        "question_type": "multiple-choice",
        "metadata": {"subject": "Art", "textbook": "", "rationale": "", "knowledge": []},
        "question": "Which shot is it?",
        "choices": {"A": "pan", "B": "tilt", "C": "zoom", "D": "dolly", "E": "still"},
        "answer": "E",
    }
    opened = {"id": "validation_1", "question_type": "open-ended", "choices": dict.fromkeys("ABCDE", "")}
    rows = [row, row | opened | {"question": "Which shot?", "answer": "Dolly Zoom"}]
    write(root / "validation.json", change(rows))
    (root / "videos" / "Art").mkdir(parents=True)
    (root / "videos" / "Art" / "0.mp4").write_bytes(video)
    return ["still"]


def video_holmes(root, video, change=list):
    row = {
        "video ID": "RSmjqss0XKQ",
        "Question ID": "q1",
        "Question Type": "SR",
        "Question": "Who did it?",
        "Options": {letter: f"person {letter}" for letter in "ABCDEF"},
        "Answer": "F",
        "Explanation": "",
    }
    write(root / "test_Video-Holmes.json", change([row, row | {"Question ID": "q2", "Answer": "A"}]))
    write_zip(root / "videos.zip", {"videos/RSmjqss0XKQ.mp4": video})
    return ["person F", "person A"]


def videoespresso(root, video, change=list):
    row = {
        "question": "Why does it stop?",
        "answer": "a wall",
        "evidence": "",
        "task": "Causal Analysis",
        "correct_answer": "(B)",
        "video_path": "test_video/one.mp4",
        "options": ["(A): a tree", "(B): a wall", "(C): a cup", "(D): a hand"],
    }
    write(root / "bench_hard.json", change([row, row | {"correct_answer": "(D)"}]))
    write_zip(root / "all_video.zip", {"all_video/test_video/one.mp4": video})
    return ["a wall", "a hand"]


def mlvu(root, video, change=list):
    row = {
        "video_name": "movie_1.mp4",
        "question": "What colour is it?\n(A) red\n(B) blue\n(C) green\n(D) grey",
        "answer": "B",
        "task_type": "plotQA",
    }
    rows = [row, row | {"task_type": "count", "answer": "D"}]
    write(root / "mlvu" / "test-00000-of-00001.parquet", change(rows))
    write_zip(root / "video_part_1.zip", {"movie_1.mp4": video})
    return ["blue", "grey"]


def longvideobench(root, video, change=list):
    row = {
        "id": "v1_0",
        "video_id": "v1",
        "video_path": "v1.mp4",
        "question": "What is said when it turns?",
        **{f"option{place}": text for place, text in enumerate(["left", "right", "stop", "N/A", "N/A"])},
        "correct_choice": 2,
        "duration": 3.0,
        "duration_group": 15,
        "question_category": "T2E",
        "subtitle_path": "v1_en.json",
        "starting_timestamp_for_subtitles": 10.0,
    }
    rows = [row, row | {"id": "v2_0", "correct_choice": 0, "subtitle_path": "v2_en.json", "duration_group": 3600}]
    write(root / "validation-00000-of-00001.parquet", change(rows))
    subtitles = {
        "v1_en.json": [
            {"timestamp": [2.0, 9.0], "text": "before"},
            {"timestamp": [10.5, 11.5], "text": "turn\nleft"},
            {"timestamp": [12.5, None], "text": "stop"},
        ],
        "v2_en.json": [{"start": "00:00:11.000", "end": "00:00:12.250", "line": "right"}],
    }
    write_tar(root / "subtitles.tar", {f"subtitles/{name}": json.dumps(one) for name, one in subtitles.items()})
    whole = root / "videos.tar"
    write_tar(whole, {"./videos/v0.mp4": b"not this" * 99, "./videos/v1.mp4": video})
    data = whole.read_bytes()
    whole.unlink()
    for place, begin in enumerate(range(0, len(data), 3000)):
        (root / f"videos.tar.part.a{chr(97 + place)}").write_bytes(data[begin : begin + 3000])
    return ["stop", "left"]


def write_tar(path, members):
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def egoschema(root, video, change=list):
    row = {
        "question_idx": "00001",
        "question": "What does c do?",
        "video_idx": "001d2d1b-d2f9",
        "option": [f"{letter}. C does {letter.lower()}." for letter in "ABCDE"],
        "answer": "4",
    }
    write(root / "Subset" / "test-00000-of-00001.parquet", change([row, row | {"question_idx": "2", "answer": "0"}]))
    write(root / "MC" / "test-00000-of-00001.parquet", [row | {"answer": None}])
    write_zip(root / "videos_chunked_01.zip", {"videos/001d2d1b-d2f9.mp4": video})
    return ["C does e.", "C does a."]


WRITERS = {
    one.__name__: one
    for one in (videomme, mvbench, tempcompass, mmvu, video_holmes, videoespresso, mlvu, longvideobench, egoschema)
}
# Columns that hold the answer and the options in each.
ANSWERS = {"video_holmes": "Answer", "videoespresso": "correct_answer", "longvideobench": "correct_choice"}
OPTIONS = {"mvbench": "candidates", "mmvu": "choices", "video_holmes": "Options", "egoschema": "option"}
CATEGORIES = {
    "videomme": {"duration", "domain", "sub_category", "task_type"},
    "mvbench": {"task"},
    "tempcompass": {"task", "dim"},
    "mmvu": {"subject"},
    "video_holmes": {"type"},
    "videoespresso": {"task"},
    "mlvu": {"task"},
    "longvideobench": {"duration_group", "question_category"},
    "egoschema": set(),
}

every_benchmark = pytest.mark.parametrize("name", WRITERS)


@pytest.fixture
def published(tmp_path, video):
    """Writes a benchmark's small copy, and loads it."""

    def load(name, change=list, allow_subset=True, **options):
        root = tmp_path / "data" / name
        if not root.exists():
            WRITERS[name](root, video, change)
        return load_benchmark(
            name, str(tmp_path / "data"), allow_subset=allow_subset, cache_dir=str(tmp_path / "cache"), **options
        )

    load.root = tmp_path / "data"
    load.cache = tmp_path / "cache"
    return load


def first_row(**columns):
    """A change of the first row."""
    return lambda rows: [rows[0] | columns, *rows[1:]]


# -- what is read


@every_benchmark
def test_a_benchmark_is_read_as_it_is_published(name, published, video, tmp_path):
    expected = WRITERS[name](published.root / name, video)
    benchmark = published(name)
    assert [one.options[one.answer] for one in benchmark.questions] == expected
    assert not [one.failure for one in benchmark.questions if one.failure]
    assert all(set(one.categories) == CATEGORIES[name] for one in benchmark.questions)
    assert all(list(one.options) == list("ABCDEF")[: len(one.options)] for one in benchmark.questions)
    assert not any("N/A" in one.options.values() for one in benchmark.questions)
    assert benchmark.mean_over == ("task" if name in ("mvbench", "mlvu") else None)
    assert benchmark.revision is None
    assert benchmark.is_subset
    assert len({one.id for one in benchmark.questions}) == len(expected)
    for one in benchmark.questions:
        frames, metadata = read_clip(one.video, lambda clip: np.arange(clip.total_num_frames), one.start, one.end)
        assert len(frames) == 9
        assert metadata.fps == pytest.approx(3)


@every_benchmark
def test_every_named_prompt_shows_the_question_and_its_options(name, published):
    benchmark = published(name, open_ended=name in ("tempcompass", "mmvu"))
    for thinking in (False, True):
        for prompt in prompt_names(benchmark, thinking):
            for one in benchmark.questions:
                text = prompt_text(benchmark, one, prompt, thinking).text
                assert one.question in text
                # A yes-or-no question of TempCompass says what to answer, without a list.
                listed = one.task != "yes_no" or prompt in ("storms", "video_r1")
                assert all(option in text for option in one.options.values()) or not listed


def test_questions_about_one_video_share_its_id(published):
    first, second, third = published("videomme").questions
    assert first.video_id == second.video_id
    assert first.video == second.video
    assert third.video_id != first.video_id  # though the names differ in case alone


def test_a_folder_may_be_given_itself_or_by_the_folder_that_holds_it(published, video):
    benchmark = published("videoespresso")
    own = str(published.root / "videoespresso")
    for name, root in (("videoespresso", own), (f"videoespresso={own}", None)):
        again = load_benchmark(name, root, allow_subset=True, cache_dir=str(published.cache))
        assert again.questions == benchmark.questions
        assert again.name == "videoespresso"


def test_loose_videos_are_taken_before_those_in_archives(published, video):
    published("video_holmes")
    loose = published.root / "video_holmes" / "videos_cropped" / "RSmjqss0XKQ.mp4"
    loose.parent.mkdir()
    loose.write_bytes(video)
    assert {one.video for one in published("video_holmes").questions} == {str(loose)}


def test_max_questions_draws_the_same_ones_each_time_and_extracts_no_other(published):
    drawn = published("mvbench", allow_subset=False, max_questions=5)
    assert len(drawn.questions) == 5
    assert drawn.is_subset
    assert published("mvbench", max_questions=5).questions == drawn.questions
    assert [one for one in published("mvbench").questions if one in drawn.questions] == drawn.questions
    assert len({one.task for one in drawn.questions}) > 2
    with pytest.raises(ValueError, match="--max_questions: saw 0"):
        published("mvbench", max_questions=0)


def test_only_what_is_asked_for_comes_out_of_archives(published):
    question = published("videomme", max_questions=1).questions[0]
    extracted = [path for path in published.cache.rglob("*") if path.is_file()]
    assert [str(path) for path in extracted] == [question.video]


# -- what is refused


@every_benchmark
def test_a_wrong_number_of_questions_is_an_error(name, published):
    expected = next(iter(BENCHMARKS[name].counts.values()))
    with pytest.raises(ValueError, match=rf"{name}: saw [1-3].* instead of {expected}.*--allow_subset"):
        published(name, allow_subset=False)


def test_the_right_number_of_questions_is_no_subset(published, monkeypatch):
    adapter = replace(BENCHMARKS["videomme"], counts={"": 3})
    monkeypatch.setitem(BENCHMARKS, "videomme", adapter)
    assert not published("videomme", allow_subset=False).is_subset
    assert published("videomme", allow_subset=False, max_questions=2).is_subset


@every_benchmark
@pytest.mark.parametrize("answer", ["G", "", "7"])
def test_an_answer_that_is_no_option_is_an_error(name, answer, published):
    value = int(answer or -1) if name == "longvideobench" and answer != "G" else answer
    if name == "longvideobench" and answer == "G":
        value = 5
    column = ANSWERS.get(name, "answer")
    with pytest.raises(ValueError, match=rf"{name}, row 0 of .*: .*saw answer .*expected .*Check that"):
        published(name, first_row(**{column: value}))


@pytest.mark.parametrize("name", [name for name in WRITERS if name not in ("tempcompass", "mlvu", "longvideobench")])
def test_missing_options_are_an_error(name, published):
    empty = {} if name in ("mmvu", "video_holmes") else []
    if name == "mmvu":
        empty = dict.fromkeys("ABCDE", "")
    with pytest.raises(ValueError, match=rf"{name}, row 0 of .*(saw 0 options|saw answer '\(F\)'|none of them empty)"):
        published(name, first_row(**{OPTIONS.get(name, "options"): empty}))


@pytest.mark.parametrize(
    ("name", "columns", "told"),
    [
        ("videomme", {"options": ["A. One.", "B. Two.", "C. Three."]}, "saw 3 options, expected 4"),
        ("videomme", {"options": ["A. One.", "B. ", "C. Three.", "D. None."]}, "expected none of them empty"),
        ("videomme", {"question": " "}, "the question is empty"),
        ("mlvu", {"question": "What colour is it?"}, "saw 0 options"),
        ("mlvu", {"task_type": "summary"}, "saw task_type 'summary', expected one of anomaly_reco"),
        ("mmvu", {"question_type": "essay"}, "saw task 'essay', expected one of multiple-choice, open-ended"),
        ("tempcompass", {"question": "What?\nA. rolling"}, "saw answer 'B. flying'"),
        ("egoschema", {"answer": "x"}, "saw answer 'x', expected an index from 0 to 4"),
        ("longvideobench", {"correct_choice": 3}, "saw answer 3, expected an index from 0 to 2"),
        ("mvbench", {"answer": "It flew."}, "saw answer 'It flew.', expected one of .'It fell.'"),
    ],
)
def test_a_row_that_can_not_be_right_is_named(name, columns, told, published):
    with pytest.raises(ValueError, match=f"{name}, row 0 of .*{told}"):
        published(name, first_row(**columns))


def test_a_missing_column_is_named_with_those_there_are(published):
    with pytest.raises(ValueError, match=r"row 1 of bench_hard\.json: it has no column 'task', but question"):
        published("videoespresso", lambda rows: [rows[0], {k: v for k, v in rows[1].items() if k != "task"}])


@pytest.mark.parametrize("name", ["videomme", "mmvu", "video_holmes", "longvideobench", "egoschema"])
def test_an_id_that_repeats_is_an_error(name, published):
    with pytest.raises(ValueError, match=rf"{name}: saw question id \S+ \(2 times\)"):
        published(name, lambda rows: [rows[0], *rows])


@every_benchmark
def test_a_missing_video_is_a_counted_failure(name, published, caplog):
    video_column = {
        "videomme": {"videoID": "gone"},
        "mvbench": {"video": "gone.mp4"},
        "tempcompass": {"video_id": "gone"},
        "mmvu": {"video": "videos/Art/gone.mp4"},
        "video_holmes": {"video ID": "gone"},
        "videoespresso": {"video_path": "../../gone.mp4"},
        "mlvu": {"video_name": "gone.mp4"},
        "longvideobench": {"video_path": "gone.mp4"},
        "egoschema": {"video_idx": "gone"},
    }[name]
    open_ended = name == "mmvu"  # its second row
    benchmark = published(name, first_row(**video_column), open_ended=open_ended)
    first, *others = benchmark.questions
    assert first.failure.startswith("missing video: ")
    assert "gone" in first.failure
    assert first.video == ""
    assert not any(one.failure for one in others)


def test_a_benchmark_without_any_of_its_videos_is_an_error(published):
    root = published.root / "videoespresso"
    videoespresso(root, b"")
    (root / "all_video.zip").unlink()
    with pytest.raises(ValueError, match=r"none of the videos of 2 questions .*missing video: test_video/one"):
        published("videoespresso")


def test_a_folder_that_holds_no_questions_says_what_should_be_there(tmp_path):
    with pytest.raises(ValueError, match=r"no file like videomme/test-\*.parquet"):
        load_benchmark("videomme", str(tmp_path))
    with pytest.raises(ValueError, match="there is no such folder"):
        load_benchmark("videomme", str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="is a folder, which has no revision 'v1'"):
        load_benchmark("videomme", str(tmp_path), revision="v1")


def test_a_broken_table_is_named(published):
    published("videomme")
    for path, name in (("videomme/test-00000-of-00001.parquet", "videomme"), ("bench_hard.json", "videoespresso")):
        file = published.root / name / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"[{")
        with pytest.raises(ValueError, match=f"{Path(path).name} can't be read: .*Download it again"):
            published(name)


# -- what is particular to one


def test_subtitles_of_videomme_are_read_and_shown_in_its_prompts(published):
    benchmark = published("videomme", subtitles=True)
    first, _, without = benchmark.questions
    spoken = (Subtitle(0.0, 1.2, "Hi guys,"), Subtitle(1.2, 2.5, "I'm going to show you how to bake."))
    assert first.subtitles == spoken
    assert without.subtitles == ()
    official = prompt_text(benchmark, first, "official").text
    assert official.startswith(
        "This video's subtitles are listed below:\nHi guys,\nI'm going to show you how to bake.\n"
    )
    seen = prompt_text(benchmark, first, "official", frame_times=[1.2, 2.0, 2.6]).text
    assert seen == official.replace("Hi guys,\n", "")
    assert "subtitles" not in prompt_text(benchmark, without, "official").text
    assert "\nNo subtitles available\nSelect" in prompt_text(benchmark, without, "lmms_eval").text
    storms = prompt_text(benchmark, first, "storms").text
    assert storms.endswith(prompt_text(published("videomme"), first, "storms").text.split("bake.\n")[1])
    assert "Hi guys," in storms
    assert all(one.subtitles == () for one in published("videomme").questions)


def test_subtitles_that_are_not_there_are_an_error(published):
    published("videomme")
    (published.root / "videomme" / "subtitle.zip").unlink()
    with pytest.raises(ValueError, match="videomme: --subtitles, but none was found"):
        published("videomme", subtitles=True)
    with pytest.raises(ValueError, match="mvbench has no subtitles"):
        published("mvbench", subtitles=True)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 7_200_000),
            st.integers(1, 9_000),
            st.text("abc ,.?'é", min_size=1).filter(str.strip),
            st.booleans(),
        ),
        max_size=8,
    ),
    st.sampled_from(["\n", "\r\n"]),
)
def test_every_line_of_a_subrip_file_is_read_with_its_times(lines, newline):
    def clock(milliseconds):
        hours, rest = divmod(milliseconds, 3_600_000)
        minutes, rest = divmod(rest, 60_000)
        return f"{hours:02}:{minutes:02}:{rest // 1000:02},{rest % 1000:03}"

    blocks = [
        f"{place}\n{clock(start)} --> {clock(start + length)}\n{f'<i>{text}</i>' if styled else text}\n"
        for place, (start, length, text, styled) in enumerate(lines, 1)
    ]
    read = parse_srt("\n".join(blocks).replace("\n", newline))
    assert [one.text for one in read] == [" ".join(text.split()) for _, _, text, _ in lines]
    assert [(round(one.start * 1000), round(one.end * 1000)) for one in read] == [
        (start, start + length) for start, length, _, _ in lines
    ]


def test_subtitles_of_longvideobench_begin_with_its_video(published):
    benchmark = published("longvideobench", subtitles=True)
    first, second = benchmark.questions
    assert first.subtitles == (Subtitle(0.5, 1.5, "turn left"), Subtitle(2.5, 3.0, "stop"))
    assert second.subtitles == (Subtitle(1.0, 2.25, "right"),)
    assert prompt_text(benchmark, first, "official").text.startswith("turn left\nstop\nQuestion: What is said")
    assert parse_subtitles([{"timestamp": [1.0, 2.0], "text": " "}], 0.0, 9.0) == ()


def test_uncut_videos_of_mvbench_are_clipped_and_frame_folders_have_three_a_second(published, video, tmp_path):
    root = published.root / "mvbench"
    mvbench(root, video)
    (root / "video.zip").unlink()
    write_zip(root / "video" / "star.zip", {"star/Charades_v1_480/action_sequence_1.mp4": video})
    write_zip(root / "video" / "data0613.zip", {"data0613/star/Charades_v1_480/action_prediction_1.mp4": video})
    write_zip(root / "video" / "perception.zip", {"perception/videos/state_change_1.mp4": video})
    names = ["00001.jpg", "00002.jpg", "00003.jpg", "00004.jpg", "00005.jpg", "00006.jpg"]
    frames = {f"tvqa/frames_fps3_hq/episodic_reasoning_1.mp4/{name}": jpeg(at) for at, name in enumerate(names)}
    write_zip(root / "video" / "tvqa.zip", dict(reversed(frames.items())))
    by_task = {one.task: one for one in published("mvbench").questions}

    for task in ("action_sequence", "action_prediction"):
        assert (by_task[task].start, by_task[task].end) == (1.0, 2.0)
        assert not by_task[task].failure
    uncut = by_task["state_change"]  # asks about the whole video, though the row has times
    assert (uncut.start, uncut.end) == (None, None)
    frames = by_task["episodic_reasoning"]
    assert [Path(path).name for path in frames.video] == names
    assert frames.video_fps == 3
    clip, _ = read_clip(
        frames.video, lambda one: np.arange(one.total_num_frames), frames.start, frames.end, frames.video_fps
    )
    assert len(clip) == 3  # from one second to two
    assert by_task["action_antonym"].failure == "missing video: ssv2_video_mp4 or ssv2_video/action_antonym_1.mp4"


def test_captioning_is_asked_only_if_a_judge_will_score_it(published):
    without = published("tempcompass")
    assert [one.task for one in without.questions] == ["multi-choice", "yes_no", "caption_matching"]
    caption = published("tempcompass", open_ended=True).questions[-1]
    assert caption.task == "captioning"
    assert not caption.options
    assert caption.judge_question == "What is it doing?\nA. rolling\nB. flying"
    assert caption.answer == "A. rolling"
    assert prompt_text(without, caption, "storms").text.endswith("Generated Caption:")
    assert prompt_text(without, caption, "official").text.endswith("Generated Caption:")


def test_open_questions_of_mmvu_are_asked_only_if_a_judge_will_score_them(published):
    assert [one.task for one in published("mmvu").questions] == ["multiple-choice"]
    opened = published("mmvu", open_ended=True).questions[-1]
    assert (opened.task, dict(opened.options), opened.answer) == ("open-ended", {}, "Dolly Zoom")


def test_an_open_question_without_an_answer_is_an_error(published):
    with pytest.raises(ValueError, match=r"mmvu, row 1 of validation\.json: the answer is empty"):
        published("mmvu", lambda rows: [rows[0], rows[1] | {"answer": " "}], open_ended=True)


@pytest.mark.parametrize(
    ("text", "letter"),
    [("Caption B: It rolls.", "B"), ("caption a", "A"), ("Caption B", "B"), ("B", "B"), ("Captions", None)],
)
def test_an_answer_may_call_an_option_as_the_benchmark_does(text, letter, published):
    question = published("tempcompass").questions[-1]
    assert question.labels == {"A": "Caption A", "B": "Caption B"}
    assert parse_choice(question.with_letters(text), question.options) == letter


def test_numbered_labels_become_letters(published):
    row = {"question": "Which fits?\nOption 1: It rolls.\nOption 2: It flies.", "answer": "Option 1: It rolls."}
    published("tempcompass")
    write(
        published.root / "tempcompass" / "caption_matching" / "test-00000-of-00001.parquet",
        [row | {"video_id": "1034419625", "dim": "order"}],
    )
    question = published("tempcompass").questions[-1]
    assert question.answer == "A"
    assert parse_choice(question.with_letters("Option 2"), question.options) == "B"
    assert published("tempcompass").questions[0].with_letters("Option 2") == "Option 2"


# -- datasets of the builder's schema


@pytest.fixture(scope="session")
def simulated(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("simulated") / "bounces"
    flags = ["--world", "bounce", "--num_rows", "4", "--seed", "1"]
    fractions = ["--validation_fraction", "0.5", "--test_fraction", "0.5"]
    dataset_builder(["build", "--source", "simulated", *flags, *fractions, "--output", str(folder)])
    return folder


def test_a_built_dataset_is_a_benchmark(simulated):
    benchmark = load_benchmark(f"simulated={simulated}")
    rows = pq.read_table(simulated / "data" / "test-00000-of-00001.parquet").to_pylist()
    assert (benchmark.name, benchmark.split, len(benchmark.questions)) == ("simulated", "test", len(rows) == 2 and 2)
    for one, row in zip(benchmark.questions, rows):
        assert (one.id, one.answer, list(one.options.values())) == (row["id"], row["answer"], row["options"])
        assert one.video == row["video"]["bytes"]
        assert one.categories == {"source": "simulated", "folder": "bounce"}
        assert len(read_clip(one.video, lambda clip: np.array([0, clip.total_num_frames - 1]))[0]) == 2
    assert prompt_names(benchmark) == ["storms"]


def test_a_built_dataset_goes_by_its_folder_and_any_split(simulated):
    by_folder = load_benchmark(str(simulated), split="validation")
    assert (by_folder.name, by_folder.dataset, by_folder.split) == ("bounces", str(simulated), "validation")
    assert by_folder.questions != load_benchmark(str(simulated)).questions
    assert load_benchmark("simulated", str(simulated), max_questions=1).is_subset
    with pytest.raises(ValueError, match=r"no file like data/train-\*.parquet"):
        load_benchmark(str(simulated), split="train")


def test_rows_without_bytes_take_videos_from_a_folder(simulated, tmp_path):
    table = pq.read_table(simulated / "data" / "test-00000-of-00001.parquet")
    rows = table.to_pylist()
    for row in rows:
        row["video"] = None
    (tmp_path / "set" / "data").mkdir(parents=True)
    path = tmp_path / "set" / "data" / "test-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
    with pytest.raises(ValueError, match=r"none of the videos of 2 questions is there.*--video_root"):
        load_benchmark(str(tmp_path / "set"))
    video = tmp_path / "videos" / rows[0]["video_path"]
    video.parent.mkdir(parents=True)
    video.write_bytes(b"film")
    first, second = load_benchmark(str(tmp_path / "set"), video_root=str(tmp_path / "videos")).questions
    assert first.video == str(video)
    assert second.failure == f"missing video: {rows[1]['video_path']}"
    with pytest.raises(ValueError, match=r"--video_root .*: there is no such folder"):
        load_benchmark(str(tmp_path / "set"), video_root=str(tmp_path / "none"))

    for columns, told in (
        ({"answer": "J"}, "row 0 of .*saw answer 'J', expected one of A, B"),
        ({"options": ["one"], "answer": "A"}, "saw 1 options, expected none or 2 to 10"),
        ({"question": ""}, "the question or its answer is empty"),
        ({"id": rows[1]["id"]}, r"saw question id \S+ \(2 times\)"),
    ):
        pq.write_table(pa.Table.from_pylist([rows[0] | columns, rows[1]], table.schema), path)
        with pytest.raises(ValueError, match=told):
            load_benchmark(str(tmp_path / "set"), video_root=str(tmp_path / "videos"))
    pq.write_table(table.drop(["video_start"]), path)
    with pytest.raises(ValueError, match="it has no column 'video_start'"):
        load_benchmark(str(tmp_path / "set"))


def test_a_benchmarks_name_is_never_taken_for_a_folder(published, monkeypatch):
    questions = published("mmvu").questions
    monkeypatch.chdir(published.root)
    assert load_benchmark("mmvu", str(published.root), allow_subset=True).questions == questions


def test_names_that_stand_for_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no benchmark 'video-mme', but videomme, mvbench.*any dataset"):
        load_benchmark("video-mme")
    with pytest.raises(ValueError, match="simulated: say which dataset, as simulated=FOLDER"):
        load_benchmark("simulated")
    with pytest.raises(ValueError, match="no/such is no folder, and can't be downloaded"):
        load_benchmark("no/such")
    with pytest.raises(ValueError, match="videomme: saw split 'train', expected 'test', the only one"):
        load_benchmark("videomme", split="train")
    with pytest.raises(ValueError, match="has no subtitles"):
        load_benchmark("simulated", str(tmp_path), subtitles=True)


# -- archives


def test_a_half_extracted_file_is_never_believed(published, video):
    question = published("videoespresso").questions[0]
    whole = Path(question.video)
    whole.write_bytes(video[:-1])
    Path(f"{whole}.partial").write_bytes(b"left by a kill")
    assert Path(published("videoespresso").questions[0].video).read_bytes() == video


def test_a_kill_in_the_middle_leaves_nothing_that_looks_whole(published, video, monkeypatch):
    def fail(source, target, *_):
        target.write(source.read(10))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("evaluation.benchmarks.files.copyfileobj", fail)
        with pytest.raises(KeyboardInterrupt):
            published("videoespresso")
    assert not [path for path in published.cache.rglob("*") if path.is_file()]
    assert Path(published("videoespresso").questions[0].video).read_bytes() == video


def test_a_file_that_is_there_is_not_extracted_again(published, monkeypatch):
    first = published("videoespresso")
    monkeypatch.setattr("evaluation.benchmarks.files.copyfileobj", None)
    assert published("videoespresso").questions == first.questions


def test_another_archive_of_the_same_name_is_extracted_anew(published, video):
    before = published("videoespresso").questions[0].video
    write_zip(published.root / "videoespresso" / "all_video.zip", {"test_video/one.mp4": video + b"more"})
    after = published("videoespresso").questions[0].video
    assert after != before
    assert Path(after).read_bytes() == video + b"more"


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_damaged_archive_is_named(tmp_path, damage, kind):
    path = tmp_path / "files" / f"videos.{kind}"
    path.parent.mkdir()
    (write_zip if kind == "zip" else write_tar)(path, {"a.mp4": bytes(5000), "b.mp4": b"b" * 5000})
    data = bytearray(path.read_bytes())
    if kind == "tar" and damage == "flipped":
        data[20] ^= 255  # a tar has checksums in its headers alone
    elif damage == "flipped":
        data[100] ^= 255
    path.write_bytes({"cut": data[:4000], "empty": b"", "flipped": data}[damage])

    def extract_all():
        files = Files(path.parent, tmp_path / "cache")
        files.extract([files.find("a.mp4"), files.find("b.mp4")])

    with pytest.raises(ValueError, match=rf"videos.{kind} is damaged or not whole: .*download it again"):
        extract_all()


def test_members_that_lead_out_of_an_archive_are_passed_over(tmp_path):
    (tmp_path / "files").mkdir()
    write_zip(tmp_path / "files" / "a.zip", {"../out.mp4": "x", "/abs.mp4": "x", "in.mp4": "x"})
    link = zipfile.ZipInfo("link.mp4")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "files" / "a.zip", "a") as file:
        file.writestr(link, "/etc/passwd")
    with tarfile.open(tmp_path / "files" / "b.tar", "w") as tar:
        info = tarfile.TarInfo("tarlink.mp4")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    files = Files(tmp_path / "files", tmp_path / "cache")
    assert [files.find(f"{name}.mp4") is not None for name in ("in", "out", "abs", "link", "tarlink")] == [
        True,
        *[False] * 4,
    ]
    assert files.find("../files/a.zip") is None


def test_two_different_videos_that_both_fit_are_an_error(tmp_path, video):
    for folder, data in (("one", b"x"), ("two", b"xx")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.mp4").write_bytes(data)
    with pytest.raises(ValueError, match=r"'a.mp4' may be one/a.mp4 or two/a.mp4, which differ"):
        Files(tmp_path).find("a.mp4")
    assert Files(tmp_path).find("two/a.mp4") == str(tmp_path / "two" / "a.mp4")
    (tmp_path / "a.mp4").write_bytes(b"nearest")
    assert Files(tmp_path).find("a.mp4") == str(tmp_path / "a.mp4")


def test_a_folder_that_links_to_itself_is_read_once(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.mp4").symlink_to(tmp_path / "nowhere")
    files = Files(tmp_path)
    assert files.find("a.mp4") == str(tmp_path / "a.mp4")
    assert files.find("loop/a.mp4") is None
    assert files.find("gone.mp4") is None


names = st.text("abAB1", min_size=1, max_size=3)
paths = st.lists(names, min_size=1, max_size=3).map(lambda parts: "/".join(parts) + ".mp4")


@given(st.dictionaries(paths, st.tuples(st.binary(max_size=30), st.sampled_from(["loose", "zip", "tar"])), max_size=6))
def test_a_file_is_found_by_its_whole_path_wherever_it_lies(tmp_path_factory, tree):
    root, cache = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("cache")
    inside = {kind: {path: data for path, (data, where) in tree.items() if where == kind} for kind in ("zip", "tar")}
    write_zip(root / "x.zip", inside["zip"])
    write_tar(root / "y.tar", inside["tar"])
    for path, (data, where) in tree.items():
        if where == "loose":
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)
    files = Files(root, cache)
    for path, (data, _) in tree.items():
        # Deeper files may end in the same path: the nearest is this one.
        found = files.find(path)
        files.extract([found])
        assert Path(found).read_bytes() == data or any(
            other != path and other.endswith(f"/{path}") and where == "loose" for other, (_, where) in tree.items()
        )


# -- the Hub


LOADER = """
import json, sys
from evaluation.benchmarks import load_benchmark
for name, options in json.loads(sys.argv[1]):
    benchmark = load_benchmark(name, allow_subset=True, **options)
    videos = [one.failure or one.video for one in benchmark.questions]
    print(json.dumps([benchmark.dataset, benchmark.revision, videos]))
"""


def test_benchmarks_load_from_the_hub(tmp_path, video):
    def tree(folder):
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    with loopback_hub() as hub:
        commits = {}
        for name in ("mvbench", "videoespresso"):
            WRITERS[name](tmp_path / name, video)
            repo = f"datasets/{BENCHMARKS[name].dataset}"
            hub.create(repo)
            files = tree(tmp_path / name) | {"unwanted.bin": bytes(9)}
            commits[name] = hashlib.sha1(name.encode()).hexdigest()
            hub.commits[repo].append((commits[name], files))
        # The branch `video` of MVBench is the default; its main one here holds nothing.
        repo = "datasets/OpenGVLab/MVBench"
        hub.tags[repo]["video"] = commits["mvbench"]
        hub.commits[repo].append(("f" * 40, {"README.md": b""}))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
        environment |= {"NO_PROXY": "127.0.0.1", "HF_TOKEN": "hf_test"}
        asked = json.dumps([["mvbench", {"max_questions": 3}], ["videoespresso", {}]])
        done = subprocess.run(
            [sys.executable, "-c", LOADER, asked],
            cwd=Path(__file__).parents[2],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        loaded = [json.loads(line) for line in done.stdout.splitlines()]
        assert [(dataset, revision) for dataset, revision, _ in loaded] == [
            ("OpenGVLab/MVBench", commits["mvbench"]),
            ("hshjerry0315/VideoEspresso-Test", commits["videoespresso"]),
        ]
        videos = [path for _, _, paths in loaded for path in paths]
        assert len(videos) == 5
        assert all(Path(path).read_bytes() == video for path in videos)
        assert all(Path(path).is_relative_to(tmp_path / "hf" / "storms_benchmarks") for path in videos)
        assert not any("unwanted" in request for request in hub.requests if "/resolve/" in request)
