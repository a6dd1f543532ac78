"""An environment with a few distributions and what they need, and nothing else: what a stranger has installed.

Links into this environment's packages instead of installing them again, which would take gigabytes and a network.
"""

import sys
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement


STOCK = ("transformers", "torch", "torchvision", "decord", "datasets")


def closure(names: tuple[str, ...]) -> dict[str, Distribution]:
    """The distributions named, and all that they require, extras included."""
    found: dict[str, Distribution] = {}
    waiting = [Requirement(name) for name in names]
    done = set()
    while waiting:
        asked = waiting.pop()
        for extra in ("", *asked.extras):
            if (asked.name, extra) in done:
                continue
            done.add((asked.name, extra))
            found[asked.name] = distribution(asked.name)
            for line in found[asked.name].requires or []:
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    waiting.append(needed)
    return found


def record_of(one: Distribution) -> list[str]:
    """Paths of a distribution's files, relative to where packages are. (`files` looks each of them up.)"""
    lines = (one.read_text("RECORD") or "").splitlines()
    return [line.split(",")[0] for line in lines if not line.startswith(("..", "/", "__pycache__"))]


def make_clean_packages(folder: Path, names: tuple[str, ...] = STOCK) -> list[str]:
    """Fill a folder with links to these distributions' files.

    Returns:
        How to start Python so that it finds these packages and the standard library, and nothing else.
    """
    folder.mkdir()
    wanted = {one.name for one in closure(names).values()}
    contents = {one.name: record_of(one) for one in distributions()}
    packages = Path(str(distribution(names[0]).locate_file("")))
    # A folder that others than these fill too is linked file by file.
    shared = {path.split("/")[0] for name in contents.keys() - wanted for path in contents[name]}
    links = {
        path if path.split("/")[0] in shared else path.split("/")[0] for name in wanted for path in contents[name]
    }
    for path in links - {"..", "__pycache__"}:
        if (packages / path).exists():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).symlink_to(packages / path)
    start = f"import sys; sys.path.append({str(folder)!r}); exec(sys.stdin.read())"
    return [sys.executable, "-I", "-S", "-c", start]
