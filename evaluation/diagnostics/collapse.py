"""Whether latents are many or one: cosines, effective rank, and norms beside those of what else the model reads."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .retrieval import unit


def mean_cosine(vectors: np.ndarray) -> float | None:
    """Mean cosine between two different rows of `vectors` `(num_rows, hidden_size)`; None if there is one row only."""
    num_rows = len(vectors)
    if num_rows < 2:
        return None
    rows = unit(vectors)
    return float((np.square(rows.sum(0)).sum() - np.square(rows).sum()) / (num_rows * (num_rows - 1)))


def slot_cosines(states: np.ndarray) -> np.ndarray:
    """Mean over rows of the cosine between each two slots, `(num_slots, num_slots)`.

    Args:
        states (`np.ndarray` of shape `(num_rows, num_slots, hidden_size)`).
    """
    rows = unit(states)
    return np.einsum("rsh,rth->st", rows, rows) / len(states)


def effective_rank(vectors: np.ndarray) -> float:
    """Over how many directions vectors spread: `exp` of the entropy of their singular values, scaled to sum to one
    (Roy and Vetterli, 2007).

    Args:
        vectors (`np.ndarray` of shape `(num_rows, hidden_size)`).

    Returns:
        `float` from 1, all on one line, to `min(num_rows, hidden_size)`; 0 if all are zero.
    """
    values = np.linalg.svd(vectors, compute_uv=False)
    if values.sum() == 0:
        return 0.0
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def measure_collapse(states: np.ndarray, references: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """How far latents are from being all the same.

    Args:
        states (`np.ndarray` of shape `(num_rows, num_slots, hidden_size)`).
        references (`Mapping[str, np.ndarray]`): other vectors that the model reads, `(num, hidden_size)`, by name.

    Returns:
        `dict`: `slot_cosines` (matrix), `between_slots` (mean over different slots of a row), `between_rows` (a value
        a slot: mean over different rows), `effective_rank` (`rows`: of each slot's states about their mean, a value a
        slot; `slots`: of a row's states, mean over rows; `all`), `most_possible` of each, `norms` (mean a slot), and
        of each reference its mean norm and cosine.
    """
    num_rows, num_slots, hidden_size = states.shape
    cosines = slot_cosines(states)
    between = (cosines.sum() - np.trace(cosines)) / max(1, num_slots * (num_slots - 1))
    slots = range(num_slots)
    return {
        "slot_cosines": cosines.tolist(),
        "between_slots": float(between) if num_slots > 1 else None,
        "between_rows": [mean_cosine(states[:, slot]) for slot in slots],
        "effective_rank": {
            "rows": [effective_rank(states[:, slot] - states[:, slot].mean(0)) for slot in slots],
            "slots": float(np.mean([effective_rank(row) for row in states])),
            "all": effective_rank(states.reshape(-1, hidden_size)),
        },
        "most_possible": {
            "rows": min(num_rows - 1, hidden_size),
            "slots": min(num_slots, hidden_size),
            "all": min(num_rows * num_slots, hidden_size),
        },
        "norms": np.linalg.norm(states, axis=-1).mean(0).tolist(),
        "references": {
            name: {"norm": float(np.linalg.norm(vectors, axis=-1).mean()), "cosine": mean_cosine(vectors)}
            for name, vectors in references.items()
        },
    }
