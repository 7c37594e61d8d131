"""What benchmarks/methods.py measures: tasks, methods with their learning rates, runs, and the seconds they take."""

from collections import defaultdict
from typing import Any, NamedTuple

SENTIMENT = {"0": "terrible", "1": "great"}
QUESTIONS = {"ABBR": "expression", "ENTY": "entity", "DESC": "description", "HUM": "human", "LOC": "location",
             "NUM": "number"}  # fmt: skip
TASKS: dict[str, dict[str, Any]] = {
    "minilm-mlm/sst2": {
        "model": "minilm-mlm", "data": ("SST-2/train.jsonl.gz", "SST-2/validation.jsonl.gz"), "batch": 64,
        "template": "{text} It was [MASK].", "label_words": SENTIMENT, "max_length": 128,
    },
    "reviews-llama/sst2": {
        "model": "reviews-llama", "data": ("SST-2/train.jsonl.gz", "SST-2/validation.jsonl.gz"), "batch": 16,
        "template": "{text}\nSentiment:", "label_words": {"0": "negative", "1": "positive"}, "max_length": 256,
    },
    "minilm-mlm/snli": {
        "model": "minilm-mlm", "data": ("SNLI/train_pool_lmbff.jsonl.gz", "SNLI/validation.jsonl.gz"), "batch": 64,
        "template": "{premise} ? [MASK] , {hypothesis}", "max_length": 128,
        "label_words": {"entailment": "yes", "neutral": "maybe", "contradiction": "no"},
    },
    "minilm-mlm/trec": {
        "model": "minilm-mlm", "data": ("TREC/train.jsonl.gz", "TREC/test.jsonl.gz"), "batch": 64,
        "template": "[MASK] : {text}", "label_words": QUESTIONS, "max_length": 128,
    },
    "minilm-mlm/rte": {
        "model": "minilm-mlm", "data": ("RTE/train.jsonl.gz", "RTE/validation.jsonl.gz"), "batch": 64,
        "template": "{premise} ? [MASK] , {hypothesis}", "max_length": 128,
        "label_words": {"entailment": "yes", "not_entailment": "no"},
    },
}  # fmt: skip
# Scalars that a model trains: all of them, LoRA of rank 8 on queries and values, and what `trainable_layers` leaves.
TRAINED = {
    "minilm-mlm": {
        "all": 22_744_506, "lora": 73_728, "last:2": 3_697_536, "last:3": 5_472_000, "last:1/3": 3_697_536,
    },
    "reviews-llama": {
        "all": 29_893_120, "lora": 131_072, "last:2": 6_425_088, "last:3": 9_637_376, "last:1/3": 9_637_376,
    },
}  # fmt: skip
LORA = {"use_peft": True, "lora_r": 8, "lora_alpha": 16.0}
LOW_RANK = {"direction": "low_rank", "direction_rank": 2, "direction_refresh_steps": 50}
FIRST_ORDER = "first order"
THIRD = ", a third"  # of the forward passes, and a rate that falls to 0 by then
# Options, and the largest of the learning rates. The order is that of the measurement.
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "mezo": ({}, 1e-4),
    FIRST_ORDER: ({}, 1e-4),
    "lozo, adam": ({**LOW_RANK, "optim": "adam"}, 1e-3),
    "fzoo, 8 queries": ({"estimator": "fzoo", "num_queries": 8}, 3e-3),
    "adam lora, 4 queries": ({**LORA, "epsilon": 1e-2, "optim": "adam", "num_queries": 4}, 1e-2),
    "mezo lora": ({**LORA, "epsilon": 1e-2}, 3e-3),
    "subspace, adam, 4 queries": (
        {**LOW_RANK, "direction": "subspace", "direction_rank": 16, "optim": "adam", "num_queries": 4},
        3e-3,
    ),
    "subspace, muon, 4 queries": (
        {**LOW_RANK, "direction": "subspace", "direction_rank": 16, "optim": "muon", "num_queries": 4},
        3e-3,
    ),
    "fzoo lora, 8 queries": ({**LORA, "epsilon": 1e-2, "estimator": "fzoo", "num_queries": 8}, 3e-2),
    f"{FIRST_ORDER} lora": (LORA, 1e-2),
    "lozo": (LOW_RANK, 1e-4),
    "lozo, momentum": ({**LOW_RANK, "optim": "momentum"}, 1e-4),
    "mezo, 4 queries": ({"num_queries": 4}, 3e-4),
    "es, 8 queries": ({"estimator": "es", "num_queries": 8}, 3e-3),
    "1.5-spsa, 16 queries": ({"estimator": "1.5-spsa", "num_queries": 16}, 1e-3),
    # Few steps of large batches, as its paper has it; a pass over four batches counts as four.
    "1.5-spsa, 16 queries, batch x 4": (
        {"estimator": "1.5-spsa", "num_queries": 16, "gradient_accumulation_steps": 4},
        1e-3,
    ),
    "mezo, clipped": ({"clip_quantile": 0.9}, 1e-4),
    "mezo, linear": ({"lr_scheduler_type": "linear"}, 1e-4),
    "mezo, epsilon 1e-2": ({"epsilon": 1e-2}, 1e-4),
    "fzoo, 8 queries, linear": ({"estimator": "fzoo", "num_queries": 8, "lr_scheduler_type": "linear"}, 1e-2),
    f"fzoo, 8 queries, linear{THIRD}": ({"estimator": "fzoo", "num_queries": 8, "lr_scheduler_type": "linear"}, 1e-2),
    f"fzoo lora, 8 queries, linear{THIRD}": (
        {**LORA, "epsilon": 1e-2, "estimator": "fzoo", "num_queries": 8, "lr_scheduler_type": "linear"},
        3e-2,
    ),
    f"lozo, adam, linear{THIRD}": ({**LOW_RANK, "optim": "adam", "lr_scheduler_type": "linear"}, 1e-3),
    # The lower layers are computed once for all passes of a row.
    "fzoo, 8 queries, last 2 layers": ({"estimator": "fzoo", "num_queries": 8, "trainable_layers": "last:2"}, 1e-2),
    "fzoo, 8 queries, last 3 layers": ({"estimator": "fzoo", "num_queries": 8, "trainable_layers": "last:3"}, 1e-2),
    "fzoo, 8 queries, last third": ({"estimator": "fzoo", "num_queries": 8, "trainable_layers": "last:1/3"}, 1e-2),
    f"fzoo, 8 queries, last 2 layers, linear{THIRD}": (
        {"estimator": "fzoo", "num_queries": 8, "trainable_layers": "last:2", "lr_scheduler_type": "linear"},
        1e-2,
    ),
    "fzoo, 8 queries, low rank": ({**LOW_RANK, "estimator": "fzoo", "num_queries": 8}, 3e-3),
    "mezo prefix": ({"use_peft": True, "peft_type": "prefix_tuning", "epsilon": 1e-1}, 1e-1),
}
# Options beside those of another method, at whose learning rate they run.
TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "mezo lora, bf16": ("mezo lora", {"dtype": "bfloat16"}),
    "mezo, bf16": ("mezo", {"dtype": "bfloat16"}),
    "fzoo, 8 queries, bf16": ("fzoo, 8 queries", {"dtype": "bfloat16"}),
    "fzoo lora, 8 queries, bf16": ("fzoo lora, 8 queries", {"dtype": "bfloat16"}),
    "fzoo, 8 queries, last 2 layers, bf16": ("fzoo, 8 queries, last 2 layers", {"dtype": "bfloat16"}),
    "mezo lora, bf16, sglang": (
        "mezo lora",
        {"dtype": "bfloat16", "engine": "sglang", "sglang_engine_args": {"mem_fraction_static": "0.2"}},
    ),
}
NUM_RATES, MORE_RATES = 4, 2  # that every method tries, and beyond the largest or smallest while that is the best
PARTS = ("time", "methods", "published", "long", "twins")
# Plain MeZO on all of the 1,000 rows, at the rates and steps of the models' README.
PUBLISHED = [("minilm-mlm/sst2", 1e-5), ("minilm-mlm/sst2", 3e-5), ("reviews-llama/sst2", 3e-5)]
PUBLISHED_STEPS, PUBLISHED_EVERY = 2000, 500
LONG_STEPS, LONG_SEGMENT, LONG_EVERY = 100_000, 5_000, 1_000

