"""A training row is the prompt of inference, a block and an answer; labels cover what is generated, and no more."""

import copy
import io
import re
import unicodedata
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dataset_builder.schema import LETTERS
from dataset_builder.thought_video import encode_video
from modeling_storms import decode_video
from recipes.collator import IGNORED, RowError, StormsCollator

from ..conftest import moving_disc


NUM_FRAMES = 4
QUESTION = "Where does the disc go?"
TEXT = "Where does the disc go?\nA. left\nB. right\nAnswer with the letter of the right option."


@pytest.fixture(scope="module")
def trained(processor):
    """The processor of a training run: its frames are its own, not told at each call."""
    processor = copy.deepcopy(processor)
    processor.video_processor.num_frames = NUM_FRAMES
    return processor


@pytest.fixture(scope="module")
def media():
    return {
        "video": encode_video(moving_disc(24, 56, 84, seed=1), 12),
        "thought": encode_video(moving_disc(10, 56, 84, seed=2), 8),
        "keyframes": [Image.fromarray(moving_disc(2, 56, 84, seed=seed)[1]) for seed in (3, 4)],
        "small": Image.fromarray(moving_disc(1, 28, 28, seed=5)[0]),
    }


@pytest.fixture
def row(media):
    """A row of the dataset contract, as `datasets` gives it."""
    return {
        "id": "disc-17",
        "video": {"bytes": media["video"], "path": None},
        "video_path": "discs/17.mp4",
        "video_start": None,
        "video_end": None,
        "question": QUESTION,
        "options": ["left", "right"],
        "answer": "B",
        "keyframes": media["keyframes"],
        "thought_video": {"bytes": media["thought"], "path": None},
    }


CONVERSATION = {
    "messages": [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": "Is a disc round?"},
        {"role": "assistant", "content": "Yes, it is."},
        {"role": "user", "content": "And a cup?"},
        {"role": "assistant", "content": "From above."},
    ]
}


def at_inference(processor, content, **processor_kwargs):
    """What a user of the checkpoint gives to the model."""
    return processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": TEXT}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=processor_kwargs,
    )


def assert_begins_with(batch, expected, padding=0):
    """A batch of one row holds, tensor for tensor, the expected prompt, and at least a token after it."""
    length = expected["input_ids"].shape[1]
    for name in ("input_ids", "mm_token_type_ids"):
        found = batch[name][:, padding : padding + length]
        assert torch.equal(found, expected[name]), name
        assert batch[name].shape[1] > length
    assert (batch["labels"][:, : padding + length] == IGNORED).all()
    names = {name for name in expected if name.startswith(("pixel", "image", "video", "second"))}
    assert names == {name for name in batch if name.startswith(("pixel", "image", "video", "second"))}
    for name in names:
        assert torch.equal(batch[name], torch.as_tensor(expected[name])), name


def labelled_texts(processor, labels):
    """Texts of the runs of labelled tokens of one row."""
    runs, last = [], -2
    for index in (labels != IGNORED).nonzero()[:, 0].tolist():
        if index != last + 1:
            runs.append([])
        runs[-1].append(int(labels[index]))
        last = index
    return [processor.tokenizer.decode(run) for run in runs]


# ------------------------------------------------------------------ the prompt


@pytest.mark.parametrize("stage", ["sft", "stage1", "stage2"])
def test_a_row_begins_with_the_prompt_of_inference(processor, trained, row, media, tmp_path, stage):
    path = tmp_path / "disc.mp4"
    path.write_bytes(media["video"])
    video = [{"type": "video", "video": str(path)}]
    images = [{"type": "image", "image": image} for image in media["keyframes"]]
    for context, content in (("video", video), ("keyframes", images), ("both", [*video, *images])):
        options = {"num_frames": NUM_FRAMES} if context != "keyframes" else {}
        expected = at_inference(processor, content, **options)
        assert_begins_with(StormsCollator(trained, stage, visual_context=context)([row]), expected)


