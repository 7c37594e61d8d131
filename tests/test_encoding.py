"""Token sequences and targets against the tokenizer's own output, and lengths against what the models really take."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from mezo.config import MeZOConfig
from mezo.encoding import context_length, label_key, make_encoder
from mezo.errors import UserError
from mezo.objective import Target
from tests.conftest import WORDS, make_tokenizer

LABEL_WORDS = {"0": "terrible", "1": "great"}


@pytest.fixture(scope="module")
def byte_level():
    """Trained byte-level BPE, where " great" and "great" are different tokens; of a RoBERTa, a Llama or a GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"{word} {word}" for word in WORDS if len(word) > 1], trainer)

    def make(kind):
        before, after = {"roberta": ("<s> ", " </s>"), "llama": ("<s> ", ""), "gpt2": ("", "")}[kind]
        own = Tokenizer.from_str(tokenizer.to_str())
        names = [(name, own.token_to_id(name)) for name in ("<s>", "</s>")]
        own.post_processor = processors.TemplateProcessing(single=f"{before}$A{after}", special_tokens=names)
        return PreTrainedTokenizerFast(
            tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
            **({"mask_token": "<mask>"} if kind == "roberta" else {}),
        )  # fmt: skip

    return make


def encoder_for(tokenizer, rows, **options):
    encoder_model = tokenizer.mask_token is not None
    model_config = RobertaConfig(max_position_embeddings=514) if encoder_model else LlamaConfig()
    config = MeZOConfig(model_name_or_path="not used", **options)
    return make_encoder(rows, config, model_config, tokenizer, encoder_model=encoder_model)


def encode(tokenizer, row, **options):
    return encoder_for(tokenizer, [row], **options)([row])[0]


def words(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(list(ids))


def answer(tokenizer, sequence):
    """The target tokens; checks that each is the input's next token and that together they are its end."""
    for target in sequence.targets:
        assert sequence.input_ids[target.position + 1] == target.token
    positions = [t.position for t in sequence.targets]
    assert positions == list(range(len(sequence.input_ids) - 1 - len(positions), len(sequence.input_ids) - 1))
    return words(tokenizer, [t.token for t in sequence.targets])


# --- prompt and completion ------------------------------------------------------------------------------------------


def test_only_the_completion_and_its_end_are_targets():
    tokenizer = make_tokenizer("decoder")
    (sequence,) = encode(tokenizer, {"prompt": "the film was", "completion": " very good ."}).sequences
    assert words(tokenizer, sequence.input_ids) == ["<s>", "the", "film", "was", "very", "good", ".", "</s>"]
    assert answer(tokenizer, sequence) == ["very", "good", ".", "</s>"]
    assert [t.position for t in sequence.targets] == [3, 4, 5, 6]
    assert {t.option for t in sequence.targets} == {0}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("the film was", " great"),
        ("question: was it good ?\n", "yes, very"),
        ("plot\n\n", "\n dull  acting"),
        ("", "no film at all"),
        ("žluť 馬 was", " 🐎 one"),
    ],
)
def test_targets_are_the_tokens_that_end_behind_the_prompt(byte_level, kind, prompt, completion):
    """By the offsets that the tokenizer itself reports."""
    tokenizer = byte_level(kind)
    example = encode(tokenizer, {"prompt": prompt, "completion": completion})
    whole = tokenizer(prompt + completion, return_offsets_mapping=True)
    expected = [
        token
        for position, (token, (_, end)) in enumerate(zip(whole["input_ids"], whole["offset_mapping"], strict=True))
        if end > len(prompt) and position > 0
    ]
    (sequence,) = example.sequences
    assert list(sequence.input_ids) == [*whole["input_ids"], tokenizer.eos_token_id]
    assert answer(tokenizer, sequence) == words(tokenizer, [*expected, tokenizer.eos_token_id])
    assert example.label is None


def test_a_completion_in_the_middle_of_a_word(byte_level):
    """ "gre" + "at" is one token; it holds the answer, so it is a target."""
    tokenizer = byte_level("llama")
    (sequence,) = encode(tokenizer, {"prompt": "film was gre", "completion": "at"}).sequences
    assert answer(tokenizer, sequence) == ["Ġgreat", "</s>"]


def test_an_empty_completion_is_the_end_alone():
    tokenizer = make_tokenizer("decoder")
    (sequence,) = encode(tokenizer, {"prompt": "the film", "completion": ""}).sequences
    assert answer(tokenizer, sequence) == ["</s>"]


