"""The whole examination: every row answered under every condition, and what that comes to."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from modeling_storms.modeling_storms import pool_thought_video

from ..answering import Answerer, Clip, EncodedClips, Reply, encode_clip
from ..protocols import Protocol
from .collapse import measure_collapse
from .effects import Outcome, Resampling, donor_test, effect, first_token_kl, read_reply, verdict
from .interventions import (
    COMPONENTS,
    STATES,
    VIDEOS,
    PlaceStates,
    change_frames,
    choose_donors,
    empty_block,
    other_rows,
    replacements,
)
from .projections import project
from .retrieval import search, unit
from .rows import Row, open_keyframes, read_frames, read_thought_video, readable_batches


FORCE = {"latent_mode": "force", "latent_stop": "budget", "max_latent_blocks": 1}
PROJECTED_CLIPS = 40


@dataclass
class Gathered:
    """What the first pass leaves behind, in the order of `rows`.

    Args:
        batches (`list[list[Row]]`): rows that run together, in both passes alike.
        outcomes (`dict[str, list[Outcome]]`): by condition.
        states (`list[torch.Tensor]`): `(num_slots, hidden_size)`, of the intact run.
        logits (`list[torch.Tensor]`): `(vocab_size,)`, of its answer's first token.
        has_opened (`list[bool]`): whether a block was opened with `latent_mode="auto"`.
        question_states, question_embeddings (`list[torch.Tensor]`): `(hidden_size,)`, means over the text.
        videos, thoughts (`list`): `(num_slots, hidden_size)`, pooled visual features of clip and thought video.
        frames, keyframes (`dict`): by clip, `(num, hidden_size)`, mean features of each.
        tokens (`dict`): by clip, `(num, hidden_size)`, some of its visual tokens.
        left_out (`list[dict]`): rows that can't be read, with the reason.
    """

    batches: list[list[Row]] = field(default_factory=list)
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    states: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    has_opened: list[bool] = field(default_factory=list)
    question_states: list[torch.Tensor] = field(default_factory=list)
    question_embeddings: list[torch.Tensor] = field(default_factory=list)
    videos: list[torch.Tensor] = field(default_factory=list)
    thoughts: list[torch.Tensor | None] = field(default_factory=list)
    frames: dict[Any, torch.Tensor] = field(default_factory=dict)
    keyframes: dict[Any, torch.Tensor] = field(default_factory=dict)
    tokens: dict[Any, torch.Tensor] = field(default_factory=dict)
    left_out: list[dict[str, str]] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        return [row for batch in self.batches for row in batch]


def diagnose(
    answerer: Answerer,
    rows: Sequence[Row],
    protocol: Protocol,
    budgets: Sequence[int] = (1, 2, 4, 8, 16),
    num_target_frames: int = 16,
    samples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Put a checkpoint's latents on trial.

    Blocks are forced and of full length throughout, except where `auto` is asked about: an intervention that some rows
    escape says little.

    Args:
        answerer (`Answerer`): of a STORMS model; a `latent_size` given there is used instead of the checkpoint's.
        rows (`Sequence[Row]`): from `load_rows`.
        protocol (`Protocol`): which frames.
        budgets (`Sequence[int]`): numbers of slots to try.
        num_target_frames (`int`): frames of a thought video, as in training.
        samples (`int`): resamples of each interval.
        seed (`int`): of whatever is drawn.

    Returns:
        `dict` of JSON values: `verdict`, `latents`, `donor_test`, `components`, `videos`, `oracle`, `budgets`, `auto`,
        `retrieval`, `collapse`, `projections`, `questions`, and how many rows there were and were left out.

    Raises:
        ValueError: if the model has no latent mode, or the rows show fewer than two videos.
    """
    if not answerer.is_latent:
        raise ValueError(
            f"The model is a plain {type(answerer.model).__name__} without latents to examine. Give a STORMS "
            "checkpoint."
        )
    other_rows([row.question for row in rows], seed)  # fails before the work
    gathered = first_pass(answerer, rows, protocol, budgets, num_target_frames)
    rows = gathered.rows
    questions = [row.question for row in rows]
    others = other_rows(questions, seed)
    donors = choose_donors(questions, [one.is_correct for one in gathered.outcomes["intact"]], seed)
    pad_id = answerer.model.latent_tokens.pad
    pad_embedding = answerer.model.get_input_embeddings().weight[pad_id].detach().float().cpu()
    states = torch.stack(gathered.states)
    placed = replacements(
        states, pad_embedding, others, [None if donor is None else donor.row for donor in donors], seed
    )
    has_thought = [row for row, thought in enumerate(gathered.thoughts) if thought is not None]
    if has_thought:
        own = zip(gathered.thoughts, gathered.states)
        placed["oracle"] = torch.stack([state if thought is None else thought for thought, state in own])
    shifts = second_pass(answerer, gathered, protocol, placed, others, seed)

    resampling = Resampling([one.video_id for one in questions], samples, seed)
    outcomes = gathered.outcomes
    intact = outcomes["intact"]
    with_donor = [row for row, donor in enumerate(donors) if donor is not None]
    donor = donor_test(questions, intact, outcomes["donor"], donors, resampling)

    def measured(name: str, rows: Sequence[int] | None = None) -> dict[str, Any]:
        return effect(intact, outcomes[name], resampling, rows)

    return {
        "num_questions": len(rows),
        "num_videos": len(set(resampling.videos)),
        "left_out": gathered.left_out,
        "chance": float(np.mean([row.chance for row in rows])),
        "latent": answerer.latent_options(**FORCE),
        "verdict": verdict(
            intact, outcomes["other_row"], outcomes["noise"], [row.chance for row in rows], donor, resampling
        ),
        "latents": {
            name: {"what": what, **measured(name, with_donor if name == "donor" else None)}
            for name, what in STATES.items()
            if name in outcomes
        },
        "donor_test": donor,
        "components": {name: {"what": what, **measured(name)} for name, what in COMPONENTS.items()},
        "videos": {
            name: {"what": what, **measured(name)}
            | {measure: resampling.mean(values) for measure, values in shifts[name].items()}
            for name, what in VIDEOS.items()
        },
        "oracle": _oracle(gathered, states, has_thought, measured, resampling),
        "budgets": {str(size): measured(f"budget_{size}") for size in budgets},
        "auto": {"opens_block": resampling.mean(gathered.has_opened), **measured("auto")},
        "retrieval": _search(gathered, states, resampling, seed),
        "collapse": _collapse(answerer, gathered, states),
        "projections": _project(gathered, seed),
        "questions": [
            {
                "id": question.id,
                "video_id": question.video_id,
                "answer": question.answer,
                "donor": (one := donors[row]) and questions[one.row].id,
                "donors_answer": one and one.answer,
                "given": {name: found[row].given for name, found in outcomes.items()},
                "is_correct": {name: found[row].is_correct for name, found in outcomes.items()},
            }
            for row, question in enumerate(questions)
        ],
    }


