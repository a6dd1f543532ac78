"""How everything is measured: in turns on one machine, beside the floor that the machine itself sets.

A floor is the time that a piece of work must take at least: its bytes over the memory bandwidth or its floating-point
operations over the peak rate, whichever is longer. Bandwidth and peak are measured first, by a copy and a matrix
product, so that both sides of a ratio are of one machine in one state.
"""

import gzip
import json
import os
import platform
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table


Ways = Mapping[str, Callable[[], Any]]
Result = dict[str, Any]

console = Console(width=None if Console().is_terminal else 160)


@dataclass(frozen=True)
class Peaks:
    """What the machine can do a second: bytes read and written by the fastest of several large copies, floating-point
    operations in `dtype` by that of square matrix products."""

    bandwidth: float
    flops: float
    dtype: str


@dataclass(frozen=True)
class Work:
    """What a computation can't do without: floating-point operations (a product and a sum are two), bytes moved."""

    flops: float = 0.0
    bytes: float = 0.0

    def floor(self, peaks: Peaks) -> float:
        """Seconds that it takes at least."""
        return max(self.flops / peaks.flops, self.bytes / peaks.bandwidth)


@dataclass
class Bench:
    """One run of the command: where, how long, and the numbers that workloads take from its flags.

    Args:
        device (`str`): torch device.
        models (`Sequence[str]`): sizes; empty for each workload's own, as are `batch_sizes`.
        rounds (`int`), seconds (`float`): of one measurement, see `measure`.
        is_waiting_counted (`bool`): clock by the wall, also on one CPU thread.
        command (`str`): what a reader can repeat.
    """

    device: str = "cpu"
    is_waiting_counted: bool = False
    models: Sequence[str] = ()
    rounds: int = 20
    seconds: float = 20.0
    output: Path = Path("speed/results")
    command: str = "python -m speed"
    batch_sizes: Sequence[int] = ()
    frames: Sequence[int] = (32, 128)
    num_layers: Sequence[int] = (3, 36)
    new_tokens: int = 64
    text_tokens: Sequence[int] = (128, 512)
    videos: Sequence[Path] = ()
    static_cache: bool = False
    compile: bool = False

    @property
    def is_cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.is_cuda else torch.float32

    @cached_property
    def peaks(self) -> Peaks:
        """Measured when first asked for."""
        source = torch.empty((1 << 30) if self.is_cuda else (1 << 26), dtype=torch.uint8, device=self.device).fill_(1)
        target = torch.empty_like(source)
        size = 8192 if self.is_cuda else 768
        left, right = (torch.randn(size, size, device=self.device, dtype=self.dtype) for _ in range(2))

        def fastest(work: Callable[[], Any]) -> float:
            seconds = []
            for _ in range(12):
                begin = self.clock()
                work()
                seconds.append(self.clock() - begin)
            return min(seconds)

        return Peaks(
            bandwidth=2 * source.numel() / fastest(lambda: target.copy_(source)),
            flops=2 * size**3 / fastest(lambda: left @ right),
            dtype=str(self.dtype).removeprefix("torch."),
        )

    def models_or(self, *defaults: str) -> Sequence[str]:
        """The sizes asked for, or a workload's own."""
        return self.models or defaults

    @property
    def clock_name(self) -> str:
        """On one CPU thread this process's own processor time counts, not that of others on a shared machine: it is
        what a quiet machine's clock would say."""
        is_alone = self.device == "cpu" and torch.get_num_threads() == 1 and not self.is_waiting_counted
        return "processor" if is_alone else "wall"

    def clock(self) -> float:
        """Seconds, when all that was begun on the device is done."""
        if self.is_cuda:
            torch.cuda.synchronize()
        return time.process_time() if self.clock_name == "processor" else time.perf_counter()

    def measure(self, ways: Ways, description: str) -> dict[str, list[float]]:
        """Seconds of each way in each round, in an order that alternates; `rounds` of them, or as many as begin within
        `seconds`."""
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        begun = time.perf_counter()
        for index in track(range(self.rounds), description=description, console=console):
            if index > 0 and time.perf_counter() - begun > self.seconds:
                break
            for name in list(ways) if index % 2 == 0 else reversed(list(ways)):
                begin = self.clock()
                ways[name]()
                seconds[name].append(self.clock() - begin)
        return seconds

    def try_out(self, ways: Ways) -> dict[str, Callable[[], Any]]:
        """Run each way once, as a warm-up; those that do not fit into the device's memory are left out."""
        fitting = {}
        for name, way in ways.items():
            try:
                way()
                fitting[name] = way
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                console.print(f"{name}: does not fit into the device's memory; left out.")
        return fitting


