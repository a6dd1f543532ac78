"""An independent latent mode: plain transformers classes, no cache, one row at a time, plain Python rules."""

import copy
import math
from dataclasses import dataclass, field

import torch
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel


def reduce_by_loops(tokens, grid, k, p, s):
    """Tokens `(T * H * W, hidden)` of a grid as the design reduces them, one after the other."""
    steps, height, width = grid
    side = math.isqrt(p)
    features = tokens.view(steps, height, width, -1)
    pooled = [features[begin : begin + k].mean(0) for begin in range(0, steps, k)][::s]
    rows = []
    for step in pooled:
        for top in range(0, height, side):
            for left in range(0, width, side):
                rows.append(step[top : top + side, left : left + side].flatten(0, 1).mean(0))
    return torch.stack(rows)


def numbers_of(config, is_video):
    """Temporal pool, spatial pool and temporal sampling of a video or an image; a plain config has none."""
    if is_video:
        return tuple(getattr(config, name, 1) for name in ("temporal_pool", "spatial_pool", "temporal_sampling"))
    return 1, config.spatial_pool if getattr(config, "pool_images", False) else 1, 1


def places_of(grid_thw, config, is_video, seconds=1.0):
    """Time, row and column of each token that is left of a medium, as M-RoPE counts them from its first token on."""
    k, p, s = numbers_of(config, is_video)
    merge, rate = config.vision_config.spatial_merge_size, getattr(config.vision_config, "tokens_per_second", 1)
    steps, height, width = int(grid_thw[0]), int(grid_thw[1]) // merge, int(grid_thw[2]) // merge
    groups = [range(begin, min(begin + k, steps)) for begin in range(0, steps, k)][::s]
    times = [math.floor(sum(group) / len(group) * rate * seconds) for group in groups] if is_video else [0]
    side = math.isqrt(p)
    rows, columns = range(-(-height // side)), range(-(-width // side))
    return [(time, row, column) for time in times for row in rows for column in columns]


class LoopModel(Qwen2_5_VLModel):
    """The plain inner model with tokens reduced and placed by plain loops, one medium after the other.

    The projector is the model's own module, which is tested to be its recurrence.
    """

    known = None  # features by the place of their pixels, while one row is decoded

    def _left(self, encode, pixels, grids, is_video):
        if self.known is not None and pixels.data_ptr() in self.known:
            return self.known[pixels.data_ptr()]
        outputs = encode(pixels, grids, return_dict=True)
        merge, left = self.config.vision_config.spatial_merge_size, []
        for tokens, (steps, height, width) in zip(outputs.pooler_output, grids.tolist()):
            tokens = tokens if self.temporal_projector is None else self.temporal_projector([tokens])[0]
            grid = steps, height // merge, width // merge
            left.append(reduce_by_loops(tokens, grid, *numbers_of(self.reducing, is_video)))
        outputs.pooler_output = tuple(left)
        if self.known is not None:
            self.known[pixels.data_ptr()] = outputs
        return outputs

    def get_video_features(self, pixel_values_videos, video_grid_thw=None, **kwargs):
        return self._left(super().get_video_features, pixel_values_videos, video_grid_thw, True)

    def get_image_features(self, pixel_values, image_grid_thw=None, **kwargs):
        return self._left(super().get_image_features, pixel_values, image_grid_thw, False)

    def get_rope_index(
        self,
        input_ids,
        mm_token_type_ids,
        image_grid_thw=None,
        video_grid_thw=None,
        second_per_grid_ts=None,
        attention_mask=None,
        **kwargs,
    ):
        positions, deltas = torch.zeros(3, *input_ids.shape, dtype=torch.long), []
        images = iter(() if image_grid_thw is None else image_grid_thw)
        videos = iter(() if video_grid_thw is None else zip(video_grid_thw, second_per_grid_ts))
        for row, kinds in enumerate(mm_token_type_ids.tolist()):
            seen = [column for column in range(len(kinds)) if attention_mask is None or attention_mask[row, column]]
            placed, begin = [], 0
            while len(placed) < len(seen):
                kind = kinds[seen[len(placed)]]
                if kind == 0:
                    places = [(0, 0, 0)]
                elif kind == 1:
                    places = places_of(next(images), self.reducing, False)
                else:
                    grid_thw, seconds = next(videos)
                    places = places_of(grid_thw, self.reducing, True, float(seconds))
                placed += [tuple(begin + place for place in triple) for triple in places]
                begin += 1 + max(max(row, column) for _, row, column in places)
            positions[:, row, seen] = torch.tensor(placed).T
            deltas.append([int(torch.tensor(placed).max()) + 1 - len(seen)])
        return positions, torch.tensor(deltas)

    def forward(self, *args, token_reduction=None, **kwargs):
        return super().forward(*args, **kwargs)


class LoopReference(Qwen2_5_VLForConditionalGeneration):
    """The plain class around `LoopModel`."""

    @classmethod
    def of(cls, plain, model):
        """With the weights and reductions of a model."""
        reference = copy.deepcopy(plain)
        reference.__class__, reference.model.__class__ = cls, LoopModel
        reference.model.reducing = model.config
        reference.model.temporal_projector = copy.deepcopy(model.model.temporal_projector)
        reference.load_state_dict(model.state_dict())
        return reference

    def generate(self, *args, token_reduction=None, **kwargs):
        return super().generate(*args, **kwargs)


@dataclass
class ReferenceRun:
    new_ids: list[int] = field(default_factory=list)
    states: list[torch.Tensor] = field(default_factory=list)
    stop_reason: str = "none"


def single_rows(inputs, config):
    """Split a batch into rows without padding, with their own pixels."""
    taken = {"image": 0, "video": 0}
    taken_pixels = {"image": 0, "video": 0}
    names = {"image": ("image_grid_thw", "pixel_values"), "video": ("video_grid_thw", "pixel_values_videos")}
    for row in range(len(inputs["input_ids"])):
        kept = inputs["attention_mask"][row].bool()
        single = {"input_ids": inputs["input_ids"][row][kept][None], "attention_mask": torch.ones(1, int(kept.sum()))}
        single["attention_mask"] = single["attention_mask"].long()
        single["mm_token_type_ids"] = inputs["mm_token_type_ids"][row][kept][None]
        for kind, (grid_name, pixel_name) in names.items():
            token_id = getattr(config, f"{kind}_token_id")
            num_tokens = int((single["input_ids"] == token_id).sum())
            while num_tokens > 0:
                grid = inputs[grid_name][taken[kind]]
                num_pixels = int(grid.prod())
                pixels = inputs[pixel_name][taken_pixels[kind] : taken_pixels[kind] + num_pixels]
                single[grid_name] = torch.cat([single.get(grid_name, grid[:0].reshape(0, 3)), grid[None]])
                single[pixel_name] = torch.cat([single.get(pixel_name, pixels[:0]), pixels])
                if kind == "video" and "second_per_grid_ts" in inputs:
                    times = torch.as_tensor(inputs["second_per_grid_ts"][taken[kind]]).reshape(1)
                    single["second_per_grid_ts"] = torch.cat([single.get("second_per_grid_ts", times[:0]), times])
                num_tokens -= len(places_of(grid, config, kind == "video"))
                taken[kind] += 1
                taken_pixels[kind] += num_pixels
        yield single


def positions_of(model, row, length):
    """M-RoPE positions of a row of `length` tokens, whatever comes after the prompt being text."""
    prompt_length = row["input_ids"].shape[1]
    if "image_grid_thw" in row or "video_grid_thw" in row:
        extra = {name: row[name] for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts") if name in row}
        prompt, _ = model.model.get_rope_index(row["input_ids"], mm_token_type_ids=row["mm_token_type_ids"], **extra)
    else:
        prompt = torch.arange(prompt_length).view(1, 1, -1).expand(3, 1, -1)
    following = prompt[0, 0, -1] + 1 + torch.arange(length - prompt_length)
    return torch.cat([prompt, following.view(1, 1, -1).expand(3, 1, -1)], dim=-1)


def recompute(model, row, embeds, attention_mask=None):
    """Post-norm hidden states `(length, hidden)` of the whole sequence from embeddings, without a cache."""
    vision = {
        k: row[k] for k in ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw") if k in row
    }
    outputs = model.model(
        inputs_embeds=embeds,
        position_ids=positions_of(model, row, embeds.shape[1]),
        attention_mask=attention_mask,
        use_cache=False,
        **vision,
    )
    return outputs.last_hidden_state[0]


@torch.no_grad()
def reference_generate(
    model, row, tokens, max_new_tokens, mode, size, stop="budget", max_blocks=1, eos=(), iterations=None
):
    """Greedy decoding of one row by the rules of the design, recomputing everything at every step.

    With `iterations`, a block's slots hold what so many parallel passes over guesses feed last.
    """
    start, pad, end = tokens
    run = ReferenceRun()
    model.model.known = {}
    embeds = model.get_input_embeddings()(row["input_ids"])
    in_block = int(row["input_ids"][0, -1]) == start
    num_blocks, num_slots = int(in_block), 0
    for step in range(max_new_tokens):
        hidden = recompute(model, row, embeds)
        logits = model.lm_head(hidden[-1]).float()
        if in_block:
            wants_end = stop == "token" and int(logits.argmax()) == end
            token = end if wants_end or num_slots == size else pad
        elif mode == "force" and step == 0:
            token = start
        else:
            allowed = mode != "off" and num_blocks < max_blocks
            logits[[pad, end] if allowed else [start, pad, end]] = -torch.inf
            token = int(logits.argmax())
        run.new_ids.append(token)
        if token == pad:
            if num_slots == 0 and iterations is not None:
                guesses = [hidden[-1]] * size
                for _ in range(iterations - 1):
                    states = recompute(model, row, torch.cat([embeds, torch.stack(guesses)[None]], dim=1))
                    guesses = [hidden[-1], *states[embeds.shape[1] : -1]]
            vector = hidden[-1] if iterations is None else guesses[num_slots]
            run.states.append(vector)
            num_slots += 1
        else:
            vector = model.get_input_embeddings().weight[token]
        embeds = torch.cat([embeds, vector[None, None]], dim=1)
        if token == start:
            in_block, num_slots, num_blocks, run.stop_reason = True, 0, num_blocks + 1, "length"
        elif token == end:
            in_block, run.stop_reason = False, "budget" if num_slots == size else "token"
        if token in eos:
            break
    model.model.known = None
    if in_block:
        run.stop_reason = "length"
    return run
