"""Objectives without a gradient, against weights written out and rewards counted by hand."""

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from mezo import MeZOConfig, UserError, mezo_finetune, philox
from mezo.api import build_trainer, eval_model, replay
from mezo.blackbox import Rewards, load_reward, loss_function, make_rewards
from mezo.cli import main
from mezo.engines.torch.generation import generate
from mezo.estimator import Probe, Record
from mezo.metrics import f1
from mezo.objective import Example, Question, Target, TokenSequence, error_rates
from tests.conftest import SENTIMENT_ROWS

PROBES = [Probe(7, 0.3), Probe(7, -0.3)]  # wide enough to change what is said
ADAPTERS = {
    "dense": {},
    "low rank": {"direction": "low_rank", "direction_refresh_steps": 4},
    "lora": {"use_peft": True, "lora_r": 2},
    "prefix": {"use_peft": True, "peft_type": "prefix_tuning"},
}
PROMPTS = [
    {"prompt": f"the {noun} was", "wanted": word} for noun in ("film", "plot", "story") for word in ("good", "bad")
]


def config_for(folder, **more):
    return MeZOConfig(model_name_or_path=folder, dtype="float32", seed=3, max_new_tokens=6, **more)


def moved(engine):
    """Away from the initial values: LoRA's B is 0 there."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in engine.space.parameters.values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    if engine._lora is not None:
        engine._lora.changed()
    if engine._low_rank is not None:
        engine._low_rank.reset()
        engine.update([Record(0, 5, 0.0, 0.0, 0.3, 0.05, 0, 0)])  # in the middle of a window
    return engine


def written_out(engine, probe):
    """A copy of the model with θ + scale · z in its weights."""
    model = copy.deepcopy(engine.model)
    parameters = dict(model.named_parameters())
    owners = {id(p): n for n, p in engine.model.named_parameters()}
    with torch.no_grad():
        for name, parameter in engine.space.parameters.items():
            stream = philox.stream_id("direction", name)
            moved_values = philox.add_normals(parameter.detach().reshape(-1), probe.scale, probe.seed, stream, 0)
            parameters[owners[id(parameter)]].copy_(moved_values.view_as(parameter))
    return model


@pytest.mark.parametrize("kind", ["dense", "lora", "prefix"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_generation_under_probes(model_folder, name, kind):
    """Both signs' texts at once are those of the two models written out."""
    config = config_for(model_folder(name), **ADAPTERS[kind], objective="f1")
    engine = moved(build_trainer(config, [{"prompt": "a film", "answers": ["good"]}]).engine)
    prompts = [(0, 10, 11, 12), (0, 13), (0, 14, 15, 16, 17)]
    found = engine.generate(prompts, PROBES, 6, None)
    expected = [
        generate(written_out(engine, p), engine.tokenizer, prompts, batch_size=1, max_new_tokens=6, stop=None)[0]
        for p in PROBES
    ]
    assert found == expected
    assert found[0] != found[1]


def test_generation_inside_a_window_of_low_rank(model_folder, tmp_path):
    """The weights lag behind in a window; what is said does not."""
    config = config_for(model_folder("llama"), **ADAPTERS["low rank"], objective="f1")
    engine = moved(build_trainer(config, [{"prompt": "a film", "answers": ["good"]}]).engine)
    assert not engine._low_rank.is_folded
    engine.save(tmp_path / "folded")
    saved = type(engine.model).from_pretrained(tmp_path / "folded").eval()
    prompts = [(0, 10, 11, 12), (0, 13)]
    expected = generate(saved, engine.tokenizer, prompts, batch_size=2, max_new_tokens=6, stop=None)
    assert engine.generate(prompts, [Probe(0, 0.0)], 6, None) == expected
    assert engine.generate(prompts, PROBES, 6, None)[0] != expected[0]


