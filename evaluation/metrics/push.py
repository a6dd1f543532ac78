"""Publish the metric as a Space, from where `evaluate.load("ORG/video_qa_accuracy")` loads it.

python -m evaluation.metrics.push ORG/video_qa_accuracy [--private]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi

from model_card.push import HubError, explain, upload


METRIC = Path(__file__).parent / "video_qa_accuracy"


def push(repo_id: str, private: bool = False) -> str:
    """Send the metric's folder to a Space, made if missing; a second push replaces the first.

    Args:
        repo_id (`str`): ORG/video_qa_accuracy.
        private (`bool`): whether to make a new Space private.

    Returns:
        The Space's address.

    Raises:
        ValueError: if the Space has another name than the metric: `evaluate.load` could not find its code there.
        HubError: if the Hub refuses it or can't be reached.
    """
    if repo_id.split("/")[1:] != [METRIC.name]:
        raise ValueError(
            f"Saw {repo_id!r}, expected ORG/{METRIC.name}: `evaluate.load` looks for a file of the Space's name."
        )
    api, again = HfApi(), "The same command tries again."
    try:
        space = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
    except Exception as error:
        raise HubError(f"Making the Space {repo_id} failed: {explain(error)[0]} {again}") from error
    upload(METRIC, repo_id, f"Metric {METRIC.name}", again, repo_type="space", api=api)
    return str(space)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo_id", help=f"ORG/{METRIC.name}")
    parser.add_argument("--private", action="store_true", help="make a new Space private")
    arguments = parser.parse_args(argv)
    try:
        address = push(arguments.repo_id, arguments.private)
    except (OSError, ValueError) as error:
        raise SystemExit(f"Error: {error}") from error
    print(f"Pushed to {address}")


if __name__ == "__main__":
    main()