# Guesses until a row of the CSV says it: H100, one process alone, and side by side.
SECONDS_PER_FORWARD = 4e-3
SECONDS_TO_BEGIN, SECONDS_PER_EVALUATION = 3.0, 0.1
SHARE = 0.63  # of a step keeps the GPU busy, so that three processes side by side take 1.9 times as long each


class Job(NamedTuple):
    """One run."""

    task: str
    method: str
    learning_rate: float
    seed: int
    phase: str  # train, time, published, or long and the step at which the segment ends


def options_of(method: str) -> dict[str, Any]:
    if method in TWINS:
        base, options = TWINS[method]
        return {**METHODS[base][0], **options}
    return METHODS[method][0]


def rates(method: str) -> list[float]:
    """The learning rates that are tried in any case, half a decade apart, the largest first."""
    return [_rate(method, n) for n in range(NUM_RATES)]


def _rate(method: str, place: int) -> float:
    return float(f"{METHODS[method][1] * 10 ** (-place / 2):.1e}")


def next_rate(found: list[dict[str, str]], task: str, method: str) -> float | None:
    """The rate beyond the best one, if that is the largest or the smallest of those that were tried so far."""
    place = {_rate(method, n): n for n in range(-MORE_RATES, NUM_RATES + MORE_RATES)}
    tried = sorted(place[rate] for rate in tried_rates(found, task, method))
    best = best_rate(found, task, method)
    if len(tried) < NUM_RATES or best is None or len(tried) >= NUM_RATES + MORE_RATES:
        return None
    beyond = {tried[0]: tried[0] - 1, tried[-1]: tried[-1] + 1}.get(place[best])
    return None if beyond is None else _rate(method, beyond)


