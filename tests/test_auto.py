"""method auto: what it sets, what is named beside it, where it ends in one line, and the rule that fills its table."""

import copy
import dataclasses
import inspect
import json
import logging
import pickle
import sys
from pathlib import Path

import pytest
import yaml

from mezo import MeZOConfig, UserError, auto, build_trainer, journal, mezo_finetune, preset, replay
from mezo.api import trainable_engine
from mezo.cli import parse_train, parse_tune
from mezo.config import looks_like_wrong_rate
from mezo.doctor import diagnose, read_run
from mezo.engines.torch.loading import load_model, load_tokenizer
from mezo.errors import JournalError
from mezo.tune import tune
from tests.conftest import SENTIMENT_ROWS, SHARED
from tests.test_cli import error_line, mezo, run_cli
from tests.test_resume import assert_same_weights

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import methods_choice
import methods_report
import methods_schedule
from methods_settings import METHODS, TRAINED, Job, forwards_per_step, rates

ROWS = Path(__file__).parents[1] / "benchmarks" / "results" / "methods.csv"
USUAL = {"estimator": "spsa", "optim": "sgd", "direction": "dense", "epsilon": 1e-3}
SIZES = {"trained_parameters": {"small": 1_000, "large": 20_000}, "rows": []}
FULL = {"method": "fzoo", "options": {**USUAL, "estimator": "fzoo", "num_queries": 4}, "learning_rate": 2e-3, **SIZES}
LOW_RANK = {**FULL, "options": {**FULL["options"], "direction": "low_rank"}, "learning_rate": 4e-3}
UPPER = {**FULL, "learning_rate": 3e-3}
LORA = {
    "method": "adam",
    "options": {**USUAL, "epsilon": 1e-2, "optim": "adam", "num_queries": 2},
    "learning_rate": 5e-3,
    **SIZES,
}
SGLANG = {"method": "spsa", "options": {**USUAL, "epsilon": 1e-2, "num_queries": 2}, "learning_rate": 1e-4, **SIZES}
KINDS = {
    "full": {},
    "low rank": {"direction": "low_rank"},
    "upper layers": {"trainable_layers": "last:2"},
    "lora": {"use_peft": True},
    "sglang lora": {"use_peft": True, "engine": "sglang"},
}


def write(monkeypatch, folder, **changed):
    path = folder / "auto.yaml"
    table = {"full": FULL, "low rank": LOW_RANK, "upper layers": UPPER, "lora": LORA, "sglang lora": SGLANG}
    path.write_text(yaml.safe_dump(table | changed))
    monkeypatch.setattr(auto, "TABLE", path)


@pytest.fixture
def table(monkeypatch, tmp_path):
    """A table of its own, whatever measurements choose."""
    write(monkeypatch, tmp_path)


@pytest.fixture(autouse=True)
def _to_caplog(monkeypatch):
    """The command line, which other tests call, keeps the package's log lines to itself."""
    monkeypatch.setattr(logging.getLogger("mezo"), "propagate", True)


def config_of(**named):
    return MeZOConfig.from_dict({"model_name_or_path": "m", "method": "auto", **named})


# --- what it sets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_its_entry_and_all_else_as_without(kind):
    """Of the table that comes with mezo."""
    entry, config = auto.entries()[kind], config_of(**KINDS[kind])
    plain = MeZOConfig.from_dict({"model_name_or_path": "m", **KINDS[kind]})
    set_by_it = {**entry.options, "learning_rate": entry.learning_rate}
    assert set(set_by_it) <= set(auto.OPTIONS)
    assert config == dataclasses.replace(plain, method="auto", **set_by_it)


def test_method_mezo_is_the_default_and_sets_nothing(table):
    config = MeZOConfig.from_dict({"model_name_or_path": "m"})
    assert config == MeZOConfig(model_name_or_path="m") == MeZOConfig(model_name_or_path="m", method="mezo")
    assert (config.method, config.estimator, config.num_queries) == ("mezo", "spsa", 1)
    assert (config.learning_rate, config.epsilon) == (1e-6, 1e-3)


