"""The design's layout: who may import whom, and what remote code needs to travel."""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]

# Each package and the packages of ours that it may import. One module of another package is written with a dot.
ALLOWED = {
    "modeling_storms": set(),
    "model_card": set(),
    "dataset_builder": {"model_card", "modeling_storms.video_storms"},
    "evaluation": {"dataset_builder", "model_card", "modeling_storms"},
    "recipes": {"evaluation", "dataset_builder", "model_card", "modeling_storms"},
    "speed": {"recipes", "evaluation", "dataset_builder", "model_card", "modeling_storms"},
}


def imports(path):
    """(module, level, names) of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level, [alias.name for alias in node.names]


@pytest.mark.parametrize("package", [name for name in ALLOWED if (ROOT / name).is_dir()])
def test_imports_point_one_way(package):
    for path in (ROOT / package).rglob("*.py"):
        for module, level, _ in imports(path):
            top = module.split(".")[0]
            if level == 0 and top in ALLOWED and top != package:
                assert {top, module} & ALLOWED[package], f"{path.relative_to(ROOT)} imports {module}"


def test_every_package_has_its_place_in_the_order():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages <= set(ALLOWED)


def test_remote_code_files_are_flat_and_import_each_other_by_name():
    files = list((ROOT / "modeling_storms").glob("*.py"))
    assert not [path for path in (ROOT / "modeling_storms").iterdir() if path.is_dir() and path.name != "__pycache__"]
    third_party = {"decord", "huggingface_hub", "numpy", "torch", "transformers"}
    import sys

    for path in files:
        for module, level, _ in imports(path):
            if level > 0:
                assert level == 1, f"{path.name}: only `from .module import name` travels to the Hub"
                assert module, f"{path.name}: `from . import x` is silently not copied"
                assert "." not in module, f"{path.name}: from .{module} fails when saved"
            else:
                top = module.split(".")[0]
                lazily = third_party | ({"av"} if path.name == "video_storms.py" else set())
                assert top in lazily or top in sys.stdlib_module_names, f"{path.name} imports {module}"


def test_videos_are_opened_in_one_place():
    for package in set(ALLOWED) - {"speed"}:  # which measures that place against decord itself
        for path in (ROOT / package).rglob("*.py"):
            if path.name != "video_storms.py":
                assert not [m for m, _, _ in imports(path) if m.split(".")[0] in ("decord", "torchcodec", "cv2")], path


def test_tests_mirror_the_tree():
    for folder in (ROOT / "tests").iterdir():
        if folder.is_dir() and folder.name not in ("__pycache__", "hub"):
            assert (ROOT / folder.name).is_dir(), f"tests/{folder.name} mirrors nothing"