def test_error_rates_by_hand():
    def example(label, also=()):
        return Example((TokenSequence((1, 2), tuple(Target(0, o, o) for o in range(3))),), label, also)

    logprobs = torch.tensor([-1.0, -0.5, -2.0] * 3)  # option 1 is the best
    assert error_rates([example(1), example(0), example(2, (1,))], logprobs).tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_accuracy_as_objective(model_folder, name):
    mask = " [MASK] ." if name == "bert" else ""
    config = config_for(
        model_folder(name),
        template=f"{{text}} it was{mask}",
        label_words={"0": "bad", "1": "good"},
        objective="accuracy",
    )
    trainer = build_trainer(config, SENTIMENT_ROWS[:8])
    losses = loss_function(config)(trainer.engine, trainer.train_examples, PROBES)
    for p, probe in enumerate(PROBES):
        plain = build_trainer(config, SENTIMENT_ROWS[:8]).engine
        plain.model.load_state_dict(written_out(plain, probe).state_dict())
        expected = error_rates(trainer.train_examples, plain.score(trainer.train_examples).logprobs_T)
        assert losses[p].tolist() == expected.tolist()
    assert 0 < losses.mean() < 1


def test_f1_as_objective(model_folder):
    rows = [{"prompt": "the film was", "answers": ["good", "film good bad"]}, {"prompt": "a plot", "answers": ["dull"]}]
    config = config_for(model_folder("llama"), objective="f1")
    trainer = build_trainer(config, rows)
    moved(trainer.engine)
    losses = loss_function(config)(trainer.engine, trainer.train_examples, PROBES)
    texts = trainer.engine.generate([e.question.prompt for e in trainer.train_examples], PROBES, 6, "\n")
    expected = [[1 - f1(t, r["answers"]) for t, r in zip(said, rows, strict=True)] for said in texts]
    assert torch.allclose(losses, torch.tensor(expected))
    assert (
        trainer.engine.work.asked
        == trainer.engine.work.computed
        == 2 * sum(e.num_tokens for e in trainer.train_examples)
    )


def test_reward_functions_get_what_trls_get():
    seen = []

    def length(prompts, completions, **columns):
        seen.append((prompts, completions, columns))
        return [len(c) for c in completions]

    def only_first(completions, **_):
        return [1.0, None]

    rewards = Rewards((length, only_first), (0.5, 10.0))
    questions = [Question((1,), columns={"prompt": p, "answer": a}) for p, a in (("x", 1), ("y", 2))]
    assert rewards(questions, ["one", "three"]) == [0.5 * 3 + 10, 0.5 * 5]
    assert seen == [(["x", "y"], ["one", "three"], {"answer": [1, 2]})]
    chat = [{"role": "user", "content": "x"}]
    rewards = Rewards((lambda completions, **_: [len(c[0]["content"]) for c in completions],), (1.0,))
    assert rewards([Question((1,), columns={"prompt": chat})], ["four"]) == [4.0]


@pytest.mark.parametrize("wrong", [[1.0], 3, ["x", "y"], None])
def test_a_reward_function_must_return_numbers(wrong):
    rewards = Rewards((lambda **_: wrong,), (1.0,))
    with pytest.raises(UserError, match="must return a list of 2 numbers"):
        rewards([Question((1,), columns={"prompt": "x"})] * 2, ["a", "b"])


def says_much(prompts, completions, **_):
    """Characters, in units of a long answer."""
    return [len(text) / 40 for text in completions]


@pytest.mark.filterwarnings("ignore:learning_rate")
@pytest.mark.parametrize(("kind", "rate"), [("lora", 3e-1), ("low rank", 3e-2)])
def test_training_on_a_reward(model_folder, tmp_path, kind, rate):
    """A reward that has no gradient grows, and the journal rebuilds the weights."""
    options = {
        **ADAPTERS[kind], "epsilon": 0.1, "num_queries": 4, "max_new_tokens": 6, "dtype": "float32", "seed": 1,
        "eval_on_start": True, "estimator": "es", "disable_tqdm": True, "eval_dataset": PROMPTS, "learning_rate": rate,
        "batch_size": 6,
    }  # fmt: skip
    result = mezo_finetune(
        model_folder("llama"), PROMPTS, num_steps=40, output_dir=tmp_path / "run", reward_funcs=says_much, **options
    )
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    before = next(entry["eval_reward"] for entry in history if "eval_reward" in entry)
    assert result.metrics.reward > before + 0.1
    assert result.metrics.loss == -result.metrics.reward and result.metrics.accuracy is None
    replay(tmp_path / "run", tmp_path / "again")
    name = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def test_a_reward_by_name(model_folder, jsonl, tmp_path):
    (tmp_path / "rewards.py").write_text(
        "def short(prompts, completions, **_):\n    return [-len(c) for c in completions]\n"
    )
    data = jsonl(PROMPTS)
    name = f"{tmp_path / 'rewards.py'}:short"
    main(["train", "--model_name_or_path", model_folder("llama"), "--dataset_name", data, "--eval_dataset_name", data,
          "--use_peft", "--objective", "reward", "--reward_funcs", name, "--max_steps", "2", "--max_new_tokens", "4",
          "--metric_for_best_model", "reward", "--eval_steps", "1", "--output_dir", str(tmp_path / "run"),
          "--learning_rate", "1e-3", "--disable_tqdm"])  # fmt: skip
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["best_metric"] == max(e["eval_reward"] for e in state["log_history"] if "eval_reward" in e) < 0
    assert "| objective | reward |" in (tmp_path / "run" / "README.md").read_text()


