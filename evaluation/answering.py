"""Many questions about videos, answered in batches; the questions about one video share its encoded prefix.

A prompt is `[system, video][question]`. The first part is the same for all questions about a video, so it runs once:
vision tower and language model alike. Its keys and values are then copied to one row a question.
"""

import copy
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    CompileConfig,
    DynamicCache,
    Qwen2_5_VLProcessor,
    StaticCache,
    StoppingCriteria,
)

from modeling_storms import StormsForConditionalGeneration, StormsProcessor, StormsVideoProcessor
from modeling_storms.temporal_storms import REDUCTIONS, TokenReducer

from .benchmarks.base import Question
from .clock import ModuleClock, PassTimes, StepTimes
from .protocols import Protocol, read_clip


MEDIA = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
STATIC_STEP = 256  # positions by which a static cache grows


def load_model(name: str, revision: str | None = None, dtype: str = "auto", attention: str | None = None) -> Any:
    """A STORMS or plain Qwen2.5-VL checkpoint and its processor, on the GPU if there is one.

    A plain checkpoint gets our video processor with its own settings: videos are decoded alike for both. Where it has
    pixel limits for images only, videos get the defaults, as in `python -m recipes.init_checkpoint`.

    Returns:
        `tuple` of the model in evaluation mode and the processor.

    Raises:
        ValueError: if it is another kind of model.
        OSError: if there is no such folder or repository.
    """
    kind = AutoConfig.from_pretrained(name, revision=revision).model_type
    if kind not in ("storms", "qwen2_5_vl"):
        raise ValueError(f"--model {name} is a {kind!r} model, expected a STORMS or Qwen2.5-VL checkpoint.")
    model_class = StormsForConditionalGeneration if kind == "storms" else AutoModelForImageTextToText
    model = model_class.from_pretrained(name, revision=revision, dtype=dtype, attn_implementation=attention).eval()
    if kind == "storms":
        processor: Any = StormsProcessor.from_pretrained(name, revision=revision)
    else:
        plain: Any = AutoProcessor.from_pretrained(name, revision=revision)
        settings = plain.video_processor.to_dict()
        settings.pop("video_processor_type", None)
        # The library takes a released repository's limits for images, 12.8 million pixels, for frames of videos.
        if settings["size"] == plain.image_processor.to_dict()["size"]:
            settings["size"] = dict(StormsVideoProcessor.size)
        settings |= {"do_sample_frames": True, "num_frames": None, "cap_pixels_per_frame": True}
        processor = Qwen2_5_VLProcessor(
            plain.image_processor, plain.tokenizer, StormsVideoProcessor(**settings), chat_template=plain.chat_template
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), processor


def checkpoint_stamp(name: str, model: Any) -> str | None:
    """What tells a checkpoint from another one under the same name: a commit, or a hash of a folder's files' times."""
    if not Path(name).is_dir():
        return getattr(model.config, "_commit_hash", None)
    kinds = (".safetensors", ".bin", ".json", ".jinja")
    files = [path for path in sorted(Path(name).iterdir()) if path.suffix in kinds]
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


@dataclass
class Clip:
    """A video as the model gets it, with the part of the prompt that stands before its end.

    Args:
        input_ids, mm_token_type_ids (`torch.Tensor` of shape `(length,)`): up to the video's last token.
        media (`dict`): pixels, grid `(1, 3)` and seconds a grid step.
        record (`dict`): what was really used: `num_frames`, `frame_times` in seconds, `frame_size`, `second_per_grid`,
            `num_video_tokens`, those that the language model gets.
        token_reduction (`torch.Tensor` of shape `(4,)`, *optional*): what the processor reduces them by, if it does.
    """

    input_ids: torch.Tensor
    mm_token_type_ids: torch.Tensor
    media: dict[str, torch.Tensor]
    record: dict[str, Any]
    token_reduction: torch.Tensor | None = None


