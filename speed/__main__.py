"""Measure what the latent mode costs.

    python -m speed                      # the plain class against latent_mode="off", narrow models
    python -m speed --device cuda --rounds 50 --output speed/results

Every figure is a ratio of two ways measured in turns in one run: absolute times of shared processors are noise.
"""

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

from recipes.init_checkpoint import build_tiny_base, convert


def measure_off_mode(device: str, num_layers: int, rounds: int, new_tokens: int) -> dict[str, Any]:
    """Seconds of one greedy `generate`, plain class against the mixin with `latent_mode="off"`, same weights.

    The plain class suppresses the same three ids, so that both do the same work. Each round times both, in an order
    that alternates; the ratio is the median over rounds of each round's own ratio.
    """
    base, processor = build_tiny_base(num_hidden_layers=num_layers)
    model, _ = convert(base, processor)
    plain = copy.deepcopy(base)
    plain.load_state_dict(model.state_dict())
    tokens = model.latent_tokens
    model, plain = model.to(device), plain.to(device)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, 300, (1, 64), generator=generator).to(device)
    shared = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
    }
    ways = {
        "plain": lambda: plain.generate(**shared, suppress_tokens=[tokens.start, tokens.pad, tokens.end]),
        "off": lambda: model.generate(**shared, latent_mode="off"),
    }
    if ways["plain"]().tolist() != ways["off"]().tolist():
        raise RuntimeError("The two ways decode different tokens, so their times can't be compared.")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for index in track(range(rounds), description=f"plain against off, {num_layers} layers"):
        for name in list(ways) if index % 2 == 0 else reversed(list(ways)):
            begin = time.perf_counter()
            ways[name]()
            if device != "cpu":
                torch.accelerator.synchronize()
            seconds[name].append(time.perf_counter() - begin)
    ratios = [off / one for off, one in zip(seconds["off"], seconds["plain"])]
    return {
        "workload": "generate, off mode against the plain class",
        "model": f"{num_layers} layers, hidden 64",
        "new_tokens": new_tokens,
        "rounds": rounds,
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio_off_to_plain": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    parser.add_argument(
        "--num_layers",
        type=int,
        nargs="+",
        default=[3, 36],
        help="decoder layers of the narrow models; the 3B model has 36 (default: 3 36)",
    )
    parser.add_argument("--rounds", type=int, default=40, help="paired measurements (default: %(default)s)")
    parser.add_argument("--new_tokens", type=int, default=64, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--output", default="speed/results", help="folder for the JSON (default: %(default)s)")
    arguments = parser.parse_args()
    results = [
        measure_off_mode(arguments.device, num_layers, arguments.rounds, arguments.new_tokens)
        for num_layers in arguments.num_layers
    ]
    device = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else platform.machine() + " CPU"
    record = {
        "command": " ".join(["python -m speed", *sys.argv[1:]]),
        "machine": {"device": device, "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "results": results,
    }
    path = Path(arguments.output) / f"off_mode_{arguments.device.split(':')[0]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    table = Table("model", "plain", "off", "off / plain", "quartiles", title=results[0]["workload"])
    for result in results:
        low, high = result["ratio_quartiles"]
        table.add_row(
            result["model"],
            *(f"{result['median_seconds'][name] * 1e3:.1f} ms" for name in ("plain", "off")),
            f"{result['ratio_off_to_plain']:.3f}",
            f"{low:.3f} to {high:.3f}",
        )
    Console().print(table, f"Written to {path}", sep="\n")


if __name__ == "__main__":
    main()
