"""SGLang's losses against the torch engine's along the same updates, on a GPU, in bfloat16 and float32.

    python benchmarks/gpu_sglang_check.py [--client colocated|in_process] [--tp N] [--output FILE.csv]

A small random Llama, rows that share prompts, 10 steps whose records are the torch engine's (float32). At the end the
adapter in SGLang's workers must have the same bits as the journal's. Runs on a CPU too.
"""

import argparse
import contextlib
import csv
import io
import tempfile
from pathlib import Path
from typing import Any

import torch
from gpu_sglang import same_in_workers
from provenance import provenance
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import logging as transformers_logging

from mezo.adapter import add_adapter
from mezo.config import MeZOConfig
from mezo.engines.sglang import versions
from mezo.engines.sglang.build import adapter_on_meta, engine_arguments
from mezo.engines.sglang.client import Client, Colocated
from mezo.engines.sglang.engine import SGLangEngine
from mezo.engines.torch.engine import TorchEngine
from mezo.estimator import Record, TwoPoint
from mezo.objective import Example, Target, TokenSequence, batch_loss

STEPS, LEARNING_RATE, EPSILON = 10, 1e-2, 1e-2
# A loss is a mean over 3 tokens of about 9; bfloat16 keeps 8 bits of the hidden states.
TOLERANCE = {"bfloat16": 5e-2, "float32": 2e-3}
ON_GPU = torch.cuda.is_available()


def make_model(dtype: str) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, vocab_size=4096, max_position_embeddings=1024, initializer_range=0.06,
    )  # fmt: skip
    folder = tempfile.mkdtemp()
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def make_examples() -> list[Example]:
    """Eight prompts of different lengths with two options of 3 tokens each."""
    generator = torch.Generator().manual_seed(1)
    examples = []
    for n in range(8):
        prompt = torch.randint(10, 4096, (40 + 13 * n,), generator=generator).tolist()
        sequences = []
        for _ in range(2):
            answer = torch.randint(10, 4096, (3,), generator=generator).tolist()
            targets = tuple(Target(len(prompt) - 1 + i, token, 0) for i, token in enumerate(answer))
            sequences.append(TokenSequence((*prompt, *answer), targets))
        examples += [Example((sequence,)) for sequence in sequences]
    return examples


def more_arguments() -> dict[str, Any]:
    more: dict[str, Any] = {"skip_tokenizer_init": True, "mem_fraction_static": 0.1 if not ON_GPU else 0.4}
    if ON_GPU:
        more |= {"attention_backend": "triton", "sampling_backend": "pytorch", "grammar_backend": "none"}
    else:
        more |= {"max_total_tokens": 16384}
    return more


def model_runner(arguments: dict[str, Any]) -> Any:
    """SGLang's ModelRunner, as its own benchmark of single batches builds it in 0.5.17 and in 0.5.20."""
    from sglang.benchmark import one_batch
    from sglang.srt.entrypoints.engine import _set_envs_and_config
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import PortArgs, ServerArgs

    load_plugins()
    one_batch.get_tokenizer = lambda *_, **__: None  # the random model has none
    server_args = ServerArgs(**{**arguments, "page_size": 1, "disable_cuda_graph": True, "max_running_requests": 64})
    resolves = hasattr(server_args, "resolve_once")
    if resolves:
        server_args.resolve_once()
    _set_envs_and_config(server_args)
    server_args.check_server_args()
    publish(server_args, role="scheduler")
    for part in ("moe_config", "fp8_gemm_config", "fp4_gemm_config"):
        getattr(one_batch, f"initialize_{part}")(*([] if resolves else [server_args]))
    with contextlib.redirect_stdout(io.StringIO()):
        return one_batch.load_model(server_args, PortArgs.init_new(server_args), 0, 0)[0].torch_runner


def make_client(name: str, arguments: dict[str, Any]) -> Client:
    if name == "colocated":
        return Colocated(arguments)
    from mezo.sglang import InProcess

    runner = model_runner(arguments)
    return InProcess(runner, runner.lora_manager)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--client", default="colocated", choices=["colocated", "in_process"])
    parser.add_argument("--dtype", default="bfloat16", choices=TOLERANCE)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--output", type=Path, help="CSV file to add to")
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    folder = make_model(options.dtype)
    config = MeZOConfig(
        model_name_or_path=folder, use_peft=True, engine="sglang", dtype=options.dtype, sglang_tp_size=options.tp
    )
    examples = make_examples()
    adapter = adapter_on_meta(config)
    client = make_client(options.client, {**engine_arguments(config, adapter, 2), **more_arguments()})
    sglang = SGLangEngine([client], adapter, None)  # type: ignore[arg-type]

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base.requires_grad_(False)
    tokenizer = type("Tokenizer", (), {"pad_token_id": 0, "eos_token_id": 1})
    model = add_adapter(base, config, "causal_lm").eval().to("cuda" if ON_GPU else "cpu")
    reference = TorchEngine(model, tokenizer)  # type: ignore[arg-type]

    estimator, largest, moved = TwoPoint(0, EPSILON), 0.0, 0.0
    first: list[float] = []
    for step in range(STEPS):
        probes = estimator.probes(step)
        expected_PN, found_PN = reference.losses(examples, probes), sglang.losses(examples, probes)
        largest = max(largest, (expected_PN - found_PN).abs().max().item())
        losses = [batch_loss(examples, losses_N) for losses_N in expected_PN]
        first = first or losses
        moved = max(moved, abs(losses[0] - first[0]))
        (outcome,) = estimator.outcomes(probes, losses)
        records = [Record(step, *outcome, LEARNING_RATE, 0, len(examples))]
        reference.update(records)
        sglang.update(records)
    same = same_in_workers(sglang)
    apart = max(
        (a.cpu() - b).abs().max().item()
        for a, b in zip(reference.space.parameters.values(), sglang.space.parameters.values(), strict=True)
    )
    sglang.close()
    checks = [
        ("losses of the torch engine", largest, TOLERANCE[options.dtype]),
        ("adapter of the torch engine", apart, 1e-5),
        ("adapter in the workers, bit for bit", 0.0 if same else 1.0, 0.5),
    ]
    where = {"client": options.client, "dtype": options.dtype, "tp": options.tp, "sglang": versions.installed()}
    rows = [
        {"what": what, "difference": f"{value:.1e}", "result": "PASS" if value < limit else "FAIL", **where}
        for what, value, limit in checks
    ]
    for row in rows:
        print(
            f"{row['result']}  {options.client}, {options.dtype}, tp {options.tp}: {row['what']}, {row['difference']}"
        )
    if options.output:
        new = not options.output.exists()
        with options.output.open("a", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *provenance()])
            if new:
                writer.writeheader()
            writer.writerows({**row, **provenance()} for row in rows)
    raise SystemExit(any(row["result"] == "FAIL" for row in rows) or moved < 10 * TOLERANCE["float32"])


if __name__ == "__main__":
    main()
