"""Put the latents of a checkpoint on trial: do they carry the answers, or does the model answer past them?

    python -m evaluation.diagnostics --model org/storms-7b --dataset org/thoughts --output diagnostics
    python -m evaluation.diagnostics --model stage2 --dataset shell_game --split validation --protocol uniform6

The dataset is one of `dataset_builder`'s schema, a folder or a Hub id. Each question is answered with its latents
intact, and again with others in their place (zeros, means, noise, another row's, those of a donor with another
answer), with parts of the block left out, with the video changed, with the true features of the thought video, and
with other numbers of slots: about 21 answers a question at the defaults, in one process. Latents are also looked up
(same-video retrieval), measured (collapse) and drawn (PCA, t-SNE).

The output folder gets `diagnostics.json`, PNG files and `report.html`, which holds all of it. Its first line is the
verdict: how many of the points of accuracy above chance the latents carry, that is, are lost with the latents of
another video's row, with a 95% interval. What each figure means is said in the report.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import HfArgumentParser

from model_card.push import write_whole
from model_card.render import public_name

from ..__main__ import HelpFormatter
from ..answering import Answerer, load_model
from ..protocols import Protocol
from ..report import public_command
from .report import draw_pictures, print_tables, write_report
from .rows import load_rows
from .run import diagnose


@dataclass
class DiagnosticsArguments:
    model: str = field(metadata={"help": "STORMS checkpoint: a folder or a Hub id."})
    dataset: str = field(metadata={"help": "Dataset of the builder's schema: a folder or a Hub id."})
    output: str = field(default="diagnostics", metadata={"help": "Folder to write."})
    split: str = field(default="test", metadata={"help": "Split of --dataset."})
    max_questions: int = field(default=200, metadata={"help": "Questions, of whole videos drawn at random."})
    video_root: str | None = field(default=None, metadata={"help": "Folder of videos that rows name by path."})
    protocol: str = field(default="uniform32", metadata={"help": "Which frames: uniform32, fps2_max32, any numbers."})
    max_frame_pixels: int | None = field(
        default=None, metadata={"help": "Largest area of a frame; the checkpoint's own limit by default."}
    )
    latent_size: int | None = field(default=None, metadata={"help": "Slots; the checkpoint's own by default."})
    budgets: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 16], metadata={"help": "Numbers of slots to try, each a run more."}
    )
    num_target_frames: int = field(default=16, metadata={"help": "Frames of a thought video, as in training."})
    batch_size: int = field(default=8, metadata={"help": "Questions at once."})
    max_new_tokens: int = field(default=16, metadata={"help": "Longest answer; blocks come on top."})
    samples: int = field(default=2000, metadata={"help": "Resamples of each interval."})
    free_form_chance: float = field(
        default=0.0, metadata={"help": "How often a guess is right where there are no options: 0.33 of three colours."}
    )
    seed: int = field(default=0, metadata={"help": "Of the questions drawn, donors, noise, orders and resamples."})
    revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of --model on the Hub."})
    dataset_revision: str | None = field(default=None, metadata={"help": "The same of --dataset."})
    dtype: str = field(default="auto", metadata={"help": "Type of the weights: auto, float32, bfloat16."})
    attention: str | None = field(
        default=None, metadata={"help": "sdpa or eager; transformers' choice by default. A bottleneck needs a mask."}
    )

    def __post_init__(self):
        least = {"max_questions": 2, "num_target_frames": 1, "batch_size": 1, "max_new_tokens": 1, "samples": 100}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"--{name}: saw {getattr(self, name)}, expected {minimum} or more.")
        if not 0 <= self.free_form_chance < 1:
            raise ValueError(f"--free_form_chance: saw {self.free_form_chance}, expected 0 to 1, without 1.")
        if not self.budgets or min(self.budgets) < 1 or (self.latent_size or 1) < 1:
            raise ValueError(
                f"--budgets {self.budgets}, --latent_size {self.latent_size}: expected one slot or more in each."
            )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    given = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(DiagnosticsArguments, description=__doc__, formatter_class=HelpFormatter)
    (arguments,) = parser.parse_args_into_dataclasses(given)
    protocol = Protocol.named(arguments.protocol, max_frame_pixels=arguments.max_frame_pixels)
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    rows = load_rows(
        arguments.dataset,
        arguments.split,
        arguments.max_questions,
        arguments.video_root,
        arguments.dataset_revision,
        arguments.seed,
        arguments.free_form_chance,
    )
    model, processor = load_model(arguments.model, arguments.revision, arguments.dtype, arguments.attention)
    latent = {} if arguments.latent_size is None else {"latent_size": arguments.latent_size}
    answerer = Answerer(model, processor, arguments.max_new_tokens, arguments.batch_size, **latent)
    record = {
        "command": public_command("evaluation.diagnostics", given),
        "model": public_name(arguments.model),
        "revision": arguments.revision,
        "dataset": public_name(arguments.dataset),
        "dataset_revision": arguments.dataset_revision,
        "split": arguments.split,
        "protocol": protocol.name,
        "num_target_frames": arguments.num_target_frames,
        "max_new_tokens": arguments.max_new_tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
        "samples": arguments.samples,
        "seed": arguments.seed,
        "versions": {name: version(name) for name in ("torch", "transformers", "scikit-learn")},
    }
    record |= _rounded(
        diagnose(
            answerer, rows, protocol, arguments.budgets, arguments.num_target_frames, arguments.samples, arguments.seed
        )
    )
    write_whole(output / "diagnostics.json", json.dumps(record, indent=2) + "\n")
    draw_pictures(record, output)
    page = write_report(record, output)
    console = Console()
    print_tables(record, console)
    if record["left_out"]:
        console.print(f"Left out {len(record['left_out'])} rows that can't be read, as {record['left_out'][0]}.")
    console.print(f"Written to {output}: diagnostics.json, pictures and {page.name}")
    return record


def _rounded(value: Any) -> Any:
    """Figures with six digits: more are noise, and twice the file."""
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"Error: {error}") from error
