"""The bench runs and writes what it says, and the README shows what it wrote."""

import json
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]


def run_bench(output, *arguments):
    command = [sys.executable, "-m", "speed", *arguments, "--rounds", "3", "--output", str(output)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_bench_writes_its_ratio(tmp_path):
    printed = run_bench(tmp_path, "off_mode", "--num_layers", "2", "--new_tokens", "4")
    record = json.loads((tmp_path / "off_mode_cpu.json").read_text())
    assert record["command"].startswith("python -m speed off_mode --num_layers 2")
    (result,) = record["results"]
    assert 0.2 < result["ratio"] < 5
    assert f"{result['ratio']:.3f}" in printed


def test_decoding_keeps_up_with_decord(tmp_path, clip):
    run_bench(tmp_path, "decode", "--videos", str(clip))
    every, some = json.loads((tmp_path / "decode_cpu.json").read_text())["results"]
    assert (every["video"], some["video"]) == ("168x112, all frames", "168x112, 16 frames")
    assert every["ratio"] > 0.5  # 0.9 and more is measured with enough rounds on a quiet machine


def test_readme_shows_the_committed_results():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    results = ROOT / "speed" / "results"
    for result in json.loads((results / "off_mode_cpu.json").read_text())["results"]:
        assert f"| {result['model'].split()[0]} | {result['ratio']:.3f} |" in readme
    for result in json.loads((results / "decode_cpu.json").read_text())["results"]:
        assert f"| {result['video']} | {result['ratio']:.3f} |" in readme
        assert result["ratio"] >= 0.9