def test_what_is_named_wins_option_by_option(table):
    assert config_of(num_queries=8) == dataclasses.replace(config_of(), num_queries=8)
    assert config_of(learning_rate="1e-6") == dataclasses.replace(config_of(), learning_rate=1e-6)
    named = config_of(use_peft=True, optim="sgd", epsilon=1e-4, learning_rate=1e-5)
    assert (named.optim, named.epsilon, named.learning_rate, named.num_queries) == ("sgd", 1e-4, 1e-5, 2)
    assert config_of(epsilon="1e-3", estimator="fzoo") == config_of()  # as the entry has it: its rate fits


def test_a_config_that_is_resolved_stays_as_it_is(monkeypatch, tmp_path, table):
    """Through JSON, copies and replace; and when the table has changed since."""
    config = config_of(use_peft=True)
    recorded = json.loads(json.dumps(config.to_dict()))
    write(monkeypatch, tmp_path, lora=SGLANG)
    assert config_of(use_peft=True) != config
    assert MeZOConfig.from_dict(recorded) == config
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == dataclasses.replace(config) == config


# --- where it ends in one line ----------------------------------------------------------------------------------------

MEND = "or give a learning_rate too (mezo tune --learning_rates … finds one)"


@pytest.mark.parametrize(
    ("named", "line"),
    [
        ({"estimator": "spsa"}, "its learning_rate was measured with estimator fzoo, not spsa; leave out estimator, "),
        ({"direction": "subspace"}, "measured with direction dense, not subspace; leave out direction, "),
        ({"trainable_layers": "last:2", "direction": "low_rank"}, "measured with direction dense, not low_rank; "),
        ({"use_peft": True, "optim": "sgd"}, "measured with optim adam, not sgd; leave out optim, "),
        ({"use_peft": True, "epsilon": "1e-3"}, "measured with epsilon 0.01, not 0.001; leave out epsilon, "),
        ({"normalize_perturbations": True}, "measured with normalize_perturbations False, not True; leave out "),
    ],
)
def test_what_the_measured_rate_does_not_fit_needs_a_rate(table, named, line):
    with pytest.raises(UserError) as caught:
        config_of(**named)
    assert str(caught.value).startswith("method auto: ")
    assert line in str(caught.value)
    assert str(caught.value).endswith(MEND)
    assert config_of(**named, learning_rate=1e-4).learning_rate == 1e-4


@pytest.mark.parametrize(
    ("named", "line"),
    [
        (
            {"use_peft": True, "peft_type": "prefix_tuning"},
            "method auto has no measurements of prefix tuning; use method mezo, or peft_type lora",
        ),
        (
            {"objective": "accuracy"},
            "method auto was measured on objective loss; with objective accuracy use method mezo",
        ),
        ({"engine": "sglang"}, "engine sglang trains LoRA adapters: set use_peft, or use engine torch"),
        ({"method": "automatic"}, "method must be one of mezo, auto, got 'automatic'"),
        ({"num_queries": 1}, "estimator fzoo compares directions: num_queries must be at least 2"),
    ],
)
def test_what_it_cannot_do(table, named, line):
    with pytest.raises(UserError) as caught:
        config_of(**named)
    assert str(caught.value) == line


def test_the_constructor_does_not_pass_for_resolved(table):
    """Its defaults would hide what is named, and plain MeZO would run under the name of auto."""
    with pytest.raises(UserError) as caught:
        MeZOConfig(model_name_or_path="m", method="auto", learning_rate=1e-4)
    assert str(caught.value) == "method auto is resolved by MeZOConfig.from_dict, not by MeZOConfig: use that"
    assert [*inspect.signature(MeZOConfig).parameters] == [f.name for f in dataclasses.fields(MeZOConfig)]


