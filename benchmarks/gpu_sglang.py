"""A training step on SGLang against the time SGLang itself takes for the same ± batch, and start-up apart.

    python benchmarks/gpu_sglang.py [--shape llama-8b|tiny] [--repeats 12] [--tp N] [--output FILE.csv]

Weights are SGLang's dummies: right for speed, meaningless for losses. Both are timed alternately in one engine with the
radix cache on and new cache keys, so that nothing is reused: (a) one prefill-only request of all rows under two
resident adapters, log-probabilities of 3 answer tokens; (b) `SGLangEngine.losses` and `update`: the command with
scalars, both signs in one request, losses. The first line checks that the adapter in the workers and the one of the
journal are the same bits after all the steps.
"""

import argparse
import csv
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from provenance import provenance

from mezo.config import MeZOConfig
from mezo.engines.sglang import versions
from mezo.engines.sglang.build import adapter_on_meta, engine_arguments
from mezo.engines.sglang.client import Colocated, worker_state
from mezo.engines.sglang.engine import SGLangEngine
from mezo.engines.sglang.scoring import Row, rows_body
from mezo.estimator import Record, TwoPoint
from mezo.objective import Example, Target, TokenSequence, batch_loss

ANSWER = 3
SHAPES = {
    "llama-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0,
    },
    "llama-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 2048,
    },
}  # fmt: skip
ROWS_AND_TOKENS = [(16, 128), (16, 400), (64, 128)]


def make_folder(shape: str, **more: float) -> str:
    """A folder with the shape's configuration and no weights; `more` goes into the configuration."""
    folder = Path(tempfile.mkdtemp())
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", **SHAPES[shape]}
    config |= more
    (folder / "config.json").write_text(json.dumps({**config, "bos_token_id": 0, "eos_token_id": 1}))
    return str(folder)


def make_examples(rows: int, tokens: int, vocabulary: int) -> list[Example]:
    ids_RS = torch.randint(10, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    examples = []
    for ids in ids_RS:
        targets = tuple(Target(p, ids[p + 1], 0) for p in range(tokens - ANSWER - 1, tokens - 1))
        examples.append(Example((TokenSequence(tuple(ids), targets),)))
    return examples


def same_in_workers(engine: SGLangEngine) -> bool:
    """Whether the adapter in the workers has the bits of the journal's."""
    engine._send([])
    engine._catch_up()
    (client,) = engine._clients
    client.command({"op": "digest", "owner": engine._owner})
    return bool(worker_state(client)["digest"] == engine.space.digest())


def timed(functions: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 3):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if repeat >= 3:
                times[name].append((time.perf_counter() - started) * 1e3)
    return times


def measure(client: Colocated, engine: SGLangEngine, vocabulary: int, repeats: int) -> list[dict[str, str]]:
    estimator, steps = TwoPoint(0, 1e-3), itertools.count()
    found = []
    for rows, tokens in ROWS_AND_TOKENS:
        examples = make_examples(rows, tokens, vocabulary)
        sequences = [e.sequences[0] for e in examples]

        def plain(sequences: list[TokenSequence] = sequences) -> None:
            key = f"plain-{time.perf_counter_ns()}"
            client.generate(rows_body([Row(name, s, key) for name in engine._names for s in sequences], 0))

        def ours(examples: list[Example] = examples) -> None:
            step = next(steps)
            probes = estimator.probes(step)
            losses = [batch_loss(examples, losses_N) for losses_N in engine.losses(examples, probes)]
            (outcome,) = estimator.outcomes(probes, losses)
            engine.update([Record(step, *outcome, 1e-6, 0, len(examples))])

        ours()  # attaches
        times = timed({"± batch by SGLang alone": plain, "mezo step": ours}, repeats)
        base = statistics.median(times["± batch by SGLang alone"])
        for what, values in times.items():
            low, _, _, high = statistics.quantiles(values, n=5)
            median = statistics.median(values)
            found.append(
                {"what": what, "unit": "ms", "rows": str(rows), "tokens": str(tokens), "median": f"{median:.1f}",
                 "p20": f"{low:.1f}", "p80": f"{high:.1f}", "ratio": f"{median / base:.3f}"}
            )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-8b", choices=SHAPES)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    config = MeZOConfig(
        model_name_or_path=make_folder(options.shape), use_peft=True, engine="sglang", sglang_tp_size=options.tp
    )
    adapter = adapter_on_meta(config)
    more: dict[str, object] = {"load_format": "dummy", "skip_tokenizer_init": True}
    if torch.cuda.is_available():
        more |= {"sampling_backend": "pytorch", "grammar_backend": "none"}
    else:
        more |= {"max_total_tokens": 65536, "mem_fraction_static": 0.1}
    started = time.perf_counter()
    client = Colocated({**engine_arguments(config, adapter, 2), **more})
    rows = [{"what": "start of the engine", "unit": "s", "median": f"{time.perf_counter() - started:.1f}"}]
    engine = SGLangEngine([client], adapter, None)  # type: ignore[arg-type]
    rows += measure(client, engine, SHAPES[options.shape]["vocab_size"], options.repeats)
    same = same_in_workers(engine)
    engine.close()
    facts = {"model": options.shape, "tp": options.tp, "sglang": versions.installed(), **provenance()}
    print(f"{'PASS' if same else 'FAIL'}  adapter in the workers = adapter of the journal")
    for row in rows:
        shape = f"{row['rows']} × {row['tokens']}" if "rows" in row else ""
        print(f"{row['what']:<26}{shape:>10}{row['median']:>10} {row['unit']:<3} {row.get('ratio', '')}")
    if options.output:
        names = ["what", "unit", "rows", "tokens", "median", "p20", "p80", "ratio", *facts]
        with options.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, names, restval="")
            writer.writeheader()
            writer.writerows({**row, **facts} for row in rows)
    slow = [row for row in rows if row["what"] == "mezo step" and float(row["ratio"]) > 1.10]
    raise SystemExit(0 if same and not slow else 1)


if __name__ == "__main__":
    main()
