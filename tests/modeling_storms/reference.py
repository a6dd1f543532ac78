"""An independent latent mode: plain transformers classes, no cache, one row at a time, plain Python rules."""

from dataclasses import dataclass, field

import torch


@dataclass
class ReferenceRun:
    new_ids: list[int] = field(default_factory=list)
    states: list[torch.Tensor] = field(default_factory=list)
    stop_reason: str = "none"


def single_rows(inputs, config):
    """Split a batch into rows without padding, with their own pixels."""
    merge = config.vision_config.spatial_merge_size**2
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
                num_tokens -= num_pixels // merge
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
    following = prompt.max() + 1 + torch.arange(length - prompt_length)
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
    if in_block:
        run.stop_reason = "length"
    return run
