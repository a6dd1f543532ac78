"""Answers by real generation, as a user of a checkpoint gets them, scored against the dataset's."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dataset_builder.schema import LETTERS
from evaluation.diagnostics.interventions import PlaceStates
from evaluation.parsing import score_answer
from modeling_storms.latent_storms import LatentReasoningMixin

from .collator import StormsCollator, row_name


@torch.no_grad()
def answer_rows(
    model: LatentReasoningMixin,
    collator: StormsCollator,
    rows: Sequence[Mapping[str, Any]],
    batch_size: int = 8,
    max_new_tokens: int = 32,
    replace_states: Sequence[torch.Tensor] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Generate an answer to each row with the checkpoint's own defaults, and score it.

    Args:
        model (`StormsForConditionalGeneration`): in evaluation mode.
        collator (`StormsCollator`): makes the prompts.
        rows (`Sequence[Mapping]`): questions with answers.
        batch_size (`int`): rows at once.
        max_new_tokens (`int`): of text; a block's tokens are added to it.
        replace_states (`Sequence[torch.Tensor]`, *optional*): for each row the states `(num_slots, hidden_size)` that
            its slots hold instead of its own. Blocks are then forced, so that all rows think at once.
        options: of `generate`, for example `latent_mode` or `latent_stop`.

    Returns:
        One `dict` a row: `name`, `text`, `choice` (the letter it was parsed to, or None), `is_parsed`, `is_correct`,
        `latent_length`, `latent_states` `(num_slots, hidden_size)`.
    """
    device = model.get_input_embeddings().weight.device
    slots = options.get("latent_size") or getattr(model.generation_config, "latent_size", None) or 0
    results = []
    for begin in range(0, len(rows), batch_size):
        batch = rows[begin : begin + batch_size]
        inputs: Any = {name: value.to(device) for name, value in collator.prompts(batch).items()}
        if replace_states is not None:
            states = torch.stack(list(replace_states[begin : begin + batch_size])).to(device)
            options |= {"latent_mode": "force", "latent_intervention": PlaceStates(states)}
        out = model.generate(
            **inputs, max_new_tokens=max_new_tokens + slots + 2, return_dict_in_generate=True, **options
        )
        texts = collator.processor.batch_decode(
            out.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for row, text, states in zip(batch, texts, out.latent_states):
            score = score_answer(text, dict(zip(LETTERS, row.get("options") or [])), row["answer"])
            results.append(
                {
                    "name": row_name(row),
                    "text": text,
                    "choice": score.choice,
                    "is_parsed": score.is_parsed,
                    "is_correct": score.is_correct,
                    "latent_length": len(states),
                    "latent_states": states.float().cpu(),
                }
            )
    return results


def compare_solvers(
    model: LatentReasoningMixin,
    collator: StormsCollator,
    rows: Sequence[Mapping[str, Any]],
    iterations: Sequence[int],
    **options: Any,
) -> list[dict[str, Any]]:
    """How near `latent_solver="jacobi"` comes to the sequential solver, in forced blocks.

    Args:
        model, collator, rows: as for `answer_rows`.
        iterations (`Sequence[int]`): of the Jacobi solver, each measured on all rows.
        options: of `answer_rows` and `generate`.

    Returns:
        One `dict` for the sequential solver, with `iterations` None, and one for each of `iterations`: `accuracy`,
        `same_answer` (part of the rows whose text is the sequential solver's), `max_difference` of the states, and
        `relative_error`, the root mean square of their difference over that of the sequential states.
    """
    results: list[dict[str, Any]] = []
    expected: list[dict[str, Any]] = []
    for count in (None, *iterations):
        solver: dict[str, Any] = {
            "latent_solver": "sequential" if count is None else "jacobi",
            "jacobi_iterations": count,
        }
        found = answer_rows(model, collator, rows, latent_mode="force", **solver, **options)
        expected = expected or found
        states, others = (torch.stack([row["latent_states"] for row in run]) for run in (expected, found))
        difference = others - states
        results.append(
            {
                "iterations": count,
                "accuracy": sum(row["is_correct"] for row in found) / len(found),
                "same_answer": sum(a["text"] == b["text"] for a, b in zip(found, expected)) / len(found),
                "max_difference": float(difference.abs().max()),
                "relative_error": float(difference.pow(2).mean().sqrt() / states.pow(2).mean().sqrt()),
            }
        )
    return results
