# Copyright 2026 The STORMS team. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The latent mode: a bounded block of hidden states instead of text, in `generate` and in training.

The vector that occupies slot k is the last-layer, post-norm hidden state of the position before it: slot 1 is fed the
state at `<|latent_start|>`, slot k + 1 the state at slot k. A slot's visible id is `<|latent_pad|>`. M-RoPE positions
and the cache advance by one per slot, as for a text token. Which rows are inside a block is read from the ids alone,
so rows of one batch may open, run and close blocks at different steps.

`LatentReasoningMixin` goes in front of any transformers vision-language model that keeps its backbone in `self.model`
and its output head in `self.lm_head`, and whose config names the three latent ids; it knows no backbone by name.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, GenerationConfig, LogitsProcessorList
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput, can_return_tuple


# What the mixin is mixed into: a transformers model with `GenerationMixin`.
Backbone: Any = object

LATENT_MODES = ("auto", "force", "off")
LATENT_STOPS = ("budget", "token")
LATENT_SOLVERS = ("sequential", "jacobi")
LATENT_INPUTS = ("rollout", "teacher_forced", "embedding")
STOP_SUPERVISIONS = ("none", "not_end", "pad")

# Inputs that only serve to compute M-RoPE positions.
POSITIONAL = ("mm_token_type_ids", "second_per_grid_ts")

LatentIntervention = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(init=False)
class StormsOutput(ModelOutput):
    """What `forward` returns.

    Args:
        loss (`torch.Tensor` of shape `()`): `lm_loss + latent_loss_weight * latent_loss + stop_loss`, those present.
        lm_loss (`torch.Tensor` of shape `()`): cross-entropy, mean over labelled tokens.
        latent_loss (`torch.Tensor` of shape `()`): squared error between states and targets, mean over slots and
            hidden dimensions, in at least float32.
        stop_loss (`torch.Tensor` of shape `()`): loss of the stay-or-end decision, mean over slots.
        logits (`torch.Tensor` of shape `(batch, num_logits, vocab_size)`): with a mask as `logits_to_keep`,
            `(1, num_kept, vocab_size)`, the rows' positions one after another.
        latent_states (`torch.Tensor` of shape `(batch, max_slots, hidden_size)`): the vector each slot should hold,
            in order, zero after a row's last slot; None where the batch has no slot.
        latent_mask (`torch.BoolTensor` of shape `(batch, max_slots)`): which of them exist.
        past_key_values (`Cache`, *optional*): None after a rollout, whose cache is laid out for training.
        hidden_states, attentions (`tuple`, *optional*): as in transformers; not available from a rollout.
        latent_feedback (`torch.Tensor` of shape `(batch, num_fed, hidden_size)`): post-norm states of the last
            positions, as many as the `latent_feedback` that was given, else one: what `generate` feeds to the next
            slots.
    """

    loss: torch.Tensor | None = None
    lm_loss: torch.Tensor | None = None
    latent_loss: torch.Tensor | None = None
    stop_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    latent_states: torch.Tensor | None = None
    latent_mask: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    latent_feedback: torch.Tensor | None = None

    def __init__(self, *values: Any, **given: Any):
        # One output a decoding step: the generated __init__ sets and checks every field, at a hundredth of the step
        # of a small model. Fields left out are None by their class's default. As with any ModelOutput, values may
        # also come in order (pickle) or as one mapping (accelerate).
        if len(values) == 1 and isinstance(values[0], Mapping):
            given = {**values[0], **given}
        elif values:
            given = {**dict(zip(self.__dataclass_fields__, values)), **given}
        if unknown := given.keys() - self.__dataclass_fields__.keys():
            raise TypeError(f"StormsOutput got {sorted(unknown)}, but has {list(self.__dataclass_fields__)}.")
        for name in self.__dataclass_fields__:
            if (value := given.get(name)) is not None:
                self[name] = value


