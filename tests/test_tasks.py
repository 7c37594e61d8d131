"""The paper's tasks: prompts as published, LM-BFF's few-shot sets, official answers' scores, generation, evaluation."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from mezo.api import build_trainer, eval_model
from mezo.cli import main
from mezo.config import MeZOConfig
from mezo.data import few_shot, load_rows
from mezo.engines.torch.generation import generate
from mezo.errors import UserError
from mezo.metrics import exact_match, f1
from mezo.prompts import demonstrated, reading
from mezo.tasks import load_task, task_names
from tests.conftest import SHARED

DATA, MODELS = SHARED / "data", SHARED / "models"
PAPER_ROBERTA = {"sst2", "sst5", "snli", "mnli", "rte", "trec"}
PAPER_OPT = {"sst2", "rte", "cb", "boolq", "wsc", "wic", "multirc", "copa", "record", "squad", "drop"}

# task, whether the model is an encoder, a row as the Hub or the data set's own files hold it, then prompt and answers
# as the paper's table 13 (RoBERTa) or 14 (OPT) gives them, and which answers are right.
PUBLISHED = [
    ("sst2", True, {"sentence": "a fine film ", "label": 1}, "a fine film It was [MASK].", ["terrible", "great"], [1]),
    ("sst2", False, {"sentence": "a fine film ", "label": 1}, "a fine film It was", [" terrible", " great"], [1]),
    ("sst5", True, {"text": "so so", "label": 2}, "so so It was [MASK].",
     ["terrible", "bad", "okay", "good", "great"], [2]),
    ("snli", True, {"premise": "Two dogs run.", "hypothesis": "They move.", "label": 0},
     "Two dogs run? [MASK], they move.", ["Yes", "Maybe", "No"], [0]),
    ("mnli", True, {"premise": "Two dogs run.", "hypothesis": "They sleep.", "label": "contradiction"},
     "Two dogs run? [MASK], they sleep.", ["Yes", "Maybe", "No"], [2]),
    ("rte", True, {"sentence1": "Two dogs run.", "sentence2": "They sleep.", "label": 1},
     "Two dogs run? [MASK], they sleep.", ["Yes", "No"], [1]),
    ("rte", False, {"premise": "Two dogs run.", "hypothesis": "They move.", "label": "entailment"},
     'Two dogs run.\nDoes this mean that "They move." is true? Yes or No?\n', ["Yes", "No"], [0]),
    ("trec", True, {"text": "Who ran ?", "label": "HUM"}, "[MASK]: Who ran ?",
     [" Expression", " Entity", " Description", " Human", " Location", " Number"], [3]),
    ("cb", False, {"premise": "He ran.", "hypothesis": "he ran", "label": 2},
     'Suppose He ran. Can we infer that "he ran"? Yes, No, or Maybe?\n', ["Yes", "No", "Maybe"], [2]),
    ("boolq", False, {"passage": "Cats purr.", "question": "do cats purr", "label": 1},
     "Cats purr. Do cats purr?\n", ["No", "Yes"], [1]),
    ("wsc", False, {"text": "Ann saw Eve when She ran.", "span1_text": "Ann", "span2_text": "She", "label": 0},
     'Ann saw Eve when She ran.\nIn the previous sentence, does the pronoun "she" refer to Ann? Yes or No?\n',
     ["No", "Yes"], [0]),
    ("wsc", False, {"text": "Ann saw Eve.", "target": {"span1_text": "Ann", "span2_text": "Eve"}, "label": True},
     'Ann saw Eve.\nIn the previous sentence, does the pronoun "eve" refer to Ann? Yes or No?\n', ["No", "Yes"], [1]),
    ("wic", False, {"word": "bank", "sentence1": "A bank.", "sentence2": "The bank.", "label": 0},
     'Does the word "bank" have the same meaning in these two sentences? Yes, No?\nA bank.\nThe bank.\n',
     ["No", "Yes"], [0]),
    ("multirc", False, {"paragraph": "Cats purr.", "question": "What purrs?", "answer": "Cats", "label": 1},
     'Cats purr.\nQuestion: What purrs?\nI found this answer "Cats". Is that correct? Yes or No?\n',
     ["No", "Yes"], [1]),
    ("copa", False, {"premise": "It fell.", "choice1": "It was wet.", "choice2": "I ran.", "question": "cause",
                     "label": 1}, "It fell because", [" it was wet.", " I ran."], [1]),
    ("copa", False, {"premise": "It fell.", "choice1": "It broke.", "choice2": "We ran.", "question": "effect",
                     "label": 0}, "It fell so", [" it broke.", " we ran."], [0]),
    ("record", False, {"passage": "Ann ran.\n@highlight\nEve saw Ann.", "query": "@placeholder ran",
                       "entities": ["Ann", "Eve"], "answers": ["Ann"]},
     "Ann ran.\n- Eve saw Ann.\n-", [" Ann ran", " Eve ran"], [0]),
    ("squad", False, {"title": "Cats", "context": "Cats purr.", "question": " What purrs? ",
                      "answers": {"text": ["Cats", "cats"], "answer_start": [0, 0]}},
     "Title: Cats\nContext: Cats purr.\nQuestion: What purrs?\nAnswer:", [" Cats\n"], [0]),
    ("drop", False, {"passage": "Two cats.", "question": "How many?", "answers_spans": {"spans": ["2"]}},
     "Passage: Two cats.\nQuestion: How many?\nAnswer:", [" 2\n"], [0]),
]  # fmt: skip


@pytest.mark.parametrize(("objective", "over_options"), [("loss", False), ("accuracy", True)])
def test_copa_has_options_where_they_are_what_is_trained(objective, over_options):
    config = MeZOConfig(model_name_or_path="x", task="copa", objective=objective)
    filled = load_task("copa").fill_in(config, encoder_model=False, test_split=False)
    assert filled.train_as_classification is over_options


def test_best_by_the_rows_that_a_task_reports_on_is_told(model_folder, sentiment, tmp_path, caplog):
    options = {"model_name_or_path": model_folder("llama"), "task": "sst2", "dataset_name": sentiment, "max_steps": 1,
               "eval_steps": 1, "load_best_model_at_end": True, "output_dir": str(tmp_path)}  # fmt: skip
    build_trainer(MeZOConfig.from_dict(options))
    assert "the best checkpoint is chosen by the rows that task sst2 reports on" in caplog.text
    caplog.clear()
    build_trainer(MeZOConfig.from_dict({**options, "validation_size": 2}))
    assert "reports on" not in caplog.text


def asked(task_name, encoder_model, row):
    """(prompt, answers, right ones) of a row, as an encoder's prompt with its mask or as a decoder reads it."""
    task = load_task(task_name)
    config = task.fill_in(MeZOConfig(model_name_or_path="x"), encoder_model=encoder_model, test_split=False)
    (prepared,) = task.prepare(Dataset.from_list([row]), config)
    if encoder_model:
        words = list(config.label_words.values())
        return config.template.format(**prepared), words, [list(config.label_words).index(str(prepared["label"]))]
    found = reading(set(prepared), [prepared], config).read(prepared)
    return found.prompt, list(found.answers), list(found.right)


