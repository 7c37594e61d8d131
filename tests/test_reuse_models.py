"""Reuse on every decoder that it is turned on for, beyond sliding windows, and on decoders that it is not."""

import copy
import random

import pytest
import torch
import transformers

from mezo.activation import activate
from mezo.adapter import add_adapter
from mezo.config import MeZOConfig
from mezo.engines.torch.engine import TorchEngine
from mezo.engines.torch.graphs import Graphs
from mezo.engines.torch.layers import trainable_names
from mezo.engines.torch.reuse import PADDED_CACHES, reach, shared_prefixes
from mezo.errors import UserError
from mezo.estimator import TwoPoint
from mezo.objective import Example, Target, TokenSequence

INVOCATION = [7]
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GROUPED = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 256}
HEADS = {**GROUPED, "head_dim": 8}
OTHER_NAMES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 64}
CONFIGS = {
    "llama": GROUPED, "mistral": {**GROUPED, "sliding_window": None}, "qwen2": GROUPED, "qwen3": HEADS, "gemma": HEADS,
    "mixtral": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "phi3": {**GROUPED, "pad_token_id": 1}, "gemma2": HEADS, "gemma3_text": HEADS, "gpt2": OTHER_NAMES,
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 256},
    "gpt_neox": {**SIZES, "max_position_embeddings": 256}, "gptj": {**OTHER_NAMES, "rotary_dim": 4},
}  # fmt: skip
WINDOWED = {
    "mistral": {**GROUPED, "sliding_window": 6},
    "gemma2": {**HEADS, "sliding_window": 6},
    "gemma3_text": {**HEADS, "sliding_window": 6},
    "qwen2": {**GROUPED, "sliding_window": 6, "use_sliding_window": True, "max_window_layers": 0},
}
OTHERS = {
    "mpt": {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256},
    "gpt_neo": {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "attention_types": [[["global", "local"], 1]],
                "num_heads": 4, "window_size": 6, "max_position_embeddings": 256},
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "lfm2": {**GROUPED, "layer_types": ["conv", "full_attention"]},
}  # fmt: skip
TOLERANCE = 1e-5


class NoTokenizer:
    pad_token_id = 1


def make_model(model_type, sizes):
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter.data, std=0.25)
    return model


def make_examples(lengths, ending=()):
    """Prompts with a common beginning of 4 tokens and three options each."""
    generator = random.Random(0)
    beginning = generator.choices(range(10, 30), k=4)
    examples = []
    for length in lengths:
        prompt, rows = [*beginning, *generator.choices(range(10, 30), k=length), *ending], []
        for option in range(3):
            answer = generator.choices(range(10, 30), k=1 + option)
            targets = tuple(Target(len(prompt) - 1 + i, token, option) for i, token in enumerate(answer))
            rows.append(TokenSequence((*prompt, *answer), targets))
        examples.append(Example(tuple(rows), 0))
    return examples


def draw_rows():
    generator = random.Random(1)
    return [tuple(generator.choices(range(10, 30), k=length)) for length in (5, 9, 14)]


