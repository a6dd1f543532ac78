"""Training steps: what each stage costs beside supervised fine-tuning on the same rows."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from recipes.collator import IGNORED
from recipes.targets import encode_targets

from .generation import LATENT_SIZE
from .harness import Bench, PeakMemory, Result, Work, beside_floor, goal, summarize
from .shapes import SIZES, build, language_bytes, language_flops, make_processor, video_inputs, vision_flops


LIMITS = {"stage1, cached": 1.05, "stage2": 1.3}


def measure_train_step(bench: Bench) -> list[Result]:
    """a training step: SFT, Stage I, Stage II, K + 1 passes; with checkpointing and without"""
    return [result for name in bench.models_or("small") for result in _train_step(bench, name)]


def _train_step(bench: Bench, name: str) -> list[Result]:
    steps = TrainingSteps(bench, name)
    steps.checkpoint(True)
    steps.train("sft")  # the optimizer's own state is made by its first step
    return [result for is_on in (False, True) for result in _stages(bench, name, steps, is_on)]


def _stages(bench: Bench, name: str, steps: "TrainingSteps", is_checkpointed: bool) -> list[Result]:
    steps.checkpoint(is_checkpointed)
    suffix = ", checkpointed" if is_checkpointed else ""
    naive = f"naive, {LATENT_SIZE + 1} passes"
    ways: dict[str, Callable[[], float]] = {
        "sft": partial(steps.train, "sft"),
        "stage1, cached": lambda: steps.imitate(steps.targets),
        "stage1, on the fly": lambda: steps.imitate(steps.encode()),
        "stage2": partial(steps.train, "block", latent_input="rollout"),
        naive: steps.naive,
    }
    # 1. Each once: memory, losses that must agree, and a warm-up.
    memory: dict[str, int] = {}
    losses: dict[str, float] = {}

    def try_out(way: str) -> None:
        steps.optimizer.zero_grad()  # what a way that did not fit has left
        with PeakMemory(bench) as used:
            losses[way] = ways[way]()
        memory[way] = used.bytes

    fitting = list(bench.try_out({way: partial(try_out, way) for way in ways}))
    if "sft" not in fitting:
        return []
    tolerance = 1e-4 if bench.dtype == torch.float32 else 0.05
    if naive in fitting and abs(losses["stage2"] - losses[naive]) > tolerance:
        raise RuntimeError("Stage II and the naive way have different losses, so their times can't be compared.")
    # 2. In turns; the naive way, as long as all others together, with SFT alone.
    groups = [[way for way in fitting if way != naive]] + [["sft", naive]] * (naive in fitting)
    results = []
    for group in groups:
        seconds = bench.measure({way: ways[way] for way in group}, f"training steps of {name}{suffix}")
        for way in group if naive not in group else [naive]:
            result: Result = {
                "workload": "training step, each stage against SFT",
                "model": f"{name}, {way}{suffix}",
                "batch": f"{steps.num_rows} rows of {steps.length} tokens, K = {LATENT_SIZE}",
                **summarize({"sft": seconds["sft"], "stage": seconds[way]}, "stage", "sft"),
                "memory_bytes": memory[way],
                "memory_ratio": memory[way] / memory["sft"],
            }
            if way != naive:
                floor = steps.floor(is_checkpointed, encodes=way == "stage1, on the fly")
                result |= beside_floor(result["median_seconds"]["stage"], floor)
            if way in LIMITS:
                result |= goal("times SFT", result["ratio"], at_most=LIMITS[way])
            results.append(result)
    return results


class TrainingSteps:
    """A model, an optimizer and batches of equal rows, one with a latent block and one without."""

    def __init__(self, bench: Bench, name: str):
        self.bench, size = bench, SIZES[name]
        self.num_rows = size.num_train_rows
        self.model = build(name, bench.device, bench.dtype).train()
        self.model.model.visual.requires_grad_(False)
        trained = [one for one in self.model.parameters() if one.requires_grad]
        self.num_trained = sum(one.numel() for one in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, fused=bench.is_cuda or None)
        inputs = video_inputs(name, size.num_train_frames, self.num_rows)
        self.media = (inputs["pixel_values_videos"].to(bench.device), inputs["video_grid_thw"].to(bench.device))
        self.batches = {
            kind: {key: value.to(bench.device) for key, value in _labelled(name, inputs, block).items()}
            for kind, block in (("sft", 0), ("block", LATENT_SIZE))
        }
        self.length = self.batches["sft"]["input_ids"].shape[1]
        self.targets = self.encode()

    def encode(self) -> torch.Tensor:
        """Targets of a thought video as long as the video itself."""
        rows = torch.ones(self.num_rows, dtype=torch.long)
        return encode_targets(self.model, *self.media, rows, LATENT_SIZE)

    def checkpoint(self, is_on: bool) -> None:
        if is_on:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.activation_checkpointing_disable()

    def train(self, kind: str, **inputs: Any) -> float:
        batch = self.batches[kind]
        return self.step(self.model(**batch, **inputs, logits_to_keep=_kept(batch), use_cache=False).loss)

    def imitate(self, targets: torch.Tensor) -> float:
        """Stage I."""
        return self.train("block", latent_input="teacher_forced", latent_targets=targets)

    def naive(self) -> float:
        """Stage II without a cache: the whole sequence once more for every slot."""
        batch = {name: one for name, one in self.batches["block"].items() if name != "labels"}
        states = torch.zeros_like(self.targets)
        for slot in range(LATENT_SIZE):
            found = self.model(**batch, latent_input="teacher_forced", latent_targets=states, logits_to_keep=1)
            states = torch.cat([states[:, :slot], found.latent_states[:, slot : slot + 1], states[:, slot + 1 :]], 1)
        batch["labels"] = self.batches["block"]["labels"]
        found = self.model(**batch, latent_input="teacher_forced", latent_targets=states, logits_to_keep=_kept(batch))
        return self.step(found.lm_loss)

    def step(self, loss: torch.Tensor) -> float:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def floor(self, checkpointed: bool, encodes: bool) -> float:
        """Seconds: the forward pass, twice as much backward and once more if it is recomputed; the frozen tower once
        for each video; AdamW reads weights, gradients and two moments, and writes all but the gradients."""
        config = self.model.config
        passes = 4 if checkpointed else 3
        language = self.num_rows * language_flops(config, self.length) * passes
        vision = vision_flops(config, self.media[1].tolist()) * (2 if encodes else 1)
        computing = Work(language + vision, passes * language_bytes(config, self.bench.dtype.itemsize))
        updating = Work(bytes=7 * self.num_trained * self.bench.dtype.itemsize)
        return computing.floor(self.bench.peaks) + updating.floor(self.bench.peaks)


def _labelled(name: str, inputs: dict[str, Any], num_slots: int) -> dict[str, torch.Tensor]:
    """`[prompt]<|latent_start|><|latent_pad|>*K<|latent_end|>[answer]`, labelled as the collator does."""
    tokenizer = make_processor(name).tokenizer
    start, pad, end = tokenizer.convert_tokens_to_ids(["<|latent_start|>", "<|latent_pad|>", "<|latent_end|>"])
    block = [start, *[pad] * num_slots, end] if num_slots else []
    added = torch.tensor([[*block, *tokenizer("A<|im_end|>")["input_ids"]]])
    prompt = inputs["input_ids"]
    added = added.expand(len(prompt), -1)
    room = (0, added.shape[1])
    return {
        **{key: inputs[key] for key in ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")},
        "input_ids": torch.cat([prompt, added], dim=1),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], room, value=1),
        "mm_token_type_ids": torch.nn.functional.pad(inputs["mm_token_type_ids"], room),
        "labels": torch.cat([torch.full_like(prompt, IGNORED), added.masked_fill(added == pad, IGNORED)], dim=1),
    }


def _kept(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Positions before a label, the only ones whose logits are computed."""
    return torch.nn.functional.pad(batch["labels"][:, 1:] != IGNORED, (0, 1))
