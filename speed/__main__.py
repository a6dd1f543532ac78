"""Measure what our code costs, beside the machine's own limits.

    python -m speed                                  # every workload, half an hour on a CPU
    python -m speed answer --batch_sizes 1           # one of them
    python -m speed answer decode_step --device cuda --model 7b     # shapes of a release, random weights
    python -m speed profile                          # traces, and the largest costs in words

Every figure is a ratio of two ways measured in turns in one run: absolute times of shared processors are noise. Where
a floor makes sense it stands beside: the time that the work's bytes need at the memory bandwidth or its operations at
the peak rate, both of this machine, measured first. "of floor" is floor / time: 100% is the best there can be. A goal
is told to be reached or not; none makes the command fail. Each workload writes one JSON, with machine, versions,
peaks and command, over that of an earlier run on the same kind of device.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from .generation import measure_answer, measure_decode_step, measure_latent_size, measure_off_mode, measure_solver
from .harness import Bench, Result, command_line, write
from .modules import measure_long_video, measure_prefill
from .pipelines import measure_builder, measure_decode, measure_evaluation
from .profiling import save_profiles
from .shapes import SIZES
from .training import measure_train_step


os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch.profiler's own messages

WORKLOADS: dict[str, Callable[[Bench], list[Result]]] = {
    "off_mode": measure_off_mode,
    "answer": measure_answer,
    "solver": measure_solver,
    "latent_size": measure_latent_size,
    "prefill": measure_prefill,
    "decode_step": measure_decode_step,
    "train_step": measure_train_step,
    "evaluation": measure_evaluation,
    "long_video": measure_long_video,
    "builder": measure_builder,
    "decode": measure_decode,
}
ON_CPU = ("builder", "decode")  # whatever --device says


def main(argv: Sequence[str]) -> None:
    workloads = "\n".join(f"  {name:<12} {run.__doc__}" for name, run in WORKLOADS.items())
    parser = argparse.ArgumentParser(
        prog="python -m speed",
        description=__doc__,
        epilog=f"workloads:\n{workloads}\n  {'profile':<12} {save_profiles.__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workloads", nargs="*", metavar="workload", help="see below (default: all but profile)")
    parser.add_argument("--device", default="cpu", help="torch device; a GPU computes in bfloat16 (%(default)s)")
    parser.add_argument(
        "--model", nargs="+", choices=SIZES, help="sizes; 3b and 7b want a GPU (default: the workload's own small one)"
    )
    parser.add_argument("--rounds", type=int, default=40, help="paired measurements at most (%(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=15.0, help="no round of a measurement begins later than that (%(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("speed/results"), help="folder for JSON (%(default)s)")
    parser.add_argument(
        "--batch_sizes", type=int, nargs="+", default=[], help="answer (1 8 32), solver, prefill and decode_step (1 8)"
    )
    parser.add_argument(
        "--text_tokens", type=int, nargs="+", default=[128, 512], help="answer: lengths of text reasoning (128 512)"
    )
    parser.add_argument(
        "--static_cache", action="store_true", help="answer: a static cache, with which a GPU's steps are compiled"
    )
    parser.add_argument("--frames", type=int, nargs="+", default=[32, 128], help="long_video: of the video (32 128)")
    parser.add_argument("--compile", action="store_true", help="decode_step, evaluation: also on a CPU (minutes)")
    parser.add_argument(
        "--num_layers", type=int, nargs="+", default=[3, 36], help="off_mode: decoder layers; a 3B model has 36 (3 36)"
    )
    parser.add_argument("--new_tokens", type=int, default=64, help="off_mode: tokens to generate (%(default)s)")
    parser.add_argument("--videos", type=Path, nargs="+", default=[], help="decode: files (default: made on the spot)")
    arguments = vars(parser.parse_args(argv))
    names = arguments.pop("workloads") or list(WORKLOADS)
    if unknown := set(names) - {*WORKLOADS, "profile"}:
        parser.error(f"unknown workload {sorted(unknown)}: expected some of {', '.join([*WORKLOADS, 'profile'])}")
    bench = Bench(models=arguments.pop("model") or (), command=command_line(argv), **arguments)
    for name in names:
        if name == "profile":
            save_profiles(bench)
        else:
            own = replace(bench, device="cpu", is_waiting_counted=True) if name in ON_CPU else bench
            write(own, name, WORKLOADS[name](own))


if __name__ == "__main__":
    main(sys.argv[1:])
