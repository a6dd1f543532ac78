"""Push a checkpoint with its card: what goes to the Hub is chosen by name, checked first, and sent in one commit.

What is chosen are weights as safetensors, configs, tokenizer and processor, the reviewed code, the card and
`training.json`. Pickles (`training_args.bin`, optimizer states) and logs stay where they are.
"""

import importlib.util
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import filter_repo_objects
from safetensors import SafetensorError, safe_open

from .render import check_results, hub_base, render_model_card


PUBLISHED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.py", "README.md")
NEVER = ("_*", "checkpoint-*", ".*", "*/*", "trainer_state.json", "*results.json", "adapter_*")
# What an earlier release may have left behind.
REPLACED = ("*.safetensors", "*.safetensors.index.json", "*.py", "*.bin", "*.pt", "*.pth", "*.pkl")
MAX_FILE_BYTES = 50_000_000_000  # of one file on the Hub
VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt")
# A path of one machine; addresses, "and/or" and the like don't begin so.
ABSOLUTE_PATH = re.compile(
    r"(?<![\w.:/~<])(?:/(?:home|root|Users|tmp|mnt|data|opt|var|scratch|workspace)/|[A-Z]:\\)[^\s\"']*"
)
TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
RETRIED = (408, 412, 429, 500, 502, 503, 504)


class HubError(ConnectionError):
    """The Hub refuses, or can't be reached; says what happened and what to do. Nothing local was changed."""


def published_files(folder: Path) -> list[Path]:
    """Which of a folder's files are sent."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    chosen = filter_repo_objects(names, allow_patterns=list(PUBLISHED), ignore_patterns=list(NEVER))
    return [folder / name for name in sorted(chosen)]


def check_checkpoint(folder: Path) -> list[Path]:
    """Refuse to publish a checkpoint that a stranger could not load, or should not trust.

    Args:
        folder (`Path`): of the checkpoint.

    Returns:
        The files that are to be sent.

    Raises:
        ValueError: if it is no whole STORMS checkpoint, weights can't be read, code differs from the installed and
            reviewed package's, a text holds a path of this machine or a token, or a file is larger than the Hub
            takes. Names every fault.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json, expected the folder of a STORMS checkpoint.")
    files = published_files(folder)
    present = {path.name for path in files}
    faults = []
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    needed = {f"{value.split('.')[0]}.py" for value in _flatten(config.get("auto_map", {}))}
    if config.get("model_type") != "storms" or not needed:
        faults.append(f"config.json has model_type {config.get('model_type')!r} and auto_map {needed or None}")
    if foreign := [value for value in _flatten(config.get("auto_map", {})) if "--" in value]:
        faults.append(f"code is taken from another repository ({foreign[0]}): load and save it with this package")
    needed |= {"generation_config.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"}
    index = folder / "model.safetensors.index.json"
    weights = {"model.safetensors"}
    if index.is_file():
        weights = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    if missing := sorted((needed | weights) - present):
        faults.append(f"missing: {', '.join(missing)}")
    reviewed = _package_files()
    for path in files:
        if path.stat().st_size > MAX_FILE_BYTES:
            faults.append(
                f"{path.name} has {path.stat().st_size / 1e9:.0f} GB, the Hub takes {MAX_FILE_BYTES / 1e9:.0f}"
            )
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt") as opened:
                    opened.keys()
            except (SafetensorError, OSError) as error:
                faults.append(f"{path.name} can't be read ({error})")
            continue
        if path.suffix == ".py" and reviewed.get(path.name) != path.read_bytes():
            faults.append(f"{path.name} is not the installed package's: load and save the checkpoint with it")
        if path.name not in VOCABULARIES:
            text = path.read_text(encoding="utf-8", errors="replace")
            if found := ABSOLUTE_PATH.search(text):
                faults.append(f"{path.name} names a path of this machine, {found[0]!r}")
            own = get_token()
            if TOKEN.search(text) or (own and own in text):
                faults.append(f"{path.name} holds an access token")
    if faults:
        raise ValueError(f"{folder} can't be published: {'; '.join(faults)}.")
    return files


def _flatten(auto_map: dict[str, Any]) -> list[str]:
    return [one for value in auto_map.values() for one in (value if isinstance(value, list) else [value]) if one]


def _package_files() -> dict[str, bytes]:
    """The reviewed code, found without importing it."""
    found = importlib.util.find_spec("modeling_storms")
    assert found is not None, "storms is installed whole"
    return {path.name: path.read_bytes() for path in Path(str(found.origin)).parent.glob("*.py")}


def upload(
    folder: Path,
    repo_id: str,
    message: str,
    again: str,
    repo_type: str = "model",
    patterns: Sequence[str] = PUBLISHED,
    ignored: Sequence[str] = NEVER,
    token: str | None = None,
    revision: str | None = None,
    api: HfApi | None = None,
    tell: Callable[[str], None] = print,
    max_attempts: int = 6,
    **options: Any,
) -> CommitInfo:
    """Send a folder's files in one commit, on top of the head that was found; tried again while there is hope.

    Args:
        folder (`Path`), repo_id (`str`), message (`str`): what goes where, and the commit's message.
        again (`str`): how to do it once more, for the error.
        patterns, ignored (`Sequence[str]`): names of files to send, and of those not to.
        tell (`Callable`): told of each failed attempt.
        max_attempts (`int`): waits double from 1 second on.
        options: of `HfApi.upload_folder`.

    Raises:
        HubError: if the Hub refuses or can't be reached.
    """
    api = api or HfApi()
    for attempt in range(1, max_attempts + 1):
        try:
            # Someone else's commit in between would make a mixture that nobody has checked.
            head = api.repo_info(repo_id, repo_type=repo_type, revision=revision, token=token).sha
            return api.upload_folder(
                repo_id=repo_id,
                repo_type=repo_type,
                folder_path=folder,
                allow_patterns=list(patterns),
                ignore_patterns=list(ignored),
                commit_message=message,
                parent_commit=head,
                revision=revision,
                token=token,
                **options,
            )
        except Exception as error:
            reason, is_passing = explain(error)
            if attempt == max_attempts or not is_passing:
                raise HubError(f"Pushing to {repo_id} failed: {reason} {folder} is as it was. {again}") from error
            seconds = min(2 ** (attempt - 1), 30)
            tell(f"Pushing to {repo_id}: {reason} Trying again in {seconds} s ({attempt} of {max_attempts}).")
            time.sleep(seconds)
    raise AssertionError("the last attempt returns or raises")


