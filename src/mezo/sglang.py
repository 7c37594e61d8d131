"""MeZO with SGLang's own objects, and under SGLang's name.

    import mezo.sglang
    from sglang import mezo_finetune                      # works once mezo.sglang has been imported
    from sglang.srt.mezo_trainer import MeZOTrainer

`mezo_finetune` here is `mezo.mezo_finetune` with engine "sglang" and LoRA of rank 8 for defaults.
"""

from __future__ import annotations

import functools
import json
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

import sglang as _sglang
import sglang.srt as _srt
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback

from mezo import api
from mezo.api import build_trainer
from mezo.config import MeZOConfig
from mezo.data import TrainData
from mezo.engines.sglang import versions
from mezo.engines.sglang.build import adapter_on_meta, run_name
from mezo.engines.sglang.engine import SGLangEngine
from mezo.engines.sglang.plugin import BASE_PREFIX, keep_tensors
from mezo.engines.sglang.worker import Worker
from mezo.engines.torch.engine import trained_parameters
from mezo.errors import EngineError, UserError
from mezo.trainer import TrainResult, make_estimator

__all__ = ["MeZOConfig", "MeZOTrainer", "mezo_finetune"]

mezo_finetune = functools.partial(api.mezo_finetune, engine="sglang", lora_rank=8)


class MeZOTrainer:
    """Trains an adapter inside a `ModelRunner`, without scheduler and without server.

    Args:
        model_runner: SGLang's, with memory pools and attention backends made and LoRA enabled.
        lora_manager: its LoRA manager.
        lora_name: adapter that is loaded there; training starts from its values.
        tokenizer: the model's.
        enable_kv_cache_optimization: rows with the same prompt share its keys and values within one perturbation, which
            is exact. Off: each row computes everything.
        options: fields of `MeZOConfig`: learning_rate, max_steps, output_dir, …

    The runner needs slots (`max_loras_per_batch`) for all probes of a step, the adapter and the base model. The adapter
    as it was at the start is saved as `checkpoint-0`, because no seed makes it anew.
    """

    def __init__(
        self,
        model_runner: Any,
        lora_manager: Any,
        lora_name: str,
        tokenizer: PreTrainedTokenizerBase,
        enable_kv_cache_optimization: bool = True,
        **options: object,
    ):
        versions.installed()
        self._client = InProcess(model_runner, lora_manager)
        self._tokenizer = tokenizer
        loaded = lora_manager.configs[versions.adapter_id(lora_manager, lora_name)]
        self.config = MeZOConfig.from_dict(
            {
                "model_name_or_path": model_runner.model_config.model_path,
                "engine": "sglang",
                "use_peft": True,
                "lora_r": int(loaded.r),
                "lora_alpha": float(loaded.lora_alpha),
                "lora_target_modules": _names(loaded.target_modules),
                "enable_kv_cache_optimization": enable_kv_cache_optimization,
                **options,
            }
        )
        self._initial = versions.adapter_tensors(
            lora_manager, lora_name, trained_parameters(adapter_on_meta(self.config))
        )

    def train(
        self,
        train_dataset: TrainData,
        eval_dataset: TrainData | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> TrainResult:
        """Trains as `mezo.mezo_finetune` does; the result's adapter loads in PEFT and in SGLang."""
        adapter = adapter_on_meta(self.config)
        for name, parameter in trained_parameters(adapter).items():
            parameter.detach().copy_(self._initial[name])
        engine = SGLangEngine(
            [self._client],
            adapter,
            self._tokenizer,
            num_probes=len(make_estimator(self.config).probes(0)),
            normalize_perturbations=self.config.normalize_perturbations,
            weight_decay=self.config.weight_decay,
            eval_batch_size=self.config.per_device_eval_batch_size,
            owner=run_name(self.config),
            share_prefixes=self.config.enable_kv_cache_optimization,
        )
        trainer = build_trainer(self.config, train_dataset, eval_dataset, callbacks, engine=engine)
        trainer.save_initial()
        try:
            return trainer.train()
        finally:
            engine.close()


def _names(modules: str | Sequence[str]) -> list[str]:
    return [modules] if isinstance(modules, str) else list(modules)


class InProcess:
    """`mezo.engines.sglang.client.Client` on a bare ModelRunner."""

    name = "ModelRunner"

    def __init__(self, model_runner: Any, lora_manager: Any):
        self._manager = lora_manager
        self._prefill = versions.Prefill(model_runner, versions.new_tree(model_runner, BASE_PREFIX))
        self._worker = Worker(
            types.SimpleNamespace(
                tp_worker=types.SimpleNamespace(model_runner=model_runner), mezo_prefill=self._prefill
            )
        )

    def command(self, command: dict[str, object]) -> Any:
        """See `Client.command`."""
        answer = self._worker.run(json.dumps(command))
        if not answer:
            raise EngineError(f"{self.name}: {self._worker.state()['error']}")
        return answer

    def info(self) -> Mapping[str, Any]:
        """See `Client.info`."""
        return {"tp_size": 1, "internal_states": [{"mezo": self._worker.state()}]}

    def generate(self, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        """See `Client.generate`; a bare ModelRunner has no loop that generates."""
        if any(options["max_new_tokens"] for options in body["sampling_params"]):
            raise UserError("a bare ModelRunner generates no texts; sglang_mode colocate or server does")
        try:
            return self._prefill(body)()
        except RuntimeError as error:  # no room in the memory pools, say
            raise EngineError(f"{self.name}: {str(error).strip().splitlines()[0]}") from error

    def load_adapter(self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, object]) -> None:
        """See `Client.load_adapter`."""
        reason = versions.load_into(self._manager, name, tensors, config)
        if reason is not None:
            raise EngineError(f"{self.name}: {reason}")
        keep_tensors(self._manager, name, tensors)

    def unload_adapter(self, name: str) -> None:
        """See `Client.unload_adapter`."""
        versions.unload_from(self._manager, name)

    def close(self) -> None:
        """See `Client.close`; the runner is the caller's."""
        self._prefill.close()


def _install() -> None:
    module = types.ModuleType("sglang.srt.mezo_trainer", __doc__)
    for name in __all__:
        setattr(module, name, globals()[name])
    sys.modules[module.__name__] = module
    _srt.mezo_trainer = module
    _sglang.mezo_finetune = mezo_finetune


_install()
