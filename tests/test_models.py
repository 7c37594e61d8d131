"""Every kind of model and adapter against plain transformers and PEFT: losses, perturbed forwards, saved adapters."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from mezo import mezo_finetune, philox
from mezo.api import build_trainer
from mezo.config import MeZOConfig
from mezo.engines.torch import dense as dense_module
from mezo.engines.torch import engine as engine_module
from mezo.engines.torch.dense import Dense
from mezo.engines.torch.passes import length_groups
from mezo.engines.torch.perturbed import PerturbedForward
from mezo.estimator import Probe
from mezo.evaluation import evaluate
from mezo.kernels import cpu as cpu_kernels
from mezo.objective import batch_loss
from tests.conftest import WORDS

DECODERS = ["llama", "llama tied", "qwen2", "opt", "gpt2"]
ENCODERS = ["bert", "roberta"]
TIED = ["llama tied", "opt", "gpt2", "bert", "roberta"]

# Rows of different lengths, so that every batch below is padded.
TEXTS = [
    "the film was good .",
    "dull",
    "a very lovely story , people see this",
    "plot ? no !",
    "acting that was the it",
]
COMPLETIONS = [
    {"prompt": f"{text} question :", "completion": f" {answer}"}
    for text, answer in zip(
        TEXTS, ["yes", "no , very bad", "good", "the plot was dull .", "one two three"], strict=True
    )
]
LABELLED = [{"text": text, "label": i % 2} for i, text in enumerate(TEXTS)]
CHOICES = [
    {"prompt": text, "choices": choices, "label": label}
    for text, choices, label in zip(
        TEXTS,
        [["yes", "no"], ["good", "very bad", "dull"], ["one two", "three"], ["yes", "no", "maybe"], ["it", "a b c"]],
        [0, 2, 1, 1, 0],
        strict=True,
    )
]
PROMPTED = {"template": "{text} it was", "label_words": {"0": "very bad", "1": "great"}}
MASKED = {"template": "{text} it was [MASK] .", "label_words": {"0": "terrible", "1": "great"}}
LORA = {"use_peft": True, "peft_type": "lora", "lora_r": 4}
PREFIX = {"use_peft": True, "peft_type": "prefix_tuning", "num_virtual_tokens": 3}

# Float32 sums of a few dozen terms near 1, in another order: 1e-6 each, over the layers of a tiny model and a
# log-softmax. Logits themselves reach about 10.
LOSS_TOLERANCE = 2e-5
LOGIT_TOLERANCE = 2e-4


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Tiny tensors gain nothing from a second thread and lose milliseconds a call when another process has the core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if cpu_kernels.enabled():
        import numba

        numba_threads = numba.get_num_threads()
        numba.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if cpu_kernels.enabled():
        numba.set_num_threads(numba_threads)


def qwen2_tokenizer():
    """transformers turns whatever tokenizer lies beside a Qwen2 model into byte-level BPE, so here is one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["</s>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([f"{word} {word}" for word in WORDS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="session")
def folder(model_folder, tmp_path_factory):
    """The tiny models with noise on all parameters.

    At their initial 0.02 every token is as probable as any other, attention hardly matters, and biases are 0: an
    error in padding, tying or a bias would stay below any tolerance.
    """
    made = {}

    def make(name):
        if name not in made:
            source = model_folder(name.split()[0])
            made[name] = str(tmp_path_factory.mktemp("noisy"))
            tokenizer = qwen2_tokenizer() if name == "qwen2" else AutoTokenizer.from_pretrained(source)
            tokenizer.save_pretrained(made[name])
            config = AutoConfig.from_pretrained(source)
            config.vocab_size = max(config.vocab_size, len(tokenizer))
            config.tie_word_embeddings = name in TIED
            auto = AutoModelForMaskedLM if name in ENCODERS else AutoModelForCausalLM
            model = auto.from_config(config)
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    start = (
                        1.0
                        if key.endswith(("norm.weight", "Norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight"))
                        else 0.0
                    )
                    parameter.copy_(start + 0.2 * torch.randn(parameter.shape, generator=generator))
            model.save_pretrained(made[name])
        return made[name]

    return make


def trainer_for(path, rows, **options):
    if options.get("normalize_perturbations"):
        options["learning_rate"] = 1e-3  # the default belongs to unnormalised directions, and that is warned of
    return build_trainer(MeZOConfig(model_name_or_path=path, disable_tqdm=True, **options), rows)


def plain(path, kind="causal_lm", dtype=torch.float32):
    auto = {"causal_lm": AutoModelForCausalLM, "masked_lm": AutoModelForMaskedLM}.get(
        kind, AutoModelForSequenceClassification
    )
    return auto.from_pretrained(path, dtype=dtype).eval()


def kind_of(name):
    return "masked_lm" if name in ENCODERS else "causal_lm"


# --- losses one example at a time, written against transformers alone -----------------------------------------------


def token_logprobs(model, ids, num_prompt):
    """Log-probabilities of the tokens behind the prompt, and whether each is the most probable one."""
    logprobs_SV = F.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].float(), dim=-1)
    positions = range(num_prompt, len(ids))
    logprobs = torch.stack([logprobs_SV[i - 1, ids[i]] for i in positions])
    return logprobs, [int(logprobs_SV[i - 1].argmax()) == ids[i] for i in positions]