def test_a_preset_beside_it(capsys, table):
    line = "method auto and a preset both choose learning rate and options; leave one of them out"
    with pytest.raises(UserError) as caught:
        preset("opt-full").config(model_name_or_path="m", method="auto")
    assert str(caught.value) == line
    for command in ("train", "tune"):
        arguments = (command, "--model_name_or_path", "m", "--preset", "opt-full", "--method", "auto")
        assert error_line(run_cli(capsys, *arguments)) == line


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_command_line_knows_what_is_named(table, tmp_path):
    """Flags in every spelling, and a file under them; tyro's defaults are not named."""
    train = ["--model_name_or_path", "m", "--method", "auto"]
    assert parse_train(train) == config_of()
    assert parse_train([*train, "--use_peft", "--learning-rate=1e-5"]) == config_of(use_peft=True, learning_rate=1e-5)
    file = tmp_path / "run.yaml"
    file.write_text("method: auto\nuse_peft: true\nnum_queries: 8\nepsilon: 1e-3\nlearning_rate: 1e-5\n")
    config = {"use_peft": True, "num_queries": 8, "epsilon": 1e-3, "learning_rate": 1e-5}
    assert parse_train(["--model_name_or_path", "m", "--config", str(file)]) == config_of(**config)
    flags = ["--no_use_peft", "--num_queries", "2"]
    config |= {"use_peft": False, "num_queries": 2}
    assert parse_train(["--model_name_or_path", "m", "--config", str(file), *flags]) == config_of(**config)
    plain = MeZOConfig.from_dict({"model_name_or_path": "m", **config})
    assert parse_train(["--model_name_or_path", "m", "--config", str(file), *flags, "--method", "mezo"]) == plain


def test_an_error_of_the_command_line(capsys, table):
    """Naming the default of plain MeZO is naming it."""
    finished = run_cli(capsys, "train", "--model_name_or_path", "m", "--method", "auto", "--estimator", "spsa")
    assert "measured with estimator fzoo, not spsa" in error_line(finished)


def test_tune_goes_around_its_rate(table, model_folder, jsonl, tmp_path):
    arguments = [
        "--model_name_or_path", model_folder("llama"), "--dataset_name", jsonl(SENTIMENT_ROWS[:24]), "--template",
        "{text} it was", "--label_words", "0", "bad", "1", "good", "--validation_size", "8", "--use_peft",
        "--max_steps", "1", "--rounds", "1", "--output_dir", str(tmp_path / "tune"), "--disable_tqdm", "--method",
        "auto",
    ]  # fmt: skip
    trials = tune(*parse_tune(arguments))
    assert sorted(t.learning_rate for t in trials) == [5e-4, 1.6e-3, 5e-3, 1.6e-2]
    assert {t.epsilon for t in trials} == {1e-2}
    assert journal.read(Path(trials[0].output_dir) / "journal").header["config"]["optim"] == "adam"
    with pytest.raises(UserError, match="tune --learning_rates"):
        parse_tune([*arguments, "--optim", "sgd"])
    config, _ = parse_tune([*arguments, "--optim", "sgd", "--learning_rates", "1e-4", "1e-5"])
    assert (config.optim, config.num_queries, config.learning_rate) == ("sgd", 2, 1e-4)


# --- runs -------------------------------------------------------------------------------------------------------------

OPTIONS = {"template": "{text} it was", "label_words": {"0": "bad", "1": "good"}, "batch_size": 4, "disable_tqdm": True}


