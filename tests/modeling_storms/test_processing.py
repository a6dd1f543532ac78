"""The processor: chat format, frames and their times, decoded text."""

import logging

import numpy as np
import pytest
import torch

from modeling_storms import StormsProcessor, StormsVideoProcessor, VideoDecodeError, decode_video
from recipes.init_checkpoint import build_tiny_base
from tests.conftest import ask

from .test_video import grey_clip


# Qwen2.5-VL's own template, for the features ours must agree on; the format is fixed by the released weights.
def qwen_format(messages, add_generation_prompt):
    text = "" if messages[0]["role"] == "system" else "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    for message in messages:
        text += f"<|im_start|>{message['role']}\n"
        parts = message["content"]
        for part in [{"type": "text", "text": parts}] if isinstance(parts, str) else parts:
            kind = part["type"]
            text += part["text"] if kind == "text" else f"<|vision_start|><|{kind}_pad|><|vision_end|>"
        text += "<|im_end|>\n"
    return text + ("<|im_start|>assistant\n" if add_generation_prompt else "")


CONVERSATIONS = [
    [{"role": "user", "content": "Hello  there\n"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Why?"}]}],
    [{"role": "user", "content": [{"type": "video", "video": "v.mp4"}, {"type": "text", "text": "What moves?"}]}],
    [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A"}, {"type": "video"}]},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": [{"type": "text", "text": "C"}, {"type": "image", "url": "x"}]},
    ],
]


class TestChatTemplate:
    @pytest.mark.parametrize("messages", CONVERSATIONS)
    @pytest.mark.parametrize("prompt", [True, False])
    def test_the_format_is_qwens(self, processor, messages, prompt):
        assert processor.apply_chat_template(messages, add_generation_prompt=prompt) == qwen_format(messages, prompt)

    def test_vision_ids_count_pictures_and_videos(self, processor):
        text = processor.apply_chat_template(CONVERSATIONS[3], add_vision_id=True)
        for label in ("Picture 1: <|vision_start|>", "Video 1: <|vision_start|>", "Picture 2: <|vision_start|>"):
            assert text.count(label) == 1

    def test_assistant_mask_covers_the_answers(self, processor):
        messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "the ball rolls."}]
        encoded = processor.tokenizer.apply_chat_template(
            messages,
            chat_template=processor.chat_template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        covered = [i for i, inside in zip(encoded["input_ids"], encoded["assistant_masks"]) if inside]
        assert processor.tokenizer.decode(covered) == "the ball rolls.<|im_end|>"

    def test_keys_that_a_dataset_filled_with_none_do_not_count(self, processor):
        parts = [
            {"type": "text", "text": "hi", "image": None, "video": None},
            {"type": "video", "text": None, "image": None, "video": "v.mp4"},
            {"image": "x.png", "video": None},
        ]
        plain = [{"type": "text", "text": "hi"}, {"type": "video"}, {"type": "image"}]
        rendered = [processor.apply_chat_template([{"role": "user", "content": c}]) for c in (parts, plain)]
        assert rendered[0] == rendered[1] == qwen_format([{"role": "user", "content": plain}], False)

    def test_an_unknown_part_is_an_error(self, processor):
        with pytest.raises(Exception, match="must be text, image or video"):
            processor.apply_chat_template([{"role": "user", "content": [{"type": "smell"}]}])


class TestVideos:
    @pytest.mark.parametrize(
        ("options", "indices", "seconds_per_grid_step"),
        [
            ({"num_frames": 4}, [0, 10, 20, 30], 2.0),
            ({"num_frames": 8}, [0, 5, 10, 15, 20, 25, 30, 35], 1.0),
            ({"fps": 2}, [0, 5, 10, 15, 20, 25, 30, 35], 1.0),
            ({"fps": 2, "max_frames": 4}, [0, 10, 20, 30], 2.0),
        ],
    )
    def test_sampled_frames_and_their_times(self, processor, tmp_path, options, indices, seconds_per_grid_step):
        inputs = ask(processor, str(grey_clip(tmp_path / "clip.mp4", 40)), return_metadata=True, **options)
        assert list(inputs["video_metadata"][0].frames_indices) == indices
        assert float(inputs["second_per_grid_ts"][0]) == pytest.approx(seconds_per_grid_step)
        assert int(inputs["video_grid_thw"][0, 0]) == len(indices) // 2
        placeholders = (inputs["input_ids"] == processor.video_token_id).sum()
        assert int(placeholders) == int(inputs["video_grid_thw"].prod()) // 4

    def test_the_default_is_32_frames(self, processor, tmp_path):
        inputs = ask(processor, str(grey_clip(tmp_path / "clip.mp4", 50)), return_metadata=True)
        assert len(inputs["video_metadata"][0].frames_indices) == 32
        assert float(inputs["second_per_grid_ts"][0]) == pytest.approx(2 * 5.0 / 32)

    def test_a_short_clip_uses_what_it_has_and_says_so(self, processor, tmp_path, caplog):
        logging.getLogger("transformers").propagate = True
        inputs = ask(processor, str(grey_clip(tmp_path / "clip.mp4", 5)), num_frames=8, return_metadata=True)
        assert list(inputs["video_metadata"][0].frames_indices) == [0, 1, 2, 3, 4]
        assert "clip.mp4 has 5 frames, fewer than the 8 asked for: using all 5." in caplog.text
        assert int(inputs["video_grid_thw"][0, 0]) == 3  # the last of five frames is doubled
        assert float(inputs["second_per_grid_ts"][0]) == pytest.approx(0.2)

    def test_path_objects_are_files_too(self, processor, tmp_path):
        path = grey_clip(tmp_path / "clip.mp4", 8)
        by_path, by_text = (ask(processor, video, num_frames=4) for video in (path, str(path)))
        assert torch.equal(by_path["pixel_values_videos"], by_text["pixel_values_videos"])
        assert by_path["input_ids"].tolist() == by_text["input_ids"].tolist()

    def test_bytes_are_refused_with_the_way_to_pass_them(self, processor, tmp_path):
        data = grey_clip(tmp_path / "clip.mp4", 8).read_bytes()
        with pytest.raises(ValueError, match="decode_video"):
            ask(processor, data)
        frames, metadata = decode_video(data, lambda metadata: [0, 2, 4, 6])
        text = "<|vision_start|><|video_pad|><|vision_end|>"
        inputs = processor(
            text=[text], videos=[frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt"
        )
        by_file = ask(processor, str(tmp_path / "clip.mp4"), num_frames=4)
        assert torch.equal(inputs["pixel_values_videos"], by_file["pixel_values_videos"])
        assert float(inputs["second_per_grid_ts"][0]) == float(by_file["second_per_grid_ts"][0])

    def test_a_single_frame_works(self, processor, tmp_path):
        inputs = ask(processor, str(grey_clip(tmp_path / "clip.mp4", 1)), fps=2)
        assert inputs["video_grid_thw"][0, 0] == 1

    def test_a_broken_file_is_named(self, processor, tmp_path):
        (tmp_path / "broken.mp4").write_bytes(b"")
        with pytest.raises(VideoDecodeError, match=r"broken\.mp4: 0 frames decoded"):
            ask(processor, str(tmp_path / "broken.mp4"))

    def test_frames_need_their_fps(self, processor):
        frames = np.zeros((8, 56, 56, 3), dtype=np.uint8)
        text = "<|vision_start|><|video_pad|><|vision_end|>"
        with pytest.raises(ValueError, match="without its fps"):
            processor(text=[text], videos=[frames], num_frames=4, return_tensors="pt")
        metadata = [{"fps": 4.0, "total_num_frames": 8}]
        inputs = processor(text=[text], videos=[frames], num_frames=4, video_metadata=metadata, return_tensors="pt")
        assert float(inputs["second_per_grid_ts"][0]) == pytest.approx(1.0)

    @pytest.mark.parametrize(
        ("metadata", "options"),
        [
            ({"fps": 30.0, "total_num_frames": 240}, {"do_sample_frames": False}),
            ({"fps": 30.0, "total_num_frames": 240}, {"num_frames": 4}),
            ({"fps": 30.0, "total_num_frames": 240, "frames_indices": [0, 1, 2]}, {"do_sample_frames": False}),
        ],
    )
    def test_metadata_of_other_frames_is_an_error(self, processor, metadata, options):
        frames = np.zeros((8, 56, 56, 3), dtype=np.uint8)
        with pytest.raises(ValueError, match="Video 0 has 8 frames, but its video_metadata describes"):
            processor(
                text=["<|vision_start|><|video_pad|><|vision_end|>"],
                videos=[frames],
                video_metadata=[metadata],
                **options,
            )

    def test_frames_already_sampled_keep_their_times(self, processor):
        frames = np.zeros((8, 56, 56, 3), dtype=np.uint8)
        metadata = {"fps": 30.0, "total_num_frames": 240, "frames_indices": list(range(0, 240, 30))}
        inputs = processor(
            text=["<|vision_start|><|video_pad|><|vision_end|>"],
            videos=[frames],
            video_metadata=[metadata],
            do_sample_frames=False,
        )
        assert float(inputs["second_per_grid_ts"][0]) == pytest.approx(2.0)

    def test_files_and_frames_in_one_batch_are_an_error(self, processor, tmp_path):
        path = str(grey_clip(tmp_path / "clip.mp4", 8))
        frames = np.zeros((8, 56, 56, 3), dtype=np.uint8)
        for videos in ([path, frames], [frames, path]):
            with pytest.raises(ValueError, match="mixes videos given as files and as frames"):
                processor.video_processor(videos, num_frames=4)

    def test_a_default_of_the_processor_gives_way_to_what_is_asked(self, processor, tmp_path):
        path = str(grey_clip(tmp_path / "clip.mp4", 40))
        by_fps = StormsVideoProcessor(size=processor.video_processor.size, fps=2)
        grids = [by_fps([path], **options)["video_grid_thw"][0][0] for options in ({}, {"num_frames": 4}, {"fps": 1})]
        assert [int(grid) for grid in grids] == [4, 2, 2]

    @pytest.mark.parametrize("options", [{"num_frames": 4, "fps": 2}, {"num_frames": 0}, {"fps": -1.0}])
    def test_contradictory_sampling_is_an_error(self, processor, tmp_path, options):
        with pytest.raises(ValueError, match="exactly one of them, positive"):
            ask(processor, str(grey_clip(tmp_path / "clip.mp4", 8)), **options)

    def test_pixels_equal_the_library_processor_on_the_same_frames(self, processor, tmp_path):
        path = grey_clip(tmp_path / "clip.mp4", 8)
        _, native = build_tiny_base()
        frames, metadata = decode_video(path)
        ours = processor.video_processor([str(path)], num_frames=8, return_tensors="pt")
        theirs = native.video_processor([frames], video_metadata=[metadata], return_tensors="pt")
        assert torch.equal(ours["pixel_values_videos"], theirs["pixel_values_videos"])
        assert torch.equal(ours["video_grid_thw"], theirs["video_grid_thw"])


class TestTokenizer:
    def test_a_tokenizer_without_latent_tokens_is_refused(self):
        _, native = build_tiny_base()
        with pytest.raises(ValueError, match="lacks <|latent_start|>".replace("|", r"\|")):
            StormsProcessor(native.image_processor, native.tokenizer, StormsVideoProcessor())

    @pytest.mark.parametrize("skip_special_tokens", [True, False])
    def test_decoding_drops_latent_tokens(self, processor, skip_special_tokens):
        tokenizer = processor.tokenizer
        text = tokenizer("the ball rolls")["input_ids"]
        start, pad, end = processor.latent_token_ids
        block = [start, pad, pad, end]
        expected = tokenizer.decode(text)
        for form in (block + text, torch.tensor(block + text), np.array(text + block)):
            assert processor.decode(form, skip_special_tokens=skip_special_tokens) == expected
        rows = [block + text, text]
        assert processor.batch_decode(rows, skip_special_tokens=skip_special_tokens) == [expected] * 2
        assert processor.decode(rows, skip_special_tokens=skip_special_tokens) == [expected] * 2
        stacked = torch.tensor([block + text, text + block])
        assert processor.decode(stacked, skip_special_tokens=skip_special_tokens) == [expected] * 2