@pytest.mark.parametrize(("task", "encoder_model", "row", "prompt", "answers", "right"), PUBLISHED)
def test_prompts_as_published(task, encoder_model, row, prompt, answers, right):
    assert asked(task, encoder_model, row) == (prompt, answers, right)


def test_all_tasks_of_the_paper():
    assert set(task_names()) == PAPER_ROBERTA | PAPER_OPT
    covered = {(name, encoder_model) for name, encoder_model, *_ in PUBLISHED}
    assert covered == {(name, True) for name in PAPER_ROBERTA} | {(name, False) for name in PAPER_OPT}


def published_rows(folder):
    """(label, text) of LM-BFF's set in a folder, part by part."""
    for name in ("train", "dev"):
        (path,) = folder.glob(f"{name}.*")
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                yield {(label, plain(text)) for label, text in csv.reader(file)}
            else:  # GLUE's files have a header
                lines = [line.rstrip("\n").split("\t") for line in file][1:]
                first = 0 if folder.parent.name == "SST-2" else 1  # others count their rows
                yield {(line[-1], plain(" ".join(line[first:-1]))) for line in lines}


def plain(text):
    """Without what copies of a data set write in different ways: quotes and brackets, with spaces or without."""
    for written, bare in (('"', ""), ("-lrb-", "("), ("-rrb-", ")"), ("( ", "("), (" )", ")")):
        text = text.replace(written, bare)
    return text.strip()


