"""Runs benchmarks: decodes in worker processes, answers in batches, writes each answer down as soon as it is there."""

import hashlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .answering import Answerer, Clip, Reply, read_question_clip
from .benchmarks.base import Benchmark, Prompt, Question
from .clock import MODULES
from .parsing import score_answer
from .prompts import RESERVED, prompt_text
from .protocols import Protocol


@dataclass(frozen=True)
class Item:
    """A question of a benchmark, as a run asks it.

    Args:
        benchmark (`Benchmark`): where it is from.
        question (`Question`): what is asked.
        prompt_name (`str`), thinking (`bool`): how it is put, see `prompt_text`.
        settings (`str`): of the run: whatever else the answer depends on.
    """

    benchmark: Benchmark
    question: Question
    prompt_name: str = "storms"
    thinking: bool = False
    settings: str = ""

    def prompt(self, frame_times: Sequence[float] | None = None) -> Prompt:
        """How it is put to a model that sees frames at some seconds of the clip; subtitles depend on them."""
        if frame_times is not None:
            frame_times = [(self.question.start or 0.0) + time for time in frame_times]
        return prompt_text(self.benchmark, self.question, self.prompt_name, self.thinking, frame_times)

    @cached_property
    def key(self) -> str:
        """A hash of all that the answer depends on."""
        asked = {name: value for name, value in asdict(self.question).items() if name != "video"}
        parts = (self.settings, self.benchmark.name, asdict(self.prompt()), asked, _video_stamp(self.question.video))
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]

    @cached_property
    def clip(self) -> tuple[Any, ...]:
        """What questions must agree on to share an encoded prefix."""
        one = self.question
        return (one.video, one.video_fps, one.start, one.end, self.prompt().system)

    @property
    def failure(self) -> str:
        """Why it can't be asked, before a look at its video; empty if it can."""
        texts = self.prompt().system + self.prompt().text
        if found := [token for token in RESERVED if token in texts]:
            return f"reserved text: {', '.join(found)} would be taken for a token that marks turns, media or blocks"
        return self.question.failure


def _video_stamp(video: str | bytes | Sequence[str]) -> Any:
    """What tells a video from a replaced one under the same name."""
    if isinstance(video, bytes):
        return hashlib.sha256(video).hexdigest()
    files = [video] if isinstance(video, str) else list(video)
    return [(Path(file).name, Path(file).stat().st_size) for file in files if file and Path(file).is_file()]