def test_nothing_is_appended_without_an_end_token():
    tokenizer = make_tokenizer("decoder")
    tokenizer.eos_token = None
    (sequence,) = encode(tokenizer, {"prompt": "the film", "completion": " was"}).sequences
    assert answer(tokenizer, sequence) == ["was"]


@pytest.mark.parametrize(("kind", "first"), [("llama", 0), ("gpt2", 1)])
def test_plain_text_predicts_everything_but_a_start_without_anything_before_it(byte_level, kind, first):
    tokenizer = byte_level(kind)
    (sequence,) = encode(tokenizer, {"text": "the film was great"}).sequences
    assert answer(tokenizer, sequence) == ["the", "Ġfilm", "Ġwas", "Ġgreat", "</s>"][first:]


# --- label words and choices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "word", "whole", "expected"),
    [
        ("{text} it was", "great", "the film . it was great", ["Ġgreat"]),
        ("{text} it was", " great", "the film . it was great", ["Ġgreat"]),
        ("{text} it was", "very great", "the film . it was very great", ["Ġvery", "Ġgreat"]),
        ("{text} answer:\n", "great", "the film . answer:\ngreat", ["great"]),
        # The prompt's own last space joins the word, as it does in running text.
        ("{text} it was ", "great", "the film . it was great", ["Ġgreat"]),
    ],
)
def test_space_between_prompt_and_label_word(byte_level, template, word, whole, expected):
    tokenizer = byte_level("llama")
    row = {"text": "the film .", "label": 1}
    example = encode(tokenizer, row, template=template, label_words={"0": "bad", "1": word})
    assert example.label == 1
    assert list(example.sequences[1].input_ids) == tokenizer(whole)["input_ids"]
    assert answer(tokenizer, example.sequences[1]) == expected
    assert [{t.option for t in s.targets} for s in example.sequences] == [{0}, {1}]


def test_label_words_have_no_end_token():
    tokenizer = make_tokenizer("decoder")
    example = encode(tokenizer, {"text": "film", "label": 0}, template="{text} was", label_words=LABEL_WORDS)
    assert [words(tokenizer, s.input_ids) for s in example.sequences] == [
        ["<s>", "film", "was", "terrible"],
        ["<s>", "film", "was", "great"],
    ]


def test_choices_of_different_number_and_length(byte_level):
    tokenizer = byte_level("gpt2")
    rows = [
        {"prompt": "the film was", "choices": ["good", "very bad", "dull"], "label": 2},
        {"prompt": "answer:\n", "choices": ["yes", "no"], "label": 0},
    ]
    examples = encoder_for(tokenizer, rows)(rows)
    answers = [[answer(tokenizer, s) for s in e.sequences] for e in examples]
    assert answers == [[["Ġgood"], ["Ġvery", "Ġbad"], ["Ġdull"]], [["yes"], ["no"]]]
    assert [e.label for e in examples] == [2, 0]
    assert [[s.targets[0].option for s in e.sequences] for e in examples] == [[0, 1, 2], [0, 1]]


# --- conversations --------------------------------------------------------------------------------------------------

CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}:\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
)
TURNS = [
    {"role": "system", "content": "answer yes or no"},
    {"role": "user", "content": "was the film good ?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "and the plot ?"},
    {"role": "assistant", "content": "no, very dull"},
]


def last_answer(tokenizer, messages):
    """Tokens of a conversation and which of them the last assistant's turn generates, by transformers' own mask."""
    whole = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )  # fmt: skip
    ids, mask = list(whole["input_ids"]), list(whole["assistant_masks"])
    last = len(mask) - 1 - mask[::-1].index(1)
    first = last
    while mask[first - 1]:
        first -= 1
    return ids, ids[first : last + 1]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("split", [None, 4])
def test_conversations_train_the_last_answer(byte_level, kind, split):
    tokenizer = byte_level(kind)
    tokenizer.chat_template = CHAT
    row = {"messages": TURNS} if split is None else {"prompt": TURNS[:split], "completion": TURNS[split:]}
    (sequence,) = encode(tokenizer, row).sequences
    ids, generated = last_answer(tokenizer, TURNS)
    assert list(sequence.input_ids) == ids
    assert list(sequence.input_ids).count(tokenizer.bos_token_id) == 1
    # The template ends every turn with a line break, which its generation mask leaves out.
    assert answer(tokenizer, sequence) == [*words(tokenizer, generated), "Ċ"]
    assert words(tokenizer, generated)[-1] == "</s>"


