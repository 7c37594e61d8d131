"""The torch engine's step against two plain forward passes and the original algorithm, over shapes, rows and tokens.

    python benchmarks/gpu_step.py [--shapes opt-13b opt-1.3b …] [--methods dense …] [--repeats 8] [--output FILE.csv]

Random bfloat16 weights of real shapes (float32 on a CPU); every model, method and size in one process, one `mezo.bench`
each. Nothing is read from a hub.
"""

import argparse
import dataclasses
import gc
import tempfile
from pathlib import Path

import torch
from provenance import provenance, write
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, OPTConfig, PreTrainedTokenizerFast

from mezo.bench import BenchOptions, run


def opt(width: int, layers: int, heads: int) -> OPTConfig:
    return OPTConfig(
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )


SHAPES = {
    "tiny": OPTConfig(
        hidden_size=64, word_embed_proj_dim=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=512
    ),
    "opt-125m": opt(768, 12, 12),
    "opt-1.3b": opt(2048, 24, 32),
    "opt-13b": opt(5120, 40, 40),
    "llama-8b": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256,
    ),
}  # fmt: skip
METHODS = {"low rank": {"direction": "low_rank"}, "LoRA": {"use_peft": True}, "dense": {}}
METHODS |= {f"{name}, {n} queries": {**METHODS[name], "num_queries": n} for name in tuple(METHODS) for n in (2, 4, 8)}
SIZES = ["1x128", "4x128", "16x128", "16x400"]


def make_folder(shape: str, parent: str) -> str:
    folder = Path(parent) / shape
    SHAPES[shape].save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(SHAPES[shape].vocab_size)}, "w3"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w3", pad_token="w1").save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["opt-13b", "llama-8b", "opt-1.3b", "opt-125m"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["low rank", "LoRA", "dense"])
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="rows x tokens")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    methods = {name: METHODS[name] for name in arguments.methods}
    rows = []
    with tempfile.TemporaryDirectory() as parent:
        for shape in arguments.shapes:
            folder = make_folder(shape, parent)
            for (method, values), size in ((m, s) for m in methods.items() for s in arguments.sizes):
                count, tokens = map(int, size.split("x"))
                options = BenchOptions(
                    model_name_or_path=folder, random_weights=True, rows=count, tokens=tokens,
                    repeats=arguments.repeats, dtype="bfloat16" if torch.cuda.is_available() else "float32", **values,
                )  # fmt: skip
                measured = run(options)
                plain = measured[0].peak_memory
                for m in measured:
                    figures = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in dataclasses.asdict(m).items()}
                    memory = f"{m.peak_memory / plain:.3f}"
                    rows.append({"model": shape, "method": method, "rows": count, "tokens": tokens, **figures,
                                 "memory_ratio": memory, **provenance()})  # fmt: skip
                    print(f"{shape:9} {method:19} {count:3} x {tokens:4} {m.what:19} {m.milliseconds:9.2f} ms "
                          f"{m.ratio:7.3f}  memory {memory}", flush=True)  # fmt: skip
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                if arguments.output:  # after each, so that a time limit leaves what was measured
                    write(arguments.output, rows)


if __name__ == "__main__":
    main()