def tried_rates(found: list[dict[str, str]], task: str, method: str) -> set[float]:
    """The rates that were tried, with the first seed."""
    return {float(row["learning_rate"]) for row in _tuning_rows(found, task, method)}


def _tuning_rows(found: list[dict[str, str]], task: str, method: str) -> list[dict[str, str]]:
    """The rows of the first seed, which all rates are tried with."""
    runs = [row for row in found if (row["task"], row["method"], row["phase"]) == (task, method, "train")]
    return [row for row in runs if row["seed"] == runs[0]["seed"]]


def forwards_per_step(method: str) -> int:
    """Passes over one batch; a backward pass counts as two forward passes."""
    if method.startswith(FIRST_ORDER):
        return 3
    options = options_of(method)
    queries, batches = options.get("num_queries", 1), options.get("gradient_accumulation_steps", 1)
    probes = {"fzoo": queries + 1, "1.5-spsa": 2 * queries + 1}.get(options.get("estimator", "spsa"), 2 * queries)
    return batches * probes


def share_of(method: str) -> float:
    """The part of the forward passes that a method is given."""
    return 1 / 3 if THIRD in method else 1.0


def key(row: dict[str, Any]) -> Job:
    """The run of a row."""
    return Job(row["task"], row["method"], float(row["learning_rate"]), int(row["seed"]), row["phase"])


def best_rate(found: list[dict[str, str]], task: str, method: str) -> float | None:
    """The rate whose last held-out loss is the lowest with the first seed, of those that did not diverge.

    Of first-order methods the one whose held-out accuracy is the highest: they fit their rows so closely that the loss
    grows while accuracy does.
    """
    if method in TWINS:
        return best_rate(found, task, TWINS[method][0])
    last = {float(row["learning_rate"]): row for row in _tuning_rows(found, task, method) if not row["end"]}

    def worse(rate: float) -> tuple[float, ...]:
        loss = float(last[rate]["held_out_loss"])
        return (-float(last[rate]["held_out_accuracy"]), loss) if method.startswith(FIRST_ORDER) else (loss,)

    return min(last, key=worse) if last else None


class Estimate:
    """Seconds that runs will take, from rows of the CSV file as far as it has them.

    Args:
        found: its rows.
        jobs: runs side by side on a GPU.
        steps: of a run.
        evaluations: in a run.
    """

    def __init__(self, found: list[dict[str, str]], jobs: float, steps: Any, evaluations: int):
        self._slower, self._steps, self._evaluations = max(1.0, SHARE * jobs), steps, evaluations
        self._step_seconds: dict[tuple[str, str], float] = {}
        self._whole: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        for row in found:
            pair, phase = (row["task"], row["method"]), row["phase"]
            if phase == "time":
                self._step_seconds[pair] = float(row["milliseconds_per_step"]) / 1e3
            elif not row["end"] and row["wall_seconds"]:
                self._whole[(*pair, phase.split()[0])].append(float(row["wall_seconds"]))

    def __call__(self, job: Job) -> float:
        whole = self._whole.get((job.task, job.method, job.phase.split()[0]))
        if whole:
            return max(whole)
        pair = (job.task, job.method)
        step = self._step_seconds.get(pair, SECONDS_PER_FORWARD * forwards_per_step(job.method))
        slower = 1.0 if job.phase == "time" else self._slower
        evaluations = 1 if job.phase == "time" else self._evaluations
        return SECONDS_TO_BEGIN + slower * (step * self._steps(job) + SECONDS_PER_EVALUATION * evaluations)
