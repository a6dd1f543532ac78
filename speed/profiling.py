"""Where the time goes inside: traces by `torch.profiler` of a latent answer and of a Stage II step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from .generation import NUM_FRAMES, latent
from .harness import Bench, console
from .shapes import build, video_inputs
from .training import TrainingSteps


def save_profiles(bench: Bench) -> None:
    """the largest costs of a latent answer and a Stage II step; traces in <output>/traces, for ui.perfetto.dev"""
    for name in bench.models_or("small"):
        steps = TrainingSteps(bench, name)
        inputs = {key: value.to(bench.device) for key, value in video_inputs(name, NUM_FRAMES).items()}
        answer = partial(build(name, bench.device, bench.dtype).generate, **inputs, **latent())
        _profile(bench, f"latent_answer_{name}", answer)
        _profile(bench, f"stage2_step_{name}", partial(steps.train, "block", latent_input="rollout"))


def _profile(bench: Bench, name: str, run: Callable[[], Any]) -> None:
    run()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.is_cuda else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        run()
        bench.clock()
    path = bench.output / "traces" / f"{name}_{bench.device.split(':')[0]}.json.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    of_device = "self_device_time_total" if bench.is_cuda else "self_cpu_time_total"
    costs = sorted(profiler.key_averages(), key=lambda one: getattr(one, of_device), reverse=True)
    whole = sum(getattr(one, of_device) for one in costs)
    shown = Table("operation", "calls", "share", title=f"largest costs of {name}, its own time alone")
    for one in costs[:10]:
        shown.add_row(one.key, str(one.count), f"{100 * getattr(one, of_device) / whole:.1f}%")
    console.print(shown, f"{torch.get_num_threads()} threads; trace in {path}", sep="\n")