def test_mezo_finetune(table, model_folder, tmp_path):
    """Its defaults are the promised ones, and not named with method auto; a value that is given is."""
    for name in ("learning_rate", "epsilon"):
        assert inspect.signature(mezo_finetune).parameters[name].default == getattr(MeZOConfig, name)
    model, rows = model_folder("llama"), SENTIMENT_ROWS[:8]
    for number, (given, wanted) in enumerate(
        [({}, (2e-3, 1e-3)), ({"lora_rank": 4}, (5e-3, 1e-2)), ({"learning_rate": 1e-6}, (1e-6, 1e-3)),
         ({"lora_rank": 4, "learning_rate": 1e-6, "epsilon": 1e-3}, (1e-6, 1e-3))]
    ):  # fmt: skip
        folder = tmp_path / str(number)
        mezo_finetune(model, rows, method="auto", num_steps=1, output_dir=folder, **given, **OPTIONS)
        recorded = journal.read(folder / "journal").header["config"]
        assert (recorded["learning_rate"], recorded["epsilon"]) == wanted
        assert recorded["method"] == "auto"
    with pytest.raises(UserError, match="objective reward use method mezo"):
        mezo_finetune(model, rows, method="auto", reward_funcs=len, output_dir=tmp_path / "reward", **OPTIONS)
    mezo_finetune(model, rows, num_steps=1, output_dir=tmp_path / "plain", **OPTIONS)
    recorded = journal.read(tmp_path / "plain" / "journal").header["config"]
    assert (recorded["method"], recorded["learning_rate"], recorded["estimator"]) == ("mezo", 1e-6, "spsa")


def test_a_run_from_the_command_line(capsys, table, model_folder, jsonl, tmp_path):
    """Journal, log and card say what was set; a second command resumes it, to the bits of a straight run."""
    arguments = (
        "train", "--model_name_or_path", model_folder("llama"), "--dataset_name", jsonl(SENTIMENT_ROWS), "--template",
        "{text} it was", "--label_words", "0", "bad", "1", "good", "--use_peft", "--method", "auto",
        "--per_device_train_batch_size", 4, "--disable_tqdm",
    )  # fmt: skip
    mezo(capsys, *arguments, "--max_steps", 6, "--output_dir", tmp_path / "straight")
    run = tmp_path / "run"
    said = mezo(capsys, *arguments, "--max_steps", 3, "--output_dir", run)
    assert said.startswith("method auto: learning_rate 0.005, ")
    assert all(f", {name} {value}" in said for name, value in LORA["options"].items())
    facts = json.loads(mezo(capsys, "inspect", run, "--json"))
    assert (facts["method"], facts["estimator"], facts["optim"]) == ("auto", "spsa, 2 queries", "adam")
    mezo(capsys, *arguments, "--max_steps", 6, "--output_dir", run, "--resume_from_checkpoint")
    assert_same_weights(run, tmp_path / "straight")
    recorded = journal.read(run / "journal").header["config"]
    assert recorded["method"] == "auto"
    assert {name: recorded[name] for name in LORA["options"]} == LORA["options"]
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert {entry["learning_rate"] for entry in history if "learning_rate" in entry} == {5e-3}
    card = (run / "README.md").read_text()
    assert "| learning rate | 0.005, constant |" in card
    assert "| estimator | spsa, 2 directions a step |" in card
    assert "| update | adam |" in card


def trainer_of(model_folder, folder, **named):
    values = {
        "model_name_or_path": model_folder("llama"), "template": "{text} it was",
        "label_words": {"0": "bad", "1": "good"}, "use_peft": True, "per_device_train_batch_size": 4, "max_steps": 3,
        "output_dir": str(folder), "disable_tqdm": True, "resume_from_checkpoint": True, "method": "auto",
    }  # fmt: skip
    return build_trainer(MeZOConfig.from_dict(values | named), SENTIMENT_ROWS)


def test_a_table_that_changed_since(monkeypatch, table, model_folder, tmp_path):
    """Replay and doctor go by the journal; a resumed run that would go on otherwise ends in one line."""
    run = tmp_path / "run"
    trainer_of(model_folder, run).train()
    write(monkeypatch, tmp_path, lora={**LORA, "learning_rate": 1e-3})
    assert_same_weights(replay(run, tmp_path / "replayed"), run)
    assert read_run(run).config.learning_rate == 5e-3
    assert len(diagnose(read_run(run))) > 0
    with pytest.raises(JournalError) as caught:
        trainer_of(model_folder, run, max_steps=4).train()
    wanted = "the run was started with learning_rate 0.005, now it is 0.001; name learning_rate to go on"
    assert str(caught.value) == f"{run / 'journal'}: {wanted}"
    assert trainer_of(model_folder, run, max_steps=4, learning_rate=5e-3).train().global_step == 4
    plain = {**LORA["options"], "learning_rate": 5e-3, "method": "mezo"}
    assert trainer_of(model_folder, run, max_steps=5, **plain).train().global_step == 5


