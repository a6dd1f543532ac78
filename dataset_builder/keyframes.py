"""Choosing keyframes: a teacher's choice, checked."""

from typing import Any

from .teacher import BadReply, Teacher, TeacherRequest, ask_until_valid


def choose_keyframes(
    teacher: Teacher, request: TeacherRequest, max_keyframes: int, max_attempts: int = 3
) -> tuple[list[int], dict[str, Any]]:
    """Positions of the keyframes among the request's frames, ascending (STORMS, Sec. 3.2).

    Args:
        max_keyframes (`int`): how many at most, 1 or more.
        max_attempts (`int`): how often the teacher is asked, each time with the last reply's fault told.
    Returns:
        the positions, and details: `attempts`, and `usage` over all attempts.
    Raises:
        Rejected: if no reply passes (`keyframes_*`), or the teacher can't reply (`teacher_*`).
    """
    if max_keyframes < 1:
        raise ValueError(f"Saw max_keyframes={max_keyframes}, expected 1 or more: a row without keyframes is useless.")
    return ask_until_valid(
        lambda request: teacher.choose_keyframes(request, max_keyframes),
        request,
        lambda positions: check_positions(positions, len(request.frames), max_keyframes),
        max_attempts,
    )


def check_positions(positions: Any, num_frames: int, max_keyframes: int) -> list[int]:
    """The positions in ascending order: `[7, 0]` of 8 frames -> `[0, 7]`.

    Raises:
        BadReply: if they are not 1 to `max_keyframes` different integers from 0 to `num_frames - 1`. None is dropped
            or clipped: a teacher that miscounts frames has most likely not looked at them.
    """
    if not isinstance(positions, list) or not all(type(position) is int for position in positions):
        raise BadReply("keyframes_not_integers", f"expected a list of integers, saw {positions!r:.100}")
    if not positions:
        raise BadReply("keyframes_empty", "expected at least one keyframe, saw none")
    outside = [position for position in positions if not 0 <= position < num_frames]
    if outside:
        raise BadReply("keyframes_out_of_range", f"expected 0 to {num_frames - 1}, saw {outside[:5]!r:.100}")
    repeated = sorted({position for position in positions if positions.count(position) > 1})
    if repeated:
        raise BadReply("keyframes_duplicated", f"expected each keyframe once, saw {repeated[:5]} more than once")
    if len(positions) > max_keyframes:
        raise BadReply("keyframes_too_many", f"expected at most {max_keyframes} keyframes, saw {len(positions)}")
    return sorted(positions)
