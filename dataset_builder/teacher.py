"""Teachers: who chooses keyframes and writes reasoning plans, on this machine or through an OpenAI-compatible API."""

import base64
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from string import Template
from threading import Thread
from typing import Any, Protocol, TypeVar

import numpy as np
from PIL import Image

from .schema import LETTERS, Rejected, is_machine_path


PROMPTS = Path(__file__).parent / "prompts"
KEYFRAMES, REASONING_PLAN = "keyframes", "reasoning_plan"  # the tasks: names of prompts and of replies' only field
DETAIL_CHARACTERS = 300
LONGEST_RETRY_AFTER = 120.0  # seconds; the client does not wait for a server that asks for more
SHORTEST_SECRET = 8  # characters; local servers take any word ("EMPTY") as a key, which is no secret and may be text

T = TypeVar("T")


class TeacherSetupError(RuntimeError):
    """The teacher can't work as it is set up (key, model, address, credit): every row would fail alike."""


class BadReply(ValueError):
    """A teacher replied, but not with what was asked for; asking again may help.

    Args:
        reason (`str`): a short name, the row's reason in the ledger if the teacher does not do better.
        detail (`str`): what was seen and what was expected; told to the teacher when it is asked again.
        usage (`dict[str, int]`, *optional*): what the reply cost, see `Reply`.
    """

    def __init__(self, reason: str, detail: str, usage: dict[str, int] | None = None):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.usage = reason, detail, usage or {}


@dataclass(eq=False)
class TeacherRequest:
    """What a teacher sees of a row.

    Args:
        question (`str`): without options.
        options (`list[str]`): option texts without letters; empty for a free-form question.
        answer (`str`): the correct option's letter, or the answer's text.
        frames (`np.ndarray` of shape `(num_frames, height, width, 3)`): uint8 RGB, in order: the candidates when
            keyframes are chosen, the keyframes when a plan is written.
        timestamps (`list[float]`): seconds, one for each frame.
        source_plan (`str`): a plan that the source knows; "" where it knows none.
        correction (`str`): what was wrong with the last reply; "" when asking for the first time.
    """

    question: str
    options: list[str]
    answer: str
    frames: np.ndarray
    timestamps: list[float]
    source_plan: str = ""
    correction: str = ""

    def __post_init__(self):
        shape = self.frames.shape
        if len(shape) != 4 or 0 in shape or shape[3] != 3 or self.frames.dtype != np.uint8:
            raise ValueError(f"Saw {self.frames.dtype} frames of shape {shape}, expected uint8 (N, H, W, 3), N > 0.")
        if len(self.timestamps) != len(self.frames):
            raise ValueError(
                f"Saw {len(self.timestamps)} timestamps for {len(self.frames)} frames, expected one each."
            )


@dataclass
class Reply:
    """A teacher's reply and what it cost: `usage` counts `calls`, `input_tokens` and `output_tokens`."""

    value: Any
    usage: dict[str, int] = field(default_factory=dict)


class Teacher(Protocol):
    """Chooses keyframes and writes plans; instances are pickled to workers and called from several threads."""

    name: str

    def settings(self) -> dict[str, Any]:
        """What decides its replies, as JSON values: no address, no key."""
        ...

    def choose_keyframes(self, request: TeacherRequest, max_keyframes: int) -> Reply:
        """Positions among the candidate frames (`list[int]`), not yet checked.

        Raises:
            BadReply: if the reply is unusable.
            Rejected: if the row can't get a reply; `transient` where another time may do.
            TeacherSetupError: if no row can.
        """
        ...

    def write_plan(self, request: TeacherRequest) -> Reply:
        """A reasoning plan (`str`), not yet checked. Raises as `choose_keyframes` does."""
        ...


