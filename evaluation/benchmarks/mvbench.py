"""MVBench (arXiv 2311.17005): 20 tasks of 200 questions; the result is the mean of the tasks' accuracies.

The Hub's branch `video` has each clip cut out and encoded; `main` has longer videos with start and end, and TVQA as
folders of frames. Which one a question is about is told by the folder that its video is in.
"""

from dataclasses import replace

from .adapter import Adapter, Row, lettered, option_lines, text_answer
from .base import Prompt, Question
from .files import Files


# For each task the folder of its videos on the branch `video`, and, where it is another, on `main`.
FOLDERS = {
    "action_sequence": ("star/Charades_segment", "star/Charades_v1_480"),
    "action_prediction": ("star/Charades_segment", "star/Charades_v1_480"),
    "action_antonym": ("ssv2_video_mp4", "ssv2_video"),
    "fine_grained_action": ("Moments_in_Time_Raw/videos",),
    "unexpected_action": ("FunQA_test/test",),
    "object_existence": ("clevrer/video_validation",),
    "object_interaction": ("star/Charades_segment", "star/Charades_v1_480"),
    "object_shuffle": ("perception/videos",),
    "moving_direction": ("clevrer/video_validation",),
    "action_localization": ("sta/sta_video_segment", "sta/sta_video"),
    "scene_transition": ("scene_qa/video",),
    "action_count": ("perception/videos",),
    "moving_count": ("clevrer/video_validation",),
    "moving_attribute": ("clevrer/video_validation",),
    "state_change": ("perception/videos",),
    "fine_grained_pose": ("nturgbd_convert", "nturgbd"),
    "character_order": ("perception/videos",),
    "egocentric_navigation": ("vlnqa",),
    "episodic_reasoning": ("tvqa/video_fps3_hq_segment", "tvqa/frames_fps3_hq"),
    "counterfactual_inference": ("clevrer/video_validation",),
}
UNCUT = ("star/Charades_v1_480", "sta/sta_video", "tvqa/frames_fps3_hq")  # where start and end apply
FRAMES_FPS = 3.0

SYSTEM = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of "
    "objects, and the action and pose of persons. Based on your observations, select the best option that accurately "
    "addresses the question.\n"
)


def read(row: Row, table: str, row_idx: int, files: Files, subtitles: bool) -> Question:
    options = lettered(row["candidates"])
    question = Question(
        id=f"{table}-{row_idx}",
        question=row["question"].strip(),
        answer=text_answer(row["answer"], options),
        options=options,
        task=table,
        categories={"task": table},
    )
    for folder in FOLDERS[table]:
        path = f"{folder}/{row['video']}"
        video: str | tuple[str, ...] | None = files.find(path)
        video_fps = 0.0
        if video is None and (frames := files.find_frames(path)):
            video, video_fps = frames, FRAMES_FPS
        if video is not None:
            question = replace(question, video=video, video_fps=video_fps, video_id=path)
            if folder in UNCUT:
                return replace(question, start=float(row["start"]), end=float(row["end"]))
            return question
    return replace(question, video_id=path, failure=f"missing video: {' or '.join(FOLDERS[table])}/{row['video']}")


def official(question: Question) -> Prompt:
    """As VideoChat2's `mvbench.ipynb` asks: the same sentence as system message and before the question.

    Left out is the beginning of the answer, `Best option:(`, which it writes for the model.
    """
    asked = f"Question: {question.question}\nOptions:\n{option_lines(question, '({letter}) {text}')}"
    return Prompt(f"{SYSTEM}{asked}\nOnly give the best option.", system=SYSTEM.strip())


def lmms_eval(question: Question) -> Prompt:
    """Its tasks `mvbench_*`."""
    listed = option_lines(question, "({letter}) {text}")
    return Prompt(f"Question:{question.question}\nOption:\n{listed}\nOnly give the best option.\n")


ADAPTER = Adapter(
    dataset="OpenGVLab/MVBench",
    split="train",
    revision="video",
    tables={task: (f"json/{task}.json", f"{task}.json", f"{task}/train-*.parquet") for task in FOLDERS},
    read=read,
    counts=dict.fromkeys(FOLDERS, 200),
    download=("*.json", "*.parquet", "*.zip", "*.mp4"),
    mean_over="task",
    prompts={"official": official, "lmms_eval": lmms_eval},
)
