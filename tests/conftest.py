"""Small random models of real architectures with a real tokenizer, made on disk once per session."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"
WORDS = (
    "a good bad great terrible film was the it story plot acting boring lovely dull fine yes no maybe answer question "
    "positive negative review : . , ? ! one two three four five six seven eight nine ten people see this that very"
).split()


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with the special tokens of BERT, RoBERTa or a decoder."""
    special = {
        "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        "roberta": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        "decoder": ["<s>", "</s>", "<unk>", "<pad>"],
    }[kind]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    unk = "[UNK]" if kind == "bert" else "<unk>"
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unk))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind == "decoder":
        first, template, names = "<s>", "<s> $A", ["<s>"]
    else:
        first, last = ("[CLS]", "[SEP]") if kind == "bert" else ("<s>", "</s>")
        template, names = f"{first} $A {last}", [first, last]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(name, vocabulary[name]) for name in names]
    )
    named = {
        "bert": {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"},
        "roberta": {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>",
                    "pad_token": "<pad>", "mask_token": "<mask>"},
        "decoder": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
    }[kind]  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unk, model_max_length=64, **named)


_SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
          "intermediate_size": 48, "max_position_embeddings": 64}  # fmt: skip
_MODELS: dict[str, tuple[str, Callable[[], torch.nn.Module]]] = {
    "bert": ("bert", lambda: BertForMaskedLM(BertConfig(**_SIZES))),
    "roberta": (
        "roberta",
        lambda: RobertaForMaskedLM(
            RobertaConfig(**{**_SIZES, "max_position_embeddings": 66}, pad_token_id=1, bos_token_id=0, eos_token_id=2)
        ),
    ),
    "llama": ("decoder", lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, num_key_value_heads=2, **_DECODER))),
    "qwen2": ("decoder", lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZES, num_key_value_heads=2, **_DECODER))),
    "opt": (
        "decoder",
        lambda: OPTForCausalLM(
            OPTConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
                      max_position_embeddings=64, word_embed_proj_dim=32, **_DECODER)
        ),
    ),
    "gpt2": (
        "decoder",
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, **_DECODER)),
    ),
}  # fmt: skip
_DECODER = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 3}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Folder of a tiny random model: bert, roberta, llama, qwen2, opt or gpt2."""
    made: dict[str, str] = {}

    def folder(name: str) -> str:
        if name not in made:
            kind, build = _MODELS[name]
            path = tmp_path_factory.mktemp(name)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                build().save_pretrained(path)
            make_tokenizer(kind).save_pretrained(path)
            made[name] = str(path)
        return made[name]

    return folder


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny tensors gain nothing from a second thread and lose much where the machine is busy."""
    torch.set_num_threads(1)


SENTIMENT_ROWS = [
    {"text": f"the {noun} was {word} {tail}", "label": int(word in ("good", "great", "lovely", "fine"))}
    for noun in ("film", "story", "plot", "acting")
    for word in ("good", "bad", "great", "terrible", "lovely", "dull", "fine", "boring")
    for tail in (".", "!", ", very", "")
]


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[[list[dict[str, object]]], str]:
    """Writes rows to a jsonl file and returns its path."""

    def write(rows: list[dict[str, object]], name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write
