"""LoRA and prefix tuning through PEFT, with initial values that are a pure function of model and seed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mezo import philox
from mezo.config import MeZOConfig
from mezo.engines.torch.layers import first_trainable
from mezo.engines.torch.reuse import reach
from mezo.errors import UserError

_TASK_TYPES = {
    "causal_lm": TaskType.CAUSAL_LM,
    # PEFT has no task type for masked language models; this one passes everything through to them.
    "masked_lm": TaskType.FEATURE_EXTRACTION,
    "sequence_classification": TaskType.SEQ_CLS,
}
# Queries and values, as in the paper, by the names that model families give them.
_QUERY_VALUE_NAMES = (("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin"), ("query_key_value",), ("c_attn",))


def add_adapter(
    model: PreTrainedModel,
    config: MeZOConfig,
    kind: str,
    fresh_modules: Sequence[str] = (),
    centred_module: str | None = None,
) -> PeftModel:
    """Wraps `model` (not to be used afterwards) with the adapter that the config describes, at its initial values.

    `fresh_modules`, which the base checkpoint has no weights for, are trained and saved with the adapter;
    `centred_module`, which differs from the checkpoint's, is saved with it.
    """
    if config.peft_type == "lora":
        saved_modules = [*fresh_modules, *([] if centred_module is None else [centred_module])]
        adapted = get_peft_model(model, _lora_config(model, config, kind, saved_modules))
        _materialise(adapted)
        _initialise_lora(adapted, config.seed)
        if centred_module is not None:
            adapted.get_submodule(f"base_model.model.{centred_module}").requires_grad_(False)
        return adapted.eval()
    prefix_V = _real_activations(model, config)
    try:
        adapted = get_peft_model(model, _prefix_config(config, kind))
    except (ValueError, AttributeError) as error:
        raise UserError(f"prefix tuning does not fit {model.config.model_type!r} models: {error}") from None
    embedding = adapted.prompt_encoder["default"].embedding.weight.detach()
    if embedding.shape != prefix_V.shape:
        raise UserError(f"prefix tuning does not fit {model.config.model_type!r} models: its cache has another layout")
    embedding.copy_(prefix_V)
    return adapted.eval()


def canonical_name(parameter_name: str) -> str:
    """The name under which PEFT saves an adapter's parameter."""
    if parameter_name.startswith("prompt_encoder."):
        return "prompt_embeddings"
    return parameter_name.replace(".modules_to_save.default.", ".").replace(".default.", ".")


def _lora_config(model: PreTrainedModel, config: MeZOConfig, kind: str, saved_modules: Sequence[str]) -> PeftConfig:
    if config.lora_variant == "alora":
        _check_cache(model.config, config.engine)
    targets = target_modules(model, config.lora_target_modules)
    return LoraConfig(
        task_type=_TASK_TYPES[kind],
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        target_modules=targets,
        # PEFT adds the classification head by itself.
        modules_to_save=[m for m in saved_modules if m.split(".")[0] not in ("classifier", "score")] or None,
        fan_in_fan_out=any(isinstance(m, Conv1D) for name, m in model.named_modules() if name.endswith(tuple(targets))),
        alora_invocation_tokens=config.alora_invocation_tokens if config.lora_variant == "alora" else None,
        layers_to_transform=_adapted_layers(model, config),
    )


def _check_cache(model_config: PretrainedConfig, engine: str) -> None:
    text = model_config.get_text_config()
    if not reach(model_config):
        raise UserError(f"lora_variant alora does not know the keys and values of {text.model_type!r} models")
    if engine == "sglang" and "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        raise UserError(
            "lora_variant alora on SGLang: a model some of whose layers see a sliding window is not supported"
        )


def _adapted_layers(model: PreTrainedModel, config: MeZOConfig) -> list[int] | None:
    if config.trainable_layers is None:
        return None
    num_layers = model.config.num_hidden_layers
    first = first_trainable(config.trainable_layers, num_layers)
    if first is None:
        raise UserError("trainable_layers: with an adapter only last:k; choose modules with lora_target_modules")
    return list(range(first, num_layers))


def target_modules(model: PreTrainedModel, wanted: list[str] | None) -> list[str]:
    """`wanted` if the model has such modules, else the names of its query and value projections."""
    present = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    if wanted is not None:
        missing = [name for name in wanted if name.rsplit(".", 1)[-1] not in present]
        if missing:
            raise UserError(
                f"lora_target_modules: the model has no module {missing[0]!r}; it has {sorted(present - {''})}"
            )
        return wanted
    for names in _QUERY_VALUE_NAMES:
        if present.issuperset(names):
            return list(names)
    raise UserError(
        f"lora_target_modules: name them for {model.config.model_type!r} models; there are {sorted(present)}"
    )


def _initialise_lora(model: PeftModel, seed: int) -> None:
    """A ~ U(−1/√in, 1/√in), PEFT's own default, drawn from the seed; B stays 0."""
    for parameter_name, parameter in model.named_parameters():
        if ".lora_A." in parameter_name:
            bound = 1 / math.sqrt(parameter.shape[1])
            stream = philox.stream_id("initialisation", canonical_name(parameter_name))
            u_N = philox.uniforms(seed, stream, 0, parameter.numel(), torch.device("cpu"))
            parameter.detach().copy_(((u_N * 2 - 1) * bound).view(parameter.shape))


def _materialise(model: PeftModel) -> None:
    """Gives LoRA's matrices memory where the base model has none; B starts at 0."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta and parameter.requires_grad:
                values = torch.zeros(parameter.shape, dtype=torch.float32)
                setattr(module, name, torch.nn.Parameter(values))


def _prefix_config(config: MeZOConfig, kind: str) -> PeftConfig:
    return PrefixTuningConfig(task_type=_TASK_TYPES[kind], num_virtual_tokens=config.num_virtual_tokens)


@torch.no_grad()
def _real_activations(model: PreTrainedModel, config: MeZOConfig) -> Tensor:
    """Keys and values of random tokens of the vocabulary, [num_virtual_tokens, layers · 2 · kv_heads · head_dim].

    The paper's "prefix_init_by_real_act" (section E.5); PEFT's layout: token, layer, (key, value), head, dimension.
    """
    count = config.num_virtual_tokens
    u_T = philox.uniforms(
        config.seed, philox.stream_id("initialisation", "prefix tokens"), 0, count, torch.device("cpu")
    )
    ids_1T = (u_T * model.config.vocab_size).long()[None].to(model.device)
    cache = DynamicCache()
    try:
        model.base_model(input_ids=ids_1T, past_key_values=cache, use_cache=True)
        layers = [torch.stack((layer.keys[0], layer.values[0])) for layer in cache.layers]
    except (TypeError, AttributeError, ValueError) as error:
        raise UserError(f"prefix tuning does not fit {model.config.model_type!r} models: {error}") from None
    if not layers:
        raise UserError(f"prefix tuning does not fit {model.config.model_type!r} models: they fill no key/value cache")
    states_LSHTD = torch.stack(layers)
    return states_LSHTD.permute(3, 0, 1, 2, 4).reshape(count, -1)