def encode_clip(processor: Any, frames: np.ndarray, metadata: Any, size: Mapping[str, int], system: str = "") -> Clip:
    """The prompt up to the end of the video.

    Args:
        frames (`np.ndarray` of shape `(num_frames, height, width, 3)`): uint8 RGB.
        metadata (`VideoMetadata`): of the clip that they were sampled from.
        size (`Mapping`): the video processor's pixel limits.
        system (`str`): a system message; the chat template's own if empty.
    """
    text = _chat_text(processor, system, "")
    text = text[: text.index(processor.video_token) + len(processor.video_token)]
    encoded = processor(
        text=[text],
        videos=[frames],
        video_metadata=[metadata],
        do_sample_frames=False,
        size=dict(size),
        return_tensors="pt",
    )
    _, height, width = encoded["video_grid_thw"][0].tolist()
    patch_size = processor.video_processor.patch_size
    ids, types = encoded["input_ids"][0], encoded["mm_token_type_ids"][0]
    record = {
        "num_frames": len(frames),
        "frame_times": [round(float(seconds), 3) for seconds in metadata.timestamps],
        "frame_size": [height * patch_size, width * patch_size],
        "second_per_grid": float(encoded["second_per_grid_ts"][0]),
        "num_video_tokens": int((ids == processor.video_token_id).sum()),
    }
    media = {name: torch.as_tensor(encoded[name]) for name in MEDIA}
    return Clip(ids, types, media, record, encoded.get("token_reduction"))


def read_question_clip(processor: Any, question: Question, protocol: Protocol, system: str = "") -> Clip:
    """The clip of a question, as a protocol samples it.

    Raises:
        ValueError: if its video can't be read; `VideoDecodeError` for a broken file.
    """
    frames, metadata = read_clip(
        question.video, protocol.sample, question.start, question.end, question.video_fps or None
    )
    return encode_clip(processor, frames, metadata, protocol.frame_size(processor.video_processor.size), system)


def _chat_text(processor: Any, system: str, text: str) -> str:
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": text}]}]
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


@dataclass
class Reply:
    """What a model answered.

    Args:
        text (`str`): without special tokens.
        num_text_tokens (`int`): of the text; slots and markers are not counted.
        latent_length (`int`): slots.
        latent_stop_reason (`str`): of the last block, as `generate` names it.
        latent_states (`torch.Tensor` of shape `(num_slots, hidden_size)`): what was fed to the slots, on the CPU.
        first_logits (`torch.Tensor` of shape `(vocab_size,)`, *optional*): of the answer's first token, if asked for.
    """

    text: str
    num_text_tokens: int
    latent_length: int = 0
    latent_stop_reason: str = "none"
    latent_states: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    first_logits: torch.Tensor | None = None


@dataclass
class EncodedClips:
    """Clips whose prefixes went through the language model, as one batch, for any number of `answer` calls.

    Args:
        prefix (`dict`): ids, mask and token types, each `(num_clips, length)`, padded on the left.
        media (`dict`): what positions depend on, a row a clip.
        cache (`DynamicCache`): the prefixes' keys and values.
    """

    prefix: dict[str, torch.Tensor]
    media: dict[str, torch.Tensor]
    cache: DynamicCache


