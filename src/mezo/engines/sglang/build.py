"""From a config to an engine on SGLang."""

from __future__ import annotations

import functools
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers import logging as transformers_logging

from mezo.adapter import add_adapter
from mezo.config import MeZOConfig
from mezo.engines.sglang import versions
from mezo.engines.sglang.client import Client, Colocated, Server
from mezo.engines.sglang.engine import SGLangEngine
from mezo.engines.sglang.plugin import RADIX_BACKEND
from mezo.engines.sglang.worker import sample_hash
from mezo.engines.torch.loading import load_model_config
from mezo.errors import EngineError, UserError
from mezo.fingerprint import checkpoint_tensor

RUN_NAME_FILE = "sglang_run"


def build_engine(config: MeZOConfig, kind: str, tokenizer: PreTrainedTokenizerBase, num_probes: int) -> SGLangEngine:
    """The engine of a config: SGLang started here, or servers that run already.

    Raises:
        UserError: what SGLang cannot train.
        EngineError: SGLang does not start, does not answer, or serves another model.
    """
    if kind != "causal_lm":
        raise UserError("engine sglang trains decoder language models; use engine torch for encoders")
    if not config.use_peft or config.peft_type != "lora":
        raise UserError("engine sglang trains LoRA adapters: set use_peft, or use engine torch")
    adapter = adapter_on_meta(config)
    if config.trainable_layers is not None:
        raise UserError("engine sglang trains adapters in all layers; trainable_layers needs engine torch")
    attention = {"q_proj", "k_proj", "v_proj"} & adapter.peft_config["default"].target_modules
    if attention and not attention >= {"q_proj", "v_proj"}:
        raise UserError("lora_target_modules: SGLang stacks q, k and v, so q_proj and v_proj must both be among them")
    clients = connect(config, adapter, num_probes)
    try:
        for client in clients:
            check_server(client.info(), client.name, config, num_probes)
    except BaseException:
        for client in clients:
            client.close()
        raise
    return SGLangEngine(
        clients,
        adapter,
        tokenizer,
        num_probes=num_probes,
        normalize_perturbations=config.normalize_perturbations,
        weight_decay=config.weight_decay,
        updates=config.sglang_updates,
        eval_batch_size=config.per_device_eval_batch_size,
        share_prefixes=config.enable_kv_cache_optimization,
        owner=run_name(config),
        base_samples=functools.partial(_base_sample, config) if config.sglang_mode == "server" else None,
    )


def _base_sample(config: MeZOConfig, name: str, dtype: str, shape: list[int]) -> str | None:
    """Of weights that SGLang keeps as they are: not merged, padded, packed, or cut for tensor parallelism."""
    tensor = checkpoint_tensor(config.model_name_or_path, config.model_revision, name)
    if tensor is None or list(tensor.shape) != shape:
        return None
    return sample_hash(tensor.to(getattr(torch, dtype)))


def run_name(config: MeZOConfig) -> str:
    """Name of the run in SGLang, kept in its folder, so that a resumed run finds what it left on any machine."""
    path = Path(config.output_dir) / RUN_NAME_FILE
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex[:16])
    return path.read_text()


def adapter_on_meta(config: MeZOConfig) -> PeftModel:
    """The adapter at its initial values in float32, around a base model without weights."""
    model_config = load_model_config(config)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
        base.name_or_path = config.model_name_or_path
        base.requires_grad_(False)
        return add_adapter(base, config, "causal_lm")
    finally:
        transformers_logging.set_verbosity(verbosity)


def connect(config: MeZOConfig, adapter: PeftModel, num_probes: int) -> list[Client]:
    """The clients that the config describes."""
    if config.sglang_mode == "server":
        if not config.sglang_server_base_url:
            raise UserError("sglang_mode server needs sglang_server_base_url")
        key = config.sglang_api_key or os.environ.get("SGLANG_API_KEY")
        admin_key = config.sglang_admin_api_key or os.environ.get("SGLANG_ADMIN_API_KEY")
        return [Server(url, key, admin_key) for url in config.sglang_server_base_url]
    return [Colocated(engine_arguments(config, adapter, num_probes))]


def engine_arguments(config: MeZOConfig, adapter: PeftModel, num_probes: int) -> dict[str, Any]:
    """`ServerArgs` of the engine that we start; `sglang_engine_args` win."""
    peft_config = adapter.peft_config["default"]
    arguments: dict[str, Any] = {
        "model_path": config.model_name_or_path,
        "revision": None if config.model_revision == "main" else config.model_revision,
        "trust_remote_code": config.trust_remote_code,
        "dtype": config.dtype,
        "tp_size": config.sglang_tp_size,
        "enable_lora": True,
        "max_lora_rank": config.lora_r,
        "lora_target_modules": sorted(peft_config.target_modules),
        "max_loras_per_batch": num_probes + 1,
        "disable_radix_cache": not config.enable_kv_cache_optimization,
        "log_level": "error",
        "random_seed": 0,
    }
    if config.use_cpu or not torch.cuda.is_available():
        arguments |= {
            "device": "cpu",
            "dtype": "float32" if config.dtype == "auto" else config.dtype,
            "attention_backend": "torch_native",
            "sampling_backend": "pytorch",
            "grammar_backend": "none",
            "lora_backend": "torch_native",
            "disable_cuda_graph": True,
            "disable_overlap_schedule": True,
            "skip_server_warmup": True,
        }
    else:
        arguments["attention_backend"] = "triton"  # rows of a batch share what is not cached yet
    if config.lora_variant == "alora":
        arguments |= {
            "radix_cache_backend": RADIX_BACKEND,
            "disable_radix_cache": False,
            "page_size": 1,
        }
    more = config.sglang_engine_args or {}
    return {**arguments, **{name: yaml.safe_load(str(value)) for name, value in more.items()}}


def check_server(info: Mapping[str, Any], name: str, config: MeZOConfig, num_probes: int) -> None:
    """A server that can train this adapter, or a clear error."""
    if info.get("version"):
        versions.check_version(str(info["version"]), name)
    if not info.get("enable_lora"):
        raise EngineError(f"{name} runs without LoRA; start it with --enable-lora")
    rank = info.get("max_lora_rank")
    if rank is not None and rank < config.lora_r:
        raise EngineError(f"lora_r is {config.lora_r}, but {name} was started with --max-lora-rank {rank}")
    slots = info.get("max_loras_per_batch")
    if slots is not None and slots < num_probes + 1:
        raise EngineError(
            f"{name} has {slots} adapter slots; {num_probes} probes and the base model need {num_probes + 1}: "
            f"start it with --max-loras-per-batch {num_probes + 1}"
        )
    if config.lora_variant == "alora":
        needed = {"radix_cache_backend": RADIX_BACKEND, "page_size": 1, "disable_radix_cache": False}
        wrong = [f"--{key.replace('_', '-')} {value}" for key, value in needed.items() if info.get(key) != value]
        if wrong:
            raise EngineError(f"lora_variant alora: start {name} with {' '.join(wrong)}")