def test_a_chat_prompt(model_folder):
    config = config_for(model_folder("llama"), objective="reward", reward_funcs=["math.fsum"])
    row = {"prompt": [{"role": "user", "content": "a film"}]}
    with pytest.raises(UserError, match="no chat template"):
        build_trainer(config, [row])
    folder = Path(model_folder("llama"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %} answer :"
    from transformers import AutoConfig

    from mezo.encoding import make_encoder

    encoder = make_encoder([row], config, AutoConfig.from_pretrained(folder), tokenizer, encoder_model=False)
    (example,) = encoder([row])
    assert example.question.prompt == tuple(tokenizer("a film answer :")["input_ids"])
    assert example.question.columns == row


def test_a_reward_file_with_a_dataclass_and_one_that_fails(tmp_path):
    (tmp_path / "own.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass Length:\n"
        "    scale: float = 2.0\n\ndef long(prompts, completions, **_):\n"
        "    return [Length().scale * len(c) for c in completions]\n"
    )
    assert load_reward(f"{tmp_path / 'own.py'}:long")([], ["abc"]) == [6.0]
    (tmp_path / "own.py").write_text("1 / 0\n")
    with pytest.raises(UserError, match="long': ZeroDivisionError: division by zero"):
        load_reward(f"{tmp_path / 'own.py'}:long")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no.such.module.function", "No module named 'no'"),
        ("math.nothing", "there is no function 'nothing' in math"),
        ("math.pi", "there is no function 'pi' in math"),
        ("/nowhere/file.py:f", "/nowhere/file.py"),
        ("function", "reward_funcs 'function'"),
    ],
)
def test_reward_functions_that_are_not_there(name, message):
    with pytest.raises(UserError, match=message):
        load_reward(name)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objective": "reward"}, "objective reward and reward_funcs go together"),
        ({"reward_funcs": ["math.fsum"]}, "objective reward and reward_funcs go together"),
        ({"objective": "f1", "use_peft": True, "lora_variant": "alora"}, "which lora_variant alora cannot"),
    ],
)
def test_objectives_that_do_not_go_together(values, message):
    with pytest.raises(UserError, match=message):
        MeZOConfig(model_name_or_path="x", **values)


def test_rows_that_an_objective_cannot_use(model_folder):
    completion = [{"prompt": "a film", "completion": "good"}]
    for objective, message in (("accuracy", "needs rows with options"), ("f1", "rows with prompt and answers")):
        with pytest.raises(UserError, match=message):
            build_trainer(config_for(model_folder("llama"), objective=objective), completion)
    encoder = config_for(
        model_folder("bert"), objective="reward", reward_funcs=["math.fsum"], template="{text} it was [MASK] .",
        label_words={"0": "bad", "1": "good"},
    )  # fmt: skip
    with pytest.raises(UserError, match="needs a decoder and rows with a prompt"):
        build_trainer(encoder, SENTIMENT_ROWS[:4])
    with pytest.raises(UserError, match="reward_weights holds 2 numbers for 1"):
        make_rewards(config_for("x", objective="reward", reward_funcs=["math.fsum"], reward_weights=[1.0, 2.0]))
    with pytest.raises(UserError, match="metric_for_best_model reward needs"):
        build_trainer(config_for(model_folder("llama"), metric_for_best_model="reward"), completion)


def test_evaluation_of_a_reward(model_folder, jsonl):
    config = config_for(
        model_folder("llama"),
        objective="reward",
        reward_funcs=["tests.test_blackbox.says_much"],
        dataset_name=jsonl(PROMPTS),
    )
    metrics = eval_model(config)
    assert 0.0 <= metrics.reward <= 1.0 and metrics.num_examples == len(PROMPTS)
