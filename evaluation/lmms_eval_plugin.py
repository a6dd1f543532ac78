"""Our models in lmms-eval, by an entry point: `pip install "storms[lmms-eval]"`, then

    python -m lmms_eval --model storms --model_args pretrained=org/storms-7b,protocol=uniform32 --tasks videomme

They run as in `python -m evaluation`: batches, shared prefixes, worker processes. Tasks that ask about one video with
one text are taken; others are refused, not guessed at.
"""

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages

from .answering import Answerer, load_model
from .benchmarks.base import Benchmark, Prompt, Question
from .protocols import Protocol
from .runner import Item, Journal, run


logger = logging.getLogger(__name__)

MANIFEST = ModelManifest("storms", chat_class_path=f"{__name__}.Storms")


@dataclass(frozen=True)
class _Request(Item):
    """A request as a question: the task has written its text already."""

    def prompt(self, frame_times: Sequence[float] | None = None) -> Prompt:
        return Prompt(self.question.question, system=self.question.task)


class Storms(lmms):
    """A STORMS or plain Qwen2.5-VL checkpoint.

    Args:
        pretrained (`str`): folder or Hub id.
        revision (`str`, *optional*): commit, tag or branch of it.
        protocol (`str`): which frames: `uniform32`, `fps2_max32`, with any numbers.
        min_frame_pixels, max_frame_pixels (`int`, *optional*): area of a frame; the checkpoint's own by default.
        batch_size (`int`): questions at once.
        num_workers (`int`): processes that decode videos.
        dtype, attention (`str`, *optional*): as in `python -m evaluation`.
        latent_mode, latent_size, latent_stop, temporal_pool, spatial_pool, temporal_sampling (*optional*): of
            `generate`; the checkpoint's own by default.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        protocol: str = "uniform32",
        min_frame_pixels: int | None = None,
        max_frame_pixels: int | None = None,
        batch_size: int | str = 1,
        num_workers: int = 4,
        dtype: str = "auto",
        attention: str | None = None,
        latent_mode: str | None = None,
        latent_size: int | None = None,
        latent_stop: str | None = None,
        temporal_pool: int | None = None,
        spatial_pool: int | None = None,
        temporal_sampling: int | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        self.accelerator = Accelerator()  # by which lmms-eval's processes wait for each other
        pixels = {"min_frame_pixels": min_frame_pixels, "max_frame_pixels": max_frame_pixels}
        self.protocol = Protocol.named(protocol, **pixels)
        model, self.processor = load_model(pretrained, revision, dtype, attention)
        self.model = model if device is None else model.to(device)
        self.batch_size, self.num_workers = int(batch_size), int(num_workers)
        options: dict[str, Any] = {"latent_mode": latent_mode, "latent_size": latent_size, "latent_stop": latent_stop}
        options |= {"temporal_pool": temporal_pool, "spatial_pool": spatial_pool}
        options |= {"temporal_sampling": temporal_sampling}
        self.options = {name: value for name, value in options.items() if value is not None}

    @property
    def device(self) -> Any:
        return self.model.device

    def generate_until(self, requests: list[Any]) -> list[str]:
        """An answer to each request, cut at the first of the task's stop strings; "" where a video can't be read."""
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[2].items(), key=str)), []).append(index)
        for indices in groups.values():
            options = dict(requests[indices[0]].args[2])
            stops = options.pop("until", None) or []
            answerer = Answerer(
                self.model,
                self.processor,
                int(options.pop("max_new_tokens", 128)),
                self.batch_size,
                **_sampling(options),
                **self.options,
            )
            questions = [_question(self, requests[index], index) for index in indices]
            benchmark = Benchmark("lmms-eval", "lmms-eval", "", questions)
            with tempfile.TemporaryDirectory() as folder:  # lmms-eval keeps answers itself, with --use_cache
                items = [_Request(benchmark, question) for question in questions]
                answers = run(answerer, items, self.protocol, Journal(Path(folder)), self.num_workers)
            for index, answer in zip(indices, answers):
                if answer["failure"]:
                    logger.error("Document %s: %s. Its answer is empty.", requests[index].args[3], answer["failure"])
                texts[index] = _cut(answer["text"], [stops] if isinstance(stops, str) else stops)
                context, _, given, *_ = requests[index].args
                self.cache_hook.add_partial("generate_until", (context, given), texts[index])
        return texts

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "Likelihoods of given texts leave no room for a latent block. Use tasks that generate."
        )

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError("Several rounds would need the states of earlier blocks. Use tasks of one round.")


def _question(model: Storms, request: Any, index: int) -> Question:
    """A request's one video and text.

    Raises:
        ValueError: if there is more or less than one video, an image or sound, or text before the video.
    """
    _, to_messages, _, doc_id, task, split = request.args
    messages = ChatMessages(messages=to_messages(model.task_dict[task][split][doc_id])).messages
    kinds = [(message.role, part.type) for message in messages for part in message.content]
    asked = [kind for kind in kinds if kind[0] != "system"]
    if asked[:1] != [("user", "video")] or any(kind != ("user", "text") for kind in asked[1:]):
        raise ValueError(
            f"Document {doc_id} of {task} consists of {kinds}, expected one video of the user's and then text. Choose "
            "a task of that kind."
        )
    parts = [part for message in messages if message.role != "system" for part in message.content]
    system = [part.text for message in messages if message.role == "system" for part in message.content]
    return Question(
        id=str(index),
        question="".join(part.text for part in parts[1:]),
        answer="",
        video_id=str(parts[0].url),
        video=parts[0].url,
        start=parts[0].start_time,
        end=parts[0].end_time,
        task="".join(system),
    )


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
    """A task's generation options as `generate` takes them; a temperature of zero is greedy."""
    if not options.get("do_sample", bool(options.get("temperature"))) or not options.get("temperature", 1.0):
        return {"do_sample": False}
    chosen = {name: options[name] for name in ("temperature", "top_p", "top_k") if options.get(name) is not None}
    return {"do_sample": True, **chosen}


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        if stop:
            text = text.split(stop)[0]
    return text
