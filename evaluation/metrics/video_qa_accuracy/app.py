"""The metric's page: JSON in, JSON out. (evaluate's own widget needs a Gradio before 4.)"""

import json
from pathlib import Path
from typing import Any

import evaluate
import gradio as gr


FOLDER = Path(__file__).parent
METRIC = evaluate.load(str(FOLDER / "video_qa_accuracy.py"), keep_in_memory=True)
EXAMPLE = {
    "predictions": ["A", "B", "", "C"],
    "references": ["A", "B", "C", "D"],
    "video_ids": ["park", "park", "kitchen", "kitchen"],
    "num_options": [4, 4, 4, 4],
    "categories": {"duration": ["short", "short", "long", "long"]},
}


def compute(arguments: str) -> dict[str, Any]:
    """The metric of what the page was given: a JSON object of `compute`'s arguments."""
    try:
        return METRIC.compute(**json.loads(arguments))
    except (TypeError, ValueError) as error:
        raise gr.Error(str(error)) from error


page = gr.Interface(
    compute,
    gr.Code(json.dumps(EXAMPLE, indent=2), language="json", label="Arguments of compute"),
    gr.JSON(label="Result"),
    title="Video QA accuracy",
    description=METRIC.info.description,
    article=(FOLDER / "README.md").read_text(encoding="utf-8").split("---\n", 2)[2],
    flagging_mode="never",
)

if __name__ == "__main__":
    page.launch()
