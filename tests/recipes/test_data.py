"""What a run trains on: which rows, how many of each source, and what stops it before its first step."""

import io
import json
import shutil
from collections import Counter

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from datasets import Array2D, Dataset, Features, Image, List, Value, Video, load_dataset

from dataset_builder.__main__ import main as build
from dataset_builder.thought_video import encode_video
from recipes.arguments import DataArguments, StormsTrainingArguments, check_stage, parse_arguments
from recipes.collator import RowError, StormsCollator
from recipes.data import TARGETS_KEY, load_data

from ..conftest import moving_disc


LATENT_SIZE = 3
SETTINGS = {
    "tower": "qwen2_5_vl",
    "tower_revision": "0123456789abcdef",
    "latent_size": LATENT_SIZE,
    "target_source": "thought_video",
    "num_target_frames": 16,
    "pixels": [3136, 4704],
}


@pytest.fixture(scope="module", autouse=True)
def _datasets(tmp_path_factory):
    """`datasets` converts into a folder of its own, and does not wait 5 s after each stream: no process ends there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
        yield


@pytest.fixture(scope="module")
def shell_games(tmp_path_factory):
    """A folder as `dataset_builder` publishes it, with splits train and validation."""
    folder = tmp_path_factory.mktemp("built") / "shell-games"
    flags = ("--source", "simulated", "--world", "shell_game", "--num_rows", "6", "--seed", "7", "--num_workers", "1")
    build(["build", *flags, "--output", str(folder)])
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Plain video questions: a JSONL file, and videos in a folder of their own. No thought videos, no ids."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "questions").mkdir()
    (folder / "videos").mkdir()
    for seed in range(2):
        (folder / "videos" / f"{seed}.mp4").write_bytes(encode_video(moving_disc(8, 56, 84, seed=seed), 8))
    rows = [
        {
            "question": f"Where does disc {seed} go?",
            "answer": "right",
            "video_path": f"{seed}.mp4",
            "video_start": 0.25,
        }
        for seed in range(2)
    ]
    write_jsonl(folder / "questions" / "train.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """TRL conversational rows with images."""
    folder = tmp_path_factory.mktemp("talks")
    file = io.BytesIO()
    PIL.Image.fromarray(moving_disc(1, 28, 28)[0]).save(file, "png")
    image = file.getvalue()
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Is disc {index} red?"},
                {"role": "assistant", "content": f"Disc {index} is."},
            ],
            "images": [{"bytes": image, "path": None}] if index % 2 else [],
        }
        for index in range(4)
    ]
    features = Features(
        {
            "messages": List({"role": Value("string"), "content": Value("string")}),
            "images": List(Image()),
        }
    )
    Dataset.from_list(rows, features=features).to_parquet(folder / "train.parquet")
    return folder


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_texts(folder, name, num_rows):
    """A dataset of conversations in words alone, which know where they come from."""
    folder = folder / name
    folder.mkdir()
    rows = [
        {
            "id": f"{name}-{index}",
            "messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": f"{name} {index}"}],
        }
        for index in range(num_rows)
    ]
    write_jsonl(folder / "train.jsonl", rows)
    return folder


def load(stage, source, target_settings=None, *, eval_strategy="no", **options):
    """`load_data` with a run's arguments; `source` is a folder or a mixture."""
    names = set(DataArguments.__dataclass_fields__)
    given = {"datasets": source} if isinstance(source, list) else {"dataset_name": str(source)}
    data = DataArguments(**given, **{name: options.pop(name) for name in list(options) if name in names})
    options = {"latent_size": LATENT_SIZE, "use_cpu": True, "bf16": False} | options
    training = StormsTrainingArguments(output_dir="unused", eval_strategy=eval_strategy, **options)
    return load_data(data, training, stage, target_settings)


def assert_same(batch, expected):
    assert batch.keys() == expected.keys()
    for name in batch:
        assert torch.equal(batch[name], expected[name]), name


# ------------------------------------------------------------------ what loads


