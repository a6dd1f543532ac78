"""What can be changed before an answer: the states in the slots, the block itself, and the video."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..benchmarks.base import Question
from ..parsing import matches_free_form


# What is put into the slots, and what it tells.
STATES = {
    "zero": "zeros",
    "mean": "each slot's mean over all rows: typical, but the same for all",
    "noise": "Gaussian noise of the states' own norms: not typical",
    "pad": "the embedding of <|latent_pad|>: dummy slots",
    "other_row": "the states of a row drawn from another video: typical, of the wrong row",
    "donor": "the states of a row whose answer is another",
    "shuffled_slots": "the row's own states in another order",
}
# What stands between the question and the answer.
COMPONENTS = {
    "off": "no block: the plain backbone, which sees the video",
    "markers": "an empty block: <|latent_start|><|latent_end|>",
    "pad": "a block of dummy slots, each the embedding of <|latent_pad|>",
    "intact": "the whole",
}
VIDEOS = {
    "other_video": "another row's video",
    "shuffled_frames": "the same frames in another order, at the same times",
    "reversed_frames": "the same frames backwards",
    "blank": "grey frames",
}


class PlaceStates:
    """A `latent_intervention` that fills the slots of a batch, whose blocks are all forced, with given states.

    Args:
        states (`torch.Tensor` of shape `(batch, num_slots, hidden_size)`): a row each, in the batch's order.
    """

    def __init__(self, states: torch.Tensor):
        self.states = states

    def __call__(self, states: torch.Tensor, slot_index: torch.Tensor) -> torch.Tensor:
        assert len(states) == len(self.states), "a forced block is open in all rows or in none"
        rows = torch.arange(len(states), device=states.device)
        return self.states.to(states)[rows, slot_index]


def empty_block(latent_end_id: int) -> dict[str, Any]:
    """Options of `generate` for a block that ends as it begins: inside it, `<|latent_end|>` outweighs all else.

    Outside, that token can't be emitted, and the weight changes nothing.
    """
    return {"latent_mode": "force", "latent_stop": "token", "sequence_bias": [[[latent_end_id], 1e9]]}


def replacements(
    states: torch.Tensor, pad_embedding: torch.Tensor, others: Sequence[int], donors: Sequence[int | None], seed: int
) -> dict[str, torch.Tensor]:
    """What each of `STATES` puts into the slots.

    Args:
        states (`torch.Tensor` of shape `(num_rows, num_slots, hidden_size)`): of the intact runs.
        pad_embedding (`torch.Tensor` of shape `(hidden_size,)`).
        others, donors (`Sequence[int]`): for each row, of which row it gets the states. A row without a donor keeps
            its own.
        seed (`int`): of noise and orders.

    Returns:
        `dict` of tensors of the shape of `states`; without `shuffled_slots` where there is one slot only.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(states.shape, generator=generator)
    noise = noise / noise.norm(dim=-1, keepdim=True) * states.norm(dim=-1, keepdim=True)
    placed = {
        "zero": torch.zeros_like(states),
        "mean": states.mean(0, keepdim=True).expand_as(states),
        "noise": noise,
        "pad": pad_embedding.expand_as(states),
        "other_row": states[torch.tensor(others)],
        "donor": states[torch.tensor([row if donor is None else donor for row, donor in enumerate(donors)])],
    }
    num_slots = states.shape[1]
    if num_slots > 1:
        generator_numpy = np.random.default_rng(seed)
        orders = torch.from_numpy(np.stack([new_order(num_slots, generator_numpy) for _ in states]))
        placed["shuffled_slots"] = states.gather(1, orders[..., None].expand_as(states))
    return placed


def new_order(length: int, generator: np.random.Generator) -> np.ndarray:
    """A random order that is not the old one, of two or more."""
    while True:
        order = generator.permutation(length)
        if (order != np.arange(length)).any():
            return order


def other_rows(questions: Sequence[Question], seed: int) -> list[int]:
    """For each row a random row of another video.

    Raises:
        ValueError: if all rows are of one video.
    """
    generator = np.random.default_rng(seed)
    videos = np.array([one.video_id for one in questions])
    if len(set(videos)) < 2:
        raise ValueError(
            f"All {len(questions)} rows show the video {videos[0]!r}, expected two videos or more: latents are "
            "exchanged between them. Raise --max_questions, or choose another dataset."
        )
    return [int(generator.choice(np.flatnonzero(videos != video))) for video in videos]


@dataclass(frozen=True)
class Donor:
    """Whose states a row gets in the donor test, and what it answers if it follows them.

    Args:
        row (`int`): the donor.
        answer (`str`): the donor's answer in this row's terms: a letter, or a free-form text.
        by (`str`): `"text"`: that option of this row reads as the donor's answer does; `"letter"`: none does, and it
            is the donor's letter; `"free-form"`.
    """

    row: int
    answer: str
    by: str


def choose_donors(questions: Sequence[Question], is_correct: Sequence[bool], seed: int) -> list[Donor | None]:
    """A donor for each row: a row of another video whose answer is another.

    An option is mapped by its text, so that a shuffled order of options is no matter; of those donors one is drawn
    whose states plausibly hold its answer: it is answered right when intact, and both text and letter differ from
    this row's.

    Args:
        is_correct (`Sequence[bool]`): whether the intact run answers right.

    Returns:
        One `Donor` a row; None where no row has another answer.
    """
    generator = np.random.default_rng(seed)
    donors: list[Donor | None] = []
    for own in questions:
        ranked: dict[int, list[Donor]] = {}
        for row, other in enumerate(questions):
            if other.video_id == own.video_id or (donor := _as_donor(own, row, other)) is None:
                continue
            rank = 4 * is_correct[row] + 2 * (donor.by != "letter") + (other.answer != own.answer)
            ranked.setdefault(rank, []).append(donor)
        best = ranked[max(ranked)] if ranked else []
        donors.append(best[int(generator.integers(len(best)))] if best else None)
    return donors


def _as_donor(own: Question, row: int, other: Question) -> Donor | None:
    if bool(own.options) != bool(other.options):
        return None
    if not own.options:
        return None if matches_free_form(other.answer, own.answer) else Donor(row, other.answer, "free-form")
    text = " ".join(other.options[other.answer].casefold().split())
    letters = [letter for letter, option in own.options.items() if " ".join(option.casefold().split()) == text]
    if letters:
        return None if letters[0] == own.answer else Donor(row, letters[0], "text")
    if other.answer == own.answer or other.answer not in own.options:
        return None
    return Donor(row, other.answer, "letter")


def change_frames(frames: np.ndarray, change: str, generator: np.random.Generator) -> np.ndarray:
    """Frames as one of `VIDEOS` shows them; `other_video` changes the frames that it is given in no way."""
    if change == "shuffled_frames":
        return frames[new_order(len(frames), generator)] if len(frames) > 1 else frames
    if change == "reversed_frames":
        return frames[::-1].copy()
    if change == "blank":
        return np.full_like(frames, 128)
    assert change == "other_video", change
    return frames