def completion_reference(model, tokenizer, prompt, completion):
    ids = [*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]
    logprobs, greedy = token_logprobs(model, ids, max(1, len(tokenizer(prompt)["input_ids"])))
    return -float(logprobs.mean()), sum(greedy) / len(greedy), len(greedy)


def options_reference(scores, label):
    return -float(F.log_softmax(scores, dim=0)[label]), float(int(scores.argmax()) == label), 1


def prompted_reference(model, tokenizer, prompt, answers, label):
    num_prompt = len(tokenizer(prompt)["input_ids"])
    scores = [token_logprobs(model, tokenizer(f"{prompt} {a}")["input_ids"], num_prompt)[0].mean() for a in answers]
    return options_reference(torch.stack(scores), label)


def masked_reference(model, tokenizer, text, answers, label):
    ids = tokenizer(f"{text} it was {tokenizer.mask_token} .")["input_ids"]
    position = ids.index(tokenizer.mask_token_id)
    logits_V = model(input_ids=torch.tensor([ids])).logits[0, position].float()
    return options_reference(F.log_softmax(logits_V, dim=0)[tokenizer.convert_tokens_to_ids(answers)], label)


def head_reference(model, tokenizer, text, label):
    return options_reference(model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0].float(), label)


TASKS = {
    "completion": (COMPLETIONS, {}, lambda m, t, r: completion_reference(m, t, r["prompt"], r["completion"])),
    "plain text": ([{"text": t} for t in TEXTS], {}, lambda m, t, r: completion_reference(m, t, "", r["text"])),
    "label words": (
        LABELLED,
        PROMPTED,
        lambda m, t, r: prompted_reference(m, t, f"{r['text']} it was", ["very bad", "great"], r["label"]),
    ),
    "choices": (CHOICES, {}, lambda m, t, r: prompted_reference(m, t, r["prompt"], r["choices"], r["label"])),
    "masked": (LABELLED, MASKED, lambda m, t, r: masked_reference(m, t, r["text"], ["terrible", "great"], r["label"])),
    "head": (LABELLED, {}, lambda m, t, r: head_reference(m, t, r["text"], r["label"])),
}
COMBINATIONS = [(d, task) for d in DECODERS for task in ("completion", "plain text", "label words", "choices")] + [
    (e, task) for e in ENCODERS for task in ("masked", "head")
]


def engine_losses(trainer, batch_size=64):
    trainer.engine.train_batch_size = batch_size
    return trainer.engine.losses(trainer.train_examples, [Probe(1, 0.0)])[0]


@torch.no_grad()
def check_losses(trainer, reference_model, task):
    """Per example, in a padded batch and alone, and over the whole set."""
    rows, _, reference = TASKS[task]
    losses, accuracies, weights = zip(
        *(reference(reference_model, trainer.engine.tokenizer, r) for r in rows), strict=True
    )
    assert max(losses) - min(losses) > 100 * LOSS_TOLERANCE  # the examples differ, so mixing them up would show
    for batch_size in (64, 2, 1):
        assert engine_losses(trainer, batch_size).tolist() == pytest.approx(losses, abs=LOSS_TOLERANCE)
    metrics = evaluate(trainer.engine, trainer.train_examples)
    mean = sum(loss * w for loss, w in zip(losses, weights, strict=True)) / sum(weights)
    assert metrics.loss == pytest.approx(mean, abs=LOSS_TOLERANCE)
    assert metrics.accuracy == pytest.approx(sum(accuracies) / len(rows), abs=1e-12)
    assert metrics.num_examples == len(rows)