def test_conversations_need_a_chat_template_and_an_answer(byte_level):
    tokenizer = byte_level("llama")
    with pytest.raises(UserError, match="no chat template"):
        encode(tokenizer, {"messages": TURNS})
    tokenizer.chat_template = CHAT
    for messages, message in (
        (TURNS[:-1], "messages must be a list that ends with an assistant's message"),
        ([], "column 'messages' must hold a list of messages"),
    ):
        with pytest.raises(UserError, match=f"row 0: {message}"):
            encode(tokenizer, {"messages": messages})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}now{% endif %}"
    )
    with pytest.raises(UserError, match="does not continue its own generation prompt"):
        encode(tokenizer, {"messages": TURNS})


# --- templates and labels -------------------------------------------------------------------------------------------


def test_a_template_of_several_columns():
    tokenizer = make_tokenizer("bert")
    row = {"one": "the film", "two": 7, "three": "plot", "label": 1}
    example = encode(tokenizer, row, template="{three} ? [MASK] , {one} {two} {three}", label_words=LABEL_WORDS)
    (sequence,) = example.sequences
    expected = ["[CLS]", "plot", "?", "[MASK]", ",", "the", "film", "[UNK]", "plot", "[SEP]"]
    assert words(tokenizer, sequence.input_ids) == expected
    terrible, great = (tokenizer.convert_tokens_to_ids(w) for w in ("terrible", "great"))
    assert sequence.targets == (Target(3, terrible, 0), Target(3, great, 1))


def test_braces_in_the_text_are_text(byte_level):
    tokenizer = byte_level("llama")
    row = {"text": "the {label} {other} film", "label": 1}
    example = encode(tokenizer, row, template="{text} was", label_words=LABEL_WORDS)
    decoded = tokenizer.decode(example.sequences[1].input_ids, skip_special_tokens=True)
    assert decoded == "the {label} {other} film was great"


@pytest.mark.parametrize(
    ("row", "template", "text"),
    [
        ({"text": "the film", "other": "x"}, None, "the film"),
        ({"sentence": "the film"}, None, "the film"),
        ({"hypothesis": "plot", "premise": "the film"}, None, "the film plot"),
        ({"sentence1": "the film", "sentence2": "plot"}, None, "the film plot"),
        ({"text": "the film", "other": "plot"}, "{other} : {text}", "plot : the film"),
    ],
)
def test_text_of_a_classification_head(row, template, text):
    tokenizer = make_tokenizer("bert")
    rows = [{**row, "label": label} for label in (0, 1, 2)]
    encoder = encoder_for(tokenizer, rows, template=template)
    for example, label in zip(encoder(rows), (0, 1, 2), strict=True):
        (sequence,) = example.sequences
        assert list(sequence.input_ids) == tokenizer(text)["input_ids"]
        assert sequence.targets == tuple(Target(0, option, option) for option in range(3))
        assert example.label == label


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([1, 0, 1], ("0", "1")),
        ([10, 2, -1], ("-1", "2", "10")),
        ([2.0, 1.0], ("1", "2")),
        ([0.5, 2.5], ("0.5", "2.5")),
        ([True, False], ("False", "True")),
        (["pos", "neg"], ("neg", "pos")),
        (["10", "9"], ("9", "10")),
        ([np.int64(3), np.int64(1)], ("1", "3")),
    ],
)
@pytest.mark.parametrize("through_datasets", [False, True])
def test_label_values(values, names, through_datasets):
    """The same options with label words and with a head, from rows as they are and through `datasets`."""
    rows = [{"text": "the film", "label": value} for value in values]
    if through_datasets:
        rows = list(Dataset.from_list(rows))
    expected = [names.index({1.0: "1", 2.0: "2"}.get(v, str(v)) if isinstance(v, float) else str(v)) for v in values]
    tokenizer = make_tokenizer("bert")
    head = encoder_for(tokenizer, rows)
    assert head.labels == names
    assert [e.label for e in head(rows)] == expected
    worded = dict(zip(names, ("bad", "good", "great"), strict=False))
    masked = encoder_for(tokenizer, rows, template="{text} was [MASK]", label_words=worded)
    assert [e.label for e in masked(rows)] == expected
    prompted = encoder_for(make_tokenizer("decoder"), rows, template="{text} was", label_words=worded)
    assert [e.label for e in prompted(rows)] == expected


def test_class_labels_are_their_numbers():
    dataset = Dataset.from_list([{"text": "film", "label": "pos"}, {"text": "film", "label": "neg"}])
    rows = list(dataset.cast_column("label", ClassLabel(names=["neg", "pos"])))
    encoder = encoder_for(make_tokenizer("decoder"), rows, template="{text} was", label_words=LABEL_WORDS)
    assert [e.label for e in encoder(rows)] == [1, 0]