@pytest.mark.parametrize(
    ("sizes", "named", "warned"),
    [((1_000, 20_000), {}, False), ((100, 179), {}, True), ((17_921, 900_000), {}, True), ((100, 180), {}, False),
     ((17_920, 900_000), {}, False), ((100, 150), {"learning_rate": 1e-4}, False),
     ((100, 150), {"method": "mezo", "learning_rate": 1e-4}, False)],
    ids=["within", "too large", "too small", "ten times", "a tenth", "own rate", "mezo"],
)  # fmt: skip
def test_far_from_the_sizes_measured_it_warns_once(monkeypatch, model_folder, tmp_path, caplog, sizes, named, warned):
    """The tiny Llama's LoRA has 1,792 trained parameters."""
    write(monkeypatch, tmp_path, lora={**LORA, "trained_parameters": dict(zip("ab", sizes, strict=True))})
    trainer = trainer_of(model_folder, tmp_path / "run", **named)
    assert trainer.engine.num_parameters() == 1_792
    lines = [r.getMessage() for r in caplog.records if "trained parameters" in r.getMessage()]
    measured_with = f"measured with {sizes[0]:,} and {sizes[1]:,} trained parameters"
    line = f"method auto: learning_rate 0.005 was {measured_with}, this run has 1,792; mezo tune finds a rate"
    assert lines == [line] * warned


def test_its_rate_is_not_taken_for_a_wrong_one(table, monkeypatch, tmp_path):
    """2e-3 on all parameters would be far above the paper's, which is of another estimator."""
    assert looks_like_wrong_rate(config_of()) is None
    assert looks_like_wrong_rate(MeZOConfig(model_name_or_path="m", learning_rate=2e-3)) is not None
    assert looks_like_wrong_rate(config_of(normalize_perturbations=True, learning_rate=1e-6)) is not None


# --- the table and the rule -------------------------------------------------------------------------------------------


def test_the_table_is_what_the_rule_gives():
    if not ROWS.exists():
        pytest.skip("benchmarks/results/methods.csv is not there yet: the table's entries are provisional")
    found = methods_schedule.read(ROWS)
    written = yaml.safe_load(auto.TABLE.read_text())
    assert {kind: written[kind] for kind in methods_choice.KINDS} == methods_choice.entries(found)


def test_the_table_and_the_page_belong_together():
    entries = auto.entries()
    assert entries.keys() == KINDS.keys() == methods_choice.KINDS.keys()
    page = methods_choice.DOCS.read_text()
    assert methods_choice.with_table(page, "auto.yaml", methods_choice.docs_table(entries)) == page
    measured = methods_report.page_table(methods_report.tuned(methods_schedule.read(ROWS)))
    assert methods_choice.with_table(page, "methods.csv", measured) == page
    assert methods_choice.to_yaml(yaml.safe_load(auto.TABLE.read_text())) == auto.TABLE.read_text()
    for kind, entry in entries.items():
        assert entry.method in methods_choice.candidates(kind)
        assert set(USUAL) <= entry.options.keys()
        for model, size in entry.trained_parameters.items():
            trained = METHODS[entry.method][0].get("trainable_layers", "lora" if "lora" in kind else "all")
            assert size == TRAINED[model][trained]


def test_no_method_sets_what_an_entry_cannot():
    for kind in KINDS:
        for method in methods_choice.candidates(kind):
            assert METHODS[method][0].keys() <= {*auto.OPTIONS, "use_peft", "lora_r", "lora_alpha", "trainable_layers"}