@pytest.mark.parametrize("stage", ["sft", "stage1", "stage2"])
def test_a_built_folder_trains_in_every_stage_read_or_streamed(processor, shell_games, stage):
    """Its rows reach the collator as `datasets` itself gives them, without what the stage does not read."""
    expected = list(load_dataset(str(shell_games), split="train"))
    for context in ("video", "keyframes", "both"):
        collator = StormsCollator(processor, stage, LATENT_SIZE, context)
        for streaming in (False, True):
            dataset, held_out = load(stage, shell_games, visual_context=context, dataset_streaming=streaming)
            assert held_out is None
            rows = list(dataset)
            assert [row["id"] for row in rows] == [row["id"] for row in expected]
            assert ("video" in rows[0]) == (context != "keyframes")
            assert ("keyframes" in rows[0]) == (context != "video")
            assert ("thought_video" in rows[0]) == (stage == "stage1")
            assert "reasoning_plan" not in rows[0]
            assert_same(collator(rows[:2]), collator(expected[:2]))


@pytest.mark.parametrize("streaming", [False, True])
def test_plain_video_questions_train_in_stage_2_and_sft(processor, plain, streaming):
    for stage in ("sft", "stage2"):
        root = str(plain / "videos")
        dataset, _ = load(stage, plain / "questions", dataset_streaming=streaming, video_root=root)
        collator = StormsCollator(processor, stage, LATENT_SIZE, video_root=root)
        batch = collator(list(dataset))
        assert batch["video_grid_thw"].tolist() == [[3, 4, 6], [3, 4, 6]]  # 6 of 8 frames: a segment from 0.25 s on
        block = "" if stage == "sft" else f"<|latent_start|>{'<|latent_pad|>' * LATENT_SIZE}<|latent_end|>"
        for ids in batch["input_ids"]:
            assert processor.tokenizer.decode(ids).endswith(f"assistant\n{block}right<|im_end|>")


def test_plain_video_questions_are_refused_in_stage_1_with_a_row_named(plain):
    options = {"video_root": str(plain / "videos")}
    with pytest.raises(RowError, match=r"Row '0\.mp4' of .*questions has no thought video, as 2 of 2 rows"):
        load("stage1", plain / "questions", **options)
    with pytest.raises(ValueError, match="questions has no column 'thought_video'"):
        load("stage1", plain / "questions", dataset_streaming=True, **options)
    # But their own videos can be their targets.
    dataset, _ = load("stage1", plain / "questions", target_source="self_distilled", **options)
    assert len(dataset) == 2


def test_a_thought_video_is_bytes_and_no_path(tmp_path):
    row = {"question": "Where?", "answer": "right", "video_path": "0.mp4", "thought_video": "thought.mp4"}
    write_jsonl(tmp_path / "train.jsonl", [row])
    with pytest.raises(RowError, match=r"Row '0\.mp4' .* has no thought video, as 1 of 1 rows"):
        load("stage1", tmp_path, video_root=str(tmp_path))


def test_columns_of_other_types_become_the_contracts(tmp_path, processor):
    """A column `video` of file names, numbers for ids and answers: as people's files have them."""
    (tmp_path / "disc.mp4").write_bytes(encode_video(moving_disc(8, 56, 84), 8))
    (tmp_path / "rows").mkdir()
    rows = [{"id": 7, "question": "How many?", "answer": 1, "options": [], "video": "disc.mp4", "video_end": 1}]
    write_jsonl(tmp_path / "rows" / "train.jsonl", rows)
    for streaming in (False, True):
        dataset, _ = load("sft", tmp_path / "rows", dataset_streaming=streaming, video_root=str(tmp_path))
        (row,) = list(dataset)
        assert (row["id"], row["answer"], row["video"]["path"]) == ("7", "1", "disc.mp4")
        batch = StormsCollator(processor, "sft", video_root=str(tmp_path))([row])
        assert processor.tokenizer.decode(batch["input_ids"][0]).endswith("assistant\n1<|im_end|>")
    write_jsonl(tmp_path / "rows" / "train.jsonl", [rows[0] | {"answer": ["1"]}])
    with pytest.raises(ValueError, match=r"rows: column 'answer' holds List.*expected Value\('string'\)"):
        load("sft", tmp_path / "rows")