@pytest.mark.parametrize(("name", "task"), COMBINATIONS)
def test_losses_are_those_of_plain_transformers(folder, tmp_path, name, task):
    rows, options, _ = TASKS[task]
    trainer = trainer_for(folder(name), rows, **options)
    if task == "head":
        trainer.engine.save(tmp_path)  # the head is fresh; plain transformers reads it from here
        check_losses(trainer, plain(tmp_path, "sequence_classification"), task)
    else:
        check_losses(trainer, plain(folder(name), kind_of(name)), task)


@pytest.mark.parametrize("name", DECODERS)
def test_batch_loss_of_completions_is_the_loss_that_transformers_computes(folder, name):
    trainer = trainer_for(folder(name), COMPLETIONS)
    tokenizer = trainer.engine.tokenizer
    ids = [[*tokenizer(r["prompt"] + r["completion"])["input_ids"], tokenizer.eos_token_id] for r in COMPLETIONS]
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, label in zip(COMPLETIONS, labels, strict=True):
        label[: len(tokenizer(row["prompt"])["input_ids"])] = -100
    with torch.no_grad():
        expected = plain(folder(name))(**batch, labels=labels).loss
    loss = batch_loss(trainer.train_examples, engine_losses(trainer))
    assert loss == pytest.approx(float(expected), abs=LOSS_TOLERANCE)


@pytest.mark.parametrize(
    ("name", "task"), [("llama", "choices"), ("gpt2", "completion"), ("bert", "masked"), ("roberta", "head")]
)
def test_the_padding_token_does_not_matter(folder, name, task):
    rows, options, _ = TASKS[task]
    trainer = trainer_for(folder(name), rows, **options)
    losses_N = engine_losses(trainer)
    trainer.engine.tokenizer.pad_token = "good"
    # Same shapes; masked positions weigh exactly 0. RoBERTa counts positions by comparing ids with its padding id,
    # so its padded positions (only they) move.
    assert torch.equal(engine_losses(trainer), losses_N)


# --- perturbed forwards ---------------------------------------------------------------------------------------------


def inputs_for(engine, texts=TEXTS):
    return engine.tokenizer(list(texts), padding=True, return_tensors="pt", return_token_type_ids=False)


def replaced(engine, probe, *, normalize):
    """A copy of the model whose trained weights really are θ + scale · z."""
    names = {id(p): name for name, p in engine.space.parameters.items()}
    model = copy.deepcopy(engine.model)
    with torch.no_grad():
        for ours, theirs in zip(engine.model.named_parameters(), model.named_parameters(), strict=True):
            if id(ours[1]) in names:
                stream = philox.stream_id("direction", names.pop(id(ours[1])))
                z = philox.reference_normals(probe.seed, stream, torch.tensor([0]), theirs[1].numel())[0].double()
                z = z / z.norm() if normalize else z
                theirs[1].copy_(theirs[1].double() + probe.scale * z.view(theirs[1].shape))
    assert not names
    return model


@torch.no_grad()
def check_perturbed(engine, *, normalize, tolerance=LOGIT_TOLERANCE):
    inputs = inputs_for(engine)
    before = engine.model(**inputs).logits
    for scale in (0.6, -0.6) if normalize else (0.05, -0.05):
        probe = Probe(philox.derive_seed(9, 4), scale)
        with PerturbedForward(Dense(engine.space, [probe])):
            logits = engine.model(**inputs).logits
        expected = replaced(engine, probe, normalize=normalize)(**inputs).logits
        assert (logits - expected).abs().max() <= tolerance
        assert (logits - before).abs().max() > 20 * tolerance  # a perturbation that is left out shows
    assert torch.equal(engine.model(**inputs).logits, before)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_a_perturbed_forward_is_the_forward_of_perturbed_weights(folder, name, normalize):
    rows, options, _ = TASKS["masked" if name in ENCODERS else "label words"]
    trainer = trainer_for(folder(name), rows, normalize_perturbations=normalize, **options)
    check_perturbed(trainer.engine, normalize=normalize)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_perturbed_classification_head(folder, name):
    check_perturbed(trainer_for(folder(name), LABELLED).engine, normalize=False)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("options", [LORA, PREFIX], ids=["lora", "prefix"])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_perturbed_adapter(folder, name, options, normalize):
    rows, task, _ = TASKS["masked" if name in ENCODERS else "label words"]
    trainer = trainer_for(folder(name), rows, normalize_perturbations=normalize, **task, **options)
    check_perturbed(trainer.engine, normalize=normalize)