class Journal:
    """Finished answers, a line each, written down before the next is asked: a killed run goes on behind the last one.

    Args:
        folder (`Path`): made if missing.
        rank (`int`): each process writes a file of its own and reads all.
    """

    def __init__(self, folder: Path, rank: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / f"answers-{rank:05d}.jsonl"

    def read(self) -> dict[str, dict[str, Any]]:
        """Answers by key; a failure only where there is no answer. A line that a kill cut off is none."""
        answers = {}
        for path in sorted(self.folder.glob("answers-*.jsonl")):
            for line in path.read_bytes().split(b"\n"):
                try:
                    answer = json.loads(line)
                    if not answer.get("failure") or answer["key"] not in answers:
                        answers[answer["key"]] = answer
                except (ValueError, KeyError, TypeError):
                    continue
        return answers

    def write(self, answers: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(answer) + "\n" for answer in answers).encode()
        with self.path.open("ab") as file:
            if file.tell() and not self._ends_whole():
                text = b"\n" + text
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def _ends_whole(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"


class _Clips(Dataset):
    """Reads the clip of each group of questions; in a worker process, where there are any."""

    def __init__(self, processor: Any, items: Sequence[Item], protocol: Protocol, dtype: Any):
        self.processor, self.items, self.protocol, self.dtype = processor, items, protocol, dtype

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[int, Clip | str]:
        item = self.items[index]
        if failure := item.failure:
            return index, failure
        try:
            clip = read_question_clip(self.processor, item.question, self.protocol, item.prompt().system)
        except (ValueError, OSError) as error:  # VideoDecodeError is a ValueError
            return index, f"{type(error).__name__}: {error}"
        # The vision tower casts to its own type anyway; half the bytes then wait in the queue.
        clip.media["pixel_values_videos"] = clip.media["pixel_values_videos"].to(self.dtype)
        return index, clip


def run(
    answerer: Answerer,
    items: Sequence[Item],
    protocol: Protocol,
    journal: Journal,
    num_workers: int = 0,
    share_prefix: bool = True,
    state: PartialState | None = None,
) -> list[dict[str, Any]]:
    """Ask what the journal does not hold an answer to.

    Args:
        answerer (`Answerer`): the model and how it generates.
        items (`Sequence[Item]`): with keys that differ.
        protocol (`Protocol`): frames and pixels.
        journal (`Journal`): answers of an earlier, perhaps killed, run are taken from there; what failed is tried
            again, as a disk or a network may be back.
        num_workers (`int`): processes that decode; 0 decodes between batches.
        share_prefix (`bool`): encode a video once for all its questions.
        state (`PartialState`, *optional*): under `accelerate launch` each process asks its part.

    Returns:
        One answer an item, in order; on every process.
    """
    wanted = {item.key for item in items}
    done = {key: answer for key, answer in journal.read().items() if key in wanted and not answer["failure"]}
    # 1. Questions that share a clip, and this process's part of them.
    groups: dict[Any, list[Item]] = defaultdict(list)
    for number, item in enumerate(items):
        if item.key not in done:
            is_shared = share_prefix and not item.failure
            groups[item.clip if is_shared else number].append(item)
    mine = list(groups.values())
    if state is not None:
        mine = mine[state.process_index :: state.num_processes]
        state.wait_for_everyone()  # nobody writes before all have read
    clips = _Clips(answerer.processor, [group[0] for group in mine], protocol, answerer.model.dtype)
    loader = DataLoader(clips, batch_size=None, num_workers=num_workers, prefetch_factor=2 if num_workers else None)
    # 2. A window of clips at a time, the longest first, so that rows of a batch are of about one length.
    bar = tqdm(
        total=len(done) + sum(map(len, mine)),
        initial=len(done),
        desc="answer",
        unit="question",
        disable=None if state is None or state.is_local_main_process else True,
    )
    window: list[tuple[list[Item], Clip]] = []
    for index, clip in loader:
        if isinstance(clip, str):
            journal.write(_record(item, None, None, clip) for item in mine[index])
            bar.update(len(mine[index]))
            continue
        window.append((mine[index], clip))
        if sum(len(group) for group, _ in window) >= 2 * answerer.batch_size:
            _ask(answerer, window, journal, bar)
            window = []
    _ask(answerer, window, journal, bar)
    bar.close()
    if state is not None:
        state.wait_for_everyone()
    done = journal.read()
    return [done[item.key] for item in items]


def _ask(answerer: Answerer, window: list[tuple[list[Item], Clip]], journal: Journal, bar: Any) -> None:
    window = sorted(window, key=lambda one: len(one[1].input_ids), reverse=True)
    while window:
        batch = [window.pop(0)]
        while window and sum(len(group) for group, _ in [*batch, window[0]]) <= answerer.batch_size:
            batch.append(window.pop(0))
        answerer.clock.take()
        began = time.perf_counter()
        texts = [[item.prompt(clip.record["frame_times"]).text for item in group] for group, clip in batch]
        replies = answerer.answer([clip for _, clip in batch], texts)
        seconds = time.perf_counter() - began
        count = sum(map(len, texts))
        modules = {name: round(one / count, 6) for name, one in answerer.clock.take().items()}
        answers = []
        for (group, clip), given in zip(batch, replies):
            for item, reply in zip(group, given):
                cost = {"seconds": seconds / count, "latency": seconds, "batch_size": count, "shared_by": len(group)}
                cost = {name: round(value, 6) for name, value in cost.items()}
                answers.append(_record(item, clip, reply) | cost | {"modules": modules})
        journal.write(answers)
        bar.update(count)


def _record(item: Item, clip: Clip | None, reply: Reply | None, failure: str = "") -> dict[str, Any]:
    """An answer as the run's file holds it."""
    question = item.question
    text = reply.text if reply is not None else ""
    record = {
        "key": item.key,
        "benchmark": item.benchmark.name,
        "id": question.id,
        "video_id": question.video_id,
        "categories": dict(question.categories),
        "num_options": len(question.options),
        "answer": question.answer,
        "text": text,
        **score_answer(question.with_letters(text), question.options, question.answer)._asdict(),
        "failure": failure,
    }
    if clip is not None and reply is not None:
        latents = {"latent_length": reply.latent_length, "latent_stop_reason": reply.latent_stop_reason}
        record |= clip.record | latents | {"num_text_tokens": reply.num_text_tokens}
    return record


def costs(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a run's answers took: questions a second, and how long one waits for its batch.

    Returns:
        `dict`: `seconds_per_question` (model time divided by questions), `modules`, how much of it each of `MODULES`
        took, `questions_per_second`, `latency_median` and `latency_p95` in seconds (of whole batches; with
        `--batch_size 1` of single questions), `video_tokens`, those that went through the language model,
        `video_tokens_unshared`, had every question run its own, and `video_tokens_per_question`.
    """
    asked = [answer for answer in answers if "seconds" in answer]
    if not asked:
        return {}
    seconds = sum(answer["seconds"] for answer in asked)
    latency = torch.tensor([answer["latency"] for answer in asked], dtype=torch.float64)
    unshared = sum(answer["num_video_tokens"] for answer in asked)
    return {
        "seconds_per_question": seconds / len(asked),
        "modules": {name: sum(answer["modules"][name] for answer in asked) / len(asked) for name in MODULES},
        "questions_per_second": len(asked) / seconds,
        "latency_median": latency.median().item(),
        "latency_p95": latency.quantile(0.95).item(),
        "video_tokens": sum(answer["num_video_tokens"] / answer["shared_by"] for answer in asked),
        "video_tokens_unshared": unshared,
        "video_tokens_per_question": unshared / len(asked),
    }