@dataclass
class StormsGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with `return_dict_in_generate=True`; everything of `GenerateDecoderOnlyOutput`, and:

    Args:
        latent_states (`list[torch.Tensor]`): per row, `(num_slots, hidden_size)`, the vectors fed to its slots, blocks
            concatenated; as `latent_intervention` left them, where there is one.
        latent_lengths (`torch.LongTensor` of shape `(batch,)`): slots per row, all blocks together.
        latent_stop_reasons (`list[str]`): how each row's last block ended. `"token"`: the model chose
            `<|latent_end|>`; `"budget"`: forced after `latent_size` slots; `"length"`: generation stopped inside the
            block; `"none"`: no block was opened.
    """

    latent_states: list[torch.Tensor] | None = None
    latent_lengths: torch.Tensor | None = None
    latent_stop_reasons: list[str] | None = None


@dataclass
class LatentOptions:
    """The latent mode of one `generate` call; see `LatentReasoningMixin.generate`.

    Raises:
        ValueError: if an option has a value that means nothing, or two contradict each other.
    """

    latent_mode: str = "auto"
    latent_size: int = 8
    latent_stop: str = "budget"
    max_latent_blocks: int = 1
    latent_bottleneck: bool = False
    latent_solver: str = "sequential"
    jacobi_iterations: int = 3

    def __post_init__(self):
        for name, value, allowed in (
            ("latent_mode", self.latent_mode, LATENT_MODES),
            ("latent_stop", self.latent_stop, LATENT_STOPS),
            ("latent_bottleneck", self.latent_bottleneck, (False, True)),
            ("latent_solver", self.latent_solver, LATENT_SOLVERS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(map(repr, allowed))}.")
        for name in ("latent_size", "max_latent_blocks", "jacobi_iterations"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                instead = "latent_solver='sequential'" if name == "jacobi_iterations" else "latent_mode='off'"
                raise ValueError(f"{name} is {value!r}, but must be an integer of at least 1. Use {instead} for none.")
        if self.latent_bottleneck and self.latent_mode == "off":
            raise ValueError(
                "latent_bottleneck=True with latent_mode='off' would answer without seeing the video at all: under "
                "the bottleneck only the slots carry it. Turn one of the two off."
            )
        if self.latent_solver == "jacobi" and self.latent_stop != "budget" and self.latent_mode != "off":
            raise ValueError(
                f"latent_solver='jacobi' with latent_stop={self.latent_stop!r} would fill slots before it is known "
                "whether they exist. Use latent_stop='budget', or latent_solver='sequential'."
            )


@dataclass
class LatentTokens:
    """The three vocabulary ids of the latent mode."""

    start: int
    pad: int
    end: int

    def isin(self, input_ids: torch.Tensor) -> torch.Tensor:
        return (input_ids == self.start) | (input_ids == self.pad) | (input_ids == self.end)


def bottleneck_overlay(blind: torch.Tensor, concealed: torch.Tensor) -> Callable:
    """Mask function of the latent bottleneck, to be laid over the causal mask.

    Args:
        blind (`torch.BoolTensor` of shape `(batch, num_keys)`): positions that, as queries, are kept from the video:
            everything but visual tokens, `<|latent_start|>` and slots.
        concealed (`torch.BoolTensor` of shape `(batch, num_keys)`): positions that, as keys, blind queries can't see:
            visual tokens and `<|latent_start|>`, which has seen them.
    """

    def overlay(batch_idx, head_idx, q_idx, kv_idx):
        return ~(blind[batch_idx, q_idx] & concealed[batch_idx, kv_idx])

    return overlay


class LatentRun:
    """What one `generate` call must remember between steps: the state to feed next, and the states fed so far.

    A step is a call of the model; `step` counts the new ids there are before it. What the host must know of the rows
    it reads once from the prompt, and at later steps only where a Jacobi solve may have to begin.

    Ids that no row has a choice about can run ahead of their step, together with what comes before them. The steps
    that then follow have nothing left to run.
    """

    def __init__(self, options: LatentOptions, tokens: LatentTokens, intervention: LatentIntervention | None):
        self.options = options
        self.tokens = tokens
        self.intervention = intervention
        self.generation_config: Any = None
        self.prompt_length = 0
        self.max_slots = 0
        self.may_skip_head = False
        self.may_run_ahead = False
        self.first_slot_steps: list[int | None] = []  # the step that feeds each row's first slot, where that is known
        self.common_step: int | None = None  # that of all rows, where it is known and their blocks end together
        self.num_opened: list[int] = []  # blocks that each row has opened, or surely will
        self.cache: Cache | None = None  # once a step has run ahead of the ids
        self.num_filled = 0  # columns that the cache then holds beyond the ids
        self.is_end_filled = False  # whether the last of them is `<|latent_end|>`
        self.logits_ahead: torch.Tensor | None = None  # (B, vocab_size), what was found there
        self.feedback: torch.Tensor | None = None  # (B, 1, H), state of the last position
        self.solved: torch.Tensor | None = None  # (B, latent_size, H), what a Jacobi solve found for each row's block
        self.recorded: torch.Tensor | None = None  # (B, max_slots, H)
        self.recorded_length = 0  # sequence length at the last record

    def begin(self, prompt_length: int, generation_config: GenerationConfig, may_skip_head: bool) -> None:
        self.prompt_length = prompt_length
        self.generation_config = generation_config
        self.may_skip_head = may_skip_head
        new_ids = generation_config.max_length - prompt_length
        self.max_slots = min(self.options.latent_size * self.options.max_latent_blocks, new_ids)

    def read_prompt(self, input_ids: torch.Tensor) -> None:
        is_open = (input_ids[:, -1:] == self.tokens.start).any(1).tolist()
        closed = 2 if self.options.latent_mode == "force" else None
        self.first_slot_steps = [1 if row else closed for row in is_open]
        self.num_opened = [int(step is not None) for step in self.first_slot_steps]
        if self.options.latent_stop == "budget" and len(set(self.first_slot_steps)) == 1:
            self.common_step = self.first_slot_steps[0]

    def num_since_start(self, step: int) -> int | None:
        """Ids since `<|latent_start|>`, -1 before it, where the host knows that of all rows without asking: up to the
        end of their first block, and beyond if there can't be a second one."""
        since = None if self.common_step is None else step - self.common_step + 1
        is_over = since is not None and since > self.options.latent_size
        return None if is_over and self.options.max_latent_blocks > 1 else since

    def step(self, input_ids: torch.Tensor) -> int:
        return input_ids.shape[1] - self.prompt_length

    def is_outcome_fixed(self, step: int) -> bool:
        """Whether no row has a choice after a step, as far as the host knows: logits would not be looked at."""
        known = [first for first in self.first_slot_steps if first is not None]
        if self.options.latent_stop != "budget" or len(known) < len(self.first_slot_steps):
            return False
        return step < min(known) + self.options.latent_size

    def may_run_start(self, room: int) -> bool:
        """Whether all rows open a block after the prompt, with room for more than its start."""
        is_whole = self.generation_config.prefill_chunk_size is None
        return self.may_run_ahead and self.num_since_start(0) == -1 and is_whole and room > 1

    def may_run_end(self, step: int, room: int) -> bool:
        """Whether all rows' blocks end after a step, with room for more than their end."""
        return self.may_run_ahead and self.num_since_start(step) == self.options.latent_size and room > 1

    def begins_block(self, input_ids: torch.Tensor) -> list[bool]:
        """For each row, whether its last id is a block's first slot; reads the ids only if that is not known."""
        step = self.step(input_ids)
        begins = [step == first for first in self.first_slot_steps]
        if min(self.num_opened) < self.options.max_latent_blocks and input_ids.shape[1] > 1:
            found = (input_ids[:, -2] == self.tokens.start) & (input_ids[:, -1] == self.tokens.pad)
            begins, known = found.tolist(), begins
            self.num_opened = [n + (new and not old) for n, new, old in zip(self.num_opened, begins, known)]
        return begins

    def num_trailing_slots(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Slots of the block each row is inside of, `(batch,)`."""
        tail = input_ids[:, -(self.options.latent_size + 1) :]
        return (tail.flip(1) == self.tokens.pad).int().cumprod(1).sum(1)

    def num_blocks(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Blocks each row has opened, one that the prompt left open included, `(batch,)`."""
        return (input_ids[:, max(self.prompt_length - 1, 0) :] == self.tokens.start).sum(1)

    def next_feedback(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The vector to feed if a row's last id is a slot, `(batch, 1, hidden_size)`; noted down once per step."""
        assert self.feedback is not None
        if input_ids.shape[1] == self.recorded_length:
            return self.feedback
        self.recorded_length = input_ids.shape[1]
        states = self.feedback[:, 0]
        if self.recorded is None:
            self.recorded = states.new_zeros(states.shape[0], self.max_slots, states.shape[1])
        since = self.num_since_start(self.step(input_ids))
        if since is not None and self.intervention is None:
            if 0 < since <= self.options.latent_size:
                if self.solved is not None and since > 1:
                    self.feedback = self.solved[:, since - 1 : since]
                self.recorded[:, since - 1] = self.feedback[:, 0]
            return self.feedback
        input_ids = input_ids.to(states.device)
        if self.solved is not None:
            num_slots = self.num_trailing_slots(input_ids)[:, None]
            solved = self.solved.gather(1, (num_slots - 1).clamp(min=0)[..., None].expand(-1, -1, states.shape[1]))
            states = torch.where(num_slots > 1, solved[:, 0], states)  # a first slot's state is the feedback itself
        is_slot = input_ids[:, -1] == self.tokens.pad
        if self.intervention is not None:
            states = self._intervene(self.intervention, states, is_slot, self.num_trailing_slots(input_ids) - 1)
        slot_idx = (input_ids[:, self.prompt_length :] == self.tokens.pad).sum(1) - 1
        slot_idx = slot_idx.clamp(min=0)[:, None, None].expand(-1, 1, states.shape[1])
        kept = torch.where(is_slot[:, None, None], states[:, None], self.recorded.gather(1, slot_idx))
        self.recorded.scatter_(1, slot_idx, kept)
        self.feedback = states[:, None]
        return self.feedback

    @staticmethod
    def _intervene(intervention, states, is_slot, slot_index):
        rows = is_slot.nonzero()[:, 0]
        if len(rows) == 0:
            return states
        replaced = intervention(states[rows], slot_index[rows])
        if not isinstance(replaced, torch.Tensor) or replaced.shape != states[rows].shape:
            seen = tuple(replaced.shape) if isinstance(replaced, torch.Tensor) else type(replaced).__name__
            raise ValueError(
                f"latent_intervention returned {seen}, but must return states of the shape it was given, "
                f"{tuple(states[rows].shape)}."
            )
        return states.index_copy(0, rows, replaced.to(states))

    def finish(self, sequences: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor, list[str]]:
        """States, lengths and stop reasons of the finished sequences, `(batch, prompt + new)`."""
        if self.feedback is not None and self.recorded_length < sequences.shape[1]:
            self.next_feedback(sequences)  # a slot chosen at the last step was never fed, but is one
        lengths = (sequences[:, self.prompt_length :] == self.tokens.pad).sum(1)
        assert self.recorded is not None
        states = [row[:length].clone() for row, length in zip(self.recorded, lengths.tolist())]
        new_ids = sequences[:, max(self.prompt_length - 1, 0) :].tolist()
        return states, lengths, [self._stop_reason(ids) for ids in new_ids]

    def _stop_reason(self, ids: list[int]) -> str:
        if self.tokens.start not in ids:
            return "none"
        block = ids[len(ids) - ids[::-1].index(self.tokens.start) :]
        num_slots = next((i for i, token in enumerate(block) if token != self.tokens.pad), len(block))
        if num_slots == len(block) or block[num_slots] != self.tokens.end:
            return "length"
        return "budget" if num_slots == self.options.latent_size else "token"


class LatentProcessorList(LogitsProcessorList):
    """`generate`'s list of logits processors, applied to the text alone and followed by the rules of the latent mode.

    Args:
        processors (`LogitsProcessorList`): what `generate` would have applied.
        run (`LatentRun`): the options and ids.
        do_sample (`bool`): inside a block with `latent_stop="token"`, whether ending is drawn or is the argmax.
        fill_token_id (`int`): stands in for a latent id where a row holds no text at all.
        sees_all (`bool`): whether processors are called at every step, also where its outcome is fixed.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        run: LatentRun,
        do_sample: bool,
        fill_token_id: int,
        sees_all: bool,
    ):
        super().__init__(processors)
        self.run = run
        self.sees_all = sees_all
        self.do_sample = do_sample
        self.fill_token_id = fill_token_id
        self.latent_ids: torch.Tensor | None = None
        self.text: torch.Tensor | None = None  # once blocks are over: the last step's text

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        run, tokens = self.run, self.run.tokens
        if run.logits_ahead is not None and run.num_filled == 0:  # those of the end, which ran before its step
            scores, run.logits_ahead = run.logits_ahead.to(scores), None
        since = run.num_since_start(run.step(input_ids))
        if since is not None and not self.sees_all:
            return self._known(input_ids, scores, since, **kwargs)
        # 1. Where each row stands, from its ids.
        num_slots = run.num_trailing_slots(input_ids)
        is_open = (num_slots > 0) | (input_ids[:, -1:] == tokens.start).any(1)  # no ids yet after inputs_embeds
        may_open = run.num_blocks(input_ids) < run.options.max_latent_blocks
        # 2. Outside a block no slot or end, and no start beyond the allowed blocks; suppressed before the other
        #    processors, so that top-k and top-p choose among what can be emitted, and once more after them.
        forbidden = torch.stack([~may_open & ~is_open, ~is_open, ~is_open], dim=1)
        scores = self._suppress(scores, forbidden)
        if self:
            scores = self._suppress(super().__call__(self._text_only(input_ids), scores, **kwargs), forbidden)
        # 3. Inside a block only stay or end.
        end = num_slots == run.options.latent_size
        if run.options.latent_stop == "token" and not self.do_sample:
            end = end | (scores.argmax(-1) == tokens.end)
        ruled = torch.full_like(scores, -math.inf)
        if run.options.latent_stop == "token" and self.do_sample:
            log_p_end = torch.where(end, 0.0, scores.log_softmax(-1)[:, tokens.end])
            ruled[:, tokens.end] = log_p_end
            ruled[:, tokens.pad] = torch.log1p(-log_p_end.exp())
        else:
            ruled[:, tokens.end] = torch.where(end, 0.0, -math.inf)
            ruled[:, tokens.pad] = torch.where(end, -math.inf, 0.0)
        scores = torch.where(is_open[:, None], ruled, scores)
        # 4. The first new token of a forced block.
        if run.options.latent_mode == "force" and input_ids.shape[1] == run.prompt_length:
            opening = torch.full_like(scores, -math.inf)
            opening[:, tokens.start] = 0.0
            scores = torch.where(is_open[:, None], scores, opening)
        return scores

    def _known(self, input_ids: torch.Tensor, scores: torch.Tensor, since: int, **kwargs: Any) -> torch.Tensor:
        """The same where the host knows that all rows are `since` ids behind `<|latent_start|>`, by fewer operations:
        what has one outcome is not computed, and text is text for good."""
        tokens, size = self.run.tokens, self.run.options.latent_size
        if since <= size:
            ruled = torch.full_like(scores, -math.inf)
            ruled[:, tokens.start if since < 0 else tokens.pad if since < size else tokens.end] = 0.0
            return ruled
        if self.latent_ids is None:
            self.latent_ids = torch.tensor([tokens.start, tokens.pad, tokens.end], device=scores.device)
        scores = scores.index_fill(1, self.latent_ids, -math.inf)
        if self:
            if self.text is not None and self.text.shape[1] == input_ids.shape[1] - 1:
                self.text = torch.cat([self.text, input_ids[:, -1:]], dim=1)
            else:
                self.text = self._text_only(input_ids)
            scores = super().__call__(self.text, scores, **kwargs)
            scores = scores.index_fill(1, self.latent_ids, -math.inf)
        return scores

    def _suppress(self, scores: torch.Tensor, forbidden: torch.Tensor) -> torch.Tensor:
        tokens = self.run.tokens
        scores = scores.clone()
        for column, token_id in enumerate((tokens.start, tokens.pad, tokens.end)):
            scores[:, token_id] = scores[:, token_id].masked_fill(forbidden[:, column], -math.inf)
        return scores

    def _text_only(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The rows without latent ids, right-aligned; the room on the left repeats a row's first token, which every
        penalty has counted already. Cutting it off would need the lengths on the host."""
        is_latent = self.run.tokens.isin(input_ids)
        order = is_latent.byte().argsort(dim=1, descending=True, stable=True)
        first = torch.where(is_latent[:, :1], self.fill_token_id, input_ids[:, :1])
        room = torch.arange(input_ids.shape[1], device=input_ids.device) < is_latent.sum(1, keepdim=True)
        return torch.where(room, first, input_ids.gather(1, order))


class SuppressingProcessorList(LogitsProcessorList):
    """`latent_mode="off"`: `generate`'s list of logits processors, applied where no latent id can be emitted.

    A list rather than one more processor in it: the library inspects each processor's signature at each step, which
    takes longer than suppressing three ids.
    """

    def __init__(self, processors: LogitsProcessorList, token_ids: torch.Tensor):
        super().__init__(processors)
        self.token_ids = token_ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return super().__call__(input_ids, scores.index_fill(1, self.token_ids, -math.inf), **kwargs)


class LatentStreamer(BaseStreamer):
    """Passes a streamer everything but latent ids.

    Columns in which every row is inside a block are dropped; a latent id beside text of other rows becomes
    `fill_token_id`, as the ids of finished rows do.
    """

    def __init__(self, streamer: BaseStreamer, tokens: LatentTokens, fill_token_id: int):
        self.streamer = streamer
        self.tokens = tokens
        self.fill_token_id = fill_token_id

    def put(self, value: torch.Tensor) -> None:
        is_latent = self.tokens.isin(value)
        if value.ndim == 1 and is_latent.all():
            return
        if value.ndim == 2:
            kept = ~is_latent.all(0)
            value, is_latent = value[:, kept], is_latent[:, kept]
        self.streamer.put(value.masked_fill(is_latent, self.fill_token_id))

    def end(self) -> None:
        self.streamer.end()


class RolloutLayer(DynamicLayer):
    """One layer's keys and values in one segment of a rollout.

    `update` returns earlier and own keys and changes nothing when it is replayed, so a checkpointed layer recomputes
    the same values; a plain DynamicCache would append a second time. Segments are kept apart, so that under
    checkpointing each key is held once, not once per later segment.
    """

    def __init__(self, earlier: "RolloutLayer | None" = None):
        super().__init__()
        self.segments: list[Any] = [] if earlier is None else [*earlier.segments, earlier.own]
        self.own: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key_states, value_states, *args, **kwargs):
        if self.own is None:
            self.own = (key_states, value_states)
        keys, values = zip(*self.segments, (key_states, value_states))
        return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)

    def get_seq_length(self) -> int:
        return sum(keys.shape[-2] for keys, _ in self.segments)


