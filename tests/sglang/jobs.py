"""Jobs that run in processes of their own: importing SGLang changes what transformers computes a little.

python -m tests.sglang.jobs JOB '{"model": …, "out": …}'
"""

import functools
import importlib
import json
import sys
from pathlib import Path
from typing import Any

ENGINE_ARGS = {"max_total_tokens": 8192, "mem_fraction_static": 0.1, "sleep_on_idle": True}
RANK = 4


def rows() -> list[dict[str, Any]]:
    """Two options to one prompt, so that rows share prefixes."""
    from tests.conftest import SENTIMENT_ROWS

    return [
        {"prompt": f"{row['text']} it was", "choices": [" bad", " great , good"], "label": row["label"]}
        for row in SENTIMENT_ROWS
    ]


def answered_rows() -> list[dict[str, Any]]:
    """Prompts with answers of words that a model without sense says now and then."""
    from tests.conftest import WORDS

    return [{"prompt": row["prompt"], "answers": [" ".join(WORDS[n % 7 :: 7])]} for n, row in enumerate(rows())]


SETTING: dict[str, Any] = {
    "learning_rate": 1e-2, "batch_size": 8, "num_steps": 50, "lora_rank": RANK, "seed": 3, "dtype": "float32",
    "use_cpu": True, "logging_steps": 10, "report_to": "none", "disable_tqdm": True,
}  # fmt: skip


def finetune(model: str, out: str, **options: Any) -> None:
    """`mezo_finetune` with the tests' setting."""
    from mezo import mezo_finetune

    if options.get("engine") == "sglang" and options.get("sglang_mode") != "server":
        options["sglang_engine_args"] = {**ENGINE_ARGS, **options.get("sglang_engine_args", {})}
    data = answered_rows() if options.get("objective") == "f1" else rows()
    mezo_finetune(model, data, output_dir=out, eval_dataset=data[:16], **{**SETTING, **options})


def says_much(completions: list[str], **columns: Any) -> list[float]:
    """A reward: characters, in units of a long answer; told of the rows' other columns."""
    assert set(columns) == {"prompts", "choices", "label"}
    return [len(text) / 40 for text in completions]


def model_runner(model: str, targets: list[str], **more: Any) -> Any:
    """SGLang's ModelRunner as its own benchmark builds it."""
    from sglang.benchmark import one_batch
    from sglang.srt.entrypoints.engine import _set_envs_and_config
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import PortArgs, ServerArgs

    load_plugins()
    arguments = ServerArgs(
        model_path=model, device="cpu", dtype="float32", attention_backend="torch_native", sampling_backend="pytorch",
        grammar_backend="none", lora_backend="torch_native", disable_cuda_graph=True, log_level="error", page_size=1,
        max_running_requests=64, enable_lora=True, max_lora_rank=RANK, lora_target_modules=targets,
        max_loras_per_batch=7, **{**ENGINE_ARGS, **more},
    )  # fmt: skip
    arguments.resolve_once()
    _set_envs_and_config(arguments)
    arguments.check_server_args()
    publish(arguments, role="scheduler")
    one_batch.initialize_moe_config()
    one_batch.initialize_fp8_gemm_config()
    one_batch.initialize_fp4_gemm_config()
    return one_batch.load_model(arguments, PortArgs.init_new(arguments), 0, 0)[0].torch_runner


