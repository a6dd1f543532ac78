"""Publish a checkpoint with its card.

    python -m model_card push --checkpoint storms-7b-stage2 --repo org/storms-7b --results results.json
    python -m model_card push --checkpoint storms-7b-stage2 --repo org/storms-7b --dry_run   # check, write the card

Sends weights, configs, tokenizer and processor, the code and a card whose numbers come from `training.json` and the
given results, in one commit, and tags it. Refuses what a stranger could not load or should not trust. After a failure
the same command goes on.
"""

import sys
from collections.abc import Sequence

from transformers import HfArgumentParser

from .push import PushArguments, push


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(PushArguments, prog="python -m model_card push", description=__doc__)
    if argv[:1] != ["push"]:
        parser.print_help()
        raise SystemExit(0 if argv in (["--help"], ["-h"]) else f"\nSaw {argv[:1]}, expected `push`.")
    (arguments,) = parser.parse_args_into_dataclasses(argv[1:])
    try:
        tag = push(arguments)
    except (OSError, ValueError) as error:
        raise SystemExit(f"Error: {error}") from error
    if arguments.dry_run:
        print(f"{arguments.checkpoint} can be published; its card is {arguments.checkpoint}/README.md")
    else:
        print(f"Pushed {arguments.checkpoint} to {arguments.repo}, tagged {tag}")


if __name__ == "__main__":
    main()