@dataclass
class RolloutLayout:
    """Where each position of a batch goes, so that every row opens and closes its blocks in the same columns.

    Columns are `chunk 0 | block 1 | chunk 1 | block 2 | ...`: text right-aligned in its chunk, slots left-aligned in
    their block, room that a row does not need masked out. A chunk then runs as one segment and a block one column at
    a time, whatever the rows' lengths, padding side and numbers of slots.
    """

    column: torch.Tensor  # (B, L), the column of each position; of padding, 0
    kept: torch.Tensor  # (B, L), False for padding
    source: torch.Tensor  # (B, T), the position in each column; of room, 0
    filled: torch.Tensor  # (B, T), False for room
    chunk_widths: list[int]  # columns of chunk 0, 1, ...
    block_widths: list[int]  # columns of the block after each chunk

    @property
    def num_passes(self) -> int:
        return sum(width > 0 for width in self.chunk_widths) + sum(self.block_widths)

    @classmethod
    def plan(cls, is_slot: torch.Tensor, kept: torch.Tensor) -> "RolloutLayout":
        batch_size, length = is_slot.shape
        begins = is_slot & ~torch.nn.functional.pad(is_slot, (1, 0))[:, :-1]
        block = begins.cumsum(1)  # (B, L), blocks begun so far
        num_blocks = int(block.max()) if length else 0
        # 1. The width of each chunk and block is that of the row that needs most.
        is_text = kept & ~is_slot
        ordinal = torch.arange(num_blocks + 1, device=is_slot.device)
        num_text = (is_text[..., None] & (block[..., None] == ordinal)).sum(1)  # (B, num_blocks + 1)
        num_slots = (is_slot[..., None] & (block[..., None] == ordinal)).sum(1)
        chunk_widths, block_widths = num_text.amax(0), num_slots.amax(0)  # block 0 does not exist: width 0
        chunk_start = (chunk_widths + block_widths).cumsum(0) - chunk_widths
        block_start = chunk_start - block_widths
        # 2. A position's column: the start of its chunk or block, plus its rank there.
        text_rank = is_text.cumsum(1) - 1 - (num_text.cumsum(1) - num_text).gather(1, block)
        slot_rank = is_slot.cumsum(1) - 1 - (num_slots.cumsum(1) - num_slots).gather(1, block)
        text_column = (chunk_start + chunk_widths - num_text).gather(1, block) + text_rank
        column = torch.where(is_slot, block_start[block] + slot_rank, text_column)
        # 3. And back. Padding is written to a column past the end and cut off.
        width = int((chunk_widths + block_widths).sum())
        position = torch.arange(length, device=is_slot.device).expand(batch_size, -1)
        target = torch.where(kept, column, width)
        source = position.new_zeros(batch_size, width + 1).scatter(1, target, position)[:, :width]
        filled = torch.zeros_like(source, dtype=torch.bool)
        filled = torch.nn.functional.pad(filled, (0, 1)).scatter(1, target, True)[:, :width]
        return cls(
            column=column.masked_fill(~kept, 0),
            kept=kept,
            source=source,
            filled=filled,
            chunk_widths=chunk_widths.tolist(),
            block_widths=[*block_widths.tolist()[1:], 0],
        )


