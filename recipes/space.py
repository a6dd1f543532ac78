"""Publish the chat demo as a Space; `python -m recipes.demo_app --push_to_space ORG/NAME` calls it."""

import importlib.metadata
import re
import sys
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, SpaceCardData

from model_card.push import HubError, explain

from .demo_app import AppArguments


# Of the packages that this project states, those that a model loaded by its own code needs. On Apple's chips a fork
# stands in for decord; PyAV opens .ts and .mpg.
NEEDED = {"av", "decord", "eva-decord", "huggingface-hub", "jinja2", "numpy", "pillow"}
NEEDED |= {"torch", "torchvision", "transformers"}

README = """---
{card}
---

Ask [{model}](https://huggingface.co/{model}) about a video, and see its answer after a latent block beside its answer
without one. `app.args` names the model and the commit of it that runs here.

A large model needs a GPU: choose one in this Space's settings. A private one needs a secret `HF_TOKEN` there that may
read it. Elsewhere: `pip install -r requirements.txt`, then `python app.py --server_name 127.0.0.1`.
"""


def space_files(app: Path, arguments: AppArguments, commit: str) -> dict[str, str]:
    """What a Space holds, by name: the app as it is, its flags, the packages it needs, a card.

    Args:
        app (`Path`): the app's file.
        arguments (`AppArguments`): the model, and what the page starts with.
        commit (`str`): of the model; others, and the code they carry, are not run.
    """
    gradio_version = importlib.metadata.version("gradio")
    stated = [line for line in importlib.metadata.requires("storms") or [] if "extra ==" not in line]
    packages = [line for line in stated if re.split(r"[^\w-]", line)[0] in NEEDED]
    flags = f"--model {arguments.model} --revision {commit} --dtype {arguments.dtype} --server_name 0.0.0.0"
    flags += f" --max_file_size {arguments.max_file_size}"
    flags += "" if arguments.num_frames is None else f" --num_frames {arguments.num_frames}"
    card = SpaceCardData(
        title=str(arguments.push_to_space).split("/")[-1],
        sdk="gradio",
        sdk_version=gradio_version,
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        app_file="app.py",
        license="apache-2.0",
        models=[arguments.model],
    )
    return {
        "app.py": app.read_text(encoding="utf-8"),
        "app.args": f"{flags}\n",
        "requirements.txt": "\n".join([*packages, f"gradio=={gradio_version}"]) + "\n",
        "README.md": README.format(card=card.to_yaml(), model=arguments.model),
    }


def push_to_space(app: Path, arguments: AppArguments) -> str:
    """Publish the app as a Space that loads the model at the commit it has now; a second push replaces the first.

    Returns:
        The Space's address.

    Raises:
        ValueError: if the model is a folder.
        HubError: if the Hub refuses, or can't be reached.
    """
    assert arguments.push_to_space is not None
    if Path(arguments.model).is_dir():
        raise ValueError(
            f"--model {arguments.model} is a folder of this machine, which a Space can't read. Publish it (`python -m "
            f"model_card push --checkpoint {arguments.model} --repo ORG/NAME`) and give --model ORG/NAME."
        )
    api = HfApi()
    try:
        commit = api.model_info(arguments.model, revision=arguments.revision).sha
        space = api.create_repo(
            arguments.push_to_space, repo_type="space", space_sdk="gradio", private=arguments.private, exist_ok=True
        )
        files = space_files(app, arguments, str(commit))
        api.create_commit(
            space.repo_id,
            [CommitOperationAdd(name, text.encode()) for name, text in files.items()],
            commit_message=f"Chat demo of {arguments.model}",
            repo_type="space",
        )
    except Exception as error:
        raise HubError(f"Pushing the Space {arguments.push_to_space} failed: {explain(error)[0]}") from error
    return str(space)