def test_a_file_in_the_video_root_gives_what_its_bytes_give(trained, row, media, tmp_path):
    (tmp_path / "discs").mkdir()
    (tmp_path / "discs" / "17.mp4").write_bytes(media["video"])
    expected = StormsCollator(trained)([row])
    at_root = StormsCollator(trained, video_root=str(tmp_path))
    elsewhere = StormsCollator(trained, video_root="/nowhere")
    path = str(tmp_path / "discs" / "17.mp4")
    for batch in (
        at_root([row | {"video": None}]),
        elsewhere([row | {"video": None, "video_root": str(tmp_path)}]),  # a source's own root goes first
        StormsCollator(trained)([row | {"video": {"bytes": None, "path": path}, "video_path": None}]),
    ):
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in batch)


def test_frames_by_rate_are_those_of_inference(processor, trained, row, media, tmp_path):
    path = tmp_path / "disc.mp4"
    path.write_bytes(media["video"])
    by_rate = copy.deepcopy(trained)
    by_rate.video_processor.num_frames, by_rate.video_processor.fps = None, 3
    expected = at_inference(processor, [{"type": "video", "video": str(path)}], fps=3)
    assert int(expected["video_grid_thw"][0, 0]) == 3  # 2 seconds at 3 a second, two frames a step
    assert_begins_with(StormsCollator(by_rate)([row]), expected)


# Of 24 frames at 12 a second. Times of the contract are float32.
SEGMENTS = {(0.5, 1.5): (6, 18), (None, 1.0): (0, 12), (1.25, None): (15, 24), (1 / 3, 5 / 3): (4, 20)}


@pytest.mark.parametrize("times", SEGMENTS)
def test_a_segment_gives_what_its_cut_frames_give(processor, trained, row, media, times):
    first, last = SEGMENTS[times]
    frames = decode_video(media["video"])[0][first:last]
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": TEXT}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    expected = processor(
        text=[text],
        videos=[frames],
        video_metadata=[{"fps": 12.0, "total_num_frames": len(frames)}],
        num_frames=NUM_FRAMES,
        return_tensors="pt",
    )
    start, end = (time and float(np.float32(time)) for time in times)
    assert_begins_with(StormsCollator(trained)([row | {"video_start": start, "video_end": end}]), expected)