@pytest.mark.skipif(not (SHARED / "models" / "minilm-mlm").exists(), reason="needs the models of shared/")
@pytest.mark.parametrize("model", TRAINED)
def test_numbers_of_trained_parameters(model):
    folder, kind = str(SHARED / "models" / model), "masked_lm" if model == "minilm-mlm" else "causal_lm"
    for trained, wanted in TRAINED[model].items():
        layers = trained if trained.startswith("last:") else None
        config = MeZOConfig(
            model_name_or_path=folder,
            dtype="float32",
            use_peft=trained == "lora",
            trainable_layers=layers,
            use_cpu=True,
        )
        engine = trainable_engine(config, kind, load_model(config, kind, []), load_tokenizer(config))
        assert engine.num_parameters() == wanted


ENCODER, DECODER = methods_choice.TASKS[:2]


def measured(task, method, ends, soon=2000, rate=None, milliseconds=10.0):
    """Rows of a method: a seed for each last accuracy, which it has from plain MeZO's step `soon` on."""
    passes, rate = forwards_per_step(method), rate or rates(method)[1]
    rows = []
    for seed, end in enumerate(ends):
        for phase, points in (("train", (0, soon, 2000)), ("time", (40,))):
            job = Job(task, method, rate, 0 if phase == "time" else seed, phase)
            for point in points:
                accuracy = 0.5 if point == 0 else end
                forwards = 2 * point
                rows.append({**job._asdict(), "step": forwards // passes, "forwards": forwards, "accuracy": accuracy,
                             "held_out_accuracy": accuracy, "held_out_loss": 1 - accuracy,
                             "milliseconds_per_step": milliseconds * passes / 2,
                             "end": "", "commit": "abc", "device": "a GPU"})  # fmt: skip
    return [{name: str(value) for name, value in row.items()} for row in rows]


def test_the_soonest_of_those_within_a_point():
    """Plain MeZO ends at 80; mezo clipped is the soonest but more than a point behind in the mean.

    fzoo takes half the time on both, lozo 0.8 and 0.2 of it, of which the geometric mean is less.
    """
    found = [
        *measured(ENCODER, "mezo", [0.79, 0.80, 0.83]), *measured(DECODER, "mezo", [0.80, 0.80, 0.80]),
        *measured(ENCODER, "fzoo, 8 queries", [0.81, 0.81, 0.81], 1000, rate=1e-3),
        *measured(DECODER, "fzoo, 8 queries", [0.80, 0.80, 0.80], 1000, rate=3e-4),
        *measured(ENCODER, "lozo", [0.80, 0.80, 0.80], 1600), *measured(DECODER, "lozo", [0.81, 0.81, 0.81], 400),
        *measured(ENCODER, "es, 8 queries", [0.79] * 3, 1000), *measured(DECODER, "es, 8 queries", [0.81] * 3, 1000),
        *measured(ENCODER, "mezo, clipped", [0.80] * 3, 20), *measured(DECODER, "mezo, clipped", [0.788] * 3, 20),
        *measured(ENCODER, "first order", [0.90] * 3, 20), *measured(DECODER, "first order", [0.90] * 3, 20),
        *measured(ENCODER, "fzoo lora, 8 queries", [0.95] * 3, 20),
    ]  # fmt: skip
    by_name = {m.method: m for m in methods_choice.judged(found, "full")}
    assert by_name.keys() == {"mezo", "fzoo, 8 queries", "lozo", "es, 8 queries", "mezo, clipped"}
    assert by_name["mezo"].ratios == [1.0, 1.0]
    assert by_name["mezo"].gaps == pytest.approx([1, 1])
    # A step of fzoo is 9 passes: 222 of them are 1,998 passes, so a little less than half.
    assert by_name["fzoo, 8 queries"].ratios == pytest.approx([0.5, 0.5], rel=2e-3)
    assert by_name["lozo"].ratios == pytest.approx([0.8, 0.2])
    assert by_name["lozo"].slowness == pytest.approx(0.4)
    assert by_name["es, 8 queries"].gaps == pytest.approx([2.0, 0.0])
    assert by_name["es, 8 queries"].accuracy == pytest.approx(80.0)
    assert methods_choice.choice(list(by_name.values())).method == "lozo"
    entry = methods_choice.entries(found)["full"]
    assert entry["options"] == {**USUAL, "direction": "low_rank", "direction_rank": 2, "direction_refresh_steps": 50}
    assert entry["trained_parameters"] == {"minilm-mlm": 22_744_506, "reviews-llama": 29_893_120}
    assert entry["rows"][1] == {
        "file": "benchmarks/results/methods.csv", "commit": "abc", "task": DECODER, "method": "lozo",
        "learning_rate": rates("lozo")[1], "seeds": 3, "accuracy": 81.0, "behind_the_best": 0.0,
        "seconds_over_plain": 0.2,
    }  # fmt: skip
    assert "lora" not in methods_choice.entries(found)  # its plain MeZO was not measured


