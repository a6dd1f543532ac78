"""Rows to batches: the prompt as at inference, the latent block, the answer, and which of it carries a label."""

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.video_utils import VideoMetadata
from trl.data_utils import prepare_multimodal_messages

from dataset_builder.schema import LETTERS
from evaluation.prompts import RESERVED, storms_prompt
from evaluation.protocols import read_clip
from modeling_storms import StormsProcessor
from modeling_storms.processing_storms import LATENT_TOKENS


IGNORED = -100
MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
TARGET_MEDIA = ("target_pixel_values", "target_grid_thw", "target_media_per_row")
TARGET_COLUMNS = ("thought_video", "latent_targets")


class RowError(ValueError):
    """A row can't be trained on; names the row, what was seen, what was expected and what to do."""


def row_name(row: Mapping[str, Any]) -> str:
    """What errors call a row: its id, else its video or the first of its texts."""
    if row.get("id"):
        return str(row["id"])
    if path := row.get("video_path") or (row.get("video") or {}).get("path"):
        return str(path)
    texts = [text for message in row.get("messages") or [] for text in _texts(message)]
    return (row.get("question") or next(iter(texts), "") or ", ".join(sorted(row)))[:80]


def check_texts(row: Mapping[str, Any]) -> None:
    """Refuse a row whose texts can't be trained on, without a look at its media.

    Raises:
        RowError: if its question or answer is empty, its answer is none of its options, a conversation has nothing to
            train on, a text holds a token that marks turns, media or blocks, or `latent_size` is no number of slots.
    """
    name = row_name(row)
    if row.get("messages"):
        _check_conversation(row["messages"], name)
        return
    _check_question(row, name)
    size = row.get("latent_size")
    if size is not None and (not isinstance(size, int) or size < 1):
        raise RowError(f"Row {name!r} has latent_size {size!r}, expected slots of its block, 1 or more, or nothing.")
    answer, letters = row.get("answer"), LETTERS[: len(row.get("options") or [])]
    if not isinstance(answer, str) or not answer.strip():
        raise RowError(f"Row {name!r} has answer {answer!r}, expected text. Correct it, or leave the row out.")
    if letters and answer.strip() not in list(letters):
        raise RowError(
            f"Row {name!r} has answer {answer!r}, expected the letter of one of its options, {', '.join(letters)}: "
            "the prompt asks for it. Correct it, or leave the row out."
        )
    _check_reserved([answer], "answer", name)


def _check_question(row: Mapping[str, Any], name: str) -> None:
    question, options = row.get("question"), row.get("options") or []
    if not isinstance(question, str) or not question.strip():
        raise RowError(
            f"Row {name!r} has question {question!r}, expected text. Correct it, or leave the row out. (Conversations "
            "are trained on, but not asked.)"
        )
    try:
        prompt = storms_prompt(question, options)
    except (ValueError, AttributeError, TypeError) as error:
        raise RowError(f"Row {name!r} has options {options!r}: {error}") from error
    _check_reserved([prompt], "question", name)


def _check_conversation(messages: Sequence[Mapping[str, Any]], name: str) -> None:
    if not all(isinstance(message, Mapping) and message.get("role") for message in messages):
        raise RowError(f"Row {name!r} has messages {str(messages)[:200]}, expected each with `role` and `content`.")
    turns = [_texts(message) for message in messages if message["role"] == "assistant"]
    if not turns:
        raise RowError(f"Row {name!r} has no assistant turn to train on. Add one, or leave the row out.")
    if not all("".join(turn).strip() for turn in turns):
        raise RowError(f"Row {name!r} has an empty assistant turn. Correct it, or leave the row out.")
    _check_reserved([text for message in messages for text in _texts(message)], "conversation", name)


def _check_reserved(texts: Sequence[str], what: str, name: str) -> None:
    if found := [token for token in RESERVED if any(token in text for text in texts)]:
        raise RowError(
            f"The {what} of row {name!r} holds {', '.join(found)}, which only the chat template and the latent mode "
            "may write. Correct it, or leave the row out."
        )


