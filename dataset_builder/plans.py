"""Writing reasoning plans: a teacher's text, checked."""

import unicodedata
from typing import Any

from .teacher import BadReply, Teacher, TeacherRequest, ask_until_valid


def write_plan(
    teacher: Teacher, request: TeacherRequest, max_characters: int = 2000, max_attempts: int = 3
) -> tuple[str, dict[str, Any]]:
    """A reasoning plan for the thought video of a row (STORMS, Sec. 3.2).

    Args:
        request (`TeacherRequest`): its frames are the row's keyframes.
        max_attempts (`int`): how often the teacher is asked, each time with the last reply's fault told.
    Returns:
        the plan, and details: `attempts`, and `usage` over all attempts.
    Raises:
        Rejected: if no reply passes (`plan_*`), or the teacher can't reply (`teacher_*`).
    """
    return ask_until_valid(teacher.write_plan, request, lambda plan: check_plan(plan, max_characters), max_attempts)


def check_plan(plan: Any, max_characters: int) -> str:
    """The plan without white space around it.

    Raises:
        BadReply: if it is not text, is empty, is too long, or has control characters other than line ends.
    """
    if not isinstance(plan, str):
        raise BadReply("plan_not_text", f"expected text, saw {plan!r:.100}")
    plan = plan.strip()
    if not plan:
        raise BadReply("plan_empty", "expected a plan, saw no text")
    if len(plan) > max_characters:
        raise BadReply("plan_too_long", f"expected at most {max_characters} characters, saw {len(plan)}")
    # Cs: lone surrogates, which no file can hold as UTF-8.
    strange = {character for character in plan if unicodedata.category(character) in ("Cc", "Cs")} - {"\n"}
    if strange:
        seen = ", ".join(sorted(f"U+{ord(character):04X}" for character in strange)[:5])
        raise BadReply("plan_control_characters", f"expected printable text, saw {seen}")
    return plan