@pytest.mark.parametrize("keys", [(0, 1), (0.0, 1.0), ("0", "1")])
def test_keys_of_label_words_as_python_and_yaml_write_them(keys):
    """`{0: "terrible", 1: "great"}`: what a user types for integer labels, and what YAML makes of unquoted keys."""
    rows = [{"text": "film", "label": 1}, {"text": "film", "label": 0}]
    worded = dict(zip(keys, ("terrible", "great"), strict=True))
    encoder = encoder_for(make_tokenizer("decoder"), rows, template="{text} was", label_words=worded)
    assert [e.label for e in encoder(rows)] == [1, 0]
    assert encoder.labels == ("0", "1")


def test_label_keys():
    values = [1, 1.0, "1", True, 1.5, "a b", -2.0]
    assert [label_key(v) for v in values] == ["1", "1", "1", "True", "1.5", "a b", "-2"]


def test_another_label_column():
    row = {"text": "film", "stars": 1}
    example = encode(
        make_tokenizer("bert"), row, template="{text} [MASK]", label_words=LABEL_WORDS, label_column="stars"
    )
    assert example.label == 1


# --- label words at the mask ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "expected"),
    [("{text} it was [MASK] .", "Ġgreat"), ("[MASK] : {text}", "great"), ("{text}, [MASK] film", "Ġgreat")],
)
def test_a_label_word_at_the_mask_has_the_space_it_would_have_in_the_text(byte_level, template, expected):
    tokenizer = byte_level("roberta")
    example = encode(tokenizer, {"text": "the film", "label": 1}, template=template, label_words=LABEL_WORDS)
    (sequence,) = example.sequences
    assert (sequence.input_ids[0], sequence.input_ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    mask_position = sequence.input_ids.index(tokenizer.mask_token_id)
    assert [t.position for t in sequence.targets] == [mask_position, mask_position]
    assert words(tokenizer, [sequence.targets[1].token]) == [expected]
    # The word in the mask's place, tokenized as running text, is that very token.
    running = tokenizer(template.replace("{text}", "the film").replace("[MASK]", "great"))["input_ids"]
    assert sequence.targets[1].token in running


# --- lengths --------------------------------------------------------------------------------------------------------

LONG = "the film was a very good story that people see"


def num_cut(caplog):
    """The number in the one line about rows that were cut; 0 without such a line."""
    lines = [r.getMessage() for r in caplog.records if "were cut" in r.getMessage()]
    caplog.clear()
    assert len(lines) < 2
    return int(lines[0].split()[0]) if lines else 0


def test_a_long_prompt_to_generate_from_loses_its_start(caplog):
    """It leaves room for the new tokens."""
    tokenizer = make_tokenizer("decoder")
    rows = [{"prompt": LONG}, {"prompt": "see"}]
    rewarded = {"objective": "reward", "reward_funcs": ["rewards.py:right"]}
    encoder = encoder_for(tokenizer, rows, max_length=7, max_new_tokens=3, **rewarded)
    cut, whole = encoder(rows)
    assert words(tokenizer, cut.question.prompt) == ["<s>", "that", "people", "see"]
    assert words(tokenizer, whole.question.prompt) == ["<s>", "see"]
    assert num_cut(caplog) == 1


def test_a_long_prompt_loses_its_start_and_keeps_start_token_and_answer(caplog):
    tokenizer = make_tokenizer("decoder")
    rows = [{"prompt": LONG, "completion": " one two"}, {"prompt": "see", "completion": " one two"}]
    encoder = encoder_for(tokenizer, rows, max_length=7)
    cut, whole = encoder(rows)
    assert words(tokenizer, cut.sequences[0].input_ids) == ["<s>", "that", "people", "see", "one", "two", "</s>"]
    assert answer(tokenizer, cut.sequences[0]) == ["one", "two", "</s>"]
    assert words(tokenizer, whole.sequences[0].input_ids) == ["<s>", "see", "one", "two", "</s>"]
    assert num_cut(caplog) == 1


def test_exactly_the_longest_length_is_not_cut(caplog):
    tokenizer = make_tokenizer("decoder")
    row = {"prompt": LONG, "completion": " one"}  # <s> + 10 + 1 + </s>
    for limit, cut in ((13, 0), (12, 1)):
        encoder = encoder_for(tokenizer, [row], max_length=limit)
        (example,) = encoder([row])
        assert len(example.sequences[0].input_ids) == limit
        assert num_cut(caplog) == cut
    assert words(tokenizer, example.sequences[0].input_ids)[:2] == ["<s>", "film"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{text} [MASK]", ["that", "people", "see", "[MASK]"]),
        ("[MASK] : {text}", ["[MASK]", ":", "the", "film"]),
        ("{text} it [MASK] .", ["see", "it", "[MASK]", "."]),
    ],
)
def test_a_long_text_is_cut_where_the_mask_is_not(caplog, template, expected):
    tokenizer = make_tokenizer("bert")
    row = {"text": LONG, "label": 1}
    encoder = encoder_for(tokenizer, [row], template=template, label_words=LABEL_WORDS, max_length=6)
    (sequence,) = encoder([row])[0].sequences
    assert words(tokenizer, sequence.input_ids) == ["[CLS]", *expected, "[SEP]"]
    assert num_cut(caplog) == 1


