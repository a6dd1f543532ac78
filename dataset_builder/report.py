"""`report.html`: rows as pictures, for people to look at before they train on them."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from modeling_storms.video_storms import decode_video

from .pipeline import Outcome, ledger_line
from .schema import LETTERS
from .stages import segment_sampler
from .staging import Staging
from .thought_video import open_keyframe


STRIP_FRAMES = 10
PICTURE_HEIGHT = 168  # pixels


def write_report(staging: Staging, outcomes: Sequence[Outcome], ledger: dict[str, Any], max_rows: int) -> Path:
    """Write one self-contained page: keyframes, thought-video strip, question, answer, scores; refused rows with them.

    Args:
        staging (`Staging`): holds the rows' media; the page goes beside it.
        outcomes, ledger: see `pipeline`.
        max_rows (`int`): rows shown, spread evenly over all.
    """
    shown = np.unique(np.linspace(0, len(outcomes) - 1, min(max_rows, len(outcomes))).round().astype(int))
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)  # questions are data
    page = environment.get_template("report.html.jinja").render(
        line=ledger_line(ledger),
        rows=[_describe(staging, outcomes[index]) for index in shown],
        total=len(outcomes),
        hidden=len(outcomes) - len(shown),
    )
    path = staging.folder.parent / "report.html"
    staging.write_atomically(path, page.encode())
    return path


def _describe(staging: Staging, outcome: Outcome) -> dict[str, Any]:
    columns = outcome.columns
    media = staging.load({name: columns[name] for name in ("keyframes", "thought_video") if name in columns})
    keyframes = [_picture(np.asarray(open_keyframe(keyframe))) for keyframe in media.get("keyframes", ())]
    strip = []
    if "thought_video" in media and not outcome.is_undecodable:
        frames, _ = decode_video(media["thought_video"]["bytes"], segment_sampler(None, None, STRIP_FRAMES))
        strip = [_picture(frame) for frame in frames]
    options = columns.get("options", [])
    return {
        "id": outcome.id,
        "rejection": outcome.rejection,
        "question": columns.get("question"),
        "options": [(letter, option, letter == columns["answer"]) for letter, option in zip(LETTERS, options)],
        "answer": columns.get("answer"),
        "keyframes": [(p, f"{t:.2f} s") for p, t in zip(keyframes, columns.get("keyframe_timestamps", ()))],
        "plan": columns.get("reasoning_plan"),
        "strip": strip,
        "scores": outcome.scores,
    }


def _picture(frame: np.ndarray) -> str:
    """A small JPEG as a data URI."""
    image = Image.fromarray(frame)
    image.thumbnail((4 * PICTURE_HEIGHT, PICTURE_HEIGHT))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