@pytest.mark.parametrize("name", ["llama tied", "opt", "gpt2", "bert"])
def test_linear_layers_in_blocks(folder, name, monkeypatch):
    """Block sizes that divide no layer evenly."""
    rows, options, _ = TASKS["masked" if name in ENCODERS else "label words"]
    engine = trainer_for(folder(name), rows, **options).engine
    for block in (32 * 7, 32 * 3):
        monkeypatch.setattr(dense_module, "_LINEAR_BLOCK", block)
        check_perturbed(engine, normalize=False)


@pytest.mark.parametrize("name", ["llama", "opt", "bert"])
def test_eager_attention(folder, name):
    rows, options, _ = TASKS["masked" if name in ENCODERS else "label words"]
    trainer = trainer_for(folder(name), rows, attn_implementation="eager", **options)
    check_perturbed(trainer.engine, normalize=False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama tied", "bert"])
def test_perturbed_weights_of_half_precision_are_rounded_once(folder, name, dtype):
    rows, options, _ = TASKS["masked" if name in ENCODERS else "label words"]
    engine = trainer_for(folder(name), rows, dtype=dtype, **options).engine
    # θ + scale · z in float32, then rounded; the copy goes through float64. They round to different neighbours only
    # where float32 falls on a tie: then a single weight is off by one unit, 2⁻⁸ (2⁻¹¹) of it, and so are the logits,
    # which are near 4 and are themselves rounded to that precision in every layer.
    check_perturbed(engine, normalize=False, tolerance=2**-5 if dtype == "bfloat16" else 2**-7)


@pytest.mark.parametrize("name", TIED)
def test_tied_weights_are_one_parameter(folder, name):
    rows, options, _ = TASKS["masked" if name in ENCODERS else "label words"]
    engine = trainer_for(folder(name), rows, **options).engine
    embedding = engine.model.get_input_embeddings().weight
    assert engine.model.get_output_embeddings().weight is embedding
    parameters = engine.space.parameters
    assert [n for n, p in parameters.items() if p is embedding] == [
        n for n, p in engine.model.named_parameters() if p is embedding
    ]
    assert len({p.data_ptr() for p in parameters.values()}) == len(parameters)
    every = {p.data_ptr(): p.numel() for p in engine.model.parameters()}
    assert engine.space.num_parameters() == sum(every.values())


def bytes_of(model):
    return {name: t.detach().clone().view(torch.uint8) for name, t in model.state_dict().items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("name", "options"), [("llama tied", {}), ("gpt2", PREFIX), ("bert", {}), ("bert", LORA)])
def test_weights_are_bit_identical_after_evaluations_and_exceptions(folder, name, options, dtype):
    rows, task, _ = TASKS["masked" if name in ENCODERS else "label words"]
    trainer = trainer_for(folder(name), rows, dtype=dtype, **task, **options)
    engine, examples, inputs = trainer.engine, trainer.train_examples, inputs_for(trainer.engine)
    weights = bytes_of(engine.model)
    with torch.no_grad():
        logits = engine.model(**inputs).logits
    probes = [Probe(philox.derive_seed(3, step), sign * 0.1) for step in range(4) for sign in (1, -1)]
    losses_PN = engine.losses(examples, probes)
    assert len(set(losses_PN.sum(dim=1).tolist())) == len(probes)

    layers = [m for n, m in engine.model.named_modules() if n.endswith((".1", "layer.1", "layers.1"))]
    handle = layers[-1].register_forward_hook(_fail)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.losses(examples, probes)
    handle.remove()

    after = bytes_of(engine.model)
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[n], weights[n]) for n in weights)
    with torch.no_grad():
        assert torch.equal(engine.model(**inputs).logits, logits)  # no hook and no perturbation stayed behind
    assert torch.equal(engine.losses(examples, probes), losses_PN)


def _fail(*_):
    raise RuntimeError("out of memory")


# --- adapters -------------------------------------------------------------------------------------------------------


class Grab(TrainerCallback):
    """Keeps the model in memory."""

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.model = model