def test_a_segment_is_cut_by_the_files_own_clock(trained, row):
    """Where the frame rate varies, index / fps errs."""
    milliseconds, shades = [0, 40, 80, 500, 1000, 1040, 3000], [10, 40, 70, 100, 130, 160, 190]
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 56, 56, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for time, shade in zip(milliseconds, shades):
            frame = av.VideoFrame.from_ndarray(np.full((56, 56, 3), shade, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, stream.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    varying = row | {"video": {"bytes": file.getvalue(), "path": None}, "video_start": 0.5, "video_end": 1.04}
    frames, metadata = StormsCollator(trained).open_video(varying, "varying")
    assert frames.mean((1, 2, 3)) == pytest.approx([100, 130], abs=3)
    assert (metadata.total_num_frames, metadata.frames_indices) == (2, [0, 1])


@pytest.mark.parametrize("stage", ["sft", "stage1", "stage2"])
def test_prompts_are_the_rows_up_to_the_block_padded_on_the_left(trained, row, stage):
    collator = StormsCollator(trained, stage, padding_side="right", visual_context="both")
    longer = row | {"id": "longer", "question": "Where does the red disc on the patterned background go at the end?"}
    longer |= {"video": row["thought_video"], "keyframes": row["keyframes"][:1]}  # other media, too
    alone = [collator([one]) for one in (row, longer)]
    without_answer = {name: value for name, value in row.items() if name not in ("answer", "thought_video")}
    prompts = collator.prompts([without_answer, longer])
    assert not {"labels", "row_seeds", "latent_targets", "target_pixel_values"} & prompts.keys()
    lengths = prompts["attention_mask"].sum(1)
    assert lengths[0] < lengths[1] == prompts["input_ids"].shape[1]
    for index, batch in enumerate(alone):
        padding = int(lengths[1] - lengths[index])
        begins = int((batch["labels"][0] != IGNORED).nonzero()[0])
        assert begins == lengths[index], "the first label is the first token that is generated"
        assert torch.equal(prompts["input_ids"][index, padding:], batch["input_ids"][0, :begins])
        assert torch.equal(prompts["mm_token_type_ids"][index, padding:], batch["mm_token_type_ids"][0, :begins])
        assert (prompts["input_ids"][index, :padding] == trained.tokenizer.pad_token_id).all()
        assert prompts["attention_mask"][index].tolist() == [0] * padding + [1] * begins
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts"):
        assert torch.equal(prompts[name], torch.cat([batch[name] for batch in alone])), name


# ------------------------------------------------------------------ labels

TEXTS = st.text(st.characters(exclude_categories=("Cs", "Cn")), min_size=1, max_size=30).filter(
    lambda text: text.strip() and "<|" not in text
)
OPTIONS = st.lists(TEXTS, min_size=2, max_size=len(LETTERS))


@st.composite
def questions(draw):
    options = draw(st.one_of(st.just([]), OPTIONS))
    answer = draw(st.sampled_from(LETTERS[: len(options)])) if options else draw(TEXTS)
    return {"question": draw(TEXTS), "options": options, "answer": answer}


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(questions(), min_size=1, max_size=3),
    latent_size=st.integers(1, 12),
    stage=st.sampled_from(["sft", "stage1", "stage2"]),
    side=st.sampled_from(["left", "right"]),
)
def test_labels_cover_the_answer_and_the_markers_and_nothing_else(trained, media, texts, latent_size, stage, side):
    rows = [{"id": str(index), "keyframes": [media["small"]], **one} for index, one in enumerate(texts)]
    rows = [one | {"latent_targets": np.zeros((latent_size, 4), np.float32).tolist()} for one in rows]
    batch = StormsCollator(trained, stage, latent_size, "keyframes", padding_side=side)(rows)
    blocks = ("", "") if stage == "sft" else ("<|latent_start|>", "<|latent_end|>")
    pads = "<|latent_pad|>" * latent_size if stage != "sft" else ""
    pad_id = trained.tokenizer.convert_tokens_to_ids("<|latent_pad|>")
    assert ("latent_targets" in batch) == (stage == "stage1")
    for index, one in enumerate(texts):
        ids, labels, is_real = (batch[name][index] for name in ("input_ids", "labels", "attention_mask"))
        is_labelled = labels != IGNORED
        assert torch.equal(ids[is_labelled], labels[is_labelled]), "a token's label is the token"
        # 1. Labelled is what stands after the prompt, slots left out.
        answer = unicodedata.normalize("NFC", one["answer"].strip())
        found = trained.tokenizer.decode(labels[is_labelled])
        assert found == f"{blocks[0]}{blocks[1]}{answer}<|im_end|>"
        # 2. The row is the prompt, the block, the answer and no more; the prompt is the chat template's.
        text = trained.tokenizer.decode(ids[is_real == 1])
        prompt, begin, rest = text.rpartition("<|im_start|>assistant\n")
        assert begin
        assert rest == f"{blocks[0]}{pads}{blocks[1]}{answer}<|im_end|>"
        assert prompt.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")
        assert unicodedata.normalize("NFC", one["question"].strip()) in prompt
        # 3. No slot and no padding is labelled, and padding is on its side alone.
        assert not is_labelled[(ids == pad_id) | (is_real == 0)].any()
        room = int((is_real == 0).sum())
        assert is_real.tolist() == ([0] * room + [1] * (len(ids) - room))[:: 1 if side == "left" else -1]
        assert set(ids[is_real == 0].tolist()) <= {trained.tokenizer.pad_token_id}
        assert not batch["mm_token_type_ids"][index][is_labelled | (is_real == 0) | (ids == pad_id)].any()


def test_the_sft_row_is_the_conversation_that_the_chat_template_writes(processor, trained, row, media, tmp_path):
    """Answers are tokenized alone in training: the tokens must be those of the whole text."""
    path = tmp_path / "disc.mp4"
    path.write_bytes(media["video"])
    for answer in ("right", "  To the right, then  back.\n", "2", "zurück «—»", "\N{COMBINING ACUTE ACCENT}a"):
        conversation = [
            {
                "role": "user",
                "content": [
                    {"type": "video", "video": str(path)},
                    {"type": "text", "text": f"{QUESTION}\nAnswer with a word or a short phrase."},
                ],
            },
            {"role": "assistant", "content": answer.strip()},
        ]
        expected = processor.apply_chat_template(
            conversation, tokenize=True, return_dict=True, processor_kwargs={"num_frames": NUM_FRAMES}
        )["input_ids"]
        batch = StormsCollator(trained, "sft")([row | {"options": [], "answer": answer}])
        newline = trained.tokenizer.encode("\n")
        assert batch["input_ids"][0].tolist() + newline == np.ravel(expected).tolist()
        assert not {
            trained.tokenizer.convert_tokens_to_ids(f"<|latent_{name}|>") for name in ("start", "pad", "end")
        } & (set(batch["input_ids"][0].tolist()))


@pytest.mark.parametrize("source", ["thought_video", "keyframes", "self_distilled"])
def test_without_pooling_a_block_has_one_slot_for_each_token_of_the_target(trained, model, row, source):
    collator = StormsCollator(trained, "stage1", None, target_source=source, num_target_frames=6)
    batch = collator([row])
    features = model.get_target_features(batch["target_pixel_values"], batch["target_grid_thw"])
    num_tokens = sum(len(one) for one in features)
    steps = {"thought_video": 6 / 2, "keyframes": 2, "self_distilled": NUM_FRAMES / 2}[source]
    assert num_tokens == steps * 6  # 56 x 84 pixels are 2 x 3 tokens
    expected = f"<|latent_start|>{'<|latent_pad|>' * num_tokens}<|latent_end|>B<|im_end|>"
    for stage in ("stage1", "stage2"):
        one = StormsCollator(trained, stage, None, target_source=source, num_target_frames=6)([row])
        assert trained.tokenizer.decode(one["input_ids"][0]).rpartition("assistant\n")[2] == expected
        assert labelled_texts(trained, one["labels"][0]) == ["<|latent_start|>", "<|latent_end|>B<|im_end|>"]


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_without_pooling_rows_of_a_batch_may_differ_in_slots(trained, row, stage):
    fewer = row | {"id": "fewer", "keyframes": row["keyframes"][:1]}
    batch = StormsCollator(trained, stage, None, target_source="keyframes")([row, fewer])
    pad_id = trained.tokenizer.convert_tokens_to_ids("<|latent_pad|>")
    assert (batch["input_ids"] == pad_id).sum(1).tolist() == [12, 6]
    for labels in batch["labels"]:
        assert labelled_texts(trained, labels) == ["<|latent_start|>", "<|latent_end|>B<|im_end|>"]


def test_a_row_may_say_its_own_number_of_slots(trained, row):
    rows = [row, row | {"id": "own", "latent_size": 3}, row | {"id": "none of its own", "latent_size": None}]
    pad_id = trained.tokenizer.convert_tokens_to_ids("<|latent_pad|>")
    for size in (8, 5):
        found = (StormsCollator(trained, "stage2", size)(rows)["input_ids"] == pad_id).sum(1)
        assert found.tolist() == [size, 3, size]
    assert (StormsCollator(trained, "sft")(rows)["input_ids"] != pad_id).all()


# ------------------------------------------------------------------ targets


def test_target_pixels_are_those_of_the_thought_video_alone(processor, trained, row, media):
    """Whatever the prompt shows, and in the order of the rows."""
    other = row | {"id": "other", "thought_video": {"bytes": media["video"], "path": None}}
    grids, pixels = [], []
    for data, num_frames in ((media["thought"], 10), (media["video"], 24)):
        chosen = np.arange(6) * num_frames // 6
        frames = decode_video(data)[0][chosen]
        encoded = processor.video_processor(
            [frames],
            do_sample_frames=False,
            video_metadata=[{"fps": 12.0, "total_num_frames": 6}],
            return_tensors="pt",
        )
        grids.append(encoded["video_grid_thw"])
        pixels.append(encoded["pixel_values_videos"])
    for context in ("video", "keyframes", "both"):
        batch = StormsCollator(trained, "stage1", visual_context=context, num_target_frames=6)([row, other])
        assert torch.equal(batch["target_pixel_values"], torch.cat(pixels))
        assert torch.equal(batch["target_grid_thw"], torch.cat(grids))
        assert batch["target_media_per_row"].tolist() == [1, 1]


def test_targets_can_be_the_keyframes_or_the_own_video(processor, trained, row, media):
    batch = StormsCollator(trained, "stage1", target_source="keyframes")([row, row])
    expected = processor.image_processor(images=media["keyframes"] * 2, return_tensors="pt")
    assert torch.equal(batch["target_pixel_values"], expected["pixel_values"])
    assert torch.equal(batch["target_grid_thw"], expected["image_grid_thw"])
    assert batch["target_media_per_row"].tolist() == [2, 2]
    batch = StormsCollator(trained, "stage1", target_source="self_distilled")([row])
    assert torch.equal(batch["target_pixel_values"], batch["pixel_values_videos"])
    assert torch.equal(batch["target_grid_thw"], batch["video_grid_thw"])


def test_stored_targets_of_rows_arrive_as_they_are(trained, row):
    stored = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    rows = [row | {"id": str(index), "latent_targets": one.tolist()} for index, one in enumerate(stored)]
    rows[0]["thought_video"] = None  # not needed any more
    batch = StormsCollator(trained, "stage1", 3)(rows)
    assert np.array_equal(batch["latent_targets"].numpy(), stored)
    assert not any(name.startswith("target_") for name in batch)


# ------------------------------------------------------------------ conversations


def test_conversations_label_their_assistant_turns_alone(trained, media):
    with_images = {
        "messages": [
            {"role": "user", "content": "What is in these two?"},
            {"role": "assistant", "content": "Two discs: zwei Scheiben."},
            {"role": "user", "content": "Which one is red?"},
            {"role": "assistant", "content": "Both are."},
        ],
        "images": media["keyframes"],
    }
    structured = {
        "messages": [  # as a dataset gives them, with all keys in each part
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Before", "image": None},
                    {"type": "image", "text": None, "image": None},
                    {"type": "text", "text": "after?", "image": None},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "A disc.", "image": None}]},
        ],
        "images": media["keyframes"][:1],
    }
    single = {"messages": with_images["messages"], "image": media["keyframes"][0]}
    expected = {
        0: (CONVERSATION, ["Yes, it is.<|im_end|>", "From above.<|im_end|>"], 0),
        1: (with_images, ["Two discs: zwei Scheiben.<|im_end|>", "Both are.<|im_end|>"], 2),
        2: (structured, ["A disc.<|im_end|>"], 1),
        3: (single, ["Two discs: zwei Scheiben.<|im_end|>", "Both are.<|im_end|>"], 1),
    }
    rows = [conversation for conversation, _, _ in expected.values()]
    for stage in ("sft", "stage2"):
        batch = StormsCollator(trained, stage)(rows)
        ids, labels = batch["input_ids"], batch["labels"]
        assert torch.equal(ids[labels != IGNORED], labels[labels != IGNORED])
        for index, (_, texts, num_images) in expected.items():
            assert labelled_texts(trained, labels[index]) == texts
            text = trained.tokenizer.decode(ids[index][batch["attention_mask"][index] == 1])
            assert text.count("<|vision_start|>") == num_images
            assert text.count("<|image_pad|>") == 6 * num_images == int((batch["mm_token_type_ids"][index] == 1).sum())
            assert "<|latent" not in text
        assert len(batch["image_grid_thw"]) == 4
    # The text around the media is the chat template's.
    text = trained.tokenizer.decode(StormsCollator(trained)([CONVERSATION])["input_ids"][0])
    assert text == (
        "<|im_start|>system\nYou are terse.<|im_end|>\n"
        "<|im_start|>user\nIs a disc round?<|im_end|>\n<|im_start|>assistant\nYes, it is.<|im_end|>\n"
        "<|im_start|>user\nAnd a cup?<|im_end|>\n<|im_start|>assistant\nFrom above.<|im_end|>\n"
    )


