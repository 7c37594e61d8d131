"""A job: random batches on one ModelRunner, with sharing, without, and with what other attention backends can share."""

import itertools
import json
import logging
import random
from pathlib import Path
from typing import Any

from mezo.activation import activate
from mezo.engines.sglang import versions
from mezo.estimator import Record, TwoPoint
from mezo.objective import Example, Target, TokenSequence, common_prefix
from tests.sglang.jobs import engine_on, model_runner

INVOCATION = [7, 8]


def batch(generator: random.Random, *, activated: bool) -> list[Example]:
    """Examples with a common instruction, prompts of their own and one to four options."""
    instruction = generator.choices(range(10, 30), k=generator.randrange(9))
    examples = []
    for _ in range(generator.randint(1, 5)):
        prompt = [*instruction, *generator.choices(range(10, 30), k=generator.randint(1, 9))]
        prompt += INVOCATION if activated else []
        sequences = []
        for option in range(generator.randint(1, 4)):
            answer = generator.choices(range(10, 30), k=generator.randint(1, 4))
            targets = tuple(Target(len(prompt) - 1 + i, t, option) for i, t in enumerate(answer))
            sequences.append(TokenSequence((*prompt, *answer), targets))
        examples.append(Example(tuple(sequences), 0))
    return activate(examples, INVOCATION) if activated else examples


def expected_tokens(examples: list[Example]) -> int:
    """Tokens that two probes compute if nothing is computed twice: what no other row, in any order, has before.

    A row may take from any other what stands before the first position that it reads.
    """
    rows = sorted((s for e in examples for s in e.sequences), key=lambda s: s.input_ids)
    shared = [
        max((common_prefix([row.input_ids[: row.read_start], earlier.input_ids]) for earlier in rows[:n]), default=0)
        for n, row in enumerate(rows)
    ]
    return 2 * sum(len(row.input_ids) - tokens for row, tokens in zip(rows, shared, strict=True))


def run(model: str, out: str, start: str) -> None:
    """Writes the largest differences of losses, and how many tokens each step computed."""
    targets = json.loads((Path(start) / "adapter_config.json").read_text())["target_modules"]
    runner = model_runner(model, targets)
    generator, estimator = random.Random(0), TwoPoint(3, 0.05)
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mezo").addHandler(handler)
    engines = [engine_on(runner, model, start, share=share) for share in (True, False)]
    usual, versions._WRITE_BEFORE_READING = versions._WRITE_BEFORE_READING, frozenset()
    in_waves = engine_on(runner, model, start, share=True)
    versions._WRITE_BEFORE_READING = usual
    engines.append(in_waves)
    engines[0].wave_cost = in_waves.wave_cost = 0
    found: dict[str, Any] = {
        "difference": 0.0,
        "difference_in_waves": 0.0,
        "computed": [],
        "expected": [],
        "prompts": [],
        "turns": [],
    }
    forward, adapters = versions.Prefill._forward, []

    def observed(prefill: versions.Prefill, requests: list[Any], body: Any) -> Any:
        adapters.extend(request.lora_id for request in requests)
        return forward(prefill, requests, body)

    versions.Prefill._forward = observed  # type: ignore[method-assign]

    def step(number: int, examples: list[Example]) -> int:
        probes = estimator.probes(number)
        before = engines[0].work.computed
        adapters.clear()
        losses = [engine.losses(examples, probes) for engine in engines[:2]]
        found["turns"].append(len([*itertools.groupby(adapters)]))
        losses.append(in_waves.losses(examples, probes))
        for name, ours in (("difference", losses[0]), ("difference_in_waves", losses[2])):
            found[name] = max(found[name], float((ours - losses[1]).abs().max()))
        (outcome,) = estimator.outcomes(probes, [float(v) for v in losses[1].mean(dim=1)])
        for engine in engines:
            engine.update([Record(number, *outcome, 1e-3, 0, len(examples))])
        return round(engines[0].work.computed - before)

    for number in range(12):
        versions._FILLING_TOKENS = 40 if number % 2 else 2048  # probes in batches of their own, or together
        examples = batch(generator, activated=False)
        found["computed"].append(step(number, examples))
        found["expected"].append(expected_tokens(examples))
    batches = [batch(generator, activated=True) for _ in range(4)]
    for number in range(12, 28):
        if number in (20, 21, 25):
            for engine in (engines[0], in_waves):
                engine._clients[0]._prefill.close()  # everything is evicted
        examples = batches[number % 4]
        suffix = 2 * sum(len(s.input_ids) - s.adapter_start for e in examples for s in e.sequences)
        found["prompts"].append([number, step(number, examples) - suffix])
    found["warned"] = warnings
    found["asked"] = [engine.work.asked for engine in engines]
    found["all_computed"] = [engine.work.computed for engine in engines]
    for engine in engines:
        engine.close()
    found["left"] = runner.max_total_num_tokens - runner.token_to_kv_pool_allocator.available_size()
    Path(out).write_text(json.dumps(found))