def test_the_lower_middle_rate_and_seconds_not_passes():
    """The same passes at twice the milliseconds a pass."""
    found = [
        *measured(ENCODER, "mezo lora", [0.80]), *measured(DECODER, "mezo lora", [0.80]),
        *measured(ENCODER, "adam lora, 4 queries", [0.80], 400, rate=1e-2),
        *measured(DECODER, "adam lora, 4 queries", [0.80], 400, rate=3e-3),
        *measured(ENCODER, "fzoo lora, 8 queries", [0.80], 400, rate=1e-2, milliseconds=20.0),
        *measured(DECODER, "fzoo lora, 8 queries", [0.80], 400, rate=3e-2, milliseconds=20.0),
    ]  # fmt: skip
    entries = methods_choice.entries(found)
    assert (entries["lora"]["method"], entries["lora"]["learning_rate"]) == ("adam lora, 4 queries", 3e-3)
    # SGLang's engine has no Adam.
    assert (entries["sglang lora"]["method"], entries["sglang lora"]["learning_rate"]) == ("fzoo lora, 8 queries", 1e-2)
    assert entries["sglang lora"]["options"] == {**USUAL, "epsilon": 1e-2, "estimator": "fzoo", "num_queries": 8}
    assert entries["lora"]["trained_parameters"] == {"minilm-mlm": 73_728, "reviews-llama": 131_072}


def test_where_nobody_gets_to_plain_mezo_on_all_timed_tasks_the_most_accurate():
    found = [
        *measured(ENCODER, "mezo lora", [0.80]), *measured(DECODER, "mezo lora", [0.70]),
        *measured(ENCODER, "fzoo lora, 8 queries", [0.79]), *measured(DECODER, "fzoo lora, 8 queries", [0.80], 400),
        *measured(ENCODER, "adam lora, 4 queries", [0.79], 20), *measured(DECODER, "adam lora, 4 queries", [0.79], 20),
    ]  # fmt: skip
    assert methods_choice.entries(found)["lora"]["method"] == "fzoo lora, 8 queries"
    adam = next(m for m in methods_choice.judged(found, "lora") if m.method == "adam lora, 4 queries")
    assert adam.ratios == [float("inf"), 0.01]  # it never gets to 80 on the first


def test_seconds_of_other_tasks_than_sst2_decide_nothing():
    """lozo is the quicker on SST-2 and does not get to plain MeZO's accuracy on TREC."""
    other = "minilm-mlm/trec"
    found = [
        *measured(ENCODER, "mezo", [0.80]), *measured(DECODER, "mezo", [0.80]), *measured(other, "mezo", [0.60]),
        *measured(ENCODER, "lozo", [0.80], 400), *measured(DECODER, "lozo", [0.80], 400),
        *measured(other, "lozo", [0.59], 400),
    ]  # fmt: skip
    entry = methods_choice.entries(found)["full"]
    assert entry["method"] == "lozo"
    assert [row["seconds_over_plain"] for row in entry["rows"]] == [0.2, 0.2, float("inf")]