@pytest.mark.parametrize("stage", ["sft", "stage2"])
def test_conversations_load_with_their_images(processor, talks, stage):
    for streaming in (False, True):
        rows = list(load(stage, talks, dataset_streaming=streaming)[0])
        batch = StormsCollator(processor, stage)(rows)
        assert len(batch["image_grid_thw"]) == 2
        for index, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"])):
            assert processor.tokenizer.decode(labels[labels != -100]) == f"Disc {index} is.<|im_end|>"
            assert "<|latent" not in processor.tokenizer.decode(ids)


def test_a_column_with_one_image_a_row_is_read_too(processor, talks, tmp_path):
    dataset = load_dataset(str(talks), split="train").filter(lambda row: row["images"])
    single = dataset.map(lambda row: {"image": row["images"][0]}, remove_columns="images", load_from_cache_file=False)
    single.to_parquet(tmp_path / "train.parquet")
    collator = StormsCollator(processor, "sft")
    rows, expected = list(load("sft", tmp_path)[0]), list(load("sft", talks)[0])
    for name in ("input_ids", "labels", "pixel_values", "image_grid_thw"):
        assert torch.equal(collator(rows)[name], collator(expected[1::2])[name]), name


def test_conversations_are_refused_in_stage_1(talks):
    for streaming in (False, True):
        with pytest.raises(ValueError, match="holds conversations, but Stage I takes questions with a thought video"):
            load("stage1", talks, dataset_streaming=streaming)


def test_a_missing_split_or_column_is_named_with_those_there_are(shell_games, tmp_path):
    with pytest.raises(
        ValueError, match=r"has no split 'training', but train, validation\. Set --dataset_train_split"
    ):
        load("sft", shell_games, dataset_train_split="training")
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": "Why?", "reply": "So."}])
    with pytest.raises(ValueError, match="has columns prompt, reply, expected `question` and `answer`"):
        load("sft", tmp_path)


def test_held_out_rows_load_only_if_they_are_asked_for(shell_games):
    assert load("sft", shell_games, dataset_test_split="nowhere")[1] is None
    with pytest.raises(ValueError, match="has no split 'nowhere', but train, validation"):
        load("sft", shell_games, dataset_test_split="nowhere", eval_strategy="steps", eval_steps=1)
    train, held_out = load("sft", shell_games, eval_strategy="steps", eval_steps=1)
    ids = [row["id"] for row in load_dataset(str(shell_games), split="validation")]
    assert held_out["id"] == ids
    assert not set(ids) & set(train["id"])


def test_held_out_rows_of_a_mixture_are_those_of_its_first_source(plain, tmp_path):
    """With its configuration and its folder of videos."""
    folder = tmp_path / "first"
    for name in ("one", "two"):
        (folder / name).mkdir(parents=True)
        for split in ("train", "validation"):
            rows = [{"id": f"{name}-{split}", "question": "Where?", "answer": "right", "video_path": "0.mp4"}]
            write_jsonl(folder / name / f"{split}.jsonl", rows)
    configs = [
        {
            "config_name": name,
            "data_files": [{"split": split, "path": f"{name}/{split}.jsonl"} for split in ("train", "validation")],
        }
        for name in ("one", "two")
    ]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    first = {"path": str(folder), "name": "two", "video_root": str(plain / "videos")}
    second = {"path": str(plain / "questions"), "video_root": str(plain / "videos")}
    train, held_out = load("sft", [first, second], eval_strategy="epoch")
    assert [row["id"] for row in train] == ["two-train", None, None]
    assert [row["id"] for row in held_out] == ["two-validation"]
    assert held_out[0]["video_root"] == str(plain / "videos")