ADAPTED = [("llama", "label words"), ("gpt2", "completion"), ("bert", "masked"), ("roberta", "head"), ("bert", "head")]


@pytest.mark.parametrize(
    ("name", "task", "options", "dtype"),
    [(name, task, LORA, "float32") for name, task in ADAPTED]
    + [(name, task, PREFIX, "float32") for name, task in ADAPTED if task != "head"]
    + [("opt", "choices", PREFIX, "float32"), ("qwen2", "label words", PREFIX, "float32")]
    + [("llama", "label words", LORA, "bfloat16"), ("llama", "label words", PREFIX, "bfloat16")],
)
def test_a_trained_adapter_loads_in_peft(folder, tmp_path, name, task, options, dtype):
    rows, task_options, _ = TASKS[task]
    grab = Grab()
    result = mezo_finetune(
        folder(name), rows, learning_rate=0.02, batch_size=4, num_steps=4, epsilon=0.01, output_dir=tmp_path,
        callbacks=[grab], dtype=dtype, disable_tqdm=True, **task_options, **options,
    )  # fmt: skip
    assert result.global_step == 4
    kind = "sequence_classification" if task == "head" else kind_of(name)
    base = plain(folder(name), kind, getattr(torch, dtype))
    inputs = AutoTokenizer.from_pretrained(folder(name))(
        TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False
    )
    with torch.no_grad():
        unadapted = base(**inputs).logits
        loaded = PeftModel.from_pretrained(base, result.model_path).eval()
        logits = loaded(**inputs).logits
        assert torch.equal(logits, grab.model(**inputs).logits)
        assert (logits - unadapted).abs().max() > 1e-2
    trainer = trainer_for(folder(name), rows, dtype=dtype, **task_options, **options)
    trainer.engine.load(result.model_path)
    if dtype == "float32":
        check_losses(trainer, loaded, task)


@pytest.mark.parametrize(("name", "task"), ADAPTED[:3])
def test_lora_starts_at_the_base_model(folder, name, task):
    rows, options, _ = TASKS[task]
    engine = trainer_for(folder(name), rows, **options, **LORA).engine
    inputs = inputs_for(engine)
    with torch.no_grad():
        assert torch.equal(engine.model(**inputs).logits, plain(folder(name), kind_of(name))(**inputs).logits)
    parameters = engine.space.parameters
    downs = {n: p.detach() for n, p in parameters.items() if n.endswith("lora_A.weight")}
    ups = {n: p.detach() for n, p in parameters.items() if n.endswith("lora_B.weight")}
    assert len(downs) == len(ups) == len(parameters) / 2 == (2 if name == "gpt2" else 4)
    for p in downs.values():
        bound = 1 / math.sqrt(p.shape[1])
        assert p.shape[0] == 4
        assert 0.9 * bound < float(p.abs().max()) <= bound
        # Uniform on ±bound: s.d. bound / √3; of 128 numbers it is known to about 4 %.
        assert float(p.std()) == pytest.approx(bound / math.sqrt(3), rel=0.2)
    assert len({tuple(p.flatten().tolist()) for p in downs.values()}) == len(downs)
    assert all((p == 0).all() for p in ups.values())


def prefix_of(engine):
    """The prefix's keys and values, [layer][heads, tokens, dimension], as PEFT hands them to the model."""
    return [(layer.keys[0], layer.values[0]) for layer in engine.model.get_prompt(batch_size=1).layers]


@torch.no_grad()
@pytest.mark.parametrize("name", DECODERS)
def test_a_prefix_starts_as_keys_and_values_of_real_tokens(folder, name):
    """The tokens are found by trying all of the vocabulary, one position after the other."""
    engine = trainer_for(folder(name), LABELLED, **PROMPTED, **PREFIX).engine
    prefix, model = prefix_of(engine), plain(folder(name))
    ids = []
    for position in range(3):
        candidates = torch.tensor([[*ids, token] for token in range(model.config.vocab_size)])
        cache = model(input_ids=candidates, use_cache=True).past_key_values
        errors_V = torch.zeros(model.config.vocab_size)
        for layer, states in zip(cache.layers, prefix, strict=True):
            for found, wanted in zip((layer.keys, layer.values), states, strict=True):
                errors_V = errors_V.maximum((found[:, :, position] - wanted[:, position]).abs().amax(dim=(1, 2)))
        ids.append(int(errors_V.argmin()))
        assert errors_V.min() < LOGIT_TOLERANCE < 100 * LOGIT_TOLERANCE < errors_V.topk(2, largest=False).values[1]
    assert len(set(ids)) > 1
    # So the adapted model at its start is the base model with these tokens in front.
    text = engine.tokenizer("the film was good .", return_tensors="pt", return_token_type_ids=False)["input_ids"]
    expected = model(input_ids=torch.cat((torch.tensor([ids]), text), dim=1)).logits[:, 3:]
    logits = engine.model(input_ids=text, attention_mask=torch.ones_like(text)).logits
    assert (logits - expected).abs().max() < LOGIT_TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("name", ENCODERS)
