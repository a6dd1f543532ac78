"""Where an answer's time goes: seconds of the vision tower, of the projector and of the language model's passes."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import StoppingCriteria


MODULES = ("vision tower", "projector", "prefill", "latent block", "decode")


class StepTimes(StoppingCriteria):
    """Seconds of each step of a `generate` call, from outside of it: no hook runs inside of a compiled step.

    Args:
        now (`Callable`): tells the seconds.
    """

    def __init__(self, now: Callable[[], float]):
        self.now, self.last = now, now()
        self.seconds: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        now = self.now()
        self.seconds.append(now - self.last)
        self.last = now
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class PassTimes(StoppingCriteria):
    """Seconds of the language model's passes, added up for each step of a `generate` call that is given this.

    A step may make several passes, or none where an earlier one ran ahead. Outside of `generate` all is one step.
    """

    def __init__(self) -> None:
        self.seconds = [0.0]

    def add(self, seconds: float) -> None:
        self.seconds[-1] += seconds

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.seconds.append(0.0)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class ModuleClock:
    """Adds up the seconds that a model's modules take.

    Args:
        model: a STORMS or plain Qwen2.5-VL model.
        now (`Callable`, *optional*): tells the seconds. By default the wall's clock, after waiting for an accelerator.

    Attributes:
        seconds (`dict[str, float]`): of `MODULES`. A decoding step belongs to the latent block if any row of the batch
            is inside of one.
    """

    def __init__(self, model: Any, now: Callable[[], float] | None = None):
        self.model = model
        self.now = self._now if now is None else now
        self.seconds = dict.fromkeys(MODULES, 0.0)

    def take(self) -> dict[str, float]:
        """The seconds since the last time."""
        taken, self.seconds = self.seconds, dict.fromkeys(MODULES, 0.0)
        return taken

    @contextmanager
    def running(self) -> Iterator[PassTimes]:
        """Times what runs within. Gives what counts the language model's passes: a stopping criterion for `generate`,
        whose seconds `add_steps` sorts."""
        passes = PassTimes()
        hooks = self._watch(self.model.model.visual, lambda seconds: self._add("vision tower", seconds))
        if (projector := getattr(self.model.model, "temporal_projector", None)) is not None:
            hooks += self._watch(projector, lambda seconds: self._add("projector", seconds))
        hooks += self._watch(self.model.model.language_model, passes.add)
        try:
            yield passes
        finally:
            for hook in hooks:
                hook.remove()

    def add_steps(self, seconds: Sequence[float], new_ids: torch.Tensor | None = None) -> None:
        """Sort a call's steps into prefill, latent block and decode.

        Args:
            seconds (`Sequence[float]`): of each step, as `StepTimes` and `PassTimes` have them.
            new_ids (`torch.Tensor` of shape `(batch, num_new)`, *optional*): what `generate` appended, one a step: the
                first step is prefill, each other one fed the id before. Without it everything is prefill.
        """
        num_prefill = len(seconds) if new_ids is None else 1
        self._add("prefill", sum(seconds[:num_prefill]))
        if new_ids is None:
            return
        tokens = getattr(self.model, "latent_tokens", None)
        inside = torch.tensor([] if tokens is None else [tokens.start, tokens.pad], device=new_ids.device)
        for taken, is_latent in zip(seconds[num_prefill:], torch.isin(new_ids, inside).any(0).tolist()):
            self._add("latent block" if is_latent else "decode", taken)

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] += seconds

    def _watch(self, module: torch.nn.Module, add: Callable[[float], None]) -> list[Any]:
        begun: list[float] = []
        before = module.register_forward_pre_hook(lambda *_: begun.append(self.now()))
        return [before, module.register_forward_hook(lambda *_: add(self.now() - begun.pop()))]

    def _now(self) -> float:
        if self.model.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()
