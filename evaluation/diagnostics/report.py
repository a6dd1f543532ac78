"""The examination for people: pictures, tables, and one page with both, all from the JSON's numbers."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from rich.console import Console
from rich.table import Table

from model_card.push import write_whole


Record = Mapping[str, Any]

COLOURS = {"frame": "#9aa5b1", "keyframe": "#2b6cb0", "thought video": "#d69e2e", "latent": "#c53030"}
BLUE, RED, GREY = COLOURS["keyframe"], COLOURS["latent"], COLOURS["frame"]


@dataclass
class Section:
    """A part of the report.

    Args:
        title, text (`str`): what is asked, and how to read the answer.
        headings (`Sequence[str]`), rows (`list[Sequence[str]]`): a table.
        pictures (`Sequence[str]`): names of PNG files.
        is_detail (`bool`): for the page only, not for the terminal.
    """

    title: str
    text: str
    headings: Sequence[str] = ()
    rows: list[Sequence[str]] = field(default_factory=list)
    pictures: Sequence[str] = ()
    is_detail: bool = False


def share(value: Record, sign: str = "") -> str:
    """A mean with its interval, in percent; a change of one in points, with `sign="+"`."""
    return _with_interval(value, 100, f"{sign}.1f")


def number(value: Record) -> str:
    return _with_interval(value, 1, ".3f")


def _with_interval(value: Record, scale: float, style: str) -> str:
    if value["mean"] is None:
        return "none"
    text = f"{scale * value['mean']:{style}}"
    if value["interval"] is None:
        return text
    low, high = (f"{scale * one:{style}}" for one in value["interval"])
    return f"{text} ({low} to {high})"


def sections(record: Record) -> list[Section]:
    """The report's parts."""
    intact, donor = record["components"]["intact"], record["donor_test"]
    headings = ("", "accuracy", "change", "other answers", "KL, nats", "")

    def effects(found: Mapping[str, Record], extra: Sequence[str] = ()) -> list[Sequence[str]]:
        return [
            (
                name.replace("_", " "),
                share(one["accuracy"]),
                share(one["accuracy_change"], "+"),
                share(one["flip_rate"]),
                number(one["kl"]),
                *(number(one[measure]) for measure in extra),
                one["what"],
            )
            for name, one in found.items()
        ]

    rows = [
        (what, *(f"{share(donor[name], sign)}" for name, sign in names))
        for what, names in (
            ("donor's answer", [("follows", ""), ("anyway", ""), ("excess", "+")]),
            ("donor's letter, where it means neither answer", [("follows_letter", "")]),
        )
        if donor[names[0][0]]["num_rows"]
    ]
    by = ", ".join(f"{count} by {name}" for name, count in donor["by"].items() if count)
    found = [
        Section(
            "Other states in the slots",
            f"Intact accuracy is {share(intact['accuracy'])}, chance {100 * record['chance']:.1f}. KL is of the "
            "answer's first token, intact against changed. An interval without width means that rows did not differ. "
            "Changed is what is fed: a slot's position also sees the video, and what it reads there stays.",
            headings,
            effects(record["latents"]),
            ("latents.png",),
        ),
        Section(
            "The donor test",
            "Each row gets the latents of a row with another answer. If latents hold the answer, it becomes that "
            f"row's. Donors' answers were found among the row's own: {by or 'none'}.",
            ("", "with its latents", "anyway", "more"),
            [[*row, *[""] * (4 - len(row))] for row in rows],
        ),
        Section(
            "Parts of the block",
            "If an empty block or dummy slots do as well as the whole, the slots' states are not what helps. A "
            "checkpoint that was trained under the bottleneck never answered without a block in training.",
            headings,
            effects(record["components"]),
        ),
        Section(
            "Other videos",
            "Latents that reflect the video move with it. Cosine and relative distance are between the states that "
            "the intact and the changed video lead to; states of different rows have a cosine of "
            f"{_mean(record['collapse']['between_rows']):.3f}.",
            (*headings[:-1], "cosine", "distance", ""),
            effects(record["videos"], ("latent_cosine", "latent_distance")),
        ),
    ]
    if oracle := record["oracle"]:
        found.append(
            Section(
                "True features in the slots",
                "Pooled features of the thought video stand where Stage I trains latents to come close. What is "
                "gained is what better latents could bring. Own states have a cosine of "
                f"{number(oracle['own_cosine'])} with them, and a relative distance of "
                f"{number(oracle['own_distance'])}.",
                ("rows", "own states", "true features", "change", "other answers"),
                [
                    (
                        str(oracle["accuracy"]["num_rows"]),
                        share(oracle["own_accuracy"]),
                        share(oracle["accuracy"]),
                        share(oracle["accuracy_change"], "+"),
                        share(oracle["flip_rate"]),
                    )
                ],
            )
        )
    size, auto = record["latent"]["latent_size"], record["auto"]
    found.append(
        Section(
            "Number of slots",
            f"Blocks forced; the checkpoint's own number is {size}. Left to itself (auto) the model opens a block in "
            f"{share(auto['opens_block'])}% of answers, at {share(auto['accuracy'])}% accuracy. It decides that "
            "before any slot, so for all budgets alike.",
            ("slots", *headings[1:-1]),
            [row[:-1] for row in effects({size: {"what": "", **one} for size, one in record["budgets"].items()})],
            ("budgets.png",),
        )
    )
    for gallery, one in record["retrieval"].items():
        where = gallery.replace("_", " ")
        table = ("query", "Hit@1", "Hit@5", "MRR", "raw Hit@1", "raw MRR")
        found += [
            Section(
                f"Retrieval: {where}",
                f"{one['num_queries']} queries among {one['num_entries']} entries; Hit@1 by chance "
                f"{100 * one['chance_of_hit_at_1']:.1f}%. Centred cosine first, raw cosine for comparison.",
                table,
                _scores(one["queries"]),
                (f"retrieval_{gallery}.png",),
            ),
            Section(
                f"Retrieval by slots: {where}",
                "Each slot alone, the mean without it, and all in order or reversed against as many pieces in order.",
                table,
                _scores(one["slots"]),
                is_detail=True,
            ),
        ]
    collapse = record["collapse"]
    rank, most = collapse["effective_rank"], collapse["most_possible"]
    found += [
        Section(
            "Collapse",
            "Latents that are all alike can't tell rows apart. Effective rank: over how many directions they spread.",
            ("", "measured", "most possible"),
            [
                ("cosine between slots of a row", _plain(collapse["between_slots"]), ""),
                ("cosine between rows, mean over slots", _plain(_mean(collapse["between_rows"])), ""),
                ("effective rank of rows, mean over slots", _plain(_mean(rank["rows"])), str(most["rows"])),
                ("effective rank of a row's slots", _plain(rank["slots"]), str(most["slots"])),
                ("effective rank of all states", _plain(rank["all"]), str(most["all"])),
                ("norm, mean over slots", _plain(_mean(collapse["norms"])), ""),
                *((f"norm of {name}", _plain(one["norm"]), "") for name, one in collapse["references"].items()),
            ],
            ("collapse.png",),
        ),
        Section(
            "Where latents lie",
            "Frames, keyframes, thought videos (pooled as targets) and latents on one plane.",
            pictures=("pca.png", "tsne.png"),
        ),
    ]
    return found