def first_pass(
    answerer: Answerer, rows: Sequence[Row], protocol: Protocol, budgets: Sequence[int], num_target_frames: int
) -> Gathered:
    """Answers that need nothing of other rows, states and features."""
    gathered = Gathered()
    end_id = answerer.model.latent_tokens.end
    conditions: dict[str, dict[str, Any]] = {
        "off": {"latent_mode": "off"},
        "markers": {**FORCE, **empty_block(end_id)},
        "auto": {**FORCE, "latent_mode": "auto"},
        **{f"budget_{size}": {**FORCE, "latent_size": size} for size in budgets},
    }
    for batch, frames in readable_batches(rows, answerer.batch_size, protocol, gathered.left_out):
        clips, encoded = _encode(answerer, batch, protocol, frames)
        replies = _ask(answerer, encoded, batch, **FORCE)
        gathered.batches.append(batch)
        gathered.states += [reply.latent_states for reply in replies]
        logits = [_logits(reply) for reply in replies]
        gathered.logits += logits
        _note(gathered, "intact", answerer, batch, logits, replies)
        for name, options in conditions.items():
            replies = _ask(answerer, encoded, batch, **options)
            _note(gathered, name, answerer, batch, logits, replies)
            if name == "auto":
                gathered.has_opened += [reply.latent_length > 0 for reply in replies]
        gathered.question_states += torch.cat(answerer.question_states(encoded, _texts(batch))).unbind()
        _note_features(gathered, answerer, batch, clips, num_target_frames)
    if not gathered.batches:
        raise ValueError(f"None of {len(rows)} rows can be read, as {gathered.left_out[0]}.")
    return gathered