class Answerer:
    """Answers questions about clips by `generate`.

    Args:
        model: a STORMS or plain Qwen2.5-VL model in evaluation mode.
        processor: as `load_model` gives it.
        max_new_tokens (`int`): longest answer; the tokens of latent blocks are added to it.
        batch_size (`int`): questions at once.
        is_compiled (`bool`): decode by compiled steps (on NVIDIA GPUs captured as graphs). For many answers: the first
            ones wait for the compiler. If it fails, a warning tells, and they run uncompiled.
        options: of `generate`: `latent_mode`, `latent_size`, ..., and `temporal_pool`, `spatial_pool` and
            `temporal_sampling`, instead of the checkpoint's.

    Attributes:
        processor: with those reductions: clips for this answerer are to be encoded by it.
        reducer (`TokenReducer`): what happens to visual tokens, all told.
        clock (`ModuleClock`): of all that was asked.

    Raises:
        ValueError: if a latent option or a reduction is given for a model that has none of this, or is none.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        max_new_tokens: int = 32,
        batch_size: int = 8,
        is_compiled: bool = False,
        **options: Any,
    ):
        self.model, self.processor = model, processor
        self.is_compiled = is_compiled
        self.compile_config = CompileConfig() if model.device.type == "cuda" else CompileConfig(mode="default")
        self.compile_config._compile_all_devices = True  # transformers compiles on accelerators only, unless told
        self._static: StaticCache | None = None
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.is_latent = hasattr(model, "latent_tokens")
        self.reduction = {name: options.pop(name) for name in REDUCTIONS if name in options}
        ours = [name for name in (*options, *self.reduction) if name.startswith("latent_") or name in REDUCTIONS]
        if ours and not self.is_latent:
            raise ValueError(
                f"The model is a plain {type(model).__name__}, without a latent mode and token reduction, but "
                f"{', '.join(ours)} was given. Leave it out, or make a STORMS checkpoint with `python -m "
                "recipes.init_checkpoint`."
            )
        self.reducer = replace(model.model.reducer, **self.reduction) if self.is_latent else TokenReducer()
        if self.reduction:
            self.processor = copy.copy(processor)
            self.processor.video_processor = copy.copy(processor.video_processor)
            for name, number in self.reduction.items():
                setattr(self.processor.video_processor, name, number)
        self.options = options
        self.num_video_tokens = 0  # that went through the language model so far
        self.clock = ModuleClock(model)

    def latent_options(self, **options: Any) -> dict[str, Any]:
        """The latent mode in force: options given, else the checkpoint's defaults; empty for a plain model."""
        if not self.is_latent:
            return {}
        config, options = self.model.generation_config, self.options | options
        defaults = {"latent_mode": "auto", "latent_size": self.model.config.latent_size, "latent_stop": "budget"}
        defaults |= {"max_latent_blocks": 1, "latent_bottleneck": False}
        found = {name: getattr(config, name, None) for name in defaults}
        found = defaults | {name: value for name, value in found.items() if value is not None}
        found |= {name: value for name, value in options.items() if name in defaults and value is not None}
        return {"latent_mode": "off"} if found["latent_mode"] == "off" else found

    @torch.no_grad()
    def encode(self, clips: Sequence[Clip]) -> EncodedClips:
        """Run the clips' prefixes as one batch, to be answered about more than once.

        Raises:
            ValueError: if a clip was encoded for another token reduction than this answerer's.
        """
        prefix = self._pad([one.input_ids for one in clips], [one.mm_token_type_ids for one in clips])
        media = {name: torch.cat([one.media[name] for one in clips]).to(self.model.device) for name in MEDIA}
        with self._reduced(), self.clock.running() as passes:
            for one in clips:
                if one.token_reduction is not None:
                    self.model.model.check_reduction(one.token_reduction)
            cache = self._run_prefix(prefix, media)
        self.clock.add_steps(passes.seconds)
        self.num_video_tokens += sum(one.record["num_video_tokens"] for one in clips)
        return EncodedClips(prefix, {name: media[name] for name in MEDIA if name != "pixel_values_videos"}, cache)

    @torch.no_grad()
    def answer(
        self,
        clips: Sequence[Clip] | EncodedClips,
        texts: Sequence[Sequence[str]],
        keep_logits: bool = False,
        **options: Any,
    ) -> list[list[Reply]]:
        """Answer all questions about some clips.

        Args:
            clips (`Sequence[Clip]` or `EncodedClips`): their prefixes run as one batch, or have done so.
            texts (`Sequence[Sequence[str]]`): for each clip, its questions' prompt texts. They run in batches of
                `batch_size`, all clips' together.
            keep_logits (`bool`): fill in `Reply.first_logits`.
            options: of `generate`, over those given at construction; reductions can't be changed here, where prefixes
                may be encoded already.

        Returns:
            For each clip, its questions' replies.
        """
        assert not options.keys() & set(REDUCTIONS), "reductions are given at construction"
        encoded = clips if isinstance(clips, EncodedClips) else self.encode(clips)
        rows = [(clip, self._suffix(text)) for clip, given in enumerate(texts) for text in given]
        replies: list[list[Reply]] = [[] for _ in texts]
        for begin in range(0, len(rows), self.batch_size):
            batch = rows[begin : begin + self.batch_size]
            with self._reduced():
                try:
                    answered = self._answer_rows(encoded, batch, keep_logits, self.options | options)
                except torch._dynamo.exc.TorchDynamoException as error:
                    warnings.warn(f"Steps can't be compiled here, and are run as they are: {error}", stacklevel=2)
                    self.is_compiled, self._static = False, None
                    answered = self._answer_rows(encoded, batch, keep_logits, self.options | options)
            for (clip, _), reply in zip(batch, answered):
                replies[clip].append(reply)
        return replies

    @torch.no_grad()
    def question_states(self, clips: EncodedClips, texts: Sequence[Sequence[str]]) -> list[torch.Tensor]:
        """What the model makes of each question's text, in sight of the video and without a latent block.

        Returns:
            For each clip `(num_questions, hidden_size)`, float32 on the CPU: mean of the last layer's post-norm states
            over the positions after the video.
        """
        rows = [(clip, self._suffix(text)) for clip, given in enumerate(texts) for text in given]
        used = torch.tensor([clip for clip, _ in rows], device=self.model.device)
        suffix = self._pad([ids for _, ids in rows], [torch.zeros_like(ids) for _, ids in rows])
        inputs = {name: torch.cat([value[used], suffix[name]], dim=1) for name, value in clips.prefix.items()}
        with self._reduced():
            positions = self._positions(inputs, {name: value[used] for name, value in clips.media.items()})
        states = self.model.model(
            input_ids=suffix["input_ids"],
            attention_mask=inputs["attention_mask"],
            position_ids=positions[..., -suffix["input_ids"].shape[1] :],
            past_key_values=_rows_of(clips.cache, used),
            use_cache=True,
        ).last_hidden_state.float()
        kept = suffix["attention_mask"][..., None]
        means = ((states * kept).sum(1) / kept.sum(1)).cpu()
        return list(means.split([len(given) for given in texts]))

    def _reduced(self) -> AbstractContextManager[None]:
        return self.model.reduced_by(**self.reduction) if self.reduction else nullcontext()

    def _suffix(self, text: str) -> torch.Tensor:
        """Ids of what follows the video's last token."""
        whole = _chat_text(self.processor, "", text)
        after = whole[whole.index(self.processor.video_token) + len(self.processor.video_token) :]
        return torch.tensor(self.processor.tokenizer(after, add_special_tokens=False)["input_ids"])

    def _pad(self, ids: Sequence[torch.Tensor], types: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        fill, device = self.processor.tokenizer.pad_token_id, self.model.device

        def pad(values: Sequence[torch.Tensor], value: int) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence(list(values), True, value, padding_side="left").to(device)

        return {
            "input_ids": pad(ids, fill),
            "attention_mask": pad([torch.ones_like(one) for one in ids], 0),
            "mm_token_type_ids": pad(types, 0),
        }

    def _positions(self, inputs: Mapping[str, torch.Tensor], media: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Text and M-RoPE positions `(4, batch, length)`, as `generate` would make them."""
        mask = inputs["attention_mask"]
        text = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
        vision, deltas = self.model.model.get_rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            video_grid_thw=media["video_grid_thw"],
            second_per_grid_ts=media["second_per_grid_ts"],
            attention_mask=mask,
        )
        self.model.model.rope_deltas = deltas
        return torch.cat([text[None], vision])

    def _run_prefix(self, prefix: Mapping[str, torch.Tensor], media: Mapping[str, torch.Tensor]) -> DynamicCache:
        cache = DynamicCache(config=self.model.config)
        self.model.model(
            input_ids=prefix["input_ids"],
            attention_mask=prefix["attention_mask"],
            position_ids=self._positions(prefix, media),
            pixel_values_videos=media["pixel_values_videos"],
            video_grid_thw=media["video_grid_thw"],
            past_key_values=cache,
            use_cache=True,
        )
        return cache

    def _answer_rows(
        self,
        clips: EncodedClips,
        batch: Sequence[tuple[int, torch.Tensor]],
        keep_logits: bool,
        options: dict[str, Any],
    ) -> list[Reply]:
        """Replies to pairs of a clip's index and a question's ids."""
        rows = list(batch)
        if self.is_compiled:  # the last row again, up to a power of two: each number of rows is compiled once
            rows += rows[-1:] * ((1 << (len(rows) - 1).bit_length()) - len(rows))
        used = torch.tensor([clip for clip, _ in rows], device=self.model.device)
        # `[room][prefix][room][question]`: keys of the prefix stand where they were computed.
        suffix = self._pad([ids for _, ids in rows], [torch.zeros_like(ids) for _, ids in rows])
        inputs = {name: torch.cat([value[used], suffix[name]], dim=1) for name, value in clips.prefix.items()}
        length = inputs["input_ids"].shape[1]
        stop: list[StoppingCriteria] = []
        room = 0
        latent = self.latent_options(**options)
        if "latent_size" in latent:
            room = latent["max_latent_blocks"] * (latent["latent_size"] + 2)
            ids = self.processor.latent_token_ids
            stop = [_TextBudget(length, self.max_new_tokens, torch.tensor(ids, device=self.model.device))]
        # A growing cache would be copied whole at each step.
        cache = self._static_rows(clips.cache, used, length + self.max_new_tokens + room)
        if self.is_compiled:
            options = {"compile_config": self.compile_config, **options}
            timed: AbstractContextManager[StepTimes | PassTimes] = nullcontext(StepTimes(self.clock.now))
        else:
            options = {"disable_compile": True, **options}
            timed = self.clock.running()
        with timed as steps:
            out = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                position_ids=self._positions(inputs, {name: value[used] for name, value in clips.media.items()}),
                past_key_values=cache,
                max_new_tokens=self.max_new_tokens + room,
                stopping_criteria=[*stop, steps],
                output_logits=keep_logits,
                return_dict_in_generate=True,
                # Released checkpoints have a repetition penalty, which would count the letters of the options as said,
                # and a batch's padding with them.
                **{"do_sample": False, "repetition_penalty": 1.0, **options},
            )
        new_ids = out.sequences[:, length:]
        self.clock.add_steps(steps.seconds, new_ids)
        texts = self.processor.batch_decode(new_ids, skip_special_tokens=True)
        latent_ids = self.processor.latent_token_ids if self.is_latent else []
        no_text = torch.tensor([*self.processor.tokenizer.all_special_ids, *latent_ids], device=new_ids.device)
        counts = (~torch.isin(new_ids, no_text)).sum(1).tolist()
        replies = [Reply(text, count) for text, count in zip(texts, counts)]
        if self.is_latent:
            for reply, states, reason in zip(replies, out.latent_states, out.latent_stop_reasons):
                reply.latent_length, reply.latent_stop_reason = len(states), reason
                reply.latent_states = states.float().cpu()
        if keep_logits:
            is_text = ~torch.isin(new_ids, torch.tensor(latent_ids, device=new_ids.device))
            for row, (reply, step) in enumerate(zip(replies, is_text.int().argmax(1).tolist())):
                reply.first_logits = out.logits[step][row].float().cpu()
        return replies[: len(batch)]

    def _static_rows(self, cache: DynamicCache, rows: torch.Tensor, length: int) -> StaticCache:
        """Like `_rows_of`, with room for `length` positions. A captured graph knows its cache by the address: the last
        batch's is used again where it has the right size."""
        length = -(-length // STATIC_STEP) * STATIC_STEP
        static = self._static
        if static is None or (static.layers[0].batch_size, static.layers[0].max_cache_len) != (len(rows), length):
            self._static = static = StaticCache(config=self.model.config.get_text_config(), max_cache_len=length)
        static.reset()
        for index, layer in enumerate(cache.layers):
            static.update(layer.keys[rows], layer.values[rows], index)
        return static


class _TextBudget(StoppingCriteria):
    """Ends an answer after as many tokens of text, whether there was a block before it or not."""

    def __init__(self, prompt_length: int, num_text_tokens: int, latent_token_ids: torch.Tensor):
        self.prompt_length, self.num_text_tokens = prompt_length, num_text_tokens
        self.latent_token_ids = latent_token_ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        is_text = ~torch.isin(input_ids[:, self.prompt_length :], self.latent_token_ids)
        return is_text.sum(1) >= self.num_text_tokens


def _rows_of(cache: DynamicCache, rows: torch.Tensor) -> DynamicCache:
    """A cache of its own with some rows of another, each as often as it is named."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(rows)
    return chosen
