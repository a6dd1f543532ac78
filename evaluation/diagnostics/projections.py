"""Frames, keyframes, thought videos and latents on one plane (STORMS, PCA and t-SNE)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def project(groups: Mapping[str, Sequence[np.ndarray]], seed: int = 0) -> dict[str, Any]:
    """Lay vectors of several kinds out on a plane, all kinds together.

    Args:
        groups (`Mapping[str, Sequence[np.ndarray]]`): by kind, for each clip the vectors `(num, hidden_size)`.
        seed (`int`): of t-SNE.

    Returns:
        `dict`: `points`, each with `kind`, `clip`, `pca` and `tsne` coordinates (the latter None below 8 points), and
        `explained`, the share of variance on each PCA axis.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    labels = [(kind, clip) for kind, clips in groups.items() for clip, found in enumerate(clips) for _ in found]
    vectors = np.concatenate([found for clips in groups.values() for found in clips if len(found)]).astype(np.float64)
    pca = PCA(2, random_state=seed)
    flat = pca.fit_transform(vectors)
    tsne: list[Any] = [None] * len(vectors)
    if len(vectors) >= 8:
        perplexity = min(30.0, (len(vectors) - 1) / 3)
        tsne = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(vectors).tolist()
    return {
        "explained": pca.explained_variance_ratio_.tolist(),
        "points": [
            {"kind": kind, "clip": clip, "pca": at.tolist(), "tsne": near}
            for (kind, clip), at, near in zip(labels, flat, tsne)
        ],
    }