def second_pass(
    answerer: Answerer,
    gathered: Gathered,
    protocol: Protocol,
    placed: dict[str, torch.Tensor],
    others: Sequence[int],
    seed: int,
) -> dict[str, dict[str, list[float]]]:
    """Answers with what the first pass gathered in the slots, and answers to changed videos.

    Returns:
        `dict` by change of the video: `latent_cosine` and `latent_distance` (relative), between the states that the
        intact video gives and these, mean over slots, a value a row.
    """
    rows = gathered.rows
    shifts: dict[str, dict[str, list[float]]] = {name: {"latent_cosine": [], "latent_distance": []} for name in VIDEOS}
    begin = 0
    bar = tqdm(total=len(rows), desc="intervene", unit="question", disable=None)
    for batch in gathered.batches:
        span, begin = slice(begin, begin + len(batch)), begin + len(batch)
        logits = gathered.logits[span]
        first_of = {row.clip: index for index, row in reversed(list(enumerate(rows[span], span.start)))}
        frames = {clip: read_frames(rows[index], protocol) for clip, index in first_of.items()}
        _, encoded = _encode(answerer, batch, protocol, frames)
        for name, states in placed.items():
            replies = _ask(answerer, encoded, batch, **FORCE, latent_intervention=PlaceStates(states[span]))
            _note(gathered, name, answerer, batch, logits, replies)
        for name in VIDEOS:
            changed = {}
            for clip, index in first_of.items():
                shown, metadata = frames[clip] if name != "other_video" else read_frames(rows[others[index]], protocol)
                changed[clip] = change_frames(shown, name, np.random.default_rng([seed, index])), metadata
            _, encoded = _encode(answerer, batch, protocol, changed)
            replies = _ask(answerer, encoded, batch, **FORCE)
            _note(gathered, name, answerer, batch, logits, replies)
            for own, reply in zip(gathered.states[span], replies):
                cosine, distance = compare_states(own.numpy(), reply.latent_states.numpy())
                shifts[name]["latent_cosine"].append(cosine)
                shifts[name]["latent_distance"].append(distance)
        bar.update(len(batch))
    bar.close()
    return shifts


def compare_states(states: np.ndarray, changed: np.ndarray) -> tuple[float, float]:
    """How far states `(num_slots, hidden_size)` moved: cosine and relative distance, mean over slots."""
    cosine = (unit(states) * unit(changed)).sum(-1).mean()
    distance = np.linalg.norm(states - changed, axis=-1) / np.linalg.norm(states, axis=-1)
    return float(cosine), float(distance.mean())


# -- answering


def _encode(
    answerer: Answerer, batch: Sequence[Row], protocol: Protocol, frames: Mapping[Any, tuple[np.ndarray, Any]]
) -> tuple[list[Clip], EncodedClips]:
    """The clips of a batch, each once, with given frames."""
    size = protocol.frame_size(answerer.processor.video_processor.size)
    clips = [encode_clip(answerer.processor, *frames[clip], size) for clip in dict.fromkeys(row.clip for row in batch)]
    return clips, answerer.encode(clips)


def _texts(batch: Sequence[Row]) -> list[list[str]]:
    """Prompts by clip; the rows of a clip stand one after another."""
    texts: dict[Any, list[str]] = {}
    for row in batch:
        texts.setdefault(row.clip, []).append(row.text)
    return list(texts.values())


def _ask(answerer: Answerer, encoded: EncodedClips, batch: Sequence[Row], **options: Any) -> list[Reply]:
    """A reply to each row; all rows in one `generate`, so that interventions know them by their place."""
    assert len(batch) <= answerer.batch_size
    replies = answerer.answer(encoded, _texts(batch), keep_logits=True, **options)
    return [reply for given in replies for reply in given]


def _logits(reply: Reply) -> torch.Tensor:
    assert reply.first_logits is not None
    return reply.first_logits


def _note(
    gathered: Gathered,
    name: str,
    answerer: Answerer,
    batch: Sequence[Row],
    logits: Sequence[torch.Tensor],
    replies: Sequence[Reply],
) -> None:
    excluded = answerer.processor.latent_token_ids
    gathered.outcomes.setdefault(name, []).extend(
        read_reply(reply, row.question, first_token_kl(intact, _logits(reply), excluded))
        for row, intact, reply in zip(batch, logits, replies)
    )


# -- features


