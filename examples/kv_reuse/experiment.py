"""Which reuse of keys and values leaves MeZO's gradient estimate alone, on a CPU in a minute.

    python examples/kv_reuse/experiment.py --output_dir runs/kv-reuse

A small Llama with random weights and a LoRA on it; prompts with four answers each. Every estimate
(L(θ + εz) − L(θ − εz)) / 2ε is compared with z · ∇L, which backward() gives. Since z is normal, the root mean square of
the difference is the length of the estimate's bias.

Needs matplotlib: pip install 'mezo[plot]'.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mezo.activation import activate
from mezo.engines.torch.engine import TorchEngine
from mezo.engines.torch.space import direction
from mezo.estimator import Probe, TwoPoint
from mezo.objective import Example, Target, TokenSequence, batch_loss, example_losses

matplotlib.use("Agg")
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
import matplotlib.pyplot as plt  # noqa: E402

VOCABULARY, PROMPT, ANSWER, OPTIONS, EXAMPLES = 256, 40, 3, 4, 4
INVOCATION = (7, 8)  # what a prompt ends with
EPSILON = 1e-3


def make_model(activated: bool) -> PeftModel:
    """A Llama whose random weights are wide enough for answers to depend on their prompts."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, initializer_range=0.15,
    )  # fmt: skip
    more = {"alora_invocation_tokens": list(INVOCATION)} if activated else {}
    lora = LoraConfig(r=1, lora_alpha=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **more)
    model = get_peft_model(LlamaForCausalLM(config), lora).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # 0 in a fresh adapter
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def make_examples() -> list[Example]:
    """Prompts of random tokens; the label is any of the answers."""
    generator = torch.Generator().manual_seed(1)

    def draw(count: int) -> list[int]:
        return torch.randint(10, VOCABULARY, (count,), generator=generator).tolist()

    examples = []
    for n in range(EXAMPLES):
        prompt = (*draw(PROMPT), *INVOCATION)
        rows = []
        for option in range(OPTIONS):
            answer = draw(ANSWER)
            targets = tuple(Target(len(prompt) - 1 + i, token, option) for i, token in enumerate(answer))
            rows.append(TokenSequence((*prompt, *answer), targets))
        examples.append(Example(tuple(rows), n % OPTIONS))
    return examples


def make_engine(model: PeftModel, share: bool) -> TorchEngine:
    """The engine that mezo trains with."""
    words = Tokenizer(WordLevel({"<pad>": 0}, "<pad>"))
    return TorchEngine(model, PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>"), share=share)


def loss(model: PeftModel, examples: list[Example], past: Any = None) -> Tensor:
    """Mean loss, written plainly; answers are read behind `past`, a cache with a row for each example's prompt."""
    sequences = [s for e in examples for s in e.sequences]
    rows_RS = torch.tensor([s.input_ids for s in sequences])  # all of one length
    start, more = 0, {}
    if past is not None:
        start = rows_RS.shape[1] - ANSWER - 1
        more = {"past_key_values": copy.deepcopy(past)}
        more["past_key_values"].batch_repeat_interleave(OPTIONS)
    logprobs_RSV = model(input_ids=rows_RS[:, start:], **more).logits.log_softmax(dim=-1)
    logprobs = [logprobs_RSV[row, t.position - start, t.token] for row, s in enumerate(sequences) for t in s.targets]
    return example_losses(examples, torch.stack(logprobs)).mean()


def prompt_cache(model: PeftModel, examples: list[Example]) -> Any:
    """Keys and values of the prompts but their last tokens, at the present weights."""
    prompts = [e.sequences[0].input_ids[: -ANSWER - 1] for e in examples]
    return model(input_ids=torch.tensor(prompts), use_cache=True).past_key_values


def naive(model: PeftModel, engine: TorchEngine, examples: list[Example], probes: list[Probe]) -> float:
    """projected_grad where the −ε pass reads the prompts' keys and values of the +ε pass."""
    masters = {name: p.detach().clone() for name, p in engine.space.parameters.items()}
    losses, cache = [], None
    with torch.no_grad():
        for probe in probes:
            for name, parameter in engine.space.parameters.items():
                z = direction(probe.seed, name, 0, parameter.numel(), parameter.device).view(parameter.shape)
                parameter.copy_(masters[name] + probe.scale * z)
            cache = cache or prompt_cache(model, examples)
            losses.append(float(loss(model, examples, cache)))
        for name, parameter in engine.space.parameters.items():
            parameter.copy_(masters[name])
    return (losses[0] - losses[1]) / (2 * EPSILON)


def gradient(engine: TorchEngine, value: Tensor) -> Tensor:
    """∇ of a loss with respect to all trained parameters, one after the other."""
    parameters = list(engine.space.parameters.values())
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, parameters)])