def _texts(message: Any) -> list[str]:
    content = message.get("content") or "" if isinstance(message, Mapping) else ""
    return [content] if isinstance(content, str) else [part.get("text") or "" for part in content]


def _digest(value: Any) -> bytes:
    """A hash of a row, or of a part of it, by content; columns without a value don't count."""
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(value, Mapping):
        for name in sorted(name for name in value if value[name] is not None):
            digest.update(name.encode() + b":" + _digest(value[name]))
    elif isinstance(value, (list, tuple)):
        for one in value:
            digest.update(_digest(one))
    elif isinstance(value, Image.Image):
        digest.update(repr((value.mode, value.size)).encode() + value.tobytes())
    elif isinstance(value, (np.ndarray, torch.Tensor)):
        digest.update(np.asarray(value).tobytes())
    else:
        digest.update(value if isinstance(value, bytes) else repr(value).encode())
    return digest.digest()


@dataclass
class Example:
    """One row, encoded.

    Args:
        name (`str`): of the row.
        seed (`int`): depends on the row alone.
        input_ids, labels, mm_token_type_ids (`list[int]`): of one length; labels are -100 where nothing is trained.
        media (`dict`): what the processor made of the row's images and videos.
        targets (`torch.Tensor` of shape `(num_slots, hidden_size)`, *optional*): from the dataset.
        target_media (`dict`): pixels and grids to encode into targets.
    """

    name: str
    seed: int
    input_ids: list[int]
    labels: list[int]
    mm_token_type_ids: list[int]
    media: dict[str, torch.Tensor]
    targets: torch.Tensor | None = None
    target_media: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class StormsCollator:
    """Makes the batches of every stage, and prompts for generation; all label masking happens here.

    A row of the dataset contract, or any row with `question`, `answer` and a video, becomes
    `[visual context][question]<|latent_start|><|latent_pad|>*K<|latent_end|>[answer]<|im_end|>`, labelled from
    `<|latent_start|>` on except for the slots. A conversational row (`messages`, perhaps `images`) gets no block;
    its assistant turns are labelled. In Stage II a row may say its own number of slots in a column `latent_size`.

    Args:
        processor (`StormsProcessor`): the checkpoint's; its `num_frames` and pixel limits are used.
        stage (`str`): `"align"` or `"sft"` (no blocks), `"stage1"` (blocks and targets) or `"stage2"` (blocks).
        latent_size (`int`, *optional*): K; None for one slot a token of the target.
        visual_context (`str`): `"keyframes"`, `"video"` or `"both"`.
        video_root (`str`, *optional*): folder of the rows' `video_path`.
        max_length (`int`, *optional*): a longer row is an error.
        padding_side (`str`): `"left"` or `"right"`.
        target_source (`str`): `"thought_video"`, `"keyframes"` or `"self_distilled"`, the row's own video.
        num_target_frames (`int`): frames sampled from a video for targets.
        cache (`dict`, *optional*): keeps every row's `Example` in memory, by a hash of the row.

    Raises:
        RowError: by the call, if a row's texts can't be trained on, it lacks what its stage needs, its targets have
            another K, or it is longer than `max_length`: it is never cut, as that would go through visual tokens or
            the block.
    """

    processor: StormsProcessor
    stage: str = "stage2"
    latent_size: int | None = 8
    visual_context: str = "video"
    video_root: str | None = None
    max_length: int | None = None
    padding_side: str = "left"
    target_source: str = "thought_video"
    num_target_frames: int = 16
    cache: dict[bytes, Example] | None = None

    def __post_init__(self):
        self.tokenizer = self.processor.tokenizer
        self.start_id, self.pad_id, self.end_id = self.tokenizer.convert_tokens_to_ids(list(LATENT_TOKENS))

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        return self.collate([self.encode(row) for row in rows])

    def encode(self, row: Mapping[str, Any]) -> Example:
        """One row, as it is trained on."""
        name = row_name(row)
        key = b"" if self.cache is None else _digest(row)
        if self.cache is not None and key in self.cache:
            return self.cache[key]
        check_texts(row)
        example = self._conversation(row, name) if row.get("messages") else self._question(row, name)
        if self.max_length is not None and len(example.input_ids) > self.max_length:
            raise RowError(
                f"Row {name!r} has {len(example.input_ids)} tokens, but max_length is {self.max_length}. Nothing is "
                "cut: give fewer --num_frames or --max_frame_pixels, raise --max_length, or leave the row out."
            )
        if self.cache is not None:
            self.cache[key] = example
        return example

    def prompts(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The rows' prompts as `generate` takes them, padded on the left: nothing of a block or an answer."""
        examples = []
        for row in rows:
            name = row_name(row)
            _check_question(row, name)
            ids, types, media = self._process(*self._prompt(row, name))
            examples.append(Example(name, 0, ids, [IGNORED] * len(ids), types, media))
        batch = self._pad(examples, "left")
        return {name: value for name, value in batch.items() if name not in ("labels", "row_seeds")}

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Pad and stack.

        Returns:
            `dict` of what `forward` takes, `row_seeds` `(batch,)`, a number that depends on the row alone, and for
            Stage I either `latent_targets` `(batch, K, hidden_size)` or the media to encode: `target_pixel_values`,
            `target_grid_thw` and `target_media_per_row` `(batch,)`.
        """
        batch = self._pad(examples, self.padding_side)
        return batch | self._collate_targets(examples) if self.stage == "stage1" else batch

    def _pad(self, examples: Sequence[Example], side: str) -> dict[str, torch.Tensor]:
        length = max(len(example.input_ids) for example in examples)

        def pad(values: list[int], fill: int) -> list[int]:
            room = [fill] * (length - len(values))
            return room + values if side == "left" else values + room

        batch = {
            "input_ids": torch.tensor([pad(one.input_ids, self.tokenizer.pad_token_id) for one in examples]),
            "attention_mask": torch.tensor([pad([1] * len(one.input_ids), 0) for one in examples]),
            "labels": torch.tensor([pad(one.labels, IGNORED) for one in examples]),
            "mm_token_type_ids": torch.tensor([pad(one.mm_token_type_ids, 0) for one in examples]),
            "row_seeds": torch.tensor([one.seed for one in examples]),
        }
        for name in MEDIA:
            values = [one.media[name] for one in examples if name in one.media]
            if values:
                batch[name] = torch.cat(values)
        return batch

    def _collate_targets(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        stored = [one.targets for one in examples if one.targets is not None]
        if len(stored) == len(examples):
            return {"latent_targets": torch.nn.utils.rnn.pad_sequence(stored, batch_first=True)}
        if without := [one.name for one in examples if not one.target_media]:
            raise RowError(
                f"Rows {without} have no thought video to encode, or stored targets beside rows that have none. Stage "
                "I takes questions with a thought video only, and targets stored for all rows or for none."
            )
        return {
            "target_pixel_values": torch.cat([one.target_media["pixels"] for one in examples]),
            "target_grid_thw": torch.cat([one.target_media["grid_thw"] for one in examples]),
            "target_media_per_row": torch.tensor([len(one.target_media["grid_thw"]) for one in examples]),
        }

    # ------------------------------------------------------------------ one row

    def _question(self, row: Mapping[str, Any], name: str) -> Example:
        messages, images, videos = self._prompt(row, name)
        ids, types, media = self._process(messages, images, videos)
        # What stands after the prompt, as the chat template writes it; the newline after it is never generated.
        reply = [*messages, {"role": "assistant", "content": row["answer"].strip()}]
        before = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        after = self.processor.apply_chat_template(reply, tokenize=False)[len(before) :].rstrip("\n")
        answer_ids = self.tokenizer(after, add_special_tokens=False)["input_ids"]
        example = Example(name, self._seed(row), ids, [IGNORED] * len(ids), types, media)
        block: list[int] = []
        if self.stage == "stage1":
            num_slots = self._add_targets(example, row)
            block = [self.start_id, *[self.pad_id] * num_slots, self.end_id]
        elif self.stage == "stage2":
            own = row.get("latent_size") or self.latent_size
            num_slots = own or self._num_tokens(self.target_media(row)["grid_thw"])
            block = [self.start_id, *[self.pad_id] * num_slots, self.end_id]
        added = [*block, *answer_ids]
        example.input_ids = [*ids, *added]
        example.labels = [*example.labels, *(IGNORED if token_id == self.pad_id else token_id for token_id in added)]
        example.mm_token_type_ids = [*types, *[0] * len(added)]
        return example

    def _conversation(self, row: Mapping[str, Any], name: str) -> Example:
        # Structured parts come from a dataset with every key that any part has.
        messages = [
            {**message, "content": [{key: part[key] for key in part if part[key] is not None} for part in content]}
            if isinstance(content := message.get("content"), list)
            else message
            for message in row["messages"]
        ]
        images = [one for one in (*(row.get("images") or []), row.get("image")) if one is not None]
        try:
            messages = prepare_multimodal_messages(messages, images=images)
        except (ValueError, KeyError) as error:
            raise RowError(f"Row {name!r}: {error} Correct it, or leave the row out.") from error
        encoded = self.processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
        )
        ids = encoded["input_ids"][0].tolist()
        is_trained = torch.as_tensor(encoded["assistant_masks"]).reshape(-1).tolist()
        types = encoded["mm_token_type_ids"][0].tolist() if "mm_token_type_ids" in encoded else [0] * len(ids)
        labels = [token_id if trained else IGNORED for token_id, trained in zip(ids, is_trained)]
        media = {key: torch.as_tensor(encoded[key]) for key in MEDIA if key in encoded}
        return Example(name, self._seed(row), ids, labels, types, media)

    def _seed(self, row: Mapping[str, Any]) -> int:
        """A number that depends on the row alone, and not on how its targets are come by."""
        if row.get("id"):
            return zlib.crc32(row_name(row).encode())
        return zlib.crc32(_digest({name: row[name] for name in row if name not in TARGET_COLUMNS}))

    def _prompt(self, row: Mapping[str, Any], name: str) -> tuple[list[dict], list, list]:
        """Messages up to the answer, and the images and videos in them."""
        images, videos = [], []
        if self.visual_context in ("video", "both"):
            videos.append(self.open_video(row, name))
        if self.visual_context in ("keyframes", "both"):
            images = list(row.get("keyframes") or [])
            if not images:
                raise RowError(f"Row {name!r} has no keyframes. Use --visual_context video, or leave the row out.")
        content = [{"type": "video"} for _ in videos] + [{"type": "image"} for _ in images]
        content.append({"type": "text", "text": storms_prompt(row["question"], row.get("options") or [])})
        return [{"role": "user", "content": content}], images, videos

    def _process(self, messages, images, videos) -> tuple[list[int], list[int], dict[str, torch.Tensor]]:
        """Ids, token types and media of one prompt."""
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        options: dict[str, Any] = {"images": images} if images else {}
        if videos:
            frames, metadata = zip(*videos)
            options |= {"videos": list(frames), "video_metadata": list(metadata), "do_sample_frames": False}
        encoded = self.processor(text=[text], return_tensors="pt", **options)
        ids = encoded["input_ids"][0].tolist()
        types = encoded["mm_token_type_ids"][0].tolist()
        media = {key: torch.as_tensor(encoded[key]) for key in MEDIA if key in encoded}
        return ids, types, media

    def open_video(self, row: Mapping[str, Any], name: str) -> tuple[np.ndarray, VideoMetadata]:
        """Sampled frames of a row's video or of its segment, as the processor samples a file at inference."""
        video, root = row.get("video") or {}, row.get("video_root") or self.video_root
        path = row.get("video_path") or video.get("path")
        if video.get("bytes"):
            source: Any = video["bytes"]
        elif path and (root is not None or Path(path).is_absolute()):
            source = Path(root or "") / path
        else:
            raise RowError(
                f"Row {name!r} holds no video, and its video_path is {path!r} with --video_root {root}. Give "
                "--video_root, use --visual_context keyframes, or leave the row out."
            )
        return self._decode(source, name, None, row.get("video_start"), row.get("video_end"))

    def _decode(self, source, name, num_frames=None, start=None, end=None) -> tuple[np.ndarray, VideoMetadata]:
        sampler = self.processor.video_processor
        if num_frames is not None:
            options: dict[str, Any] = {"num_frames": num_frames}
        else:
            options = {"num_frames": sampler.num_frames} if sampler.fps is None else {"fps": sampler.fps}
        try:
            return read_clip(source, partial(sampler.sample_frames, name=name, **options), start, end)
        except ValueError as error:
            raise RowError(f"Row {name!r}: {error}") from error

    # ------------------------------------------------------------------ targets

    def _add_targets(self, example: Example, row: Mapping[str, Any]) -> int:
        """Put the dataset's targets, or the media to make them from, into the example; the number of slots."""
        if row.get("latent_size") is not None:
            raise RowError(
                f"Row {example.name!r} has a latent_size of its own, {row['latent_size']}, but Stage I pools every "
                "row's targets to --latent_size. Drop the column, or train on such rows in Stage II."
            )
        stored = row.get("latent_targets")
        if stored is not None:
            example.targets = torch.as_tensor(np.asarray(stored, dtype=np.float32))
            num_slots = len(example.targets)
            if self.latent_size not in (None, num_slots):
                raise RowError(
                    f"Row {example.name!r} has {num_slots} stored latent_targets, but latent_size is "
                    f"{self.latent_size}. Run `python -m recipes.cache_targets` with --latent_size {self.latent_size}."
                )
            return num_slots
        example.target_media = self.target_media(row)
        return self.latent_size or self._num_tokens(example.target_media["grid_thw"])

    def target_media(self, row: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Pixels and grids that the row's targets are made from.

        Returns:
            `dict` of `pixels` `(num_patches, patch_dim)` and `grid_thw` `(num_media, 3)`.

        Raises:
            RowError: if the row has no thought video (keyframes, video), or it does not decode.
        """
        name = row_name(row)
        if self.target_source == "keyframes":
            images = list(row.get("keyframes") or [])
            if not images:
                raise RowError(f"Row {name!r} has no keyframes for --target_source keyframes. Leave the row out.")
            encoded = self.processor.image_processor(images=images, return_tensors="pt")
            return {"pixels": encoded["pixel_values"], "grid_thw": encoded["image_grid_thw"]}
        if self.target_source == "self_distilled":
            frames, metadata = self.open_video(row, name)
        else:
            thought = row.get("thought_video")
            if thought is None or not thought.get("bytes"):
                raise RowError(
                    f"Row {name!r} has no thought video, which Stage I takes its targets from (and --latent_size null "
                    "the number of slots). Leave the row out, use --target_source keyframes or self_distilled, or "
                    "train it in Stage II."
                )
            frames, metadata = self._decode(thought["bytes"], name, self.num_target_frames)
        encoded = self.processor.video_processor(
            videos=[frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt"
        )
        return {"pixels": encoded["pixel_values_videos"], "grid_thw": encoded["video_grid_thw"]}

    def _num_tokens(self, grid_thw: torch.Tensor) -> int:
        return int(grid_thw.prod(-1).sum()) // self.processor.video_processor.merge_size**2