@pytest.mark.parametrize("seed", [13, 21, 42, 87, 100])
@pytest.mark.parametrize(
    ("task", "folder", "numbers"),  # our labels, in the order of theirs
    [
        ("trec", "TREC", dict(zip("012345", "210345", strict=True))),
        ("sst5", "SST-5", dict(zip("01234", "01234", strict=True))),
        ("sst2", "SST-5", {"0": "0", "1": "1"}),  # its sentences are SST-5's that are not neutral
        ("rte", "RTE", {"entailment": "0", "not_entailment": "1"}),
    ],
)
def test_few_shot_sets_are_lm_bffs(task, folder, numbers, seed):
    """Their published sets for k = 16, made from the same training files."""
    train = DATA / folder / "train.jsonl.gz"
    if not train.exists():
        pytest.skip(f"needs {folder} in {SHARED.name}/ beside the clone")
    loaded = load_task(task)
    config = loaded.fill_in(MeZOConfig(model_name_or_path="x"), encoder_model=True, test_split=False)
    rows = load_rows(str(train), None, "train")
    if task == "sst2":
        rows = rows.filter(lambda row: row["label"] != 2).map(lambda row: {"label": int(row["label"] > 2)})
        assert len(rows) == 6920
    parts = few_shot(loaded.prepare(rows, config), 16, "label", seed)
    published = DATA / "lmbff_k16" / {"sst2": "SST-2", "rte": "RTE"}.get(task, folder.lower()) / f"16-{seed}"
    for part, expected in zip(parts, published_rows(published), strict=True):
        columns = ("premise", "hypothesis") if task == "rte" else ("text",)
        found = {(row["label"], plain(" ".join(row[c].strip() for c in columns))) for row in part}
        assert len(part) == 16 * len(loaded.label_names)
        assert {(numbers[label], text) for label, text in expected} == found


def test_few_shot_is_per_label_and_by_seed():
    rows = Dataset.from_list([{"text": str(i), "label": str(i % 3)} for i in range(90)])
    train, other = few_shot(rows, 5, "label", 13)
    assert sorted(train["label"]) == sorted(other["label"]) == ["0"] * 5 + ["1"] * 5 + ["2"] * 5
    assert not set(train["text"]) & set(other["text"])
    assert few_shot(rows, 5, "label", 13)[0]["text"] == train["text"] != few_shot(rows, 5, "label", 21)[0]["text"]
    with pytest.raises(UserError, match="none are left to evaluate"):
        few_shot(rows, 30, "label", 13)


@pytest.mark.parametrize("seed", [13, 21, 42, 87, 100])
def test_512_shots_go_on_from_16(seed):
    """The paper's larger sets: of the order by seed, each label's first 512, and as many others to evaluate on."""
    rows = Dataset.from_list([{"text": str(i), "label": str(i % 2)} for i in range(3000)])
    small, large = few_shot(rows, 16, "label", seed), few_shot(rows, 512, "label", seed)
    for part in large:
        assert sorted(part["label"]) == ["0"] * 512 + ["1"] * 512
    assert set(small.train["text"]) < set(large.train["text"])
    assert not set(large.train["text"]) & set(large.evaluation["text"])


# Cases of the official script (rajpurkar/SQuAD-explorer, evaluate-v1.1): normalisation, articles, several answers.
@pytest.mark.parametrize(
    ("prediction", "answers", "expected_f1", "expected_match"),
    [
        ("The Denver Broncos", ["Denver Broncos"], 1.0, 1.0),
        ("denver  broncos.", ["Denver Broncos", "The Denver Broncos"], 1.0, 1.0),
        ("Santa Clara, California", ["Levi's Stadium", "Santa Clara"], 0.8, 0.0),
        ("gold", ["gold gold"], 2 / 3, 0.0),
        ("red", ["blue"], 0.0, 0.0),
        ("", ["blue"], 0.0, 0.0),
        ("a", ["the"], 0.0, 1.0),  # both empty: the same, yet no common word
        ("theatre", ["the theatre"], 1.0, 1.0),
        ("it's", ["its"], 1.0, 1.0),
    ],
)
def test_official_answer_scores(prediction, answers, expected_f1, expected_match):
    assert f1(prediction, answers) == pytest.approx(expected_f1)
    assert exact_match(prediction, answers) == expected_match


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_generation_is_greedy(model_folder, name):
    """Against one row at a time, one argmax after the other; prompts of several lengths in one batch."""
    model = AutoModelForCausalLM.from_pretrained(model_folder(name), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder(name))
    prompts = [(0, 10, 11, 12), (0, 13), (0, 14, 15, 16, 17, 18, 19)]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(8):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        expected.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))
    (found,) = generate(model, tokenizer, prompts, batch_size=2, max_new_tokens=8, stop="\n")
    assert found == expected
    for word in " ".join(expected).split():  # rows of one batch end at different lengths
        (stopped,) = generate(model, tokenizer, prompts, batch_size=3, max_new_tokens=8, stop=word)
        assert stopped == [text.partition(word)[0] for text in expected]