@pytest.mark.parametrize("streaming", [False, True])
def test_the_first_so_many_rows(shell_games, streaming):
    options = {"eval_strategy": "epoch", "dataset_streaming": streaming, "dataset_test_split": "train"}
    train, held_out = (list(part) for part in load("sft", shell_games, **options))
    few, one = (list(part) for part in load("sft", shell_games, max_train_rows=2, max_eval_rows=1, **options))
    assert [row["id"] for row in few] == [row["id"] for row in train[:2]]
    assert [row["id"] for row in one] == [row["id"] for row in held_out[:1]]
    many, all_of_them = load("sft", shell_games, max_train_rows=99, max_eval_rows=99, **options)
    assert (len(list(many)), len(list(all_of_them))) == (len(train), len(held_out))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_changed_folder_gives_its_new_rows(shell_games, tmp_path, streaming):
    """Its card is as before: by that alone `datasets` would take the rows from its cache."""

    def questions(folder):
        return [row["question"] for row in load("sft", folder, dataset_streaming=streaming)[0]]

    before = questions(shell_games)
    folder = rewrite(shell_games, tmp_path / "copy", lambda index, row: row | {"question": f"Which? {index}"})
    expected = [f"Which? {index}" for index in range(len(before))]
    assert questions(folder) == expected
    rewrite(shell_games, folder, lambda index, row: row | {"question": f"Where? {index}"})
    assert questions(folder) == [question.replace("Which", "Where") for question in expected]
    assert questions(shell_games) == before


# ------------------------------------------------------------------ mixtures


@pytest.mark.parametrize("streaming", [False, True])
def test_a_mixture_without_weights_gives_every_row_once(tmp_path, streaming):
    sources = [{"path": str(write_texts(tmp_path, name, count))} for name, count in (("a", 3), ("b", 5))]
    train, _ = load("sft", sources, dataset_streaming=streaming)
    expected = [f"a-{index}" for index in range(3)] + [f"b-{index}" for index in range(5)]
    assert [row["id"] for row in train] == expected


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("weights", [(3, 1), (0.25, 0.75)])
def test_weights_are_the_shares_of_a_mixture(tmp_path, streaming, weights):
    paths = [write_texts(tmp_path, name, 40) for name in ("a", "b")]
    sources = [{"path": str(path), "weight": weight} for path, weight in zip(paths, weights)]
    train, _ = load("sft", sources, dataset_streaming=streaming, seed=1)
    ids = [row["id"] for row in train]
    counts = Counter(name[0] for name in ids)
    share = weights[0] / sum(weights)
    # At least 80 draws: three standard deviations of the share are 0.15 at most.
    assert len(ids) >= 80
    assert counts["a"] / len(ids) == pytest.approx(share, abs=0.15)
    assert len(set(ids)) == 80, "every row of each is used"
    limited, _ = load("sft", sources, dataset_streaming=streaming, seed=1, max_train_rows=10)
    assert [row["id"] for row in limited] == ids[:10]
    assert [row["id"] for row in load("sft", sources, dataset_streaming=streaming, seed=2)[0]] != ids


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("weights", [(), (1, 1, 1)])
def test_built_rows_plain_questions_and_conversations_mix(processor, shell_games, plain, talks, streaming, weights):
    """Their columns differ, and each source has its own folder of videos."""
    sources = [
        {"path": str(shell_games)},
        {"path": str(plain / "questions"), "video_root": str(plain / "videos")},
        {"path": str(talks)},
    ]
    for source, weight in zip(sources, weights):
        source["weight"] = weight
    rows = list(load("stage2", sources, dataset_streaming=streaming)[0])
    kinds = Counter(kind_of(row) for row in rows)
    num_built = len(load_dataset(str(shell_games), split="train"))
    if not weights:
        assert kinds == {"built": num_built, "plain": 2, "talk": 4}
    assert set(kinds) == {"built", "plain", "talk"}
    # A batch with one of each, wherever the other sources' columns are absent or empty.
    chosen = [next(row for row in rows if kind_of(row) == kind) for kind in ("built", "plain", "talk")]
    batch = StormsCollator(processor, "stage2", LATENT_SIZE)(chosen)
    pad_id = processor.tokenizer.convert_tokens_to_ids("<|latent_pad|>")
    assert (batch["input_ids"] == pad_id).sum(1).tolist() == [LATENT_SIZE, LATENT_SIZE, 0]
    assert len(batch["video_grid_thw"]) == 2
    root = str(plain / "videos")
    alone = list(load("stage2", plain / "questions", dataset_streaming=streaming, video_root=root)[0])
    collator = StormsCollator(processor, "stage2", LATENT_SIZE, video_root=root)
    answers = [row for row in alone if row["video_path"] == chosen[1]["video_path"]]
    inputs, expected = collator([chosen[1]]), collator(answers)
    for name in ("input_ids", "labels", "pixel_values_videos"):
        assert torch.equal(inputs[name], expected[name]), name