def ask_until_valid(
    ask: Callable[[TeacherRequest], Reply], request: TeacherRequest, check: Callable[[Any], T], max_attempts: int
) -> tuple[T, dict[str, Any]]:
    """Ask, check, and ask again with the fault told, until a reply passes.

    Args:
        check (`Callable`): the value to use, from a reply's value; raises `BadReply`.
        max_attempts (`int`): replies to pay for at most, 1 or more.
    Returns:
        the checked value, and `{"attempts": ..., "usage": ...}` summed over all attempts, failed ones too.
    Raises:
        Rejected: with the last reply's fault, or at once with the teacher's own `Rejected`; `details` as above.
    """
    if max_attempts < 1:
        raise ValueError(f"Saw max_attempts={max_attempts}, expected 1 or more: a row needs at least one reply.")
    usage = {"calls": 0, "input_tokens": 0, "output_tokens": 0}
    details: dict[str, Any] = {"attempts": 0, "usage": usage}

    def pay(paid: dict[str, int]) -> None:
        for name, count in paid.items():
            usage[name] = usage.get(name, 0) + count

    while True:
        details["attempts"] += 1
        try:
            reply = ask(request)
            pay(reply.usage)
            return check(reply.value), details
        except BadReply as bad:
            pay(bad.usage)
            refused = Rejected(bad.reason, bad.detail, details)
        except Rejected as given_up:
            pay(given_up.details.get("usage", {}))
            refused = Rejected(given_up.reason, given_up.detail, {**given_up.details, **details}, given_up.transient)
            break
        if details["attempts"] == max_attempts:
            break
        request = replace(request, correction=refused.detail)
    raise refused


