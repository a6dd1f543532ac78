"""The bench runs and writes what it says, and the README shows what it wrote."""

import json
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]


def test_bench_writes_its_ratio(tmp_path):
    command = [sys.executable, "-m", "speed", "--num_layers", "2", "--rounds", "3", "--new_tokens", "4"]
    done = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, check=True)
    record = json.loads((tmp_path / "off_mode_cpu.json").read_text())
    assert record["command"].startswith("python -m speed --num_layers 2 --rounds 3")
    (result,) = record["results"]
    assert 0.2 < result["ratio_off_to_plain"] < 5
    assert f"{result['ratio_off_to_plain']:.3f}" in done.stdout


def test_readme_shows_the_committed_results():
    record = json.loads((ROOT / "speed" / "results" / "off_mode_cpu.json").read_text())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for result in record["results"]:
        layers = result["model"].split()[0]
        assert f"| {layers} | {result['ratio_off_to_plain']:.3f} |" in readme