def kind_of(row):
    return "talk" if row.get("messages") else "built" if row.get("id") else "plain"


def test_sources_have_their_own_folders_of_videos(processor, plain, tmp_path):
    """Equal paths under two roots are two videos."""
    (tmp_path / "0.mp4").write_bytes((plain / "videos" / "1.mp4").read_bytes())
    (tmp_path / "1.mp4").write_bytes((plain / "videos" / "0.mp4").read_bytes())
    source = {"path": str(plain / "questions")}
    sources = [source, {**source, "video_root": str(tmp_path)}]
    for streaming in (False, True):
        options = {"video_root": str(plain / "videos"), "dataset_streaming": streaming}
        rows = list(load("sft", sources, **options)[0])
        batch = StormsCollator(processor, "sft", video_root=options["video_root"])(rows)
        first, second, third, fourth = batch["pixel_values_videos"].chunk(4)
        assert torch.equal(first, fourth)
        assert torch.equal(second, third)
        assert not torch.equal(first, second)


def test_types_that_do_not_mix_are_an_error(talks, tmp_path):
    parts = [{"role": name, "content": [{"type": "text", "text": "So"}]} for name in ("user", "assistant")]
    write_jsonl(tmp_path / "train.jsonl", [{"messages": parts}])
    with pytest.raises(ValueError, match="columns of different types"):
        load("sft", [{"path": str(talks)}, {"path": str(tmp_path)}])


# ------------------------------------------------------------------ bad rows, before the first step