def z_of(engine: TorchEngine, seed: int) -> Tensor:
    """The direction in the order of `gradient`."""
    return torch.cat([direction(seed, n, 0, p.numel(), p.device) for n, p in engine.space.parameters.items()])


def estimate(model: PeftModel, examples: list[Example], share: bool, directions: int) -> tuple[list[float], float]:
    """projected_grad along each direction, and the share of tokens that was not computed again."""
    engine = make_engine(model, share)
    values = []
    for step in range(directions):
        estimator = TwoPoint(0, EPSILON)
        probes = estimator.probes(step)
        losses = [batch_loss(examples, losses_N) for losses_N in engine.losses(examples, probes)]
        values.append(estimator.outcomes(probes, losses)[0].coefficient)
    return values, 1 - engine.work.computed / engine.work.asked


def main() -> None:
    """Runs everything and writes table, rows and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/kv-reuse"))
    parser.add_argument("--directions", type=int, default=600)
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    examples = make_examples()
    probes_of: Callable[[int], list[Probe]] = TwoPoint(0, EPSILON).probes

    model, activated = make_model(activated=False), make_model(activated=True)
    engine = make_engine(model, share=False)
    true = gradient(engine, loss(model, examples))
    true_activated = gradient(make_engine(activated, share=False), loss(activated, examples))  # PEFT's own masking
    z_ND = torch.stack([z_of(engine, probes_of(step)[0].seed) for step in range(options.directions)])

    results = {
        "(a) no reuse": (*estimate(model, examples, False, options.directions), true),
        "(b) exact: within one sign": (*estimate(model, examples, True, options.directions), true),
        "(c) naive: across signs": (
            [naive(model, engine, examples, probes_of(step)) for step in range(options.directions)], math.nan, true,
        ),
        "(d) exact: activated LoRA": (
            *estimate(activated, activate(examples, INVOCATION), True, options.directions), true_activated,
        ),
    }  # fmt: skip
    rows, curves = [], {}
    for name, (values, reuse, reference) in results.items():
        values_N = torch.tensor(values)
        mean_ND = (values_N[:, None] * z_ND).cumsum(dim=0)
        curves[name] = torch.nn.functional.cosine_similarity(mean_ND, reference[None], dim=1)
        expected_N = z_ND @ reference
        rows.append(
            {
                "reuse": name,
                "tokens_reused": "" if math.isnan(reuse) else f"{reuse:.3f}",
                "bias_over_gradient": f"{float((values_N - expected_N).square().mean().sqrt() / reference.norm()):.4f}",
                "cosine": f"{float(curves[name][-1]):.4f}",
            }
        )
    with (options.output_dir / "kv-reuse.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for row in ({key: key for key in rows[0]}, *rows):
        print("  ".join(f"{value:28}" if key == "reuse" else f"{value:>18}" for key, value in row.items()))
    ceiling = math.sqrt(options.directions / (options.directions + len(true)))
    print(
        f"{len(true)} trained parameters: {options.directions} exact directions reach a cosine of about {ceiling:.3f}"
    )
    plot(options.output_dir / "kv-reuse.png", results, z_ND, curves, len(true))


def plot(
    path: Path, results: dict[str, tuple[list[float], float, Tensor]], z_ND: Tensor, curves: dict[str, Tensor], d: int
) -> None:
    """Estimates against z · ∇L, and the cosine of their running mean."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    colours = {"(a)": "#444444", "(b)": "#1f77b4", "(c)": "#d62728", "(d)": "#2ca02c"}
    for name in ("(c) naive: across signs", "(b) exact: within one sign"):
        values, _, reference = results[name]
        left.scatter(z_ND @ reference, values, s=7, alpha=0.6, linewidths=0, color=colours[name[:3]], label=name)
    bound = float((z_ND @ results["(a) no reuse"][2]).abs().max())
    left.plot([-bound, bound], [-bound, bound], color="#444444", linewidth=0.8)
    left.set(xlabel="z · ∇L by backward()", ylabel="(L₊ − L₋) / 2ε", title="one direction")
    left.legend(frameon=False)
    count_N = torch.arange(1, len(z_ND) + 1)
    right.plot(count_N, (count_N / (count_N + d)).sqrt(), color="#bbbbbb", linewidth=4, label="√(N / (N + d))")
    for name, cosine_N in curves.items():
        style = "--" if name.startswith("(b)") else "-"
        right.plot(count_N, cosine_N, style, color=colours[name[:3]], linewidth=1.3, label=name)
    right.set(xlabel="directions N", ylabel="cosine with ∇L", title="mean of N estimates", ylim=(0, 1))
    right.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