def summarize(seconds: Mapping[str, Sequence[float]], over: str, under: str) -> Result:
    """Median over rounds of each round's own ratio `over / under`, and its quartiles."""
    ratios = [a / b for a, b in zip(seconds[over], seconds[under])]
    return {
        "rounds": len(ratios),
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else ratios * 2,
    }


def beside_floor(seconds: float, floor: float) -> Result:
    """The floor, and which part of the time it is: 1 is the best there can be."""
    return {"floor_seconds": floor, "of_floor": floor / seconds}


def goal(what: str, value: float, at_most: float | None = None, at_least: float | None = None) -> Result:
    """Whether a figure is where it should be; told, not enforced: a loaded machine proves nothing."""
    if at_most is not None:
        text, reached = f"{what} at most {at_most:g}", value <= at_most
    else:
        assert at_least is not None
        text, reached = f"{what} at least {at_least:g}", value >= at_least
    return {"goal": {"what": text, "value": value, "reached": bool(reached)}}


class PeakMemory:
    """Most bytes of tensors alive at once inside the `with` block, beyond those alive before; in `bytes` afterwards.

    On a GPU the allocator's own count; on a CPU the sum over what `torch.profiler` saw allocated and freed.
    """

    def __init__(self, bench: Bench):
        self.bench, self.bytes = bench, 0

    def __enter__(self) -> "PeakMemory":
        if self.bench.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.profiler = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            )
            self.profiler.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.bench.is_cuda:
            self.bytes = torch.cuda.max_memory_allocated() - self.before
            return
        self.profiler.__exit__(*error)
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/trace.json.gz"
            self.profiler.export_chrome_trace(path)
            with gzip.open(path, "rt") as file:
                events = json.load(file)["traceEvents"]
        alive = 0
        for event in sorted((one for one in events if one.get("name") == "[memory]"), key=lambda one: one["ts"]):
            alive += event["args"]["Bytes"]
            self.bytes = max(self.bytes, alive)


def write(bench: Bench, name: str, results: Sequence[Result]) -> None:
    """Write a workload's JSON and print its table."""
    device_name = torch.cuda.get_device_name() if bench.is_cuda else f"{platform.machine()} CPU"
    record = {
        "command": bench.command,
        "machine": {
            "device": device_name,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "clock": bench.clock_name,
            "peaks": vars(bench.peaks),
        },
        "versions": {package: version(package) for package in ("torch", "transformers", "decord")},
        "results": list(results),
    }
    path = bench.output / f"{name}_{bench.device.split(':')[0]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    console.print(table(results), f"Written to {path}", sep="\n")


def table(results: Sequence[Result]) -> Table:
    """One row a result: seconds of both ways, their ratio, the floor, and the goal where there is one."""
    ways = list(results[0]["median_seconds"])
    shown = Table("", *ways, "ratio", "quartiles", title=results[0]["workload"])
    has_floor = any("of_floor" in result for result in results)
    has_memory = any("memory_bytes" in result for result in results)
    has_goal = any("goal" in result for result in results)
    for title, has in (("floor", has_floor), ("of floor", has_floor), ("memory", has_memory), ("goal", has_goal)):
        if has:
            shown.add_column(title)
    for result in results:
        low, high = result["ratio_quartiles"]
        cells = [result.get("model") or result["video"]]
        cells += [_time(result["median_seconds"].get(way)) for way in ways]
        cells += [f"{result['ratio']:.3f}", f"{low:.3f} to {high:.3f}"]
        if has_floor:
            share = result.get("of_floor")
            cells += [_time(result.get("floor_seconds")), "" if share is None else f"{100 * share:.0f}%"]
        if has_memory:
            cells.append(f"{result['memory_bytes'] / 1e6:.0f} MB" if "memory_bytes" in result else "")
        if has_goal:
            aim = result.get("goal")
            cells.append("" if aim is None else f"{aim['what']}: {'' if aim['reached'] else 'not '}reached")
        shown.add_row(*cells)
    return shown


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def command_line(argv: Sequence[str]) -> str:
    return shlex.join(["python", "-m", "speed", *argv])