def _scores(scored: Mapping[str, Record]) -> list[Sequence[str]]:
    return [
        (
            name,
            *(share(ways["centred"][score]) for score in ("hit_at_1", "hit_at_5", "mrr")),
            *(share(ways["cosine"][score]) for score in ("hit_at_1", "mrr")),
        )
        for name, ways in scored.items()
    ]


def _mean(values: Sequence[float | None]) -> float:
    kept = [value for value in values if value is not None]
    return float(np.mean(kept)) if kept else float("nan")


def _plain(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def print_tables(record: Record, console: Console | None = None) -> None:
    console = console or Console()
    for section in sections(record):
        if section.rows and not section.is_detail:
            # What each row means, a last column without a heading, takes more room than a terminal has.
            width = len(section.headings) - (section.headings[-1] == "")
            table = Table(*section.headings[:width], title=section.title, title_justify="left")
            for row in section.rows:
                table.add_row(*row[:width])
            console.print(table)
    console.print(f"[bold]{record['verdict']['text']}")


def write_report(record: Record, folder: Path) -> Path:
    """Write `report.html`, with the folder's pictures inside it."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)  # names are data
    parts = sections(record)
    names = [name for section in parts for name in section.pictures]
    pictures = {
        name: "data:image/png;base64," + base64.b64encode((folder / name).read_bytes()).decode()
        for name in names
        if (folder / name).is_file()
    }
    page = environment.get_template("report.html.jinja").render(record=record, sections=parts, pictures=pictures)
    path = folder / "report.html"
    write_whole(path, page)
    return path


# -- pictures


def draw_pictures(record: Record, folder: Path) -> None:
    """Write the PNG files that `sections` names."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def save(figure: Any, name: str) -> None:
        figure.savefig(folder / name, dpi=110)
        plt.close(figure)

    # 1. All changes side by side.
    changes = {**record["latents"], **record["videos"]}
    changes |= {name: one for name, one in record["components"].items() if name in ("off", "markers")}
    changes |= {"oracle": record["oracle"]} if record["oracle"] else {}
    figure, axes = plt.subplots(1, 3, figsize=(13, 0.36 * len(changes) + 1.2), sharey=True, layout="constrained")
    panels = (("accuracy_change", "change of accuracy, points", 100), ("flip_rate", "other answers, %", 100))
    for axis, (measure, title, scale) in zip(axes, (*panels, ("kl", "KL of first token, nats", 1))):
        _bars(axis, {name.replace("_", " "): one[measure] for name, one in changes.items()}, scale)
        axis.set_title(title, fontsize=10)
    axes[0].invert_yaxis()
    save(figure, "latents.png")

    # 2. Budgets.
    figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
    sizes = [int(size) for size in record["budgets"]]
    accuracies = [one["accuracy"] for one in record["budgets"].values()]
    means, spread = _spread(accuracies, 100)
    axis.errorbar(range(len(sizes)), means, spread, marker="o", color=RED, capsize=3, label="forced")
    axis.axhline(100 * record["auto"]["accuracy"]["mean"], color=BLUE, label="auto")
    axis.axhline(100 * record["chance"], color=GREY, linestyle="--", label="chance")
    axis.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axis.set(xlabel="slots", ylabel="accuracy, %", ylim=(0, 102))
    axis.legend(fontsize=8)
    save(figure, "budgets.png")

    # 3. Retrieval.
    for gallery, found in record["retrieval"].items():
        figure, (axis, curve) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
        scored = {**found["queries"], **{f"latents, {name}": one for name, one in found["slots"].items()}}
        scored.pop("latents, mean")
        _bars(axis, {name: one["centred"]["mrr"] for name, one in scored.items()}, 100)
        axis.invert_yaxis()
        axis.set_title("MRR, %", fontsize=10)
        palette = (RED, BLUE, COLOURS["thought video"], GREY)
        for (name, ranks), colour in zip(found["ranks"].items(), palette):
            curve.plot(np.linspace(0, 100, len(ranks)), sorted(1 / np.array(ranks))[::-1], label=name, color=colour)
        curve.set(xlabel="queries, % (best first)", ylabel="reciprocal rank", ylim=(0, 1.03))
        curve.legend(fontsize=8)
        save(figure, f"retrieval_{gallery}.png")

    # 4. Collapse.
    collapse = record["collapse"]
    figure, (matrix, norms, rows) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    slots = np.arange(1, len(collapse["norms"]) + 1)
    edges = (0.5, len(slots) + 0.5)
    shown = matrix.imshow(collapse["slot_cosines"], vmin=-1, vmax=1, cmap="RdBu_r", extent=(*edges, *edges[::-1]))
    figure.colorbar(shown, ax=matrix)
    matrix.set_title("cosine between slots", fontsize=10)
    norms.plot(slots, collapse["norms"], marker="o", color=RED, label="latents")
    for (name, one), style in zip(collapse["references"].items(), ("--", ":")):
        norms.axhline(one["norm"], color=BLUE, linestyle=style, label=name)
    norms.set(title="norm", xlabel="slot")
    norms.legend(fontsize=8)
    rows.plot(slots, [np.nan if one is None else one for one in collapse["between_rows"]], marker="o", color=RED)
    rows.set(title="cosine between rows", xlabel="slot", ylim=(-0.05, 1.05))
    save(figure, "collapse.png")

    # 5. Planes.
    for name, title in (("pca", "PCA"), ("tsne", "t-SNE")):
        figure, axis = plt.subplots(figsize=(6.5, 5), layout="constrained")
        for kind, colour in COLOURS.items():
            at = [one[name] for one in record["projections"]["points"] if one["kind"] == kind and one[name]]
            if at:
                across, up = np.array(at).T
                axis.scatter(across, up, s=9, alpha=0.6, color=colour, label=kind, linewidths=0)
        axis.set(title=title, xticks=[], yticks=[])
        axis.legend(fontsize=8, markerscale=2)
        save(figure, f"{name}.png")


def _bars(axis: Any, values: Mapping[str, Record], scale: float) -> None:
    means, spread = _spread(list(values.values()), scale)
    axis.barh(range(len(values)), means, xerr=spread, color=BLUE, alpha=0.75, error_kw={"capsize": 2, "lw": 1})
    axis.set_yticks(range(len(values)), list(values), fontsize=8)
    axis.axvline(0, color="black", lw=0.8)


def _spread(values: Sequence[Record], scale: float) -> tuple[list[float], np.ndarray]:
    """Means, and how far below and above them the intervals reach, `(2, num)`."""
    means = [scale * (one["mean"] or 0.0) for one in values]
    reach = []
    for one, mean in zip(values, means):
        low, high = (scale * end for end in one["interval"] or (mean / scale, mean / scale))
        reach.append([max(0.0, mean - low), max(0.0, high - mean)])
    return means, np.array(reach).T