def test_a_prefix_of_an_encoder_starts_as_keys_and_values_of_real_tokens(folder, name):
    """Keys of the first layer name the tokens; then all layers must hold what these tokens give together."""
    engine = trainer_for(folder(name), LABELLED, **MASKED, **PREFIX).engine
    prefix, model = prefix_of(engine), plain(folder(name), "masked_lm")
    seen = {}
    for layer in range(2):
        attention = getattr(model, name).encoder.layer[layer].attention.self
        for kind in ("key", "value"):
            getattr(attention, kind).register_forward_hook(
                lambda module, args, output, at=(layer, kind): seen.update({at: output.unflatten(-1, (4, 8))})
            )
    ids = []
    for position in range(3):
        candidates = torch.tensor([[*ids, token] for token in range(model.config.vocab_size)])
        model(input_ids=candidates)
        errors_V = (seen[0, "key"][:, position] - prefix[0][0][:, position]).abs().amax(dim=(1, 2))
        ids.append(int(errors_V.argmin()))
    assert len(set(ids)) > 1
    model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, 3, dtype=torch.long))
    for layer, (keys, values) in enumerate(prefix):
        assert (seen[layer, "key"][0].transpose(0, 1) - keys).abs().max() < LOGIT_TOLERANCE
        assert (seen[layer, "value"][0].transpose(0, 1) - values).abs().max() < LOGIT_TOLERANCE


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 60)), min_size=1, max_size=9),
    st.integers(0, 300),
    st.integers(1, 4),
    st.integers(0, 60),
)
def test_length_groups_are_the_cheapest_split_of_the_sorted_rows(shapes, pass_cost, step, common):
    common = min(common, *(length for _, length in shapes))

    def cost_of(group):
        rows, longest = sum(shapes[n][0] for n in group), max(shapes[n][1] for n in group)
        in_two = common + pass_cost + rows * (longest - common)
        return pass_cost + min(rows * longest, in_two)

    def cost(groups):
        return sum(map(cost_of, groups))

    groups = length_groups(shapes, pass_cost, step=step, common=common)
    order = [n for group in groups for n in group]
    assert sorted(order) == list(range(len(shapes)))
    assert [shapes[n][1] for n in order] == sorted(length for _, length in shapes)
    places = range(step, len(order), step)
    cuts = itertools.chain.from_iterable(itertools.combinations(places, k) for k in range(len(places) + 1))
    assert cost(groups) == min(cost([order[a:b] for a, b in itertools.pairwise((0, *cut, len(order)))]) for cut in cuts)


def test_losses_do_not_depend_on_how_rows_are_grouped(model_folder, tmp_path, monkeypatch):
    config = MeZOConfig(model_name_or_path=model_folder("llama"), output_dir=str(tmp_path), use_peft=True)
    trainer = build_trainer(config, COMPLETIONS)
    probes = [Probe(7, 1e-3), Probe(7, -1e-3)]
    grouped = {}
    for pass_cost in (0, 10**6):  # every length by itself; one pass
        monkeypatch.setattr(engine_module, "length_groups", lambda shapes, *_, c=pass_cost: length_groups(shapes, c))
        grouped[pass_cost] = (
            trainer.engine.losses(trainer.train_examples, probes),
            trainer.engine.score(trainer.train_examples),
        )
    (one_by_one, one_scores), (together, scores) = grouped.values()
    assert torch.allclose(one_by_one, together, atol=1e-5)
    assert torch.allclose(one_scores.logprobs_T, scores.logprobs_T, atol=1e-5)
    assert torch.equal(one_scores.greedy_T, scores.greedy_T)
