"""Training curves as a picture, from the `trainer_state.json` that each run saves.

python -m recipes.curves stage1 stage2 --output curves.png
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path


PANELS = (("loss/lm", "eval_loss/lm"), ("loss/latent", "eval_loss/latent"), ("eval_accuracy", "mean_token_accuracy"))


def plot_curves(folders: Sequence[Path], output: Path) -> None:
    """One row of panels a run: losses, accuracy; a panel without values is left empty.

    Raises:
        ValueError: if a folder holds no `trainer_state.json`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(folders), len(PANELS), figsize=(4 * len(PANELS), 2.6 * len(folders)), squeeze=False, layout="constrained"
    )
    for row, folder in zip(axes, folders):
        state = folder / "trainer_state.json"
        if not state.is_file():
            raise ValueError(f"{folder} holds no trainer_state.json: give the output folder of a finished run.")
        history = json.loads(state.read_text())["log_history"]
        for panel, names in zip(row, PANELS):
            for name in names:
                points = [(entry["step"], entry[name]) for entry in history if name in entry]
                if points:
                    panel.plot(*zip(*points), label=name, marker="." if len(points) < 30 else None)
            panel.set_xlabel("step")
            panel.set_title(f"{folder.name}: {names[0]}", fontsize=9)
            if panel.has_data():
                panel.legend(fontsize=8)
            else:
                panel.axis("off")
    figure.savefig(output, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="output folders of training runs")
    parser.add_argument("--output", type=Path, default=Path("curves.png"), help="picture to write (%(default)s)")
    arguments = parser.parse_args(argv)
    plot_curves(arguments.folders, arguments.output)
    print(f"Wrote {arguments.output}")


if __name__ == "__main__":
    main()
