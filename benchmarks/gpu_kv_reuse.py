"""What reuse of keys and values saves: a training step with it against the same step without.

    python benchmarks/gpu_kv_reuse.py sglang|torch [--shape NAME] [--settings TEXT] [--repeats 10] [--random_weights]
        [--output FILE.csv]

sglang: Llama-8B shape with SGLang's dummy weights, which make all losses the same; with `--random_weights` a checkpoint
of normal ones is written and loaded, which is what loss_difference needs. torch: OPT-1.3B shape with random bfloat16
weights. A step is the command with scalars, both signs, the losses and the update. Without reuse every token of every
row is computed under both signs; that is timed as an ordinary LoRA step, because a LoRA that is activated late costs as
much and one request more. Steps with reuse are those of a second epoch: an activated LoRA's prompts have been computed
before. loss_difference is the largest difference of a row's loss with reuse and without, under the same probes.
"""

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_sglang import SHAPES, make_folder
from provenance import provenance, write

from mezo.activation import activate
from mezo.config import MeZOConfig
from mezo.estimator import Record, TwoPoint
from mezo.objective import Example, Target, TokenSequence, batch_loss

INVOCATION, ANSWER = [7], 3
# name: (examples, options, common tokens, own tokens of the prompt, activated)
SETTINGS = {
    "aLoRA, 16 x (397 + 3)": (16, 1, 0, 397, True),
    "aLoRA, 16 x (1,500 + 3)": (16, 1, 0, 1500, True),
    "aLoRA, 64 x (397 + 3)": (64, 1, 0, 397, True),
    "LoRA, 16 x 4 options of 3 to a prompt of 200": (16, 4, 0, 200, False),
    "LoRA, 1,500 common + 16 x (97 + 3)": (16, 1, 1500, 97, False),
}
TORCH_SETTINGS = ["aLoRA, 16 x (397 + 3)"]
OPT = {
    "opt-1.3b": {"hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24, "num_attention_heads": 32},
    "tiny": {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
}
VOCABULARY = 50272  # OPT's
ALORA: dict[str, Any] = {"use_peft": True, "lora_variant": "alora", "alora_invocation_tokens": INVOCATION}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class NoTokenizer:
    pad_token_id = 1


def make_examples(setting: tuple[int, int, int, int, bool], vocabulary: int, shorter: int = 0) -> list[Example]:
    """Random rows; each example's prompt is `shorter` tokens shorter than the one's before."""
    count, options, common, own, activated = setting
    generator = random.Random(0)

    def ids(length: int) -> list[int]:
        return [generator.randrange(10, vocabulary) for _ in range(length)]

    beginning = ids(common)
    examples = []
    for n in range(count):
        prompt = [*beginning, *ids(own - 1 - n * shorter), *INVOCATION]
        rows = []
        for option in range(options):
            answer = ids(ANSWER)
            targets = tuple(Target(len(prompt) - 1 + i, token, option) for i, token in enumerate(answer))
            rows.append(TokenSequence((*prompt, *answer), targets))
        examples.append(Example(tuple(rows), 0 if options > 1 else None))
    return activate(examples, INVOCATION) if activated else examples


def plain(examples: list[Example]) -> list[Example]:
    """The same rows for an ordinary LoRA."""
    return [Example(tuple(TokenSequence(s.input_ids, s.targets) for s in e.sequences), e.label) for e in examples]


def timed(engine: Any, examples: list[Example], steps: "itertools.count[int]", repeats: int) -> list[float]:
    estimator, times = TwoPoint(0, 1e-3), []
    for repeat in range(repeats + 3):
        step = next(steps)
        started = time.perf_counter()
        probes = estimator.probes(step)
        losses = [batch_loss(examples, losses_N) for losses_N in engine.losses(examples, probes)]
        (outcome,) = estimator.outcomes(probes, losses)
        engine.update([Record(step, *outcome, 1e-6, 0, len(examples))])
        if repeat >= 3:
            times.append((time.perf_counter() - started) * 1e3)
    return times


def measure(
    engine: Any, share: Callable[[bool], None], names: list[str], vocabulary: int, repeats: int
) -> list[dict[str, str]]:
    rows, steps = [], itertools.count()
    for name in names:
        examples = make_examples(SETTINGS[name], vocabulary)
        share(False)
        off = timed(engine, plain(examples), steps, repeats)
        share(True)
        timed(engine, examples, steps, 0)
        before = (engine.work.asked, engine.work.computed)
        on = timed(engine, examples, steps, repeats)
        reused = 100 * (1 - (engine.work.computed - before[1]) / (engine.work.asked - before[0]))
        probes = TwoPoint(1, 1e-3).probes(next(steps))
        shared_PN = engine.losses(examples, probes)
        share(False)
        difference = (engine.losses(examples, probes) - shared_PN).abs().max().item()
        base = statistics.median(off)
        for reuse, times in (("off", off), ("on", on)):
            low, _, _, high = statistics.quantiles(times, n=5)
            median = statistics.median(times)
            rows.append(
                {"setting": name, "reuse": reuse, "unit": "ms", "median": f"{median:.1f}", "p20": f"{low:.1f}",
                 "p80": f"{high:.1f}", "faster": f"{base / median:.2f}",
                 "reused_percent": f"{reused:.2f}" if reuse == "on" else "0",
                 "loss_difference": f"{difference:.1e}" if reuse == "on" else "0"}
            )  # fmt: skip
    return rows


def make_weights(folder: str) -> None:
    """Random bfloat16 weights beside the folder's configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with DEVICE:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def start_sglang(config: MeZOConfig, *, dummy: bool) -> Any:
    """The client of an SGLang with `dummy` weights or those in the model's folder."""
    from mezo.engines.sglang.build import adapter_on_meta, engine_arguments
    from mezo.engines.sglang.client import Colocated

    more: dict[str, object] = {"skip_tokenizer_init": True}
    if dummy:
        more["load_format"] = "dummy"
    if torch.cuda.is_available():
        more |= {"sampling_backend": "pytorch", "grammar_backend": "none"}
    else:
        more |= {"max_total_tokens": 262144, "mem_fraction_static": 0.1}
    return Colocated({**engine_arguments(config, adapter_on_meta(config), 2), **more})


def sglang_engine(client: Any, config: MeZOConfig) -> Any:
    """An engine there, with the adapter at its initial values."""
    from mezo.engines.sglang.build import adapter_on_meta
    from mezo.engines.sglang.engine import SGLangEngine

    return SGLangEngine([client], adapter_on_meta(config), None)  # type: ignore[arg-type]


def make_opt(shape: str, **more: float) -> Any:
    """An OPT with random weights, in bfloat16 on a GPU; `more` goes into its configuration."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(**OPT[shape], word_embed_proj_dim=OPT[shape]["hidden_size"], vocab_size=VOCABULARY, **more)
    with DEVICE:
        model = OPTForCausalLM._from_config(config, dtype=torch.bfloat16 if DEVICE.type == "cuda" else None)
    return model.eval().requires_grad_(False)


def with_adapter(model: Any) -> Any:
    """The model with an adapter whose examples say from where on it acts."""
    from mezo.adapter import add_adapter

    return add_adapter(model, MeZOConfig(model_name_or_path="random", **ALORA), "causal_lm").to(DEVICE)


def on_sglang(shape: str, names: list[str], repeats: int, random_weights: bool) -> list[dict[str, str]]:
    folder = make_folder(shape)
    if random_weights:
        make_weights(folder)
    config = MeZOConfig(model_name_or_path=folder, engine="sglang", **ALORA)
    engine = sglang_engine(start_sglang(config, dummy=not random_weights), config)

    def share(on: bool) -> None:
        engine._share_prefixes = on

    try:
        return measure(engine, share, names, SHAPES[shape]["vocab_size"], repeats)  # type: ignore[arg-type]
    finally:
        engine.close()


def on_torch(shape: str, names: list[str], repeats: int, random_weights: bool) -> list[dict[str, str]]:
    from mezo.engines.torch.engine import TorchEngine
    from mezo.engines.torch.reuse import TensorStore

    engine = TorchEngine(with_adapter(make_opt(shape)), NoTokenizer())  # type: ignore[arg-type]

    def share(on: bool) -> None:
        engine._share, engine._store = on, TensorStore(4_000_000_000 if on else 0, DEVICE)

    return measure(engine, share, names, VOCABULARY, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["sglang", "torch"])
    parser.add_argument("--shape")
    parser.add_argument("--settings", default="", help="only those whose name holds this")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--random_weights", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    shape = options.shape or {"sglang": "llama-8b", "torch": "opt-1.3b"}[options.engine]
    run, settings = {"sglang": (on_sglang, SETTINGS), "torch": (on_torch, TORCH_SETTINGS)}[options.engine]
    names = [name for name in settings if options.settings in name]
    rows = run(shape, names, options.repeats, options.random_weights)
    weights = "random" if options.random_weights or options.engine == "torch" else "dummy"
    facts = {"engine": options.engine, "model": shape, "weights": weights, **provenance()}
    for row in rows:
        figures = f"{row['median']:>8} ms {row['faster']:>6} x {row['reused_percent']:>6} % {row['loss_difference']:>8}"
        print(f"{row['setting']:<46}{row['reuse']:>4}{figures}")
    if options.output:
        write(options.output, [{**row, **facts} for row in rows])


if __name__ == "__main__":
    main()
