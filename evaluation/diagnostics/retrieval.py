"""Same-video retrieval: does a vector find the video that it was made from? (STORMS, same-video retrieval)

The paper gives Hit@1, Hit@5 and MRR of latents, text and random vectors, latents averaged over slots. It does not say
what is searched. Here there are three galleries, each with an entry a clip or a question:

- `video`: tokens of each clip's sampled frames from the vision tower and merger, averaged;
- `thought_video`: the same of thought videos, where all rows have one: what Stage I trains latents to resemble;
- `questions`: the same kind of vector of the other questions, where some share a video; those are right.

Similarity is the cosine. States and visual features are different populations, and a raw cosine is decided by their
means, so each side is also centred by its own mean.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .effects import Resampling


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length one; a zero row (to rounding, beside the others) stays zero."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    is_zero = norms <= 1e-9 * norms.max(initial=0.0)
    return np.where(is_zero, 0.0, vectors / np.where(is_zero, 1.0, norms))


def cosine_table(queries: np.ndarray, gallery: np.ndarray, centred: bool) -> np.ndarray:
    """Cosine of each query with each entry, `(num_queries, num_entries)`; if `centred`, less each side's mean."""
    if centred:
        queries, gallery = queries - queries.mean(0), gallery - gallery.mean(0)
    return unit(queries) @ unit(gallery).T


def match_ranks(similarity: np.ndarray, is_match: np.ndarray, is_candidate: np.ndarray | None = None) -> np.ndarray:
    """Rank of each query's best match, from 1.

    Args:
        similarity (`np.ndarray` of shape `(num_queries, num_entries)`).
        is_match (`np.ndarray` of the same shape): right entries, at least one a query.
        is_candidate (`np.ndarray` of the same shape, *optional*): entries that are searched; all by default.

    Returns:
        `np.ndarray` of shape `(num_queries,)`: one more than the wrong entries that are more similar; of equally
        similar ones half count, so that vectors that are all alike find nothing by luck.
    """
    searched = np.ones_like(is_match) if is_candidate is None else is_candidate
    best = np.where(is_match & searched, similarity, -np.inf).max(axis=1, keepdims=True)
    wrong = ~is_match & searched
    return 1 + (wrong & (similarity > best)).sum(1) + 0.5 * (wrong & (similarity == best)).sum(1)


def retrieval_scores(ranks: np.ndarray, resampling: Resampling, rows: Sequence[int]) -> dict[str, Any]:
    """Hit@1, Hit@5 and mean reciprocal rank, each with its interval.

    Args:
        ranks (`np.ndarray` of shape `(num_queries,)`): of some rows.
        rows (`Sequence[int]`): which of them.
    """
    every = np.zeros(len(resampling.videos))

    def mean(values: np.ndarray) -> dict[str, Any]:
        every[list(rows)] = values
        return resampling.mean(every, rows)

    return {"hit_at_1": mean(ranks <= 1), "hit_at_5": mean(ranks <= 5), "mrr": mean(1 / ranks)}


def slot_variants(states: np.ndarray) -> dict[str, np.ndarray]:
    """A vector a row from some slots: their mean, each alone, the mean without each.

    Args:
        states (`np.ndarray` of shape `(num_rows, num_slots, hidden_size)`).
    """
    slots = range(states.shape[1])
    variants = {"mean": states.mean(1)}
    variants |= {f"slot {slot + 1}": states[:, slot] for slot in slots}
    if len(slots) > 1:
        variants |= {f"without {slot + 1}": np.delete(states, slot, axis=1).mean(1) for slot in slots}
    return variants


def search(
    states: np.ndarray,
    texts: Mapping[str, np.ndarray],
    galleries: Mapping[str, np.ndarray],
    clips: Sequence[Any],
    resampling: Resampling,
    seed: int = 0,
) -> dict[str, Any]:
    """Look each row's vectors up in each gallery.

    Args:
        states (`np.ndarray` of shape `(num_rows, num_slots, hidden_size)`): latents.
        texts (`Mapping[str, np.ndarray]`): other vectors of each row, `(num_rows, hidden_size)`, by name.
        galleries (`Mapping[str, np.ndarray]`): by name, features of each row's video, pooled to one piece a slot,
            `(num_rows, num_slots, hidden_size)`. Rows with one clip have one entry, that of the first.
        clips (`Sequence`): what each row shows; rows that show the same are of one video.
        seed (`int`): of the random vectors.

    Returns:
        `dict` by gallery: `num_entries`, `chance_of_hit_at_1`, `queries`: by query (`latents`, `random` and the names
        of `texts`) and `slots` (by variant): `cosine` and `centred` scores; `ranks`: by query, of the centred search.
    """
    generator = np.random.default_rng(seed)
    names = list(dict.fromkeys(clips))
    clip_idx = np.array([names.index(clip) for clip in clips])
    firsts = [int(np.flatnonzero(clip_idx == index)[0]) for index in range(len(names))]
    queries = {
        "latents": states.mean(1),
        **texts,
        "random": generator.standard_normal(states.mean(1).shape),
    }
    results: dict[str, Any] = {}

    def record(gallery: str, ranked: Any, num_entries: float, chance: float, rows: Sequence[int]) -> None:
        """`ranked(query, entries, centred)` gives ranks; `entries` names what the query is compared with."""
        slots = slot_variants(states)
        flat = states.reshape(len(states), -1)
        backwards = states[:, ::-1].reshape(len(states), -1)
        variants = {name: (vectors, name) for name, vectors in slots.items()}
        if states.shape[1] > 1:
            variants |= {"in order": (flat, "in order"), "reversed": (backwards, "in order")}

        def both(query: np.ndarray, entries: str) -> dict[str, Any]:
            ways = {"cosine": False, "centred": True}
            return {
                way: retrieval_scores(ranked(query, entries, is_centred), resampling, rows)
                for way, is_centred in ways.items()
            }

        results[gallery] = {
            "num_entries": num_entries,
            "num_queries": len(rows),
            "chance_of_hit_at_1": chance,
            "queries": {name: both(query, name) for name, query in queries.items()},
            "slots": {name: both(query, entries) for name, (query, entries) in variants.items()},
            "ranks": {name: ranked(query, name, True).tolist() for name, query in queries.items()},
        }

    # 1. Videos: an entry a clip.
    is_own = clip_idx[:, None] == np.arange(len(names))
    for name, pooled in galleries.items():
        entries = pooled[firsts]

        def among_videos(query: np.ndarray, compared: str, centred: bool, entries: np.ndarray = entries) -> np.ndarray:
            found = entries.reshape(len(entries), -1) if compared == "in order" else entries.mean(1)
            return match_ranks(cosine_table(query, found, centred), is_own)

        record(name, among_videos, len(names), 1 / len(names), range(len(clips)))

    # 2. Questions: an entry a row. Each query searches all rows but its own.
    same = clip_idx[:, None] == clip_idx
    rows = [row for row in range(len(clips)) if same[row].sum() > 1]
    if rows and len(names) > 1:
        is_other = ~np.eye(len(clips), dtype=bool)
        gallery = slot_variants(states) | {"in order": states.reshape(len(states), -1)} | queries

        def among_questions(query: np.ndarray, compared: str, centred: bool) -> np.ndarray:
            similarity = cosine_table(query, gallery[compared], centred)
            return match_ranks(similarity[rows], (same & is_other)[rows], is_other[rows])

        num_right = np.array([same[row].sum() - 1 for row in rows])
        record("questions", among_questions, len(clips) - 1, float((num_right / (len(clips) - 1)).mean()), rows)
    return results