def train_last_layer(model):
    """Names of what is trained."""
    names = set(trainable_names(model, "last:1"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return names


def losses(model, examples, share, monkeypatch):
    monkeypatch.setattr(TorchEngine, "_cost_of_pass", lambda *_: 0)
    monkeypatch.setattr(TorchEngine, "_groups", lambda _, some, *__: [list(range(len(some)))])
    engine = TorchEngine(copy.deepcopy(model), NoTokenizer(), share=share)
    return engine.losses(examples, TwoPoint(0, 1e-2).probes(0)), engine.work


def test_every_decoder_of_the_list_is_tested():
    assert set(CONFIGS) == PADDED_CACHES


@pytest.mark.parametrize("model_type", CONFIGS)
def test_shared_prefixes(model_type, monkeypatch):
    model, examples = make_model(model_type, CONFIGS[model_type]), make_examples((3, 9, 14))
    found, work = losses(model, examples, True, monkeypatch)
    expected, _ = losses(model, examples, False, monkeypatch)
    assert (found - expected).abs().max() < TOLERANCE
    assert work.computed < 0.7 * work.asked


@pytest.mark.parametrize("model_type", CONFIGS)
def test_probes_of_a_trained_prefix_in_one_traversal(model_type):
    config = MeZOConfig(model_name_or_path="", use_peft=True, peft_type="prefix_tuning", num_virtual_tokens=3)
    model = add_adapter(make_model(model_type, CONFIGS[model_type]), config, "causal_lm")
    together, apart = (TorchEngine(copy.deepcopy(model), NoTokenizer(), share=share) for share in (True, False))
    passes = []
    together._transformer.register_forward_hook(lambda *_: passes.append(None))
    probes, examples = TwoPoint(0, 1e-1, 3).probes(0), make_examples((3, 9, 14))
    found, expected = (engine.losses(examples, probes) for engine in (together, apart))
    assert len(passes) == 1 and found.shape == (6, 3)
    assert (found - expected).abs().max() < TOLERANCE
    assert (found[0] - found[1]).abs().max() > 100 * TOLERANCE < (found[0] - found[2]).abs().max()


@pytest.mark.parametrize("model_type", CONFIGS)
def test_shared_prefixes_above_frozen_layers(model_type, monkeypatch):
    """Keys are kept of the upper layers only; masks and positions go by all of them."""
    model, examples = make_model(model_type, CONFIGS[model_type]), make_examples((3, 9, 14))
    train_last_layer(model)
    found, work = losses(model, examples, True, monkeypatch)
    expected, _ = losses(model, examples, False, monkeypatch)
    assert (found - expected).abs().max() < TOLERANCE
    tokens = sum(stage.num_tokens for stage in shared_prefixes(examples, 0))
    share = 1 / model.config.num_hidden_layers
    assert work.computed == pytest.approx((1 - share) * tokens + share * 2 * tokens)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_shared_prefixes_behind_a_trained_one(model_type, monkeypatch):
    """PEFT's forward pass takes the rows whole."""
    config = MeZOConfig(model_name_or_path="", use_peft=True, peft_type="prefix_tuning", num_virtual_tokens=3)
    model = add_adapter(make_model(model_type, CONFIGS[model_type]), config, "causal_lm")
    examples = make_examples((3, 9, 14))
    found, work = losses(model, examples, True, monkeypatch)
    expected, _ = losses(model, examples, False, monkeypatch)
    assert (found - expected).abs().max() < TOLERANCE
    assert work.computed < 0.7 * work.asked
    (prefix,) = (p for p in model.parameters() if p.requires_grad)
    prefix.data.zero_()
    assert (losses(model, examples, True, monkeypatch)[0] - found).abs().max() > 100 * TOLERANCE  # it is read


@pytest.mark.parametrize("model_type", WINDOWED)
def test_rows_beyond_a_sliding_window_are_not_cut(model_type, monkeypatch):
    model = make_model(model_type, WINDOWED[model_type])
    assert reach(model.config) == 6
    wide = make_model(model_type, {**WINDOWED[model_type], "sliding_window": 64})
    for of, shares in ((model, False), (wide, True)):
        found, work = losses(of, make_examples((3, 9, 14)), True, monkeypatch)
        expected, _ = losses(of, make_examples((3, 9, 14)), False, monkeypatch)
        assert (found - expected).abs().max() < TOLERANCE
        assert (work.computed < work.asked) == shares


@pytest.mark.parametrize("model_type", OTHERS)
def test_other_decoders_compute_everything(model_type, monkeypatch):
    model, examples = make_model(model_type, OTHERS[model_type]), make_examples((3, 9, 14))
    found, work = losses(model, examples, True, monkeypatch)
    assert work.computed == work.asked and torch.isfinite(found).all()
    assert torch.equal(found, losses(model, examples, False, monkeypatch)[0])


def adapted(model, **more):
    config = MeZOConfig(
        model_name_or_path="", use_peft=True, lora_variant="alora", alora_invocation_tokens=INVOCATION, **more
    )
    peft_model = add_adapter(model.requires_grad_(False), config, "causal_lm")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter.data, std=0.3)
    return peft_model


@pytest.mark.parametrize("static", [False, True], ids=["plain", "as on a GPU"])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_activated_lora_is_pefts(model_type, static, monkeypatch):
    """Rows of different lengths in one pass, against PEFT's own forward of each row."""
    targets = {"lora_target_modules": ["qkv_proj"]} if model_type == "phi3" else {}
    model = adapted(make_model(model_type, CONFIGS[model_type]), **targets)
    examples = activate(make_examples((3, 9, 14), INVOCATION), INVOCATION)
    monkeypatch.setattr(TorchEngine, "_groups", lambda _, some, *__: [list(range(len(some)))])
    engine = TorchEngine(model, NoTokenizer())
    engine._graphs = Graphs(torch.device("cpu")) if static else None
    found = engine.score(examples).logprobs_T
    expected = []
    with torch.no_grad():
        for sequence in (s for e in examples for s in e.sequences):
            logits = model(input_ids=torch.tensor([sequence.input_ids])).logits[0].log_softmax(dim=-1)
            expected += [logits[t.position, t.token] for t in sequence.targets]
    assert (found - torch.stack(expected)).abs().max() < TOLERANCE


def test_activated_lora_says_where_it_does_not_reach():
    with pytest.raises(UserError, match="does not know the keys and values of 'lfm2' models"):
        adapted(make_model("lfm2", OTHERS["lfm2"]), lora_target_modules=["q_proj"])
    model = make_model("gemma2", WINDOWED["gemma2"])
    with pytest.raises(UserError, match="on SGLang: a model some of whose layers see a sliding window"):
        adapted(copy.deepcopy(model), engine="sglang")
    engine = TorchEngine(adapted(model), NoTokenizer())
    with pytest.raises(UserError, match="are more than the 6 of the model's sliding window; set a shorter max_length"):
        engine.score(activate(make_examples((3,), INVOCATION), INVOCATION))


DEBERTA = {**SIZES, "num_hidden_layers": 3, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
ENCODERS = {
    "bert": SIZES, "roberta": SIZES, "electra": {**SIZES, "embedding_size": 16}, "mpnet": SIZES, "deberta": DEBERTA,
    "deberta-v2": {**DEBERTA, "position_buckets": 16, "norm_rel_ebd": "layer_norm", "share_att_key": True},
    "distilbert": {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "xlnet": {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
}  # fmt: skip
MODERNBERT = {**SIZES, "num_hidden_layers": 3, "local_attention": 8, "pad_token_id": 1, "max_position_embeddings": 128,
              **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 2)}  # fmt: skip


@pytest.mark.parametrize("model_type", [*(n for n in ENCODERS if n != "xlnet"), "modernbert"])
def test_masked_words_of_encoders(model_type):
    """Logits where they are read only, against those of transformers."""
    config = transformers.AutoConfig.for_model(model_type, **{**ENCODERS, "modernbert": MODERNBERT}[model_type])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForMaskedLM.from_config(config).eval()
    rows = draw_rows()
    examples = [Example((TokenSequence(row, (Target(2, 20, 0), Target(2, 21, 1))),), 1) for row in rows]
    found = TorchEngine(model, NoTokenizer()).score(examples).logprobs_T
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([row])).logits[0, 2].log_softmax(dim=-1)[20:22] for row in rows]
    assert (found - torch.cat(expected)).abs().max() < TOLERANCE


@pytest.mark.parametrize("model_type", ENCODERS)
def test_frozen_layers_of_encoders(model_type, monkeypatch):
    """Layers that return tuples of several lengths; relative positions beside the layers, which each of them reads."""
    config = transformers.AutoConfig.for_model(model_type, **ENCODERS[model_type])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter.data, std=0.25)
    assert not any("encoder.rel" in name or "embeddings" in name for name in train_last_layer(model))
    examples = [Example((TokenSequence(row, (Target(0, 0, 0), Target(0, 1, 1))),), 1) for row in draw_rows()]
    found, work = losses(model, examples, True, monkeypatch)
    expected, _ = losses(model, examples, False, monkeypatch)
    assert (found - expected).abs().max() < TOLERANCE < (found[0] - found[1]).abs().max()
    assert (work.computed < work.asked) == (model_type != "xlnet")  # whose hidden states lie otherwise