class LatentReasoningMixin(Backbone):
    """Adds the latent mode to `generate`, and its training to `forward`.

    Put it before a transformers model class: `class Storms(LatentReasoningMixin, SomeVLForConditionalGeneration)`.
    The config must hold `latent_start_token_id`, `latent_pad_token_id` and `latent_end_token_id`.
    """

    # The loss is divided by what the trainer counts over the whole global batch, not averaged per micro-batch.
    accepts_loss_kwargs = True

    @property
    def latent_tokens(self) -> LatentTokens:
        names = {key: f"latent_{key}_token_id" for key in ("start", "pad", "end")}
        token_ids: dict[str, Any] = {key: getattr(self.config, name, None) for key, name in names.items()}
        if None in token_ids.values():
            raise ValueError(
                f"The config has latent token ids {token_ids}, but the latent mode needs all three. Make a STORMS "
                "checkpoint with `python -m recipes.init_checkpoint`."
            )
        return LatentTokens(**token_ids)

    # ------------------------------------------------------------------ forward

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        second_per_grid_ts: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
        latent_input: str | None = None,
        latent_targets: torch.Tensor | None = None,
        latent_loss_weight: float | None = None,
        latent_bottleneck: bool | torch.Tensor | None = None,
        stop_supervision: str = "none",
        latent_feedback: torch.Tensor | None = None,
        latent_fixed: bool = False,
        num_items_in_batch: int | torch.Tensor | None = None,
        num_slots_in_batch: int | torch.Tensor | None = None,
        num_passes: int | None = None,
        **kwargs: Any,
    ) -> StormsOutput:
        """The backbone's forward, plus latent blocks in training (STORMS, Sec. 3.3).

        Arguments not listed are the backbone's own.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): for training,
                `[visual context][question]<|latent_start|><|latent_pad|>*K<|latent_end|>[answer]`. Rows may differ in
                length, padding side, number of slots and number of blocks.
            labels (`torch.LongTensor` of shape `(batch, length)`): -100 is ignored. Slots never carry a token label,
                whatever stands there: use `stop_supervision` to train the stay-or-end decision.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0): as in transformers; or a
                `torch.BoolTensor` of shape `(batch, length)`, the positions whose logits are computed. Those that a
                label or `stop_supervision` needs must be among them.
            latent_input (`str`, *optional*): what fills the slots. `"teacher_forced"`: `latent_targets`, in one
                parallel pass. `"rollout"`: the model's own states, with gradient: text in one pass per chunk, slots
                one position at a time, about one forward's work in all. `"embedding"`: nothing; they keep that of
                `<|latent_pad|>`, as pause tokens do (Goyal et al., 2024), a control. `generate` does the same only
                with a `latent_intervention` that returns that embedding.
            latent_targets (`torch.Tensor` of shape `(batch, K, hidden_size)`): K is the largest number of slots in the
                batch; a row with fewer uses its first ones.
            latent_loss_weight (`float`, *optional*): overrides `config.latent_loss_weight`.
            latent_bottleneck (`bool` or `torch.BoolTensor` of shape `(batch,)`, *optional*): rows whose answer may
                learn about the video from the slots only.
            stop_supervision (`str`, *optional*, defaults to `"none"`): `"not_end"` adds `-log(1 - p(<|latent_end|>))`,
                `"pad"` the cross-entropy of `<|latent_pad|>`, each at the K positions that a slot follows.
            latent_feedback (`torch.Tensor` of shape `(batch, length, hidden_size)`, *optional*): for `generate`; the
                vectors to feed in a decoding step where the id is `<|latent_pad|>`.
            latent_fixed (`bool`, *optional*, defaults to `False`): for `generate`; the rules of the block fix what
                comes next, so the output head is not run and `logits` are zeros. With `input_ids` of length 0 nothing
                is: an earlier step has filled this slot.
            num_items_in_batch, num_slots_in_batch (`int`, *optional*): labelled tokens and slots of the whole global
                batch (accumulation and ranks included), to divide the losses by instead of this batch's own.
            num_passes (`int`, *optional*): passes of the backbone that a rollout must make at least. What its own
                slots don't need runs idle. Ranks that share weights must all make as many, or they wait for each other
                for ever; `num_rollout_passes` tells how many a batch needs.

        Raises:
            ValueError: if slots come without `latent_input` (their states would be the embedding of a token that
                means nothing); if targets have the wrong count or width; if a slot follows neither
                `<|latent_start|>` nor a slot; if visual tokens follow a block; if `mm_token_type_ids` is missing
                beside image or video grids (positions would silently become one-dimensional).
        """
        if stop_supervision not in STOP_SUPERVISIONS:
            raise ValueError(f"stop_supervision is {stop_supervision!r}, but must be one of {STOP_SUPERVISIONS}.")
        vision = {
            "pixel_values": pixel_values,
            "pixel_values_videos": pixel_values_videos,
            "image_grid_thw": image_grid_thw,
            "video_grid_thw": video_grid_thw,
            "mm_encoder_outputs": mm_encoder_outputs,
        }
        if position_ids is None:
            _check_mm_token_type_ids(past_key_values, mm_token_type_ids, image_grid_thw, video_grid_thw)
            vision |= dict(zip(POSITIONAL, (mm_token_type_ids, second_per_grid_ts)))
        vision = {name: value for name, value in vision.items() if value is not None}

        if latent_fixed and latent_feedback is not None and input_ids is not None and input_ids.shape[1] == 0:
            return StormsOutput(
                logits=self._no_logits(latent_feedback),
                past_key_values=past_key_values,
                latent_feedback=latent_feedback,
            )

        is_slot = None
        if latent_input is None:
            # 1a. The plain backbone; in a decoding step, slots get their state instead of an embedding.
            has_bottleneck = latent_bottleneck is not None and latent_bottleneck is not False
            if has_bottleneck or latent_targets is not None or stop_supervision != "none":
                raise ValueError(
                    "latent_targets, latent_bottleneck and stop_supervision need latent_input='teacher_forced' or "
                    "'rollout', but latent_input is None."
                )
            if latent_feedback is not None and input_ids is not None:
                inputs_embeds = self.get_input_embeddings()(input_ids)
                is_fed = torch.eq(input_ids, self.latent_tokens.pad)[..., None]
                inputs_embeds = torch.where(is_fed, latent_feedback.to(inputs_embeds), inputs_embeds)
                input_ids = None
            elif input_ids is not None and _is_prompt(input_ids, past_key_values):
                self._refuse_slots(input_ids)
            outputs = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **vision,
                **kwargs,
            )
            hidden_states = outputs.last_hidden_state
        else:
            # 1b. Training: find the slots, then fill them in parallel or one after the other.
            if past_key_values is not None or inputs_embeds is not None or input_ids is None:
                raise ValueError(
                    f"latent_input={latent_input!r} takes whole sequences of input_ids, without past_key_values or "
                    "inputs_embeds: the slots are found by their ids."
                )
            if attention_mask is not None and attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}, but latent_input={latent_input!r} needs "
                    f"that of input_ids, {tuple(input_ids.shape)}: 1 for tokens, 0 for padding."
                )
            is_slot = self._find_slots(input_ids)
            kept = torch.ones_like(is_slot) if attention_mask is None else attention_mask.to(is_slot)
            if position_ids is None:
                position_ids = self._prepare_position_ids_for_generation(
                    input_ids,
                    {"attention_mask": (kept | is_slot).long(), **vision},  # a hidden slot has its place
                )
            vision = {name: value for name, value in vision.items() if name not in POSITIONAL}
            _check_targets(latent_targets, is_slot, self.config.get_text_config().hidden_size)
            sight = self._sight(input_ids, is_slot, latent_bottleneck)
            if latent_input == "teacher_forced":
                if latent_targets is None and is_slot.any():
                    raise ValueError(
                        "latent_input='teacher_forced' fills the slots with latent_targets, but got none."
                    )
                outputs = self._teacher_forced(
                    input_ids, kept, position_ids, is_slot, latent_targets, sight, **vision, **kwargs
                )
                hidden_states = outputs.last_hidden_state
            elif latent_input == "embedding":
                outputs = self._teacher_forced(
                    input_ids, kept, position_ids, torch.zeros_like(is_slot), None, sight, **vision, **kwargs
                )
                hidden_states = outputs.last_hidden_state
            elif latent_input == "rollout":
                outputs = None
                hidden_states = self._rollout(
                    input_ids, kept, position_ids, is_slot, sight, vision, num_passes or 0, kwargs
                )
            else:
                raise ValueError(f"latent_input is {latent_input!r}, but must be None or one of {LATENT_INPUTS}.")

        # 2. Logits; a slot's state is the hidden state of the position before it.
        chosen = None  # (B, L)
        if latent_fixed:
            logits = self._no_logits(hidden_states)
        elif isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.dtype == torch.bool:
            chosen = logits_to_keep
            logits = self.lm_head(hidden_states[chosen])[None]
        else:
            kept_logits = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept_logits])
        training: dict[str, torch.Tensor] = {}
        if is_slot is not None and is_slot.any():
            states, mask = _gather_ragged(hidden_states[:, :-1], is_slot[:, 1:])
            training |= {"latent_states": states, "latent_mask": mask}

        # 3. Losses: each a mean, over the global batch where its counts are given.
        if num_items_in_batch is not None and is_slot is not None:
            self._check_counts(
                labels, is_slot, num_items_in_batch, num_slots_in_batch, latent_targets, stop_supervision
            )
        if labels is not None:
            labels = labels if is_slot is None else labels.masked_fill(is_slot, -100)
            shift_labels = None
            if chosen is not None:
                shift_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
                self._check_chosen(chosen, shift_labels != -100, "labels")
                shift_labels = shift_labels[chosen][None]
            training["lm_loss"] = training["loss"] = self.loss_function(
                logits=logits,
                labels=labels,
                shift_labels=shift_labels,
                vocab_size=self.config.get_text_config().vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        if is_slot is not None and "latent_states" in training:
            num_slots = is_slot.sum() if num_slots_in_batch is None else num_slots_in_batch
            if latent_targets is not None:
                if latent_loss_weight is None:
                    latent_loss_weight = getattr(self.config, "latent_loss_weight", 0.1)
                training["latent_loss"] = _latent_loss(states, latent_targets, mask) / num_slots
                training["loss"] = training.get("loss", 0.0) + latent_loss_weight * training["latent_loss"]
            if stop_supervision != "none":
                before_slots = torch.nn.functional.pad(is_slot[:, 1:], (0, 1))
                if chosen is not None:
                    self._check_chosen(chosen, before_slots, "stop_supervision")
                    before_slots = before_slots[chosen][None]
                elif logits.shape[1] != is_slot.shape[1]:
                    raise ValueError("stop_supervision needs the logits of all positions: leave logits_to_keep at 0.")
                training["stop_loss"] = self._stop_loss(logits[before_slots], stop_supervision) / num_slots
                training["loss"] = training.get("loss", 0.0) + training["stop_loss"]
        return StormsOutput(
            logits=logits,
            past_key_values=outputs.past_key_values if outputs is not None else None,
            hidden_states=outputs.hidden_states if outputs is not None else None,
            attentions=outputs.attentions if outputs is not None else None,
            latent_feedback=hidden_states[:, -(1 if latent_feedback is None else latent_feedback.shape[1]) :],
            **training,
        )

    def _no_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.new_zeros(()).expand(len(hidden_states), 1, self.config.get_text_config().vocab_size)

    @staticmethod
    def _check_counts(
        labels, is_slot, num_items_in_batch, num_slots_in_batch, latent_targets, stop_supervision
    ) -> None:
        """Counts over the global batch must count what the losses average, or losses scale with accumulation."""
        labelled = torch.zeros_like(is_slot) if labels is None else labels != -100
        if num_slots_in_batch is None and (latent_targets is not None or stop_supervision != "none"):
            own = [int(labelled.sum()), int(labelled[:, 1:].sum())]
            if int(num_items_in_batch) not in own:
                raise ValueError(
                    f"num_items_in_batch is {int(num_items_in_batch)}, this batch has {own[0]} labels, so the global "
                    "batch is larger; but num_slots_in_batch is missing, by which to divide the losses of slots. "
                    "Count the slots of the global batch too."
                )
        if labelled[is_slot].any():
            raise ValueError(
                "labels hold token labels at latent slots, which are not trained as tokens, so num_items_in_batch "
                "counts too many. Set them to -100; stop_supervision trains the stay-or-end decision."
            )

    @staticmethod
    def _check_chosen(chosen, needed, name: str) -> None:
        if (missing := needed & ~chosen).any():
            row, position = missing.nonzero()[0].tolist()
            raise ValueError(
                f"logits_to_keep leaves out position {position} of row {row}, whose logits {name} need. Keep every "
                "position before a label, and with stop_supervision every position before a slot."
            )

    def num_rollout_passes(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> int:
        """Passes of the backbone that `latent_input="rollout"` makes for a batch: one a chunk of text, one a column of
        slots.

        Args:
            input_ids, attention_mask (`torch.Tensor` of shape `(batch, length)`): as for `forward`.
        """
        is_slot = self._find_slots(input_ids)
        kept = torch.ones_like(is_slot) if attention_mask is None else attention_mask.to(is_slot)
        return RolloutLayout.plan(is_slot, kept | is_slot).num_passes

    def _refuse_slots(self, input_ids: torch.Tensor) -> None:
        pad_id = getattr(self.config, "latent_pad_token_id", None)
        if pad_id is not None and (input_ids == pad_id).any():
            rows = (input_ids == pad_id).any(1).nonzero()[:, 0].tolist()
            raise ValueError(
                f"Rows {rows} of input_ids hold latent slots, but latent_input is None, so nothing would fill them. "
                "Pass latent_input='rollout', or 'teacher_forced' with latent_targets."
            )

    def _find_slots(self, input_ids: torch.Tensor) -> torch.Tensor:
        tokens = self.latent_tokens
        is_slot = input_ids == tokens.pad
        before = torch.nn.functional.pad(input_ids, (1, 0), value=tokens.end)[:, :-1]
        stray = is_slot & (before != tokens.start) & (before != tokens.pad)
        if stray.any():
            row, position = stray.nonzero()[0].tolist()
            raise ValueError(
                f"Row {row} of input_ids has <|latent_pad|> at position {position} after id "
                f"{int(before[row, position])}, but a slot follows <|latent_start|> or another slot."
            )
        return is_slot

    def _sight(self, input_ids, is_slot, latent_bottleneck) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Who is kept from the video, and what they can't see, `(batch, length)` each; None without bottleneck."""
        if latent_bottleneck is None or latent_bottleneck is False:
            return None
        rows = torch.as_tensor(latent_bottleneck, device=input_ids.device)
        if rows.dtype != torch.bool or rows.shape not in ((), (len(input_ids),)):
            raise ValueError(
                f"latent_bottleneck is {latent_bottleneck}, but must be True, False or one boolean for each of the "
                f"{len(input_ids)} rows. Draw the rows from a probability in the collator."
            )
        rows = rows.expand(len(input_ids))
        if (without := rows & ~is_slot.any(1)).any():
            raise ValueError(
                f"latent_bottleneck is set for rows {without.nonzero()[:, 0].tolist()}, which have no latent slots: "
                "their answers would not see the video at all."
            )
        return self._bottleneck_sight(input_ids, is_slot, rows)

    def _bottleneck_sight(self, input_ids, is_slot, rows=None):
        attention = self.config.get_text_config()._attn_implementation
        if "flash" in str(attention):
            raise ValueError(
                f"latent_bottleneck needs an attention that takes a mask of its own, but this one is {attention!r}. "
                "Load the model with attn_implementation='sdpa'."
            )
        is_start = input_ids == self.latent_tokens.start
        is_visual = self._is_visual(input_ids)
        blind, concealed = ~(is_visual | is_start | is_slot), is_visual | is_start
        return (blind if rows is None else blind & rows[:, None]), concealed

    def _is_visual(self, input_ids: torch.Tensor) -> torch.Tensor:
        token_ids = [getattr(self.config, name, None) for name in ("image_token_id", "video_token_id")]
        is_visual = torch.zeros_like(input_ids, dtype=torch.bool)
        for token_id in token_ids:
            if token_id is not None:
                is_visual = is_visual | (input_ids == token_id)
        return is_visual

    def _attention_mask(self, kept, sight, input_ids, past_key_values):
        """The 2D mask, or under a bottleneck the masks the backbone's layers would build, with the overlay."""
        if sight is None:
            return kept.long()
        blind, concealed = sight
        length = input_ids.shape[1]
        if past_key_values is not None:
            length = past_key_values.get_mask_sizes(length, 0)[0]
        if (room := length - blind.shape[1]) > 0:  # a static cache has keys not yet written
            blind, concealed = (torch.nn.functional.pad(mask, (0, room)) for mask in (blind, concealed))
        return create_masks_for_generate(
            config=self.config,
            inputs_embeds=torch.empty(*input_ids.shape, 0, dtype=self.dtype, device=kept.device),  # shape and type
            attention_mask=kept,
            past_key_values=past_key_values,
            and_mask_function=bottleneck_overlay(blind, concealed),
        )

    @torch.compiler.disable  # compiled graphs are reused whether a hook is there or not
    def _teacher_forced(self, input_ids, kept, position_ids, is_slot, latent_targets, sight, **kwargs):
        """One pass with `latent_targets` in the slots, put there as the embedding layer returns: the model still
        finds its placeholders by their ids."""

        def fill(module, args, embeds):
            slot_idx = (is_slot.cumsum(1) - 1).clamp(min=0)[..., None].expand_as(embeds)
            return torch.where(is_slot[..., None], latent_targets.to(embeds).gather(1, slot_idx), embeds)

        hook = self.get_input_embeddings().register_forward_hook(fill) if is_slot.any() else None
        try:
            kwargs["use_cache"] = False
            return self.model(
                input_ids=input_ids,
                position_ids=position_ids,
                attention_mask=self._attention_mask(kept, sight, input_ids, None),
                **kwargs,
            )
        finally:
            if hook is not None:
                hook.remove()

    def _rollout(self, input_ids, kept, position_ids, is_slot, sight, vision, num_passes, kwargs) -> torch.Tensor:
        """Post-norm hidden states `(batch, length, hidden_size)`, slots fed by the states before them; zeros at
        padding."""
        if kwargs.get("output_hidden_states") or kwargs.get("output_attentions"):
            raise ValueError(
                "A rollout runs in segments and can't return hidden_states or attentions of all layers. Ask for them "
                "with latent_input='teacher_forced' and the rollout's latent_states as latent_targets."
            )
        begun = is_slot.cumsum(1) > 0
        if (late := begun & self._is_visual(input_ids)).any():
            row, position = late.nonzero()[0].tolist()
            raise ValueError(
                f"Row {row} has a visual token at position {position}, after a latent block. Put images and videos "
                "before the first block."
            )
        # 1. Line the rows up. A slot that the mask hides still has to be computed: it is only unseen by the others.
        layout = RolloutLayout.plan(is_slot, kept | is_slot)
        ids = input_ids.gather(1, layout.source).masked_fill(~layout.filled, self.latent_tokens.pad)
        seen = kept.gather(1, layout.source) & layout.filled
        positions = position_ids.expand(*position_ids.shape[:-2], *ids.shape[:1], -1)
        positions = positions.gather(-1, layout.source.expand(*positions.shape[:-1], -1))
        if sight is not None:
            sight = tuple(mask.gather(1, layout.source) & layout.filled for mask in sight)
        # Idle passes go to columns past the end that nobody sees; their outputs are part of the graph all the same,
        # so that sharded weights are gathered as often in the backward pass.
        if (idle := max(0, num_passes - layout.num_passes)) > 0:
            ids = torch.nn.functional.pad(ids, (0, idle), value=self.latent_tokens.pad)
            seen = torch.nn.functional.pad(seen, (0, idle))
            positions = torch.nn.functional.pad(positions, (0, idle))
            sight = sight and tuple(torch.nn.functional.pad(mask, (0, idle)) for mask in sight)

        # 2. Text in chunks, slots one by one, keys and values carried along with their gradient.
        pieces: list[torch.Tensor] = []
        cache = self._next_rollout_cache(None)
        column = 0

        def advance(width: int, **inputs: Any) -> None:
            nonlocal cache, column
            span, column = slice(column, column + width), column + width
            outputs = self.model(
                **inputs,
                position_ids=positions[..., span],
                attention_mask=self._attention_mask(seen[:, :column], sight, ids[:, span], cache),
                past_key_values=cache,
                use_cache=False,
                **kwargs,
            )
            pieces.append(outputs.last_hidden_state)
            cache = self._next_rollout_cache(cache)

        with self._checkpointing_with_cache():
            for chunk_width, block_width in zip(layout.chunk_widths, layout.block_widths):
                if chunk_width > 0:
                    advance(chunk_width, input_ids=ids[:, column : column + chunk_width], **vision)
                    vision = {}
                for _ in range(block_width):
                    advance(1, inputs_embeds=pieces[-1][:, -1:])
            for _ in range(idle):
                advance(1, inputs_embeds=pieces[-1][:, -1:])
        # 3. Back to the rows' own order.
        hidden_states = torch.cat(pieces, dim=1)
        hidden_states = hidden_states.gather(1, layout.column[..., None].expand(-1, -1, hidden_states.shape[-1]))
        return hidden_states.masked_fill(~layout.kept[..., None], 0.0)

    def _next_rollout_cache(self, cache: Cache | None) -> Cache:
        if cache is None:
            return Cache(layers=[RolloutLayer() for _ in range(self.config.get_text_config().num_hidden_layers)])
        return Cache(layers=[RolloutLayer(layer) for layer in cache.layers])

    @contextmanager
    def _checkpointing_with_cache(self) -> Iterator[None]:
        """Lets checkpointed layers keep the rollout's cache, which `GradientCheckpointingLayer` would drop: later
        segments would then not see earlier ones, and gradients would be silently wrong."""
        layers = [module for module in self.modules() if isinstance(module, GradientCheckpointingLayer)]
        layers = [layer for layer in layers if layer.gradient_checkpointing and self.training]
        for layer in layers:
            if getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant") is not False:
                raise ValueError(
                    "latent_input='rollout' with reentrant activation checkpointing would lose the gradients between "
                    "segments. Use gradient_checkpointing_kwargs={'use_reentrant': False}."
                )
            layer._can_checkpoint_with_cache = True
        try:
            yield
        finally:
            for layer in layers:
                del layer._can_checkpoint_with_cache

    def _stop_loss(self, logits: torch.Tensor, stop_supervision: str) -> torch.Tensor:
        """Summed loss of the decision to stay, `logits` `(num_slots, vocab_size)` of the positions before slots."""
        tokens = self.latent_tokens
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_total = logits.logsumexp(-1)
        if stop_supervision == "pad":
            return (log_total - logits[:, tokens.pad]).sum()
        others = logits.index_fill(1, torch.tensor(tokens.end, device=logits.device), -math.inf)
        return (log_total - others.logsumexp(-1)).sum()

    # ----------------------------------------------------------------- generate

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        streamer: BaseStreamer | None = None,
        latent_intervention: LatentIntervention | None = None,
        **kwargs: Any,
    ) -> Any:
        """`GenerationMixin.generate` with a latent mode. The options below also live in `generation_config.json`.

        Args:
            latent_mode (`str`, *optional*, defaults to `"auto"`): `"auto"`: the model opens a block by emitting
                `<|latent_start|>`. `"force"`: that is the first new token, unless the prompt already ends in it.
                `"off"`: no latent id can be emitted; the output is the plain backbone's.
            latent_size (`int`, *optional*): slots per block; the checkpoint's training size by default.
            latent_stop (`str`, *optional*, defaults to `"budget"`): `"budget"`: exactly `latent_size` slots.
                `"token"`: the model may end the block earlier with `<|latent_end|>`.
            max_latent_blocks (`int`, *optional*, defaults to 1): after that many no further block can be opened.
            latent_bottleneck (`bool`, *optional*, defaults to `False`): the video reaches the answer only through
                the slots, as in training; the default of checkpoints that were trained so on every row. Without blocks
                (`"off"`) such a default is ignored.
            latent_solver (`str`, *optional*, defaults to `"sequential"`): `"sequential"`: one slot a step. `"jacobi"`:
                all slots of a block at once, from a first guess that repeats the state at `<|latent_start|>`, refined
                in `jacobi_iterations` passes; then the first `jacobi_iterations` slots are the sequential ones, the
                others near them at best. In `"auto"` mode the ids are read back at each step until every row has
                opened its blocks; a batch whose rows open at different steps gains no speed.
            jacobi_iterations (`int`, *optional*, defaults to 3): passes over a block's slots; `latent_size` or more
                give the sequential result.
            latent_intervention (`Callable`, *optional*): `(states (num_rows, hidden_size), slot_index (num_rows,)) ->
                states`, called once for each slot with the rows that are about to be fed one, in batch order;
                `slot_index` counts from 0 in each block. What it returns is fed and reported.
            streamer (`BaseStreamer`, *optional*): sees text only.

        Returns:
            `StormsGenerateOutput` with `return_dict_in_generate=True`, else `torch.LongTensor` of shape
            `(batch, prompt + new)`. Latent ids stay in the sequences; `StormsProcessor.batch_decode` drops them.

        Raises:
            ValueError: for what would be silently wrong: a prompt that holds a closed block (its states are gone), a
                right-padded batch, missing `mm_token_type_ids`, and, unless `latent_mode="off"`, `use_cache=False`,
                beam search, assisted decoding, guidance and continuous batching; with `latent_solver="jacobi"` also
                `latent_stop="token"`, `latent_intervention`, outputs of each step (`output_logits`,
                `output_hidden_states`, `output_attentions`), sharded weights, and caches that can't be rewound.
        """
        tokens = self.latent_tokens
        # A keyword wins over the generation config given, and that over the model's own.
        chosen: dict[str, Any] = {"latent_size": getattr(self.config, "latent_size", LatentOptions.latent_size)}
        asks_bottleneck = kwargs.get("latent_bottleneck")
        for name in LatentOptions.__dataclass_fields__:
            given = [kwargs.pop(name, None)]
            given += [getattr(config, name, None) for config in (generation_config, self.generation_config)]
            chosen.update((name, value) for value in reversed(given) if value is not None)
        if chosen.get("latent_mode") == "off" and not asks_bottleneck:
            chosen["latent_bottleneck"] = False  # a checkpoint's default is about blocks, and here there are none
        options = LatentOptions(**chosen)
        if latent_intervention is not None and (options.latent_mode == "off" or not callable(latent_intervention)):
            raise ValueError(
                f"latent_intervention is {latent_intervention!r} with latent_mode={options.latent_mode!r}, but must "
                "be a callable, and there must be slots to call it on. Leave one of the two out."
            )
        if latent_intervention is not None and options.latent_solver == "jacobi":
            raise ValueError(
                "latent_intervention with latent_solver='jacobi' would be called on guesses, several times for each "
                "slot. Use latent_solver='sequential'."
            )
        self._check_prompt(inputs, tokens, options, generation_config, kwargs)
        if options.latent_mode == "off":
            outputs = super().generate(inputs, generation_config, streamer=streamer, latent_mode="off", **kwargs)
            if isinstance(outputs, GenerateDecoderOnlyOutput):
                rows, hidden_size = len(outputs.sequences), self.config.get_text_config().hidden_size
                outputs = StormsGenerateOutput(
                    **outputs,
                    latent_states=[self.lm_head.weight.new_empty(0, hidden_size)] * rows,
                    latent_lengths=torch.zeros(rows, dtype=torch.long, device=outputs.sequences.device),
                    latent_stop_reasons=["none"] * rows,
                )
            return outputs

        resolved, _ = self._prepare_generation_config(generation_config, **kwargs)
        _check_decoding(resolved, kwargs, options)
        alone = self._needs_steps_of_their_own(resolved, kwargs)
        if options.latent_solver == "jacobi" and alone is not None:
            raise ValueError(
                f"latent_solver='jacobi' does not work with {alone}. Drop it, or use latent_solver='sequential'."
            )
        if self.training and self.is_gradient_checkpointing:
            raise ValueError(
                f"latent_mode={options.latent_mode!r} with activation checkpointing in training mode would decode "
                "without a cache, so without the slots. Call model.eval() first."
            )
        run = LatentRun(options, tokens, latent_intervention)
        run.may_run_ahead = options.latent_stop == "budget" and alone is None
        if streamer is not None:
            streamer = LatentStreamer(streamer, tokens, _fill_token_id(resolved))
        outputs = super().generate(inputs, generation_config, streamer=streamer, latent_run=run, **kwargs)
        if run.cache is not None:  # a criterion may have stopped inside a block
            _rewind(run.cache, run.num_filled)
        if not isinstance(outputs, GenerateDecoderOnlyOutput):
            return outputs
        states, lengths, reasons = run.finish(outputs.sequences)
        return StormsGenerateOutput(
            **outputs, latent_states=states, latent_lengths=lengths, latent_stop_reasons=reasons
        )

    def _check_prompt(self, inputs, tokens, options, generation_config, kwargs) -> None:
        """Refuse prompts whose result would be silently wrong; one look at the ids per call."""
        cache = kwargs.get("past_key_values")
        if kwargs.get("position_ids") is None:
            _check_mm_token_type_ids(
                cache, *(kwargs.get(name) for name in ("mm_token_type_ids", "image_grid_thw", "video_grid_thw"))
            )
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        if input_ids is None or input_ids.ndim != 2 or input_ids.is_floating_point() or input_ids.shape[1] == 0:
            return
        attention_mask = kwargs.get("attention_mask")
        padded_right = torch.zeros_like(input_ids[:, -1], dtype=torch.bool)
        if attention_mask is not None:
            padded_right = attention_mask[:, -1] == 0
        elif len(input_ids) > 1:
            resolved, _ = self._prepare_generation_config(generation_config, **kwargs)
            if resolved.pad_token_id is not None:
                padded_right = input_ids[:, -1] == resolved.pad_token_id
        # Blocks that a cache still holds are fine: only what has to be run again is checked.
        cached = 0 if cache is None else int(cache.get_seq_length())
        is_whole = cached < input_ids.shape[1] and (attention_mask is None or attention_mask.shape == input_ids.shape)
        if options.latent_bottleneck and cached > 0:
            self._check_bottleneck_cache(input_ids[:, :cached] if is_whole else None, attention_mask)
        if not is_whole:
            cached = 0  # only the new ids were given
        latent = tokens.isin(input_ids[:, cached:])
        if options.latent_mode != "off":
            latent[:, -1] &= input_ids[:, -1] != tokens.start
        if not torch.stack([padded_right.any(), latent.any()]).any():
            return
        if padded_right.any():
            raise ValueError(
                f"Rows {padded_right.nonzero()[:, 0].tolist()} of the prompt are padded on the right, but generation "
                "continues at the right end. Set processor.tokenizer.padding_side = 'left'."
            )
        row, position = latent.nonzero()[0].tolist()
        raise ValueError(
            f"Row {row} of the prompt holds the latent id {int(input_ids[row, cached + position])} at position "
            f"{cached + position}, but the hidden states of a block that is not in the cache are gone. Remove closed "
            "blocks from the chat history (StormsProcessor.batch_decode does); a prompt may only end in "
            "<|latent_start|>, and not with latent_mode='off'."
        )

    def _check_bottleneck_cache(self, cached_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> None:
        """Refuse a cache whose keys may have seen what the bottleneck conceals."""
        if cached_ids is not None:
            blind, concealed = self._bottleneck_sight(cached_ids, torch.zeros_like(cached_ids, dtype=torch.bool))
            if attention_mask is not None:
                blind = blind & attention_mask[:, : cached_ids.shape[1]].bool()
            if not (blind & (concealed.cumsum(1) > 0)).any():
                return
        raise ValueError(
            "latent_bottleneck=True with past_key_values needs the ids of the whole prompt, and a cache that ends "
            "with its last visual token: what follows has seen the video. Cache no more, or leave past_key_values out."
        )

    def _needs_steps_of_their_own(self, generation_config: GenerationConfig, kwargs: dict[str, Any]) -> str | None:
        """What is asked for, if anything, that needs a pass for each id, and why."""
        synced_gpus = kwargs.get("synced_gpus")
        if synced_gpus is None:
            synced_gpus = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(self)
        if synced_gpus:
            return "synced_gpus or sharded weights (ranks would make different numbers of passes)"
        for name in ("output_logits", "output_hidden_states", "output_attentions"):
            if generation_config.return_dict_in_generate and getattr(generation_config, name):
                return f"{name} (slots have no step of their own)"
        return None

    def _prepare_generation_config(self, generation_config, latent_mode=None, **kwargs):
        resolved, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        resolved.latent_mode = latent_mode  # for _get_logits_processor, which sees no other argument of `generate`
        return resolved, model_kwargs

    def _get_logits_processor(self, generation_config, *args, **kwargs):
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        if (run := (kwargs.get("model_kwargs") or {}).get("latent_run")) is not None:
            cache = kwargs["model_kwargs"].get("past_key_values")
            stuck = _not_rewindable(cache)
            if run.options.latent_solver == "jacobi" and stuck:
                raise ValueError(
                    "latent_solver='jacobi' runs a block's positions several times, but the cache has layers that "
                    f"can't take positions back ({', '.join(stuck)}). Use latent_solver='sequential' or another cache."
                )
            # A compiled step with a head and one without would be two graphs. Whoever looks at logits gets them.
            looked_at = generation_config.output_logits or kwargs.get("logits_processor")
            may_compile = cache is not None and cache.is_compileable and not generation_config.disable_compile
            may_skip_head = not looked_at and not may_compile
            run.may_run_ahead = run.may_run_ahead and not looked_at and cache is not None and not stuck
            run.begin(kwargs["input_ids_seq_length"], generation_config, may_skip_head)
            fill_token_id = _fill_token_id(generation_config)
            do_sample, own = bool(generation_config.do_sample), bool(kwargs.get("logits_processor"))
            return LatentProcessorList(processors, run, do_sample, fill_token_id, sees_all=own)
        if getattr(generation_config, "latent_mode", None) == "off":
            tokens = self.latent_tokens
            token_ids = torch.tensor([tokens.start, tokens.pad, tokens.end], device=kwargs.get("device"))
            return SuppressingProcessorList(processors, token_ids)
        return processors

    def save_pretrained(self, *args, **kwargs):
        # From a generation config that it derived from the model's config, the library drops options it doesn't know.
        self.generation_config._from_model_config = False
        return super().save_pretrained(*args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        raise ValueError(
            "Continuous batching (`generate_batch`) feeds token ids only: no pixels, no states for latent slots. Use "
            "`generate` with a batch."
        )

    def get_compiled_call(self, compile_config):
        compiled = super().get_compiled_call(compile_config)

        def call(**inputs):
            has_run = inputs.get("latent_fixed", False) and inputs["input_ids"].shape[1] == 0
            return (self if has_run else compiled)(**inputs)  # no graph for steps that run nothing

        return call

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if (run := model_kwargs.get("latent_run")) is not None:
            # A copy: a view would keep the whole prefill alive, and a captured graph overwrites its outputs.
            run.feedback = outputs.latent_feedback[:, -1:].clone()
            if run.is_end_filled:
                run.logits_ahead, run.is_end_filled = outputs.logits[:, -1].float().clone(), False
        return model_kwargs

    def prepare_inputs_for_generation(
        self, input_ids, inputs_embeds=None, is_first_iteration=False, latent_run=None, **kwargs
    ):
        kwargs |= {"inputs_embeds": inputs_embeds, "is_first_iteration": is_first_iteration}
        if latent_run is None:
            return super().prepare_inputs_for_generation(input_ids, **kwargs)
        run, step = latent_run, latent_run.step(input_ids)
        room = run.generation_config.max_length - input_ids.shape[1]
        if is_first_iteration:
            run.read_prompt(input_ids)
            if inputs_embeds is None and run.may_run_start(room):
                return self._run_ahead(input_ids, run, [run.tokens.start], **kwargs)
            return self._latent_inputs(input_ids, run, 0, **kwargs)
        feedback = run.next_feedback(input_ids)
        if run.num_filled > 0:
            run.num_filled -= 1
            return {
                "input_ids": input_ids[:, :0],
                "past_key_values": kwargs["past_key_values"],
                "latent_feedback": feedback,
                "latent_fixed": True,
            }
        if run.options.latent_solver == "jacobi" and any(begins := run.begins_block(input_ids)):
            return self._solve_block(input_ids, run, begins, feedback, **kwargs)
        # Compiled, a pass of two positions would be one more graph.
        if run.may_run_end(step, room) and not self._valid_auto_compile_criteria(kwargs, run.generation_config):
            return self._run_ahead(input_ids, run, [run.tokens.end], latent_feedback=feedback, **kwargs)
        return self._latent_inputs(input_ids, run, step, latent_feedback=feedback, **kwargs)

    def _run_ahead(self, input_ids, run, added, **kwargs):
        """The inputs of a step that also runs the ids `added` after it, known already; later steps find them done."""
        ids, wide = self._widen(input_ids, added, **kwargs)
        run.cache, run.num_filled = kwargs["past_key_values"], len(added)
        run.is_end_filled = added[-1] == run.tokens.end
        step = run.step(input_ids) if not run.is_end_filled else run.step(ids)  # whose outcome is looked at
        return self._latent_inputs(ids, run, step, **wide)

    def _widen(self, input_ids, added, next_sequence_length=None, latent_feedback=None, **kwargs):
        """The ids and arguments of a step with the ids `added` after it."""
        # Written on the device: a copy from the host would make it wait.
        columns = [input_ids.new_full((len(input_ids), 1), token_id) for token_id in added]
        ids = torch.cat([input_ids, *columns], dim=1)
        wide = self._update_model_kwargs_for_generation(ModelOutput(), dict(kwargs), num_new_tokens=len(added))
        if next_sequence_length is not None:
            wide["next_sequence_length"] = next_sequence_length + len(added)
        if latent_feedback is not None:
            wide["latent_feedback"] = latent_feedback.expand(-1, 1 + len(added), -1)
        return ids, wide

    def _latent_inputs(self, input_ids, run, step, **kwargs):
        """The library's inputs for a step, with the bottleneck's mask and without a head where nobody has a choice."""
        model_inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if run.may_skip_head and run.is_outcome_fixed(step):
            model_inputs["latent_fixed"] = True
        if run.options.latent_bottleneck:
            blind, concealed = self._bottleneck_sight(input_ids, input_ids == run.tokens.pad)
            attention_mask = kwargs.get("attention_mask")
            kept = torch.ones_like(blind) if attention_mask is None else attention_mask.bool()
            model_inputs["attention_mask"] = self._attention_mask(
                kept.to(self.device),
                (blind.to(self.device), concealed.to(self.device)),
                model_inputs["input_ids"],
                model_inputs["past_key_values"],
            )
        return model_inputs

    def _solve_block(self, input_ids, run, begins, feedback, past_key_values, **kwargs):
        """Find all states of the blocks that begin, and return the inputs of the next step.

        A slot's guess is the state that the previous pass found before it. The last pass is the step itself, where
        all rows begin; then the ids follow, and nothing is left to run until the block's end. Where some rows don't,
        the states are kept, to be fed one a step while those rows go on.
        """
        size, room = run.options.latent_size, run.generation_config.max_length - input_ids.shape[1]
        width = min(size, room)  # slots that will be fed
        added = [run.tokens.pad] * (width - 1)
        ids, wide = self._widen(input_ids, added, past_key_values=past_key_values, **kwargs)
        call = self.__call__
        if self._valid_auto_compile_criteria(wide, run.generation_config):
            call = self.get_compiled_call(run.generation_config.compile_config)

        def inputs(states):
            fed = {"latent_feedback": states[:, :width], "latent_fixed": True}
            return self._latent_inputs(ids, run, run.step(input_ids), **wide) | fed

        states = feedback.repeat(1, size, 1)
        for _ in range(min(run.options.jacobi_iterations, size) - 1):
            found = call(**inputs(states), return_dict=True).latent_feedback
            states[:, 1 : width + 1] = found[:, : size - 1]
            _rewind(past_key_values, width)
        if all(begins):
            run.solved = states
            if run.may_run_ahead and room > size:
                fed = torch.nn.functional.pad(states, (0, 0, 0, 1))
                added = [*added, run.tokens.end]
                kwargs |= {"past_key_values": past_key_values}
                return self._run_ahead(input_ids, run, added, **kwargs) | {"latent_feedback": fed}
            run.cache, run.num_filled = past_key_values, width - 1
            return inputs(states)
        rows = torch.tensor(begins, device=states.device)[:, None, None]
        run.solved = states if run.solved is None else torch.where(rows, states, run.solved)
        kwargs |= {"past_key_values": past_key_values, "latent_feedback": feedback}
        return self._latent_inputs(input_ids, run, run.step(input_ids), **kwargs)


# `generate` inspects the signature of remote code's forward at every step. Kept ready, that costs a tenth.
LatentReasoningMixin.forward.__signature__ = inspect.signature(LatentReasoningMixin.forward)


def _is_prompt(input_ids: torch.Tensor, past_key_values: Cache | None) -> bool:
    """Whether nothing was cached before; a decoding step is told by its width, without asking the device."""
    if past_key_values is None:
        return True
    return input_ids.shape[1] > 1 and not torch.compiler.is_compiling() and int(past_key_values.get_seq_length()) == 0


def _not_rewindable(cache: Cache | None) -> list[str]:
    """Kinds of layers of a cache, if any, that can't take positions back."""
    stuck = set()
    for layer, is_sliding in [] if cache is None else zip(cache.layers, cache.is_sliding):
        if is_sliding or not (layer.is_croppable or isinstance(layer, StaticLayer)):
            stuck.add(type(layer).__name__)
    return sorted(stuck)


def _rewind(cache: Cache, num_columns: int) -> None:
    """Take back a cache's last columns. A static layer keeps their values, where no mask shows them."""
    for layer in cache.layers:
        if isinstance(layer, StaticLayer):
            layer.cumulative_length.sub_(num_columns)
        else:
            layer.crop(-num_columns)


def _fill_token_id(generation_config: GenerationConfig) -> int:
    """The id transformers puts after a finished row."""
    token_id = generation_config.pad_token_id
    if token_id is None:
        token_id = generation_config.eos_token_id
    if isinstance(token_id, (list, tuple)):
        token_id = token_id[0]
    return 0 if token_id is None else int(token_id)


def _check_mm_token_type_ids(past_key_values, mm_token_type_ids, image_grid_thw, video_grid_thw) -> None:
    has_grid = image_grid_thw is not None or video_grid_thw is not None
    if has_grid and mm_token_type_ids is None and past_key_values is None:
        raise ValueError(
            "image_grid_thw or video_grid_thw came without mm_token_type_ids, so M-RoPE positions would silently be "
            "one-dimensional. Pass on everything the processor returns."
        )


def _check_decoding(generation_config: GenerationConfig, kwargs: dict[str, Any], options: LatentOptions) -> None:
    """Refuse ways of decoding in which a slot's state would be lost or wrong."""
    refused = None
    mode = generation_config.get_generation_mode(kwargs.get("assistant_model"))
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        refused = f"generation mode {mode.value!r} (beams or drafts would need other states in the same slot)"
    elif generation_config.use_cache is False:
        refused = "use_cache=False (fed states live in the cache; recomputing slots from ids would lose them)"
    elif generation_config.guidance_scale not in (None, 1, 1.0):
        refused = "guidance_scale (the unconditional pass would see slots without states)"
    elif generation_config.cache_implementation == "paged":
        refused = "cache_implementation='paged' (continuous batching feeds token ids only)"
    elif kwargs.get("custom_generate") is not None:
        refused = "custom_generate (it may not feed states back)"
    elif options.latent_bottleneck and generation_config.prefill_chunk_size is not None:
        refused = "latent_bottleneck with prefill_chunk_size (the mask needs the whole prompt)"
    elif options.latent_bottleneck and kwargs.get("inputs_embeds") is not None:
        refused = "latent_bottleneck with inputs_embeds (the mask needs the whole prompt's ids)"
    if refused is not None:
        raise ValueError(
            f"latent_mode={options.latent_mode!r} does not work with {refused}. Drop it, or set latent_mode='off'."
        )


def _check_targets(latent_targets: torch.Tensor | None, is_slot: torch.Tensor, hidden_size: int) -> None:
    if latent_targets is None:
        return
    counts = is_slot.sum(1)
    expected = (len(is_slot), int(counts.max()), hidden_size)
    if tuple(latent_targets.shape) != expected:
        raise ValueError(
            f"latent_targets has shape {tuple(latent_targets.shape)}, but this batch needs {expected}: one vector of "
            f"the hidden size for each slot (slots per row: {counts.tolist()})."
        )


def _gather_ragged(values: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The chosen positions of each row, in order: `(batch, most, dim)`, zero-padded, and which exist."""
    counts = chosen.sum(1)
    order = chosen.byte().argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())]
    mask = torch.arange(order.shape[1], device=order.device) < counts[:, None]
    gathered = values.gather(1, order[..., None].expand(-1, -1, values.shape[-1]))
    return gathered.masked_fill(~mask[..., None], 0.0), mask


def _latent_loss(states: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Squared error, mean over hidden dimensions, summed over slots; in float32 or better."""
    precision = torch.promote_types(states.dtype, torch.float32)
    error = (states.to(precision) - targets.to(states.device, precision)).pow(2).mean(-1)
    return error.masked_fill(~mask, 0.0).sum()


__all__ = ["LatentReasoningMixin", "StormsGenerateOutput", "StormsOutput"]