def rewrite(source, folder, change, split="train", **features):
    """A copy of a built folder with other rows."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    dataset = load_dataset(str(source), split=split)
    rows = [change(index, row) for index, row in enumerate(dataset.cast_column("video", Video(decode=False)))]
    changed = Dataset.from_list(rows, features=Features({**dataset.features, **features}))
    changed.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


BAD_ROWS = {
    "thought video": ("stage1", {}, {"thought_video": None}, "has no thought video, as 1 of"),
    "thought bytes": ("stage1", {}, {"thought_video": {"bytes": b"", "path": None}}, "has no thought video, as 1 of"),
    "keyframes": ("sft", {"visual_context": "both"}, {"keyframes": []}, "has no keyframes, as 1 of"),
    "keyframe targets": ("stage1", {"target_source": "keyframes"}, {"keyframes": None}, "has no keyframes, as 1 of"),
    "video": ("sft", {}, {"video": None}, "has no video, as 1 of"),
    "own video": (
        "stage1",
        {"target_source": "self_distilled", "visual_context": "keyframes"},
        {"video": None},
        "has no video, as 1 of",
    ),
    "slots": ("stage2", {"latent_size": None}, {"thought_video": None}, "has no thought video, as 1 of"),
    "answer": ("sft", {}, {"answer": " "}, "has answer ' ', expected text"),
    "no answer": ("stage2", {}, {"answer": None}, "has answer None, expected text"),
    "letter": ("stage2", {}, {"answer": "D"}, "has answer 'D', expected the letter of one of its options, A, B, C"),
    "question": ("sft", {}, {"question": ""}, "has question '', expected text"),
    "option": ("sft", {}, {"options": ["left"]}, "has options"),
    "block": ("stage2", {}, {"question": "<|latent_pad|>?"}, r"holds <\|latent_pad\|>"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_in_the_middle_is_found_before_the_first_step(shell_games, tmp_path, kind):
    stage, options, changed, expected = BAD_ROWS[kind]
    folder = rewrite(shell_games, tmp_path / "bad", lambda index, row: row | changed if index == 2 else row)
    name = load_dataset(str(shell_games), split="train")[2]["id"]
    load(stage, shell_games, **options)
    with pytest.raises(RowError, match=f"ow '{name}'.*{expected}"):
        load(stage, folder, **options)


def test_a_row_that_its_stage_does_not_need_whole_is_no_error(shell_games, tmp_path):
    """A thought video matters where it is read, and a stored video not where the file is there."""
    empty = {"thought_video": None, "keyframes": [], "video": None}
    folder = rewrite(shell_games, tmp_path / "empty", lambda index, row: row | {"thought_video": None})
    for stage, options in (
        ("sft", {}),
        ("stage2", {}),
        ("stage1", {"target_source": "keyframes"}),
        ("stage1", {"target_source": "self_distilled"}),
    ):
        assert len(load(stage, folder, **options)[0]) > 2
    folder = rewrite(shell_games, tmp_path / "emptier", lambda index, row: row | empty)
    assert len(load("sft", folder, video_root=str(tmp_path))[0]) > 2
    with pytest.raises(RowError, match=r"has no video, as .* Give video_path with --video_root"):
        load("sft", folder)


def test_conversations_are_looked_through_too(tmp_path):
    folder = write_texts(tmp_path, "talk", 3)
    lines = (folder / "train.jsonl").read_text().splitlines()
    lines[1] = lines[1].replace('"assistant"', '"user"')
    (folder / "train.jsonl").write_text("\n".join(lines))
    with pytest.raises(RowError, match="Row 'talk-1' has no assistant turn"):
        load("sft", folder)


def test_held_out_rows_are_looked_through_as_well(shell_games, tmp_path):
    folder = rewrite(shell_games, tmp_path / "bad", lambda index, row: row | {"answer": ""}, split="validation")
    load("sft", folder)
    with pytest.raises(RowError, match="has answer ''"):
        load("sft", folder, eval_strategy="epoch")


def test_a_stream_without_rows_is_an_error(tmp_path):
    features = Features({"question": Value("string"), "answer": Value("string"), "video_path": Value("string")})
    Dataset.from_dict({name: [] for name in features}, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="have no rows"):
        load("sft", tmp_path, dataset_streaming=True)


# ------------------------------------------------------------------ stored targets


def with_targets(source, folder, settings, targets=None):
    """A copy of a built folder with a column of targets, and a card that says what they were made with."""
    rng = np.random.default_rng(0)

    def change(index, row):
        target = rng.normal(size=(LATENT_SIZE, 4)).astype(np.float32) if targets is None else targets[index]
        return row | {"latent_targets": target}

    rewrite(source, folder, change, latent_targets=Array2D((LATENT_SIZE, 4), "float32"))
    files = {"split": "train", "path": "data/train-*.parquet"}
    content = {"configs": [{"config_name": "default", "data_files": [files]}]}
    if settings is not None:
        content[TARGETS_KEY] = settings
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(content)}---\n")
    return folder


def test_stored_targets_are_read_instead_of_thought_videos(processor, shell_games, tmp_path):
    folder = with_targets(shell_games, tmp_path / "stored", SETTINGS)
    expected = np.random.default_rng(0).normal(size=(2, LATENT_SIZE, 4)).astype(np.float32)
    for streaming in (False, True):
        rows = list(load("stage1", folder, SETTINGS, dataset_streaming=streaming)[0])
        assert "thought_video" not in rows[0]
        batch = StormsCollator(processor, "stage1", LATENT_SIZE)(rows[:2])
        assert np.array_equal(batch["latent_targets"].numpy(), expected)
    # Elsewhere they mean nothing: the number of slots without pooling is not that of pooled targets.
    assert "latent_targets" not in load("stage2", folder)[0].column_names
    assert "latent_targets" not in load("stage2", folder, latent_size=None)[0].column_names


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("tower_revision", "another"),
        ("latent_size", 8),
        ("num_target_frames", 4),
        ("target_source", "keyframes"),
        ("pixels", [3136, 9999]),
    ],
)
def test_targets_made_otherwise_are_refused(shell_games, tmp_path, name, stored, streaming):
    folder = with_targets(shell_games, tmp_path / "stored", SETTINGS | {name: stored})
    with pytest.raises(ValueError, match="latent_targets were made with") as error:
        load("stage1", folder, SETTINGS, dataset_streaming=streaming)
    assert f"{name} {stored!r} instead of {SETTINGS[name]!r}" in str(error.value)
    assert "stored" in str(error.value)
    assert "recipes.cache_targets" in str(error.value)


def test_targets_that_nothing_is_known_about_are_refused(shell_games, tmp_path):
    folder = with_targets(shell_games, tmp_path / "stored", None)
    with pytest.raises(ValueError, match="its card does not say what they were made with"):
        load("stage1", folder, SETTINGS)
    (folder / "README.md").unlink()
    with pytest.raises(ValueError, match="its card does not say what they were made with"):
        load("stage1", folder, SETTINGS)


def test_stored_targets_of_a_tower_that_trains_are_refused(shell_games, tmp_path):
    folder = with_targets(shell_games, tmp_path / "stored", SETTINGS)
    with pytest.raises(ValueError, match="--trainable all trains the vision tower"):
        load("stage1", folder, SETTINGS, trainable="all")


def test_a_row_without_its_stored_targets_is_named(shell_games, tmp_path):
    targets = [np.zeros((LATENT_SIZE, 4), np.float32)] * 99
    targets[1] = None
    folder = with_targets(shell_games, tmp_path / "stored", SETTINGS, targets)
    name = load_dataset(str(shell_games), split="train")[1]["id"]
    with pytest.raises(RowError, match=f"Row '{name}' of .* has no latent targets, as 1 of"):
        load("stage1", folder, SETTINGS)


# ------------------------------------------------------------------ arguments


def parse(tmp_path, stage="stage2", flags=(), **content):
    path = tmp_path / "run.yaml"
    given = {"dataset_name": "somewhere", "output_dir": "out", "use_cpu": True, "bf16": False}
    path.write_text(yaml.safe_dump({name: one for name, one in (given | content).items() if one is not ...}))
    return parse_arguments(stage, None, ["--config", str(path), *flags])


def test_a_flag_overrides_the_file_and_the_file_the_default(tmp_path):
    data, training, model = parse(
        tmp_path, "stage1", ["--latent_size", "4", "--max_steps", "7"], latent_size=5, latent_loss_weight=0.3
    )
    assert (training.latent_size, training.max_steps, training.latent_loss_weight) == (4, 7, 0.3)
    assert (training.num_target_frames, training.max_length, training.remove_unused_columns) == (16, None, False)
    assert (data.dataset_name, data.visual_context, model.use_peft) == ("somewhere", "video", False)
    assert parse(tmp_path, flags=["--latent_size", "null"])[1].latent_size is None
    assert parse(tmp_path, latent_size=None)[1].latent_size is None


def test_a_mixture_comes_from_a_file(tmp_path):
    entries = [
        {"path": "a", "weight": 3, "video_root": "~/videos"},
        {"path": "b", "name": "x", "revision": "1", "split": "s", "weight": 1},
    ]
    data, _, _ = parse(tmp_path, dataset_name=..., datasets=entries)
    first, second = data.sources()
    assert (first.path, first.weight, second.name, second.revision, second.split) == ("a", 3, "x", "1", "s")
    assert first.video_root.endswith("/videos")
    assert "~" not in first.video_root


def test_unknown_keys_and_flags_are_refused(tmp_path):
    with pytest.raises(ValueError, match="latent_sise"):
        parse(tmp_path, latent_sise=4)
    with pytest.raises(ValueError, match="latent_sise"):
        parse(tmp_path, flags=["--latent_sise", "4"])


@pytest.mark.parametrize(
    ("stage", "option"),
    [
        ("sft", {"latent_bottleneck": 0.5}),
        ("sft", {"stop_supervision": "pad"}),
        ("sft", {"latent_input": "rollout"}),
        ("sft", {"latent_loss_weight": 0.2}),
        ("sft", {"target_source": "keyframes"}),
        ("sft", {"num_target_frames": 4}),
        ("stage2", {"latent_loss_weight": 0.2}),
        ("stage2", {"latent_input": "teacher_forced"}),
        ("stage2", {"target_source": "keyframes"}),
        ("stage2", {"num_target_frames": 4}),
        ("stage1", {"target_source": "self_distilled", "num_target_frames": 4}),
    ],
)
def test_options_that_mean_nothing_in_a_stage_are_refused(tmp_path, stage, option):
    name = list(option)[-1]
    with pytest.raises(ValueError, match=f"--{name} mean nothing in {stage}"):
        parse(tmp_path, stage, **option)
    # In a stage where it means something it passes.
    meaningful = {"latent_size": None} if stage == "stage2" and "target" in name else {}
    other = stage if meaningful else "stage1"
    if len(option) == 1:
        parse(tmp_path, other, **option, **meaningful)


def test_options_of_a_stage_pass_in_it():
    common = {"output_dir": "out", "use_cpu": True, "bf16": False}
    for stage, option in (
        ("stage2", {"latent_input": "rollout"}),
        ("stage2", {"latent_bottleneck": 1.0, "stop_supervision": "not_end"}),
        ("stage2", {"latent_size": None, "target_source": "keyframes"}),
        ("stage1", {"latent_input": "rollout", "target_source": "keyframes"}),
        ("sft", {}),
    ):
        check_stage(StormsTrainingArguments(**common, **option), stage)


@pytest.mark.parametrize(
    ("option", "seen", "expected"),
    [
        ({"trainable": "tower"}, "'tower'", "'llm', 'all'"),
        ({"latent_input": "zeros"}, "'zeros'", "'teacher_forced', 'rollout'|'rollout', 'teacher_forced'"),
        ({"target_source": "audio"}, "'audio'", "'thought_video', 'keyframes', 'self_distilled'"),
        ({"stop_supervision": "end"}, "'end'", "'none', 'not_end', 'pad'"),
        ({"padding_side": "both"}, "'both'", "'left', 'right'"),
        ({"visual_context": "audio"}, "'audio'", "'keyframes', 'video', 'both'"),
        ({"latent_bottleneck": 1.5}, "1.5", "0 to 1"),
        ({"latent_size": 0}, "0", "1 or more"),
        ({"latent_loss_weight": -0.1}, "-0.1", "0 or more"),
        ({"stop_at_loss": -0.1}, "-0.1", "0 or more"),
        ({"num_target_frames": 0}, "0", "1 or more"),
        ({"eval_answers": -1}, "-1", "0 or more"),
        ({"eval_max_new_tokens": 0}, "0", "1 or more"),
        ({"max_length": 0}, "0", "1 or more"),
        ({"num_frames": 0}, "0", "1 or more"),
        ({"max_frame_pixels": -5}, "-5", "1 or more"),
        ({"max_train_rows": 0}, "0", "1 or more"),
        ({"max_eval_rows": 0}, "0", "1 or more"),
        ({"packing": True}, "True", "its default"),
        ({"padding_free": True}, "True", "its default"),
        ({"label_smoothing_factor": 0.1}, "0.1", "its default"),
        ({"loss_type": "dft"}, "'dft'", "its default"),
        ({"use_liger_kernel": True}, "True", "its default"),
        ({"average_tokens_across_devices": False}, "False", "its default"),
        ({"dataset_name": ...}, "None", "exactly one"),
        ({"datasets": [{"path": "a"}]}, "'somewhere'", "exactly one"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_seen_and_what_is_expected(tmp_path, option, seen, expected):
    (name,) = option
    name = "dataset_name" if name == "datasets" else name
    with pytest.raises(ValueError, match=f"--{name}: saw {seen}.*expected.*({expected})"):
        parse(tmp_path, "stage1", **option)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"name": "a"}], "saw {'name': 'a'}, expected `path`"),
        ([{"path": "a", "wight": 2}], "expected `path` and some of name, path, revision, split, video_root, weight"),
        (["a"], "saw 'a', expected `path`"),
        ([{"path": "a", "weight": 1}, {"path": "b"}], r"saw weights \[1, None\], expected a positive one for each"),
        ([{"path": "a", "weight": 1}, {"path": "b", "weight": 0}], r"saw weights \[1, 0\]"),
        ([{"path": "a", "weight": "much"}], r"saw weights \['much'\]"),
    ],
)
def test_a_wrong_mixture_is_refused_when_it_is_parsed(tmp_path, entries, message):
    with pytest.raises(ValueError, match=message):
        parse(tmp_path, dataset_name=..., datasets=entries)