def test_demonstrations_stand_before_the_prompt():
    rows = [{"text": "bad film", "label": "0"}, {"text": "good film", "label": "1"}]
    words = {"0": "terrible", "1": "great"}
    config = MeZOConfig(model_name_or_path="x", template="{text} It was", label_words=words)
    found = reading({"text", "label"}, rows, config)
    assert demonstrated(found.read, rows) == "bad film It was terrible\n\ngood film It was great\n\n"


@pytest.fixture
def sentiment(jsonl):
    """SST-2 as the Hub holds it, small: a folder with two splits."""
    rows = [{"sentence": f"the film was {'good' if i % 2 else 'bad'} ", "label": i % 2} for i in range(40)]
    jsonl(rows, "train.jsonl")
    return str(Path(jsonl(rows[:10], "validation.jsonl")).parent)


def test_a_task_by_name(model_folder, sentiment, tmp_path, capsys):
    """Train, evaluate from the journal and in context: only the data's place is named."""
    run = str(tmp_path / "run")
    main(["train", "--task", "sst2", "--model_name_or_path", model_folder("llama"), "--dataset_name", sentiment,
          "--use_peft", "--max_steps", "3", "--per_device_train_batch_size", "4", "--learning_rate", "1e-3",
          "--output_dir", run, "--disable_tqdm"])  # fmt: skip
    state = json.loads((Path(run) / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    capsys.readouterr()
    main(["eval", "--model_name_or_path", model_folder("llama"), "--adapter_name_or_path", run, "--dataset_name",
          sentiment, "--json"])  # fmt: skip
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["num_examples"] == 10 and 0 <= metrics["accuracy"] <= 1
    main(["eval", "--task", "sst2", "--model_name_or_path", model_folder("llama"), "--dataset_name", sentiment,
          "--num_demonstrations", "2", "--json"])  # fmt: skip
    in_context = json.loads(capsys.readouterr().out)
    main(["eval", "--task", "sst2", "--model_name_or_path", model_folder("llama"), "--dataset_name", sentiment,
          "--json"])  # fmt: skip
    assert json.loads(capsys.readouterr().out)["loss"] != in_context["loss"]


def test_few_shots_of_a_task(model_folder, sentiment, tmp_path):
    config = MeZOConfig(
        model_name_or_path=model_folder("bert"), task="sst2", dataset_name=sentiment, num_shots=4, max_steps=1,
        output_dir=str(tmp_path),
    )  # fmt: skip
    trainer = build_trainer(config)
    assert len(trainer.train_examples) == len(trainer.eval_examples) == 8


def test_teacher_forcing_on_the_right_choice(model_folder, jsonl, tmp_path):
    """COPA trains the right ending's tokens alone, as the paper does, and is evaluated over both endings."""
    choices = {"choice1": "people see it", "choice2": "this was boring"}
    row = {"premise": "the film was dull.", **choices, "question": "effect", "label": 1}
    data = jsonl([row] * 6)
    config = MeZOConfig(
        model_name_or_path=model_folder("llama"), task="copa", dataset_name=data, eval_dataset_name=data,
        output_dir=str(tmp_path),
    )  # fmt: skip
    trainer = build_trainer(config)
    trained, evaluated = trainer.train_examples[0], trainer.eval_examples[0]
    assert (len(trained.sequences), trained.label) == (1, None)
    assert (len(evaluated.sequences), evaluated.label) == (2, 1)
    assert trained.sequences[0].input_ids == evaluated.sequences[1].input_ids


def test_every_entity_that_answers_counts(model_folder, jsonl):
    passage = "the good film and the bad film"
    row = {"passage": passage, "query": "the @placeholder was fine", "entities": ["film", "plot", "story"]}
    accuracy = {}
    for answer in (["film"], ["plot"], ["story"], ["film", "plot", "story"]):
        data = jsonl([{**row, "answers": answer}])
        config = MeZOConfig(model_name_or_path=model_folder("llama"), task="record", dataset_name=data)
        accuracy[len(answer), answer[0]] = eval_model(config).accuracy
    assert accuracy.pop((3, "film")) == 1.0
    assert sorted(accuracy.values()) == [0.0, 0.0, 1.0]


def test_generated_answers_are_scored(model_folder, jsonl, tmp_path):
    """The metric of SQuAD is that of what the model itself says."""
    row = {"title": "film", "context": "the good film", "question": "good ?", "answers": ["nothing like it"]}
    config = MeZOConfig(model_name_or_path=model_folder("llama"), task="squad", dataset_name=jsonl([row]))
    assert eval_model(config).exact_match == 0.0
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder("llama"))
    prompt = tuple(tokenizer("Title: film\nContext: the good film\nQuestion: good ?\nAnswer:")["input_ids"])
    ((said,),) = generate(model, tokenizer, [prompt], batch_size=1, max_new_tokens=50, stop="\n")
    found = eval_model(MeZOConfig.from_dict({**config.to_dict(), "dataset_name": jsonl([{**row, "answers": [said]}])}))
    assert found.f1 == found.exact_match == 1.0


def test_a_task_of_ones_own(model_folder, jsonl, tmp_path):
    task = tmp_path / "mood.yaml"
    task.write_text('template: "{review} I feel"\ncolumns: {review: [body]}\nlabel_words: {0: bad, 1: good}\n')
    data = jsonl([{"body": "the film was good", "label": 1}, {"body": "the film was bad", "label": 0}])
    config = MeZOConfig(model_name_or_path=model_folder("llama"), task=str(task), dataset_name=data)
    assert eval_model(config).num_examples == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("templat: x", "'templat'"),
        ("source: me", "template is missing"),
        ('template: "{text}"\nlabel_words: {0: Yes}', "put True in quotes"),
        ('template: "{text}"\nrows: magic', "rows must be one of"),
        ("[1, 2]", "a mapping is needed"),
        ("a: [", "task "),
    ],
)
def test_a_bad_task_file(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        load_task(str(path))


def test_unknown_task_names_the_nearest():
    with pytest.raises(UserError, match="the nearest is 'sst2'"):
        load_task("sst-2")
    with pytest.raises(UserError, match="there is no file"):
        load_task("none.yaml")


def test_a_task_without_the_right_columns(model_folder, jsonl):
    config = MeZOConfig(model_name_or_path=model_folder("llama"), task="boolq", dataset_name=jsonl([{"text": "a"}]))
    with pytest.raises(UserError, match="task 'boolq', row 0: column 'question' is missing"):
        eval_model(config)
    config = MeZOConfig(
        model_name_or_path=model_folder("llama"), task="cb", dataset_name=jsonl([{"premise": "a", "hypothesis": "b",
        "label": "perhaps"}]),
    )  # fmt: skip
    with pytest.raises(UserError, match="label 'perhaps' is none of 0 \\(entailment\\)"):
        eval_model(config)


@pytest.mark.parametrize(
    ("task", "file"),
    [
        ("boolq", "BoolQ/validation"), ("copa", "COPA/validation"), ("drop", "DROP/subset_800"),
        ("record", "ReCoRD/fewglue_dev32"), ("rte", "RTE/validation"), ("squad", "SQuAD/subset_routerlens"),
        ("wsc", "WSC/validation"), ("snli", "SNLI/validation"), ("mnli", "MNLI/validation_matched"),
        ("trec", "TREC/test"), ("sst5", "SST-5/test"), ("sst2", "SST-2/validation"),
    ],
)  # fmt: skip
def test_real_rows_are_read(task, file):
    """Every row of the real sets becomes a prompt with answers, whatever names the columns have there."""
    path = DATA / f"{file}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"needs {file} in {SHARED.name}/ beside the clone")
    loaded = load_task(task)
    encoder_model = loaded.template is None
    # This file has no titles.
    template = "{context}\nQuestion: {question}\nAnswer:" if task == "squad" else None
    config = MeZOConfig(model_name_or_path="x", template=template)
    config = loaded.fill_in(config, encoder_model=encoder_model, test_split=False)
    rows = load_rows(str(path), None, "train")
    prepared = loaded.prepare(rows, config)
    assert len(prepared) >= 0.9 * len(rows)
    if encoder_model:
        assert {row["label"] for row in prepared} == set(config.label_words)
        return
    found = reading(set(prepared.column_names), list(prepared), config)
    for row in prepared:
        question = found.read(row)
        assert question.prompt and all(answer.strip() for answer in question.answers)


@pytest.mark.parametrize(
    ("model", "task", "options", "expected"),
    [
        ("reviews-llama", "sst2", {}, 0.8463),
        ("minilm-mlm", "sst2", {}, 0.644),
    ],
)
def test_zero_shot_accuracy_of_an_independent_implementation(model, task, options, expected):
    """The figures in the models' own README, measured with plain transformers."""
    data = DATA / "SST-2"
    if not (data.exists() and (MODELS / model).exists()):
        pytest.skip(f"needs {model} and SST-2 in {SHARED.name}/ beside the clone")
    config = MeZOConfig(model_name_or_path=str(MODELS / model), task=task, dataset_name=str(data), **options)
    assert eval_model(config).accuracy == pytest.approx(expected, abs=0.003)
