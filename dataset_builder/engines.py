"""Engines: how a stage's rows are spread over processes or machines. Both run the same classes, to the same bytes."""

import os
import time
from collections.abc import Sequence
from functools import cache
from threading import Thread
from typing import Any

from .stages import Stage
from .staging import StagedStage


def run_local(output: str, stages: Sequence[Stage], rows: Sequence[str], num_workers: int | None = None) -> None:
    """Run stages one after another with `datasets.map`.

    Args:
        output (`str`): the output folder, where results are staged.
        stages (`Sequence[Stage]`): in order.
        rows (`Sequence[str]`): source rows as JSON.
        num_workers (`int`, *optional*): processes of a stage that computes; all cores by default. A stage that waits
            (for a server) or holds a GPU has one process.
    """
    from datasets import Dataset

    _end_children_with_this_process()
    for stage_idx, stage in enumerate(stages):
        waits = stage.concurrency > 1 or stage.num_gpus > 0
        num_proc = 1 if waits else min(num_workers or os.cpu_count() or 1, len(rows))
        Dataset.from_dict({"row": list(rows)}).map(
            StagedStage(output, stages, stage_idx),
            batched=True,
            batch_size=4 * stage.concurrency if waits else 1,
            num_proc=num_proc if num_proc > 1 else None,
            load_from_cache_file=False,
            new_fingerprint=f"storms-{stage.name}",
            desc=stage.name,
        )


@cache
def _end_children_with_this_process() -> None:
    """Let forked processes end when this one is killed: they would wait for its next message for ever."""

    def watch(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    def watch_in_thread() -> None:
        Thread(target=watch, args=(os.getppid(),), daemon=True).start()

    os.register_at_fork(after_in_child=watch_in_thread)


def run_ray(output: str, stages: Sequence[Stage], rows: Sequence[str], num_workers: int | None = None) -> None:
    """Run stages as a Ray Data pipeline of actor pools: a row's plan is written while another's video is generated.

    Joins the cluster of `RAY_ADDRESS`, or starts one on this machine. The output folder must be one that all nodes
    share.

    Args:
        output, stages, rows: see `run_local`.
        num_workers (`int`, *optional*): actors of a stage at most; all CPUs (GPUs, for a stage that needs them) by
            default.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError('--engine ray needs Ray: pip install "storms[ray]". Or use --engine local.') from error

    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS", "local"), include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    resources = ray.cluster_resources()
    data: Any = ray.data.from_items([{"row": row} for row in rows], override_num_blocks=min(len(rows), 200))
    for stage_idx, stage in enumerate(stages):
        available = int(resources.get("GPU", 0) // stage.num_gpus if stage.num_gpus else resources.get("CPU", 1))
        if available == 0:
            raise ValueError(
                f"--engine ray: stage {stage.name!r} needs {stage.num_gpus} GPU(s), but the Ray cluster has none."
            )
        data = data.map_batches(
            StagedStage,
            fn_constructor_args=(output, list(stages), stage_idx),
            batch_size=4 * stage.concurrency if stage.concurrency > 1 else 1,
            # Rows that wait do so in one actor's threads: `concurrency` limits all requests in flight.
            compute=ray.data.ActorPoolStrategy(
                min_size=1, max_size=1 if stage.concurrency > 1 else min(num_workers or available, available)
            ),
            num_cpus=0.1,  # every pool holds an actor at once: whole CPUs would leave none for the last pool
            num_gpus=stage.num_gpus,
        )
    try:
        for _ in data.iter_batches():
            pass
    except ray.exceptions.RayError as error:
        cause: BaseException | None = error
        while cause is not None and type(cause).__module__.startswith("ray."):
            cause = getattr(cause, "cause", None) or cause.__cause__
        raise cause or error from None  # what went wrong, without a hundred lines of where


ENGINES = {"local": run_local, "ray": run_ray}