@pytest.mark.parametrize("stage", ["sft", "stage2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mixed_batch_costs_what_its_rows_cost_alone(trained, model, row, media, stage, side):
    with_image = {
        "messages": [{"role": "user", "content": "A disc?"}, {"role": "assistant", "content": "Yes."}],
        "images": media["keyframes"][:1],
    }
    other = row | {"id": "other", "video": row["thought_video"], "options": [], "answer": "It goes to the right."}
    rows = [CONVERSATION, row, with_image, other]
    collator = StormsCollator(trained, stage, 3, padding_side=side)

    def loss(rows):
        batch = collator(rows)
        assert batch.pop("row_seeds").shape == (len(rows),)
        latent_input = "rollout" if stage == "stage2" else None
        with torch.no_grad():
            out = model(**batch, latent_input=latent_input, use_cache=False)
        return float(out.lm_loss), int((batch["labels"] != IGNORED).sum())

    alone = [loss([one]) for one in rows]
    mean = sum(value * count for value, count in alone) / sum(count for _, count in alone)
    together, count = loss(rows)
    assert count == sum(count for _, count in alone)
    # Float32 sums in another order; a row with wrong positions, media or masks differs in the second digit.
    assert together == pytest.approx(mean, rel=1e-5)


def test_a_batch_of_text_alone_holds_no_media(trained, model):
    batch = StormsCollator(trained, "stage2")([CONVERSATION, CONVERSATION | {"id": "again"}])
    assert batch.keys() == {"input_ids", "attention_mask", "labels", "mm_token_type_ids", "row_seeds"}
    batch.pop("row_seeds")
    assert torch.isfinite(model(**batch, latent_input="rollout").loss)


# ------------------------------------------------------------------ seeds and the cache


def test_the_seed_of_a_row_depends_on_the_row_alone(trained, row):
    other = row | {"id": "disc-18"}
    nameless = {name: value for name, value in row.items() if name != "id"}
    asked_otherwise = nameless | {"question": "Where is it?"}
    rows = [row, other, nameless, asked_otherwise, CONVERSATION]
    collator = StormsCollator(trained, "stage2")
    seeds = collator(rows)["row_seeds"].tolist()
    assert len(set(seeds)) == len(rows), "rows without an id are told apart by what they hold"
    assert collator(rows[::-1])["row_seeds"].tolist() == seeds[::-1]
    # Where targets come from is no part of it.
    stored = [one | {"latent_targets": [[0.0]] * 8, "thought_video": None} for one in (row, nameless)]
    assert StormsCollator(trained, "stage1")(stored)["row_seeds"].tolist() == [seeds[0], seeds[2]]


def test_the_cache_takes_no_row_for_another(trained, row):
    """Plain video questions have no id: many may share a video."""
    plain = {"video": row["video"], "video_path": "disc.mp4", "question": QUESTION, "options": [], "answer": "right"}
    rows = [plain, plain | {"question": "Where is it?"}, plain | {"answer": "left"}, plain | {"video_end": 1.0}]
    collator, cached = StormsCollator(trained), StormsCollator(trained, cache={})
    for _ in range(2):
        for one in rows:
            batch, expected = cached([one]), collator([one])
            assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert len(cached.cache) == len(rows)
    assert cached.encode(dict(plain)) is cached.encode(plain)


# ------------------------------------------------------------------ bad data

LONG = " Again." * 400
BAD_ROWS = {
    # what is changed, the collator's options, what the error says after the row's name
    "no thought video": ({"thought_video": None}, {"stage": "stage1"}, "has no thought video"),
    "an empty thought video": (
        {"thought_video": {"bytes": b"", "path": None}},
        {"stage": "stage1"},
        "no thought video",
    ),
    "slots of no thought video": ({"thought_video": None}, {"latent_size": None}, "has no thought video"),
    "other K": (
        {"latent_targets": [[0.0, 1.0]] * 4},
        {"stage": "stage1"},
        "has 4 stored latent_targets, but latent_size is 8",
    ),
    "slots of its own in Stage I": ({"latent_size": 3}, {"stage": "stage1"}, "latent_size of its own, 3, but Stage I"),
    "no slots": ({"latent_size": 0}, {}, "has latent_size 0, expected slots of its block, 1 or more"),
    "empty answer": ({"answer": "  \n"}, {}, r"has answer '  \\n', expected text"),
    "no answer": ({"answer": None}, {}, "has answer None, expected text"),
    "no such option": ({"answer": "C"}, {}, "has answer 'C', expected the letter of one of its options, A, B"),
    "text for a letter": ({"answer": "right"}, {}, "has answer 'right', expected the letter"),
    "empty question": ({"question": ""}, {}, "has question '', expected text"),
    "one option": ({"options": ["left"]}, {}, "has options .*Saw 1 options"),
    "too long": ({"question": QUESTION + LONG}, {"max_length": 400}, r"has \d+ tokens, but max_length is 400"),
    "no keyframes": ({"keyframes": []}, {"visual_context": "both"}, "has no keyframes"),
    "no keyframes for targets": (
        {"keyframes": None},
        {"stage": "stage1", "target_source": "keyframes"},
        "has no keyframes for --target_source keyframes",
    ),
    "no video": ({"video": None}, {}, "holds no video, and its video_path is 'discs/17.mp4' with --video_root None"),
    "no video file": ({"video": None}, {"video_root": "/nowhere"}, "/nowhere/discs/17.mp4: .*no such file"),
    "no video at all": ({"video": None, "video_path": None}, {"video_root": "/nowhere"}, "holds no video"),
    "rotten video": ({"video": {"bytes": b"rotten" * 99, "path": None}}, {}, "0 frames decoded"),
    "rotten thought video": (
        {"thought_video": {"bytes": b"rotten" * 99, "path": None}},
        {"stage": "stage1"},
        "0 frames decoded",
    ),
    "slot in the question": ({"question": "Is <|latent_pad|> it?"}, {}, r"holds <\|latent_pad\|>"),
    "slot in an option": ({"options": ["<|latent_start|>", "b"]}, {}, r"holds <\|latent_start\|>"),
    "slot in the answer": ({"options": [], "answer": "a<|latent_pad|>"}, {}, r"holds <\|latent_pad\|>"),
    "video in the question": ({"question": "Is <|video_pad|> it?"}, {}, r"holds <\|video_pad\|>"),
    "turn in the answer": ({"options": [], "answer": "a<|im_end|>b"}, {}, r"holds <\|im_end\|>"),
    "segment after the end": (
        {"video_start": 5.0, "video_end": 6.0},
        {},
        "asks for 5.0 to 6.0 seconds of a video of 2.0 seconds",
    ),
    "segment of nothing": ({"video_start": 1.0, "video_end": 1.0}, {}, "asks for 1.0 to 1.0 seconds"),
}
USER, ASSISTANT = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
BAD_CONVERSATIONS = {
    "no assistant": ([USER], {}, "has no assistant turn"),
    "empty assistant": ([USER, {"role": "assistant", "content": " "}], {}, "has an empty assistant turn"),
    "empty part": (
        [USER, {"role": "assistant", "content": [{"type": "text", "text": ""}]}],
        {},
        "has an empty assistant turn",
    ),
    "one empty turn": ([USER, ASSISTANT, USER, {"role": "assistant", "content": None}], {}, "has an empty assistant"),
    "block": ([USER, {"role": "assistant", "content": "<|latent_start|>"}], {}, r"holds <\|latent_start\|>"),
    "slot in a question": ([{"role": "user", "content": "<|latent_pad|>"}, ASSISTANT], {}, r"holds <\|latent_pad\|>"),
    "images": (
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}, ASSISTANT],
        {},
        "Number of images",
    ),
    "role": ([{"role": "oracle", "content": "Why?"}, ASSISTANT], {}, "Invalid role"),
    "too long": (
        [USER, {"role": "assistant", "content": LONG}],
        {"max_length": 50},
        r"\d+ tokens, but max_length is 50",
    ),
    "stage1": ([USER, ASSISTANT], {"stage": "stage1"}, "no thought video to encode"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_named(trained, row, kind):
    changed, options, expected = BAD_ROWS[kind]
    collator = StormsCollator(trained, **options)
    good = row | {"id": "good"} | ({"latent_targets": [[0.0, 1.0]] * 8} if "latent_targets" in changed else {})
    collator([good])
    with pytest.raises(RowError, match=f"(?s)ow 'disc-17'.*{expected}"):
        collator([good, row | changed])


@pytest.mark.parametrize("kind", BAD_CONVERSATIONS)
def test_a_bad_conversation_is_named(trained, kind):
    messages, options, expected = BAD_CONVERSATIONS[kind]
    with pytest.raises(RowError, match=f"(?s)'talk-3'.*{expected}"):
        StormsCollator(trained, **options)([{"id": "talk-3", "messages": messages}])


def test_stored_targets_beside_rows_without_are_refused(trained, row):
    stored = row | {"id": "stored", "latent_targets": [[0.0]] * 8}
    with pytest.raises(RowError, match=r"'stored'.*for all rows or for none"):
        StormsCollator(trained, "stage1")([row, stored])


def test_rows_are_never_cut(trained, row):
    """The limit itself is allowed; one token more is an error, on which side the rows are padded or not."""
    length = StormsCollator(trained)([row])["input_ids"].shape[1]
    assert StormsCollator(trained, max_length=length)([row])["input_ids"].shape[1] == length
    for side in ("left", "right"):
        with pytest.raises(RowError, match=f"has {length} tokens, but max_length is {length - 1}"):
            StormsCollator(trained, max_length=length - 1, padding_side=side)([row])


def test_a_row_without_an_id_is_called_by_its_video_or_its_text(trained, row):
    nameless = {**row, "id": None, "answer": ""}
    with pytest.raises(RowError, match=r"Row 'discs/17\.mp4' has answer ''"):
        StormsCollator(trained)([nameless])
    with pytest.raises(RowError, match=f"Row '{re.escape(QUESTION)}' has answer ''"):
        StormsCollator(trained)([nameless | {"video_path": None}])
    with pytest.raises(RowError, match="Row 'Tell me' has no assistant turn"):
        StormsCollator(trained)([{"messages": [{"role": "user", "content": [{"type": "text", "text": "Tell me"}]}]}])
    with pytest.raises(RowError, match=r"Row 'Is a disc round.*has question None.*not asked"):
        StormsCollator(trained).prompts([{"messages": CONVERSATION["messages"][1:]}])
