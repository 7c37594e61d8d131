"""Models from disk or Hub for the torch engine, with every fresh parameter a pure function of the seed."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from mezo import philox
from mezo.config import MeZOConfig
from mezo.errors import UserError, is_out_of_memory
from mezo.fingerprint import is_hub_name, weight_files
from mezo.hub import converted_revision

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_AUTO_CLASSES = {
    "causal_lm": AutoModelForCausalLM,
    "masked_lm": AutoModelForMaskedLM,
    "sequence_classification": AutoModelForSequenceClassification,
}


def device_for(config: MeZOConfig) -> torch.device:
    """The GPU if there is one and the config allows it."""
    return torch.device("cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu")


def with_safetensors(config: MeZOConfig) -> MeZOConfig:
    """The config with the revision that has safetensors, where the Hub's main one has pickled weights alone.

    That is the case of OPT. The revision then stands in the run's header, so replay and resume take the same.
    """
    name = config.model_name_or_path
    if config.model_revision != "main" or not is_hub_name(name) or Path(name).exists():
        return config
    revision = converted_revision(name)
    if revision is None:
        return config
    logger.warning("%s has pickled weights alone; taking the copy that the Hub's bot converted, %s", name, revision)
    return dataclasses.replace(config, model_revision=revision)


def load_model_config(config: MeZOConfig) -> PretrainedConfig:
    """The model's configuration, without its weights."""
    name = config.model_name_or_path
    if not is_hub_name(name) and not Path(name).exists():
        raise UserError(f"model_name_or_path: there is no folder {name!r}")
    try:
        model_config: PretrainedConfig = AutoConfig.from_pretrained(
            config.model_name_or_path, revision=config.model_revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model_name_or_path {config.model_name_or_path!r}: {_first_line(error)}") from None
    is_encoder(model_config)  # refuses other architectures
    return model_config


def is_encoder(model_config: PretrainedConfig) -> bool:
    """True for BERT-like encoders, False for decoder language models; other architectures are refused."""
    model_type = model_config.model_type
    if not getattr(model_config, "is_encoder_decoder", False):
        if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(model_config, "is_decoder", False):
            return True
        if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            text = model_config.get_text_config()
            if getattr(text, "is_causal", True) is False or getattr(text, "use_bidirectional_attention", None):
                raise UserError(f"this {model_type} attends to what follows a token; decoders must be causal")
            return False
    raise UserError(
        f"model architecture {model_type!r} is neither a decoder language model nor a masked-language-model encoder"
    )


def load_tokenizer(config: MeZOConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            config.model_name_or_path, revision=config.model_revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"no tokenizer in {config.model_name_or_path!r}: {_first_line(error)}") from None
    # Without any tokenizer files transformers makes one that knows only its special tokens.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(f"no tokenizer in {config.model_name_or_path!r}: its vocabulary is empty")
    return tokenizer


class LoadedModel(NamedTuple):
    """A model, the names of its modules that the checkpoint had no weights for, and that of a centred pooler."""

    model: PreTrainedModel
    fresh_modules: list[str]
    centred_module: str | None = None


def is_quantised(config: MeZOConfig, model_config: PretrainedConfig) -> bool:
    """Whether the base model's weights are quantised: by the config, or in the checkpoint."""
    return config.bits is not None or _by_checkpoint(model_config)


def _by_checkpoint(model_config: PretrainedConfig) -> bool:
    configs = (model_config, model_config.get_text_config())
    return any(getattr(c, "quantization_config", None) is not None for c in configs)


def _quantisation(config: MeZOConfig, model_config: PretrainedConfig, compute_dtype: torch.dtype) -> dict[str, object]:
    """What `from_pretrained` is told of quantised weights, which lie on their device from the start."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for each layer of each pass
    options: dict[str, object] = {"device_map": {"": device_for(config)}}
    if config.bits is None:
        return options
    name = f"load_in_{config.bits}bit"
    if _by_checkpoint(model_config):
        raise UserError(f"{name}: {config.model_name_or_path!r} is quantised already; leave it out")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{name} needs bitsandbytes: pip install 'mezo[quantization]'")
    quantisation = BitsAndBytesConfig(**{name: True}, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype)
    return {**options, "quantization_config": quantisation}


def load_model(config: MeZOConfig, kind: str, labels: Sequence[str] = ()) -> LoadedModel:
    """The base model in eval mode on its device.

    Args:
        config: names the model, type and device.
        kind: "causal_lm", "masked_lm" or "sequence_classification".
        labels: class names of a classification head. A head that the checkpoint lacks is drawn from the seed, and the
            layer that feeds it is centred (see `_centre`) unless `head_init` says otherwise.
    """
    device = device_for(config)
    dtype = config.dtype if config.dtype != "auto" or device.type != "cpu" else "float32"
    weight_files(config.model_name_or_path, config.model_revision)  # refuses pickled ones
    options: dict[str, object] = {"dtype": _DTYPES.get(dtype, "auto"), "trust_remote_code": config.trust_remote_code}
    options["use_safetensors"] = True
    model_config = load_model_config(config)
    quantised = is_quantised(config, model_config)
    if quantised:
        if kind == "sequence_classification":
            raise UserError("a classification head cannot be quantised; give template and label_words in its place")
        options |= _quantisation(config, model_config, _DTYPES.get(dtype) or model_config.dtype or torch.bfloat16)
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    if kind == "sequence_classification":
        options |= {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "ignore_mismatched_sizes": True}
        options["label2id"] = {label: i for i, label in enumerate(labels)}
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # missing heads are handled and reported below
    try:
        model, info = _AUTO_CLASSES[kind].from_pretrained(
            config.model_name_or_path, revision=config.model_revision, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, SafetensorError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and (is_out_of_memory(error) or not quantised):
            raise
        raise UserError(f"model_name_or_path {config.model_name_or_path!r}: {_first_line(error)}") from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    fresh = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
    if fresh and kind != "sequence_classification":
        raise UserError(
            f"{config.model_name_or_path!r} holds no weights for {sorted(fresh)[0]} and {len(fresh) - 1} more: it "
            "has no language-model head. On an encoder, leave label_words out to train a classification head."
        )
    _initialise(model, fresh, config.seed)
    fresh_modules = sorted({name.rpartition(".")[0] for name in fresh})
    model = model.eval().requires_grad_(False)
    model = _exact(model) if quantised else model.to(device)
    centred = _pooling_layer(model) if fresh and config.head_init == "centered" else None
    if centred is None:
        return LoadedModel(model, fresh_modules)
    _centre(model, model.get_submodule(centred), load_tokenizer(config), config.seed)
    if centred.startswith("classifier."):
        return LoadedModel(model, fresh_modules)
    return LoadedModel(model, [name for name in fresh_modules if name != centred], centred)


def _exact(model: PreTrainedModel) -> PreTrainedModel:
    """Without the kernel of bitsandbytes for CPUs with AVX512-BF16.

    It rounds weights, activations and outputs to bfloat16, in which both signs of a probe look alike, and does not find
    its scales again once a state dict was asked for.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def num_weights(model: torch.nn.Module) -> int:
    """Of all parameters; of quantised ones those that they stand for."""
    states = [(p, getattr(p, "quant_state", None)) for p in model.parameters()]
    return sum(p.numel() if state is None else math.prod(state.shape) for p, state in states)


def _pooling_layer(model: PreTrainedModel) -> str | None:
    """Name of the square layer whose tanh a classifier reads: BERT's pooler, the dense layer of RoBERTa's head."""
    for name in (f"{model.base_model_prefix}.pooler.dense", "classifier.dense"):
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(layer, torch.nn.Linear) and layer.in_features == layer.out_features and layer.bias is not None:
            return name
    return None


@torch.no_grad()
def _centre(
    model: PreTrainedModel, layer: torch.nn.Linear, tokenizer: PreTrainedTokenizerBase, seed: int, count: int = 64
) -> None:
    """Makes `layer` h − h̄, h̄ being the mean of its inputs over `count` sequences of random tokens.

    Hidden states of encoders share a large mean, which says nothing of the input. A random direction of the classifier
    moves all logits along it, so the mean drowns the part of projected_grad that the classes differ in. A pooler that
    comes with the checkpoint is replaced too: it was trained for another task, or, in sentence encoders, not at all
    (arXiv 2006.05987 finds that drawing it anew helps).
    """
    length = 16
    stream = philox.stream_id("initialisation", "centring tokens")
    u_N = philox.uniforms(seed, stream, 0, count * length, torch.device("cpu"))
    ids_RS = (u_N * model.config.vocab_size).long().view(count, length)
    if tokenizer.cls_token_id is not None:
        ids_RS[:, 0] = tokenizer.cls_token_id
    if tokenizer.sep_token_id is not None:
        ids_RS[:, -1] = tokenizer.sep_token_id
    inputs: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        model(input_ids=ids_RS.to(model.device), attention_mask=torch.ones_like(ids_RS).to(model.device))
    finally:
        handle.remove()
    layer.weight.copy_(torch.eye(layer.in_features))
    layer.bias.copy_(-torch.cat(inputs).float().mean(dim=0))


def _initialise(model: PreTrainedModel, names: set[str], seed: int) -> None:
    """Fresh weights: N(0, initializer_range²) from the seed; biases 0."""
    std = float(getattr(model.config, "initializer_range", 0.02))
    parameters: Mapping[str, torch.Tensor] = dict(model.named_parameters())
    for name in sorted(names & parameters.keys()):
        parameter = parameters[name].detach()
        if parameter.ndim < 2:
            parameter.zero_()
            continue
        stream = philox.stream_id("initialisation", name)
        z_N = philox.normals(seed, stream, torch.tensor([0]), parameter.numel())[0]
        parameter.copy_(z_N.mul_(std).view(parameter.shape))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