class LocalTeacher:
    """A teacher without a model or a network: it sees motion and scene changes, and nothing of their meaning."""

    name = "local"
    grid = 16  # frames are compared as pictures of at most grid x grid mean colours
    min_change = 2  # grey levels of 255, in some cell: less is noise
    min_cut = 25.0  # grey levels of 255, mean over the picture: more is another scene

    def settings(self) -> dict[str, Any]:
        return {"kind": self.name, "version": 1}

    def choose_keyframes(self, request: TeacherRequest, max_keyframes: int) -> Reply:
        """The first frame, then where most changes or starts to change, ascending; a static video has only the first.

        Two of them are at least `num_frames // (2 * max_keyframes)` frames apart, unless a scene cut is between them.
        """
        differences = self._differences(request.frames)
        num_frames = len(request.frames)
        change = np.concatenate([[0.0], differences.mean(axis=(1, 2))])  # (num_frames,), to the frame before
        moves = np.concatenate([[False], differences.max(axis=(1, 2), initial=0) >= self.min_change])
        cuts_so_far = np.cumsum(change >= self.min_cut)
        rise = np.maximum(np.diff(change, prepend=0.0), 0.0)  # so that a movement's first frame beats its later ones
        gap = max(1, num_frames // (2 * max_keyframes))
        chosen = [0]
        for position in np.argsort(-(change + rise), kind="stable").tolist():
            if len(chosen) == max_keyframes:
                break
            near = [one for one in chosen if abs(one - position) < gap]
            if moves[position] and all(cuts_so_far[one] != cuts_so_far[position] for one in near):
                chosen.append(position)
        return Reply(sorted(chosen))

    def write_plan(self, request: TeacherRequest) -> Reply:
        """The source's plan where it has one; else when, where and how much the picture changes, in plain words."""
        if request.source_plan:
            return Reply(request.source_plan)
        times = request.timestamps
        if len(times) == 1:
            return Reply(f"One picture is seen, at {times[0]:.2f} s. Whether anything moves is not known.")
        sentences = []
        for difference, start, end in zip(self._differences(request.frames), times, times[1:]):
            sentences.append(f"From {start:.2f} s to {end:.2f} s {self._describe(difference)}.")
        return Reply(" ".join(sentences))

    def _differences(self, frames: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) frames -> (N - 1, rows, columns) grey levels by which each cell changes."""
        size = min(self.grid, frames.shape[2]), min(self.grid, frames.shape[1])
        small = [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX), np.int16) for frame in frames]
        return np.abs(np.diff(np.stack(small), axis=0)).max(axis=3)

    def _describe(self, difference: np.ndarray) -> str:
        if difference.mean() >= self.min_cut:
            return "the picture changes to another scene or view"
        changed = difference >= self.min_change
        if not changed.any():
            return "nothing moves"
        rows, columns = ((2 * np.arange(size) + 1) * 3 // (2 * size) for size in difference.shape)
        sums = np.zeros((3, 3))
        np.add.at(sums, (rows[:, None], columns[None, :]), difference)
        row, column = np.unravel_index(sums.argmax(), sums.shape)
        where = " ".join(filter(None, (("upper", "", "lower")[row], ("left", "", "right")[column]))) or "middle"
        return f"about {max(1, round(100 * changed.mean()))}% of the picture changes, most of it in the {where} part"


@dataclass
class OpenAITeacher:
    """A vision model behind an OpenAI-compatible `/chat/completions` (OpenAI, vLLM, SGLang, llama.cpp, ...).

    The client repeats requests after 429, 5xx, time-outs and lost connections, with exponential back-off or for as
    long as the server's `Retry-After` says, up to two minutes. One call ends within `max_call_seconds`, whatever the
    server does; a row's task makes at most `max_attempts` (of `choose_keyframes` and `write_plan`) such calls.

    Args:
        model (`str`): model id, as the server knows it.
        base_url (`str`, *optional*): the server, with `/v1`; the client's default (`OPENAI_BASE_URL`, then OpenAI).
        api_key_env (`str`): name of the environment variable that holds the key. The key itself is never stored in
            an instance, and is taken out of every error, log record and detail, should a server repeat it.
        timeout (`float`): seconds until a request without a reply is given up.
        max_retries (`int`): requests after the first one that the client makes for one call.
        max_image_side (`int`): pixels; larger frames are scaled down to it.
        temperature, seed (*optional*): sent where not None; some models refuse them.
    Raises:
        ValueError: if an argument can't work, before any row is paid for.
    """

    model: str
    base_url: str | None = field(default=None, repr=False)
    api_key_env: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    max_retries: int = 5
    max_image_side: int = 512
    temperature: float | None = 0.0
    seed: int | None = 0
    name = "openai"

    def __post_init__(self):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            raise ValueError("api_key_env is not the name of an environment variable. Give the name, not the key.")
        if self.base_url is not None and not self.base_url.startswith(("http://", "https://")):
            raise ValueError("base_url must start with http:// or https://, for example http://127.0.0.1:8000/v1.")
        if self.timeout <= 0 or self.max_retries < 0 or self.max_image_side < 1:
            raise ValueError(
                f"Saw timeout={self.timeout}, max_retries={self.max_retries}, max_image_side={self.max_image_side}; "
                "expected more than 0, 0 or more, 1 or more."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_client"}  # it holds the key and sockets

    @property
    def max_call_seconds(self) -> float:
        """Upper limit of one call: every request times out, and every wait is the longest the client accepts."""
        return (self.max_retries + 1) * self.timeout + self.max_retries * LONGEST_RETRY_AFTER

    def settings(self) -> dict[str, Any]:
        return {
            "kind": self.name,
            "model": Path(self.model).name
            if is_machine_path(self.model)
            else self.model,  # servers name models by paths
            "temperature": self.temperature,
            "seed": self.seed,
            "max_image_side": self.max_image_side,
            "prompts": {task: prompt_hash(task) for task in (KEYFRAMES, REASONING_PLAN)},
        }

    def choose_keyframes(self, request: TeacherRequest, max_keyframes: int) -> Reply:
        last_index = len(request.frames) - 1
        limits = {"num_frames": last_index + 1, "last_index": last_index, "max_keyframes": max_keyframes}
        return self._ask(KEYFRAMES, list[int], _instructions(KEYFRAMES, **limits), request)

    def write_plan(self, request: TeacherRequest) -> Reply:
        instructions = _instructions(REASONING_PLAN, num_frames=len(request.frames))
        return self._ask(REASONING_PLAN, str, instructions, request)

    def _ask(self, task: str, kind: Any, instructions: str, request: TeacherRequest) -> Reply:
        client = self._client
        import pydantic

        fields: dict[str, Any] = {task: (kind, ...)}
        schema = pydantic.create_model(task, __config__=pydantic.ConfigDict(extra="forbid", strict=True), **fields)
        sampling = {"temperature": self.temperature, "seed": self.seed}
        body = self._send(
            client,
            model=self.model,
            messages=[
                {"role": "system", "content": instructions},
                {"role": "user", "content": self._content(task, request)},
            ],
            response_format={
                "type": "json_schema",
                "json_schema": {"name": task, "strict": True, "schema": schema.model_json_schema()},
            },
            **{name: value for name, value in sampling.items() if value is not None},
        )
        usage = {"calls": 1, "input_tokens": 0, "output_tokens": 0}

        def bad(reason: str, detail: str) -> BadReply:
            return BadReply(reason, _one_line(detail, client.api_key), usage)

        completion = _load_json(body)
        if completion is None:
            raise bad("teacher_bad_json", f"the response is not JSON: {body!r}")
        if not isinstance(completion, dict) or not isinstance(completion.get("choices"), list):
            raise bad("teacher_bad_shape", f"the response is not a chat completion: {completion!r}")
        reported = completion.get("usage")
        for name, key in (("input_tokens", "prompt_tokens"), ("output_tokens", "completion_tokens")):
            count = reported.get(key) if isinstance(reported, dict) else None
            usage[name] = count if type(count) is int and count >= 0 else 0
        if not completion["choices"]:
            raise bad("teacher_no_choices", "the response has no choices")
        choice = completion["choices"][0]
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(message, dict):
            raise bad("teacher_bad_shape", f"the response's first choice has no message: {choice!r}")
        if choice.get("finish_reason") == "length":
            raise bad("teacher_cut_by_length", "the reply was cut at the length limit: reply more briefly")
        if choice.get("finish_reason") == "content_filter":
            raise bad("teacher_content_filter", "the reply was stopped by the server's content filter")
        if message.get("refusal"):
            raise bad("teacher_refused", f"the model refused: {message['refusal']!r}")
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            raise bad("teacher_empty_reply", "the reply is empty")
        faults: list[Any] = []
        try:
            value = getattr(schema.model_validate_json(content), task)
        except pydantic.ValidationError as error:
            faults = error.errors(include_url=False, include_context=False, include_input=False)[:3]
        if faults:
            reason = "teacher_bad_json" if faults[0]["type"] == "json_invalid" else "teacher_bad_shape"
            told = "; ".join(": ".join([*map(str, fault["loc"]), fault["msg"]]) for fault in faults)
            raise bad(reason, f"the reply is not what the JSON schema asks for: {told}")
        if _is_secret(client.api_key) and client.api_key in str(value):
            raise bad("teacher_repeats_key", "the reply repeats the API key")
        return Reply(value, usage)

    def _content(self, task: str, request: TeacherRequest) -> list[dict[str, Any]]:
        """The question as JSON, then each frame after its index and time, then what was wrong with the last reply."""
        data = {
            "question": request.question,
            "options": dict(zip(LETTERS, request.options)),
            "answer": request.answer,
        }
        if task == REASONING_PLAN and request.source_plan:
            data["source_plan"] = request.source_plan
        content: list[dict[str, Any]] = [{"type": "text", "text": json.dumps(data, ensure_ascii=False)}]
        for index, (frame, seconds) in enumerate(zip(request.frames, request.timestamps)):
            image, file = Image.fromarray(frame), io.BytesIO()
            image.thumbnail((self.max_image_side, self.max_image_side))
            image.save(file, "JPEG", quality=90)
            url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
            content.append({"type": "text", "text": f"Frame {index}, {seconds:.2f} s:"})
            content.append({"type": "image_url", "image_url": {"url": url}})
        if request.correction:
            told = f"Your last reply could not be used: {request.correction}. Reply again without this fault."
            content.append({"type": "text", "text": told})
        return content

    def _send(self, client: Any, **payload: Any) -> bytes:
        """One call's response body.

        It runs in a thread of its own, since the client's time-outs are between two bytes: a server that sends a
        byte now and then holds it for ever.
        """
        import openai

        future: Future[bytes] = Future()

        def send() -> None:
            try:
                future.set_result(client.chat.completions.with_raw_response.create(**payload).content)
            except Exception as error:
                future.set_exception(error)

        Thread(target=send, daemon=True).start()
        failure: Exception
        try:
            return future.result(timeout=self.max_call_seconds)
        except TimeoutError:
            detail = f"no whole reply within {self.max_call_seconds:g} s"
            failure = Rejected("teacher_timeout", detail, {"usage": {"calls": 1}}, transient=True)
        except openai.OpenAIError as error:
            failure = self._failure(error, client.api_key)
        raise failure  # out here, so that no `__context__` carries the request's headers or the server's words along

    def _failure(self, error: Exception, key: str) -> Exception:
        """What the client's error means for the row or the build."""
        import openai

        status = error.status_code if isinstance(error, openai.APIStatusError) else None
        code = error.code if isinstance(error, openai.APIStatusError) else None
        what = _one_line(str(error) or type(error).__name__, key)
        if status == 401:  # without the server's words: they often hold parts of the key
            return TeacherSetupError(
                f"The teacher's server refused the key (401). Put a valid key into {self.api_key_env} and run the "
                "same command again: finished rows are kept."
            )
        if status in (402, 403, 404, 405) or code == "insufficient_quota":
            return TeacherSetupError(
                f"The teacher's server refuses every request for {self.model!r}: {what.rstrip('.')}. Check the "
                f"model's name, the base URL (most end in /v1), and what the key in {self.api_key_env} may use, then "
                "run the same command again: finished rows are kept."
            )
        if status is None and not isinstance(error, openai.APIConnectionError):
            return TeacherSetupError(f"The `openai` client can't be used as it is set up: {what}")
        details = {"usage": {"calls": 1}}
        if isinstance(error, openai.APITimeoutError):
            what = f"no reply within {self.timeout:g} s, {self.max_retries + 1} times"
            return Rejected("teacher_timeout", what, details, transient=True)
        if status == 429:
            return Rejected("teacher_rate_limited", what, details, transient=True)
        if status is None:
            cause = _one_line(f"{what} {type(error.__cause__).__name__}: {error.__cause__}", key)
            return Rejected("teacher_unreachable", cause, details, transient=True)
        if status in (408, 409) or status >= 500:
            return Rejected("teacher_server_error", what, details, transient=True)
        return Rejected("teacher_bad_request", what, details, transient=True)  # mostly the server's, rarely the row's

    @cached_property
    def _client(self) -> Any:
        """Made on first use: instances travel to workers, and the key is read where they run."""
        try:
            import openai
        except ImportError as error:
            raise ImportError('The OpenAI teacher needs the `openai` package: pip install "storms[openai]"') from error
        key = os.environ.get(self.api_key_env, "")
        if not key:
            raise TeacherSetupError(
                f"The environment variable {self.api_key_env} is not set: put the API key there. "
                "A local server that needs no key takes any word."
            )
        if not all("!" <= character <= "~" for character in key):
            raise TeacherSetupError(
                f"The key in {self.api_key_env} has spaces, line ends or characters outside ASCII: set it again."
            )
        client = openai.OpenAI(api_key=key, base_url=self.base_url, timeout=self.timeout, max_retries=self.max_retries)
        for name in list(logging.root.manager.loggerDict):
            if name.startswith(("openai", "httpx", "httpcore")):
                logging.getLogger(name).addFilter(_KeyFilter(key))
        return client


@dataclass(frozen=True)
class _KeyFilter(logging.Filter):
    """Takes the key out of what HTTP libraries log: at DEBUG, also response headers, where a server may repeat it."""

    key: str = field(repr=False)

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if self.key in message:
            record.msg, record.args = _hide(message, self.key), None
        return True


def prompt_hash(name: str) -> str:
    """SHA-256 of the prompt file `prompts/{name}.txt`."""
    return hashlib.sha256(_prompt(name).encode()).hexdigest()


def _prompt(name: str) -> str:
    return (PROMPTS / f"{name}.txt").read_text(encoding="utf-8")


def _instructions(name: str, **numbers: int) -> str:
    return Template(_prompt(name)).substitute(numbers)


def _load_json(body: bytes) -> Any:
    """What a JSON text holds, or None: also for one nested too deep to read."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _is_secret(key: str) -> bool:
    return len(key) >= SHORTEST_SECRET


def _hide(text: str, key: str) -> str:
    return text.replace(key, "[key]") if _is_secret(key) else text


def _one_line(text: str, key: str) -> str:
    """A detail for the ledger: without the key, on one line, not long."""
    text = " ".join(_hide(text, key).split())
    return text if len(text) <= DETAIL_CHARACTERS else f"{text[: DETAIL_CHARACTERS - 3]}..."