def in_process(model: str, out: str, start: str, **options: Any) -> None:
    """The in-process form, through SGLang's name, from the adapter in `start`."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    config = json.loads((Path(start) / "adapter_config.json").read_text())
    runner = model_runner(model, config["target_modules"])
    importlib.import_module("mezo.sglang")  # before the two imports of its names
    from sglang import mezo_finetune as under_sglangs_name
    from sglang.srt.mezo_trainer import MeZOTrainer

    from mezo.engines.sglang import versions

    assert isinstance(under_sglangs_name, functools.partial)
    adapter = load_file(str(Path(start) / "adapter_model.safetensors"))
    assert versions.load_into(runner.lora_manager, "mine", adapter, config) is None
    tokenizer = AutoTokenizer.from_pretrained(model)
    for shared in (True, False):
        folder = Path(out) / ("shared" if shared else "apart")
        trainer = MeZOTrainer(
            runner, runner.lora_manager, "mine", tokenizer, enable_kv_cache_optimization=shared,
            learning_rate=SETTING["learning_rate"], per_device_train_batch_size=8, max_steps=20, seed=3,
            output_dir=str(folder), disable_tqdm=True, **options,
        )  # fmt: skip
        trainer.train(rows(), rows()[:16])


def stale(model: str, out: str, start: str) -> None:
    """Losses of six directions, with updates between the last: cache on, cache key frozen, each row computed whole."""
    import torch
    from transformers import AutoTokenizer

    config = json.loads((Path(start) / "adapter_config.json").read_text())
    runner = model_runner(model, config["target_modules"])
    from mezo import MeZOConfig
    from mezo.encoding import make_encoder
    from mezo.engines.torch.loading import load_model_config
    from mezo.estimator import Record, TwoPoint

    mezo_config = MeZOConfig(model_name_or_path=model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    encoder = make_encoder(rows(), mezo_config, load_model_config(mezo_config), tokenizer, encoder_model=False)
    examples = encoder(rows()[:8])
    found: dict[str, list[list[float]]] = {}
    for case in ("cached", "frozen", "computed"):
        engine = engine_on(runner, model, start, share=case != "computed")
        engine.wave_cost = 0
        found[case] = []
        for step in range(6):
            if case == "frozen":
                engine._version = 0  # so that every step's key is the first one's
            losses_PN = engine.losses(examples, TwoPoint(3, 0.05).probes(step))
            found[case] += losses_PN.tolist()
            if step >= 2:  # the same update in all three cases, whatever their losses
                engine.update([Record(step, step, 0.0, 0.0, 1.0, 1e-3, 0, 8)])
        engine.close()
    assert all(torch.tensor(v).isfinite().all() for v in found.values())
    Path(out).write_text(json.dumps(found))


def engine_on(runner: Any, model: str, start: str, *, share: bool) -> Any:
    """An SGLangEngine on a bare ModelRunner, from the adapter in `start`."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    import mezo.sglang
    from mezo import MeZOConfig
    from mezo.engines.sglang import build
    from mezo.engines.sglang.engine import SGLangEngine
    from mezo.engines.torch.engine import trained_parameters

    targets = json.loads((Path(start) / "adapter_config.json").read_text())["target_modules"]
    config = MeZOConfig(model_name_or_path=model, use_peft=True, lora_r=RANK, lora_target_modules=targets)
    peft_model = build.adapter_on_meta(config)
    adapter = load_file(str(Path(start) / "adapter_model.safetensors"))
    for name, parameter in trained_parameters(peft_model).items():
        parameter.detach().copy_(adapter[name])
    client = mezo.sglang.InProcess(runner, runner.lora_manager)
    return SGLangEngine([client], peft_model, AutoTokenizer.from_pretrained(model), share_prefixes=share)


def table(model: str, out: str) -> None:
    """Reuse in percent of the second pass over each row of `tests.speed_table`."""
    import mezo.sglang
    from mezo import MeZOConfig
    from mezo.engines.sglang import build
    from mezo.engines.sglang.engine import SGLangEngine
    from mezo.estimator import TwoPoint
    from tests.speed_table import INVOCATION, TABLE, examples_of

    runner = model_runner(model, ["q_proj", "v_proj"], max_total_tokens=65536, context_length=2048)
    found = {}
    for row, ((*_, activated), _) in TABLE.items():
        variant = {"lora_variant": "alora", "alora_invocation_tokens": INVOCATION} if activated else {}
        config = MeZOConfig(
            model_name_or_path=model, use_peft=True, lora_r=RANK, lora_target_modules=["q_proj", "v_proj"], **variant
        )
        client = mezo.sglang.InProcess(runner, runner.lora_manager)
        engine = SGLangEngine([client], build.adapter_on_meta(config), None)
        for step in range(2):
            before = engine.work.asked, engine.work.computed
            engine.losses(examples_of(row, 28), TwoPoint(0, 1e-3).probes(step))
        asked, computed = engine.work.asked - before[0], engine.work.computed - before[1]
        found[row] = 100 * (1 - computed / asked)
        engine.close()
    Path(out).write_text(json.dumps(found))


def reuse(**arguments: Any) -> None:
    """See `tests.sglang.random_batches`."""
    from tests.sglang.random_batches import run

    run(**arguments)


if __name__ == "__main__":
    globals()[sys.argv[1]](**json.loads(sys.argv[2]))
