"""lm-evaluation-harness on a task file of one's own, offline, against mezo's own evaluation of the same prompts."""

import json

import pytest

from mezo import MeZOConfig, UserError, mezo_finetune
from mezo.api import eval_model
from mezo.cli import main
from mezo.harness import evaluate_with_harness
from tests.conftest import SENTIMENT_ROWS

# Its packages' own deprecations.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

WORDS = {"0": "bad", "1": "good"}
TASK = """\
task: mood
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}} it was"
doc_to_choice: [bad, good]
doc_to_target: label
metric_list:
  - metric: acc
"""


@pytest.fixture
def trained(model_folder, jsonl, tmp_path):
    """(model, adapter, rows, folder of the task)."""
    data = jsonl(SENTIMENT_ROWS[:40])
    mezo_finetune(
        model_folder("llama"), data, learning_rate=5e-2, num_steps=60, batch_size=16, lora_rank=4, epsilon=1e-2,
        template="{text} it was", label_words=WORDS, output_dir=tmp_path / "run", disable_tqdm=True,
    )  # fmt: skip
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mood.yaml").write_text(TASK.format(data=data))
    return model_folder("llama"), str(tmp_path / "run"), data, str(tmp_path / "tasks")


def test_both_models_side_by_side(trained, capsys):
    model, adapter, data, folder = trained
    capsys.readouterr()
    main(["eval", "--model_name_or_path", model, "--adapter_name_or_path", adapter, "--lm_eval", "mood",
          "--lm_eval_include_path", folder, "--json"])  # fmt: skip
    (figure,) = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    config = MeZOConfig(model_name_or_path=model, dataset_name=data, template="{text} it was", label_words=WORDS)
    assert (figure["task"], figure["metric"]) == ("mood", "acc,none")
    assert figure["base"] == pytest.approx(eval_model(config).accuracy)
    assert figure["trained"] == pytest.approx(eval_model(config, adapter).accuracy)
    assert figure["trained"] != figure["base"]
    assert 0 < figure["base_stderr"] < 0.2
    main(["eval", "--model_name_or_path", model, "--lm_eval", "mood", "--lm_eval_include_path", folder,
          "--max_eval_samples", "4"])  # fmt: skip
    assert "mood" in capsys.readouterr().out


def test_what_the_harness_cannot_do(model_folder, tmp_path):
    config = MeZOConfig(model_name_or_path=model_folder("llama"))
    with pytest.raises(UserError, match="knows no task 'nothing-of-the-kind'"):
        evaluate_with_harness(config, ["nothing-of-the-kind"])
    with pytest.raises(UserError, match="there is no folder"):
        evaluate_with_harness(config, ["x"], include_path=str(tmp_path / "none"))
    with pytest.raises(UserError, match="this model is an encoder"):
        evaluate_with_harness(MeZOConfig(model_name_or_path=model_folder("bert")), ["x"])
