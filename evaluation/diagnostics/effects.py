"""What a change did to the answers, with intervals, and the verdict on the latents."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..answering import Reply
from ..benchmarks.base import Question
from ..compare import compare_means
from ..parsing import matches_free_form, parse_choice


@dataclass
class Outcome:
    """One row's answer under one condition.

    Args:
        given (`str`): the letter chosen, else the text: what counts as the same answer.
        is_parsed, is_correct (`bool`).
        kl (`float`): of the answer's first token, intact against this, in nats.
    """

    given: str
    is_parsed: bool
    is_correct: bool
    kl: float = 0.0

    def gives(self, answer: str, question: Question) -> bool:
        """Whether it is this answer: a letter, or a free-form text."""
        return self.given == answer if question.options else matches_free_form(self.given, answer)


def read_reply(reply: Reply, question: Question, kl: float = 0.0) -> Outcome:
    if question.options:
        letter = parse_choice(reply.text, question.options)
        return Outcome(letter or reply.text.strip(), letter is not None, letter == question.answer, kl)
    text = reply.text.strip()
    return Outcome(" ".join(text.casefold().split()), bool(text), matches_free_form(text, question.answer), kl)


def first_token_kl(intact: torch.Tensor, changed: torch.Tensor, excluded: Sequence[int] = ()) -> float:
    """`KL(intact || changed)` of two next-token distributions, in nats.

    Args:
        intact, changed (`torch.Tensor` of shape `(vocab_size,)`): logits.
        excluded (`Sequence[int]`): ids that can't be emitted here, as those of the latent tokens.
    """
    kept = torch.ones(len(intact), dtype=torch.bool)
    kept[list(excluded)] = False
    p, q = (logits[kept].double().log_softmax(-1) for logits in (intact, changed))
    return max(0.0, float((p.exp() * (p - q)).nan_to_num(0.0, posinf=float("inf")).sum()))


@dataclass(frozen=True)
class Resampling:
    """How intervals are made: a bootstrap over videos, as questions about one video are no separate evidence."""

    videos: Sequence[str]
    samples: int = 2000
    seed: int = 0

    def change(self, before: Any, after: Any, rows: Sequence[int] | None = None) -> dict[str, Any]:
        """Mean of `after` less that of `before`, row by row.

        Returns:
            `dict`: `mean`, `interval` (95%, None with one video) and `num_rows`.
        """
        values = np.stack([np.asarray(before, float), np.asarray(after, float)], axis=1)
        videos = np.array(self.videos)
        if rows is not None:
            values, videos = values[list(rows)], videos[list(rows)]
        if len(values) == 0:
            return {"mean": None, "interval": None, "num_rows": 0}
        found = compare_means(values, videos, np.zeros(len(videos)), self.samples, self.seed)
        return {"mean": found["difference"], "interval": found["interval"], "num_rows": len(values)}

    def mean(self, values: Any, rows: Sequence[int] | None = None) -> dict[str, Any]:
        """Mean of some values, as `change` returns it."""
        return self.change(np.zeros(len(self.videos)), values, rows)


def effect(
    intact: Sequence[Outcome], changed: Sequence[Outcome], resampling: Resampling, rows: Sequence[int] | None = None
) -> dict[str, Any]:
    """What a change did, to all rows or some.

    Returns:
        `dict` of `accuracy`, `accuracy_change` (changed less intact), `flip_rate` (answers that are another), `kl` (of
        the first token, nats) and `parsed`, each with mean and interval.
    """
    right = [one.is_correct for one in intact], [one.is_correct for one in changed]
    return {
        "accuracy": resampling.mean(right[1], rows),
        "accuracy_change": resampling.change(*right, rows),
        "flip_rate": resampling.mean([one.given != other.given for one, other in zip(intact, changed)], rows),
        "kl": resampling.mean([one.kl for one in changed], rows),
        "parsed": resampling.mean([one.is_parsed for one in changed], rows),
    }


def verdict(
    intact: Sequence[Outcome],
    other_row: Sequence[Outcome],
    noise: Sequence[Outcome],
    chances: Sequence[float],
    donor: dict[str, Any],
    resampling: Resampling,
) -> dict[str, Any]:
    """How much of the accuracy the latents carry.

    `y`, what there is to carry: intact accuracy less chance (one in the number of options; 0 for free-form answers).
    `x`, what they carry: intact accuracy less that with the latents of a random row of another video. Those are as
    typical as the row's own and differ only in what they say about it: a model that answers from nothing else falls to
    chance (x = y), one that never reads them changes no answer (x = 0). Noise would overstate x, as states of no
    known kind may break a model that learns nothing from its own; a donor chosen for another answer would put it below
    chance. Both are told beside it: that answers become the donor's is what shows that latents hold the answer.

    The latents are the states that are fed to the slots. A slot's position attends to the video too, even under the
    bottleneck, and what it reads there stays when states are exchanged: it is part of y, but not of x.

    Args:
        intact, other_row, noise (`Sequence[Outcome]`): a row each.
        chances (`Sequence[float]`): of a right guess.
        donor (`dict`): from `donor_test`.

    Returns:
        `dict`: `status`: `"carry"` if x is above 0 (its 95% interval excludes it), `"hurt"` if below, `"none"` if the
        interval includes 0, `"nothing to carry"` if that of y includes 0 or it is below, `"undecided"` without
        intervals; `text`; `carried` (x), `above_chance` (y) and `noise_change`, each with mean and interval.
    """
    right = [one.is_correct for one in intact]
    above = resampling.change(chances, right)
    carried = resampling.change([one.is_correct for one in other_row], right)
    noise_change = resampling.change(right, [one.is_correct for one in noise])
    x, y = 100 * carried["mean"], 100 * above["mean"]
    follows, excess = donor["follows"]["mean"], donor["excess"]
    is_followed = excess["interval"] is not None and excess["interval"][0] > 0
    told = f"with the latents of another video's row accuracy changes by {-x:+.1f} points"
    if carried["interval"] is None or above["interval"] is None:
        status = "undecided"
        text = f"Undecided, as there is one video only: {told}."
    elif above["interval"][0] <= 0:
        status = "nothing to carry"
        text = (
            f"The model answers no better than chance ({y:+.1f} points, {span(above)}), so there is no accuracy for "
            f"the latents to carry; {told}."
        )
    elif carried["interval"][0] > 0:
        status = "carry"
        text = f"The latents carry {x:.1f} of {y:.1f} points of accuracy above chance ({span(carried)})."
    elif carried["interval"][1] < 0:
        status = "hurt"
        text = (
            f"The latents carry none of {y:.1f} points of accuracy above chance, but hurt: {told} ({span(carried)})."
        )
    else:
        status = "none"
        text = (
            f"The latents carry none of {y:.1f} points of accuracy above chance that could be shown: {told} "
            f"({span(carried)} carried, zero included)."
        )
    if follows is not None:
        text += (
            f" With the latents of a row that has another answer, {100 * follows:.0f}% of answers become that one; "
            f"{100 * donor['anyway']['mean']:.0f}% are it anyway."
        )
    if status == "carry" and not is_followed:
        text += " Answers do not follow the donor, so what the latents carry is not the answer itself."
    if status == "none" and is_followed:
        text += " So they move answers, if not accuracy."
    if status == "none" and noise_change["interval"][1] < 0:
        text += (
            f" Noise in the slots costs {-100 * noise_change['mean']:.1f} points: the slots must hold something "
            "typical, whatever it says."
        )
    return {
        "status": status,
        "text": text,
        "carried": carried,
        "above_chance": above,
        "noise_change": noise_change,
        "follows_donor_excess": excess,
    }


def donor_test(
    questions: Sequence[Question],
    intact: Sequence[Outcome],
    given: Sequence[Outcome],
    donors: Sequence[Any],
    resampling: Resampling,
) -> dict[str, Any]:
    """How often an answer becomes that of the row whose latents it was given.

    Returns:
        `dict`: `follows`, how often the donor's answer is given, `anyway`, how often the intact run of the same row
        gives it, and `excess`, the difference, each with mean, interval and number of rows; `by`, how many donors'
        answers were mapped by option text, by letter and as free-form; and `follows_letter`: of rows whose donor's
        own letter stands for a text that is neither answer, how often that letter is given: what a model does whose
        latents hold letters.
    """
    rows = [row for row, donor in enumerate(donors) if donor is not None]

    def gives(outcomes: Sequence[Outcome]) -> list[bool]:
        return [
            donor is not None and outcome.gives(donor.answer, question)
            for question, outcome, donor in zip(questions, outcomes, donors)
        ]

    letters = ["" if donor is None else questions[donor.row].answer for donor in donors]
    apart = [row for row in rows if donors[row].by == "text" and letters[row] != donors[row].answer]
    apart = [row for row in apart if letters[row] != questions[row].answer and letters[row] in questions[row].options]
    return {
        "follows": resampling.mean(gives(given), rows),
        "anyway": resampling.mean(gives(intact), rows),
        "excess": resampling.change(gives(intact), gives(given), rows),
        "by": {by: sum(donors[row].by == by for row in rows) for by in ("text", "letter", "free-form")},
        "follows_letter": resampling.mean([one.given == letter for one, letter in zip(given, letters)], apart),
    }


def span(value: dict[str, Any], scale: float = 100) -> str:
    """An interval in words, in percent or points."""
    if value["interval"] is None:
        return "95% interval undefined"
    low, high = (scale * one for one in value["interval"])
    return f"95% interval {low:.1f} to {high:.1f}"