def _note_features(
    gathered: Gathered, answerer: Answerer, batch: Sequence[Row], clips: Sequence[Clip], num_target_frames: int
) -> None:
    """What the vision tower makes of clips, keyframes and thought videos."""
    model, processor = answerer.model, answerer.processor
    num_slots = len(gathered.states[-1])

    def features(pixels: torch.Tensor, grid_thw: torch.Tensor) -> list[torch.Tensor]:
        device = model.device
        return [one.float().cpu() for one in model.get_target_features(pixels.to(device), grid_thw.to(device))]

    pooled: dict[Any, torch.Tensor] = {}
    for row, clip in zip({row.clip: row for row in batch}.values(), clips):
        grid_thw = clip.media["video_grid_thw"]
        (tokens,) = features(clip.media["pixel_values_videos"], grid_thw)
        pooled[row.clip] = pool_thought_video(tokens, num_slots)
        gathered.tokens[row.clip] = tokens[:: -(-len(tokens) // 16)]
        gathered.frames[row.clip] = tokens.unflatten(0, (int(grid_thw[0, 0]), -1)).mean(1)
        if row.keyframes:
            images = processor.image_processor(images=open_keyframes(row), return_tensors="pt")
            found = features(images["pixel_values"], images["image_grid_thw"])
            gathered.keyframes[row.clip] = torch.stack([tokens.mean(0) for tokens in found])
    embed = model.get_input_embeddings()
    for row in batch:
        gathered.videos.append(pooled[row.clip])
        thought = None
        if row.thought_video:
            try:
                frames, metadata = read_thought_video(row, num_target_frames)
            except ValueError as error:  # VideoDecodeError is a ValueError
                raise ValueError(
                    f"The thought video of row {row.question.id!r} can't be read: {error} Run `python -m "
                    "dataset_builder validate`."
                ) from error
            video = processor.video_processor(
                videos=[frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt"
            )
            (tokens,) = features(video["pixel_values_videos"], video["video_grid_thw"])
            thought = pool_thought_video(tokens, num_slots)
        gathered.thoughts.append(thought)
        ids = torch.tensor(processor.tokenizer(row.text)["input_ids"], device=model.device)
        gathered.question_embeddings.append(embed(ids).detach().float().mean(0).cpu())


# -- figures


def _oracle(
    gathered: Gathered, states: torch.Tensor, rows: Sequence[int], measured: Callable, resampling: Resampling
) -> dict[str, Any] | None:
    """Pooled features of the thought video in the slots, against the row's own states; None without any."""
    if not rows:
        return None
    likeness = [
        (0.0, 0.0) if thought is None else compare_states(thought.numpy(), own.numpy())
        for thought, own in zip(gathered.thoughts, states)
    ]
    cosine, distance = zip(*likeness)
    return {
        **measured("oracle", rows),
        "own_accuracy": resampling.mean([one.is_correct for one in gathered.outcomes["intact"]], rows),
        "own_cosine": resampling.mean(cosine, rows),
        "own_distance": resampling.mean(distance, rows),
    }


def _search(gathered: Gathered, states: torch.Tensor, resampling: Resampling, seed: int) -> dict[str, Any]:
    galleries = {"video": torch.stack(gathered.videos).double().numpy()}
    thoughts = [thought for thought in gathered.thoughts if thought is not None]
    if len(thoughts) == len(gathered.thoughts):
        galleries["thought_video"] = torch.stack(thoughts).double().numpy()
    texts = {
        "question states": torch.stack(gathered.question_states).double().numpy(),
        "question embeddings": torch.stack(gathered.question_embeddings).double().numpy(),
    }
    clips = [row.clip for row in gathered.rows]
    return search(states.double().numpy(), texts, galleries, clips, resampling, seed)


def _collapse(answerer: Answerer, gathered: Gathered, states: torch.Tensor) -> dict[str, Any]:
    table = answerer.model.get_input_embeddings().weight.detach()
    known = table[: len(answerer.processor.tokenizer)].float().cpu().double().numpy()
    visual = torch.cat(list(gathered.tokens.values())).double().numpy()
    return measure_collapse(states.double().numpy(), {"token embeddings": known, "visual tokens": visual})


def _project(gathered: Gathered, seed: int) -> dict[str, Any]:
    first: dict[Any, int] = {}
    for index, row in enumerate(gathered.rows):
        first.setdefault(row.clip, index)
    shown = list(first.items())[:PROJECTED_CLIPS]
    empty = torch.zeros(0, gathered.states[0].shape[1])
    groups = {
        "frame": [gathered.frames[clip] for clip, _ in shown],
        "keyframe": [gathered.keyframes.get(clip, empty) for clip, _ in shown],
        "thought video": [empty if (one := gathered.thoughts[index]) is None else one for _, index in shown],
        "latent": [gathered.states[index] for _, index in shown],
    }
    return project({kind: [one.numpy() for one in clips] for kind, clips in groups.items()}, seed)