def test_tasks_without_seconds_count_by_accuracy_alone():
    """What was not timed leaves no figure in the table, either; of four rates it is the second."""
    untimed = "minilm-mlm/trec"
    found = [
        *measured(ENCODER, "mezo", [0.80], rate=3e-5), *measured(DECODER, "mezo", [0.80], rate=1e-4),
        *[r for r in measured(untimed, "mezo", [0.50], rate=1e-5) if r["phase"] != "time"],
        *measured(ENCODER, "lozo", [0.80], 400, rate=1e-5), *measured(DECODER, "lozo", [0.80], 400, rate=3.2e-5),
        *[r for r in measured(untimed, "lozo", [0.46], rate=1e-4) if r["phase"] != "time"],
    ]  # fmt: skip
    of = {m.method: m for m in methods_choice.judged(found, "full")}
    assert of["lozo"].slowness == pytest.approx(0.2) and of["lozo"].accuracy == pytest.approx((80 + 80 + 46) / 3)
    assert methods_choice.entries(found)["full"]["method"] == "mezo"  # 1.3 points ahead in the mean
    found = [r for r in found if (r["task"], r["method"]) != (untimed, "lozo")]
    found += [r for r in measured(untimed, "lozo", [0.48], rate=1e-4) if r["phase"] != "time"]
    entry = methods_choice.entries(found)["full"]
    assert (entry["method"], entry["learning_rate"]) == ("lozo", 3.2e-5)
    assert [row.get("seconds_over_plain") for row in entry["rows"]] == [0.2, 0.2, None]
    table = methods_choice.docs_table({"full": auto.Entry(**entry)})
    assert "minilm-mlm/trec at 0.0001: 48.0 %, 2.0 behind the best |" in table


def test_one_task_alone_and_none():
    found = [*measured(DECODER, "mezo", [0.80]), *measured(DECODER, "lozo", [0.81], 400)]
    entry = methods_choice.entries(found)["full"]
    assert (entry["method"], list(entry["trained_parameters"])) == ("lozo", ["reviews-llama"])
    # A method that is missing where plain MeZO was measured is no candidate.
    found += measured(ENCODER, "mezo", [0.80])
    assert methods_choice.entries(found)["full"]["method"] == "mezo"
    assert methods_choice.entries([]) == {}


def test_the_command_writes_table_and_page(monkeypatch, tmp_path, capsys):
    """Kinds that were not measured stay as they are."""
    write(monkeypatch, tmp_path)
    page, rows = tmp_path / "methods.md", tmp_path / "rows.csv"
    page.write_text("Before\n<!-- auto.yaml -->\nold\n<!-- end of auto.yaml -->\nafter\n")
    monkeypatch.setattr(methods_choice, "DOCS", page)
    for method, end, soon in (("mezo", 0.80, 2000), ("lozo", 0.81, 400)):
        worse = [row for rate in rates(method) for row in measured(DECODER, method, [0.60], rate=rate)]
        best = measured(DECODER, method, [end], soon)
        taken = {(row["learning_rate"], row["phase"]) for row in best}
        worse = [row for row in worse if (row["learning_rate"], row["phase"]) not in taken and row["phase"] == "train"]
        methods_schedule.append(rows, [*best, *worse])
    # Not all of its rates were tried.
    methods_schedule.append(rows, measured(DECODER, "es, 8 queries", [0.99], 20))
    monkeypatch.setattr(sys, "argv", ["methods_choice.py", str(rows), "--write"])
    methods_choice.main()
    assert auto.entries()["full"].method == "lozo"
    assert auto.entries()["lora"] == auto.Entry(**LORA)
    text = page.read_text()
    assert text.startswith("Before\n<!-- auto.yaml -->\n\n| trained |")
    assert text.endswith("|\n\n<!-- end of auto.yaml -->\nafter\n")
    assert "reviews-llama/sst2: 81.0 %, 0.0 behind the best, accuracy of *mezo* in 0.20 of its time" in text
    assert "| lora | adam |" in text and "old" not in text
    assert "lozo" in capsys.readouterr().out
    first = auto.TABLE.read_text()
    methods_choice.main()
    assert auto.TABLE.read_text() == first and page.read_text() == text