def test_a_mask_between_two_long_texts_survives():
    tokenizer = make_tokenizer("bert")
    row = {"a": LONG, "b": LONG, "label": 1}
    example = encode(tokenizer, row, template="{a} ? [MASK] , {b}", label_words=LABEL_WORDS, max_length=8)
    (sequence,) = example.sequences
    assert len(sequence.input_ids) == 8
    assert sequence.input_ids[sequence.targets[0].position] == tokenizer.mask_token_id


def test_a_long_text_before_a_head_loses_its_end():
    tokenizer = make_tokenizer("bert")
    rows = [{"text": LONG, "label": label} for label in (0, 1)]
    (sequence,) = encoder_for(tokenizer, rows, max_length=5)(rows)[0].sequences
    assert words(tokenizer, sequence.input_ids) == ["[CLS]", "the", "film", "was", "[SEP]"]


_SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
          "intermediate_size": 48, "max_position_embeddings": 24, "pad_token_id": 1}  # fmt: skip
_NAMED_OTHERWISE = {
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 24},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "distilbert": {"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 48},
}
_LEARNED_POSITIONS = ["bert", "distilbert", "electra", "gpt2", "opt"]
_SHIFTED_POSITIONS = [
    "roberta", "xlm-roberta", "camembert", "mpnet", "data2vec-text", "roberta-prelayernorm", "xlm-roberta-xl",
]  # fmt: skip


@pytest.mark.parametrize("model_type", [*_LEARNED_POSITIONS, *_SHIFTED_POSITIONS])
def test_context_is_the_longest_input_that_the_model_takes(model_type):
    """The tokenizer says nothing here: many checkpoints' tokenizers do not."""
    options = {**_SIZES, **_NAMED_OTHERWISE.get(model_type, {})}
    auto = AutoModelForCausalLM if model_type in ("gpt2", "opt") else AutoModelForMaskedLM
    model_config = AutoConfig.for_model(model_type, **options)
    model = auto.from_config(model_config).eval()
    tokenizer = make_tokenizer("bert")
    tokenizer.model_max_length = 10**30
    limit = context_length(MeZOConfig(model_name_or_path="not used"), model_config, tokenizer)
    assert limit == (22 if model_type in _SHIFTED_POSITIONS else 24)
    with torch.no_grad():
        model(input_ids=torch.full((1, limit), 9), attention_mask=torch.ones(1, limit, dtype=torch.long))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, limit + 1), 9), attention_mask=torch.ones(1, limit + 1, dtype=torch.long))


def test_context_of_rotary_positions_and_of_the_tokenizer():
    tokenizer = make_tokenizer("decoder")
    config = MeZOConfig(model_name_or_path="not used")
    model_config = LlamaConfig(max_position_embeddings=100)
    assert context_length(config, model_config, tokenizer) == 64
    tokenizer.model_max_length = 1000
    assert context_length(config, model_config, tokenizer) == 100
    assert context_length(MeZOConfig(model_name_or_path="", max_length=30), model_config, tokenizer) == 30
    with pytest.raises(UserError, match="max_length 101 is more than the model's context of 100 tokens"):
        context_length(MeZOConfig(model_name_or_path="", max_length=101), model_config, tokenizer)


def test_a_prefix_takes_its_tokens_from_the_context():
    tokenizer = make_tokenizer("decoder")
    tokenizer.model_max_length = 10**30
    model_config = LlamaConfig(max_position_embeddings=24)
    prefix = {"use_peft": True, "peft_type": "prefix_tuning", "num_virtual_tokens": 7, "model_name_or_path": ""}
    assert context_length(MeZOConfig(**prefix), model_config, tokenizer) == 17
    assert context_length(MeZOConfig(**{**prefix, "use_peft": False}), model_config, tokenizer) == 24
    assert context_length(MeZOConfig(**{**prefix, "peft_type": "lora"}), model_config, tokenizer) == 24
    with pytest.raises(UserError, match="context of 17"):
        context_length(MeZOConfig(**prefix, max_length=18), model_config, tokenizer)