def explain(error: Exception) -> tuple[str, bool]:
    """What an error of the Hub's client means, in a sentence, and whether it may pass by itself."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        said = (error.server_message or "").strip()
        meaning = {
            401: "wrong or revoked token, none at all, or no such repository. Log in by `hf auth login`.",
            403: "the token may not write there. Use one with write access.",
            404: "there is no such repository.",
            412: "someone else has committed meanwhile.",
            429: "too many requests.",
        }.get(status, "the Hub has an error of its own." if status >= 500 else "the Hub refused it.")
        return f"status {status}{f' ({said})' if said else ''}: {meaning}", status in RETRIED
    if type(error).__module__.split(".")[0].startswith(("httpx", "httpcore")):  # the client's transport
        return f"the connection broke ({type(error).__name__}).", True
    if isinstance(error, OSError):
        return f"{error}.", isinstance(error, (ConnectionError, TimeoutError))
    raise error


@dataclass
class PushArguments:
    checkpoint: str = field(metadata={"help": "Folder of a checkpoint, as training leaves it."})
    repo: str = field(metadata={"help": "Model on the Hub, ORG/NAME; made if missing."})
    results: list[str] = field(
        default_factory=list, metadata={"help": "JSON files that the evaluation wrote; the card shows only these."}
    )
    license: str | None = field(
        default=None,
        metadata={"help": "Of the weights; by default what the base model's own card states."},
    )
    tag: str | None = field(
        default=None, metadata={"help": "Tag of this release; v1, v2, ... by default. A tag is never moved."}
    )
    private: bool = field(default=False, metadata={"help": "Make a new repository private."})
    dry_run: bool = field(default=False, metadata={"help": "Check, write the card, and send nothing."})


def push(arguments: PushArguments, api: HfApi | None = None) -> str:
    """Check a checkpoint, write its card, send both, and tag the commit.

    Args:
        arguments (`PushArguments`): what goes where.
        api (`HfApi`, *optional*): the Hub and who we are there; from the environment by default.

    Returns:
        The tag; sent again unchanged, a checkpoint keeps the one it has.

    Raises:
        ValueError: if the checkpoint or the results can't be published, or the tag is taken.
        HubError: if the Hub refuses it or can't be reached.
    """
    folder = Path(arguments.checkpoint)
    results = []
    for name in arguments.results:
        results += check_results(json.loads(Path(name).read_text(encoding="utf-8")), name)
    record_path = folder / "training.json"
    record = json.loads(record_path.read_text(encoding="utf-8")) if record_path.is_file() else {}
    check_checkpoint(folder)
    if arguments.dry_run:
        _write_card(folder, arguments.repo, record, results, arguments.license)
        return ""
    api, again = api or HfApi(), "The same command tries again."
    try:
        repo_id = api.create_repo(arguments.repo, private=arguments.private, exist_ok=True).repo_id
        head = api.repo_info(repo_id).sha
        tags = {one.name: one.target_commit for one in api.list_repo_refs(repo_id).tags}
    except Exception as error:
        raise HubError(f"Pushing to {arguments.repo} failed: {explain(error)[0]} {again}") from error
    if arguments.tag is not None and tags.get(arguments.tag, head) != head:
        raise ValueError(f"{repo_id} has a tag {arguments.tag} already, and no tag is moved. Choose another --tag.")
    _write_card(folder, repo_id, record, results, arguments.license or _license_of(record, api))
    message = f"Release {arguments.tag or ''}".strip()
    commit = upload(folder, repo_id, message, again, api=api, delete_patterns=list(REPLACED)).oid
    releases = [name for name, target in tags.items() if target == commit]
    if arguments.tag in releases or (arguments.tag is None and releases):  # sent before, and not changed since
        return arguments.tag or releases[-1]
    numbers = [int(name[1:]) for name in tags if re.fullmatch(r"v\d+", name)]
    tag = arguments.tag or f"v{max(numbers, default=0) + 1}"
    try:
        api.create_tag(repo_id, tag=tag, revision=commit)
    except Exception as error:
        raise HubError(f"Tagging {repo_id} as {tag} failed: {explain(error)[0]} {again}") from error
    return tag


def _write_card(folder: Path, repo_id: str, record: Any, results: Any, license: str | None) -> None:
    write_whole(folder / "README.md", render_model_card(repo_id, record, results, license))


def write_whole(path: Path, text: str) -> None:
    """Write a file, or leave it as it was: on a full disk, too."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _license_of(record: dict[str, Any], api: HfApi) -> str | None:
    """What the base model's own card states; None if there is no such card."""
    base = hub_base(record)
    try:
        card = api.model_info(base).card_data if base else None
    except Exception as error:
        explain(error)  # raises what is not the Hub's
        return None
    return card.get("license") if card else None
