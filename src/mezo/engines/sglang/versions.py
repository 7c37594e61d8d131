"""Everything that depends on SGLang's release. Read against 0.5.17 and 0.5.20."""

from __future__ import annotations

import importlib.metadata
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mezo.errors import UserError

OLDEST, NEWEST = (0, 5, 17), (0, 5, 20)

# Where the plugin hooks in; `sglang.srt.plugins.hook_registry` resolves the names.
SET_STATE = "sglang.srt.managers.scheduler.Scheduler.set_internal_state"
GET_STATE = "sglang.srt.managers.scheduler.Scheduler.get_internal_state"
LOAD_TENSORS = "sglang.srt.lora.lora_manager.LoRAManager.load_lora_adapter_from_tensors"


def installed() -> str:
    """SGLang's version.

    Raises:
        UserError: not installed, or older than what this module was read against.
    """
    try:
        version = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("engine sglang needs SGLang here: pip install 'mezo[sglang]'") from None
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    if numbers < OLDEST:
        raise UserError(f"engine sglang needs SGLang {_dotted(OLDEST)} to {_dotted(NEWEST)}, found {version}")
    return version


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def set_state_request(values: Mapping[str, int]) -> Any:
    """The request behind POST /set_internal_state."""
    from sglang.srt.managers.io_struct import SetInternalStateReq

    return SetInternalStateReq(server_args=dict(values))


def set_state_answer(updated: bool) -> Any:
    """What a hook of `SET_STATE` returns."""
    from sglang.srt.managers.io_struct import SetInternalStateReqOutput

    return SetInternalStateReqOutput(updated=updated)


def generate_request(body: Mapping[str, Any]) -> Any:
    """The request behind POST /generate; `Engine.generate` knows no `extra_key`."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    return GenerateReqInput(**body)


def load_request(body: Mapping[str, Any]) -> Any:
    """The request behind POST /load_lora_adapter_from_tensors."""
    from sglang.srt.managers.io_struct import LoadLoRAAdapterFromTensorsReqInput

    return LoadLoRAAdapterFromTensorsReqInput(**body)


def unload_request(name: str) -> Any:
    """The request behind POST /unload_lora_adapter."""
    from sglang.srt.managers.io_struct import UnloadLoRAAdapterReqInput

    return UnloadLoRAAdapterReqInput(lora_name=name)


def serialized(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors for `load_lora_adapter_from_tensors`: a plain pickle, which crosses machines.

    SGLang's own serializer puts a handle of shared memory into it, which does not.
    """
    return pickle.dumps({name: t.detach().cpu().contiguous() for name, t in tensors.items()})


def lora_manager(scheduler: Any) -> Any:
    """The LoRA manager of a scheduler process, or None without LoRA."""
    runner = scheduler.tp_worker.model_runner
    return runner.lora_manager if runner.server_args.enable_lora else None


def tp_size(scheduler: Any) -> int:
    """Tensor-parallel ranks."""
    return int(scheduler.tp_worker.model_runner.server_args.tp_size)


def adapter_id(manager: Any, name: str) -> str:
    """SGLang's id of a loaded adapter."""
    for lora_id, ref in manager.lora_refs.items():
        if ref.lora_name == name:
            return str(lora_id)
    raise UserError(f"no adapter {name!r} is loaded in SGLang")


def make_resident(manager: Any, names: list[str]) -> list[int]:
    """Puts the adapters into slots of the memory pool and returns the slots' numbers."""
    ids = [adapter_id(manager, name) for name in names]
    missing = [i for i in ids if i not in manager.memory_pool.uid_to_buffer_id]
    if missing:
        manager.fetch_new_loras(set(ids))
    return [manager.memory_pool.get_buffer_id(i) for i in ids]


def stacked_weights(manager: Any, name: str, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """`tensors` of an adapter under PEFT's names, as SGLang stacks them (q, k, v in one), layer by layer."""
    loaded = manager.loras[adapter_id(manager, name)]
    adapter = type(loaded)(loaded.uid, loaded.config, loaded.base_hf_config, loaded.load_config, loaded.lora_backend)
    adapter.initialize_weights_from_tensors(dict(tensors))
    return [dict(layer.weights) for layer in adapter.layers]


def slot_views(manager: Any, slot: int, rank: int) -> Iterator[tuple[int, str, Any, Tensor, Tensor]]:
    """(layer, target, module, A view, B view) of each adapted module in one slot of the memory pool."""
    from sglang.srt.lora.utils import get_stacked_multiply, get_target_module_name

    pool = manager.memory_pool
    for layer, modules in enumerate(manager.lora_modules):
        for module_name in sorted(modules):
            target = get_target_module_name(module_name, pool.target_modules)
            count = get_stacked_multiply(target, manager.base_model)
            a = pool.A_buffer[target][layer][slot, : rank * count]
            yield layer, target, modules[module_name], a, pool.B_buffer[target][layer][slot, :, :rank]


def target_of(manager: Any, weight_name: str) -> str:
    """The memory pool's name of the module that a stacked weight belongs to."""
    from sglang.srt.lora.utils import get_target_module_name

    return str(get_target_module_name(weight_name, manager.memory_pool.target_modules))


def slots_changed(manager: Any, slots: list[int]) -> None:
    """Tells SGLang's layers that slots were written, where they keep copies."""
    notify = getattr(manager, "_notify_lora_slots_updated", None)
    if notify is not None:
        notify(set(slots))


def complete_opt() -> None:
    """Gives SGLang's OPT the method that LoRA asks models for; its config has no `num_key_value_heads`."""
    from sglang.srt.models.opt import OPTForCausalLM

    if hasattr(OPTForCausalLM, "get_hidden_dim"):
        return

    def get_hidden_dim(self: Any, module_name: str, layer_idx: int) -> tuple[int, int]:
        hidden, inner = self.config.hidden_size, self.config.ffn_dim
        shapes = {
            "qkv_proj": (hidden, 3 * hidden),
            "out_proj": (hidden, hidden),
            "fc1": (hidden, inner),
            "fc2": (inner, hidden),
        }
        if module_name not in shapes:
            raise NotImplementedError(f"OPT has no LoRA module {module_name!r}")
        return shapes[module_name]

    OPTForCausalLM.get_hidden_dim = get_hidden_dim


def without_pinned_memory() -> None:
    """SGLang's LoRA asks for pinned memory, which a machine without an accelerator does not have."""
    if torch.cuda.is_available():
        return
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like"):
        setattr(torch, name, _ignoring_pin_memory(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self, *_, **__: self  # type: ignore[method-assign]


def _ignoring_pin_memory(function: Any) -> Any:
    def call(*args: Any, pin_memory: bool = False, **options: Any) -> Any:
        return function(*args, **options)

    return call


def adapter_tensors(manager: Any, name: str, names_of: Any) -> dict[str, Tensor]:
    """Float32 tensors of a loaded adapter under PEFT's names, unstacked.

    Args:
        manager: SGLang's LoRA manager.
        name: the adapter.
        names_of: (rank, targets) → tensors under PEFT's names with the right shapes.
    """
    loaded = manager.loras[adapter_id(manager, name)]
    templates: dict[str, Tensor] = names_of(loaded.config.r, list(loaded.config.target_modules))
    marks = {key: torch.full(t.shape, i + 1.0) for i, (key, t) in enumerate(templates.items())}
    tensors = {}
    for layer, marked in zip(loaded.layers, stacked_weights(manager, name, marks), strict=True):
        for key, mark in marked.items():
            for number in mark[:, 0].unique().int().tolist():
                if number:
                    parameter = list(templates)[number - 1]
                    tensors[parameter] = layer.weights[key][mark[:, 0] == number].float().clone()
    return tensors


def load_into(manager: Any, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, object]) -> str | None:
    """Loads an adapter into a LoRA manager; the reason if it cannot be."""
    from sglang.srt.lora.lora_registry import LoRARef

    reference = LoRARef(lora_name=name, lora_path="__tensor__", pinned=True)
    result = manager.load_lora_adapter_from_tensors(reference, dict(tensors), dict(config))
    return None if result.success else str(result.error_message)


def unload_from(manager: Any, name: str) -> None:
    """Takes an adapter out of a LoRA manager, if it is there."""
    for reference in list(manager.lora_refs.values()):
        if reference.lora_name == name:
            manager.unload_lora_adapter(reference)


class Prefill:
    """Prefill batches on a bare `ModelRunner`, with a radix cache and without a scheduler.

    Args:
        model_runner: with memory pools and attention backends made.
    """

    def __init__(self, model_runner: Any):
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.radix_cache import RadixCache

        self._runner = model_runner
        self._tree = RadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=model_runner.req_to_token_pool,
                token_to_kv_pool_allocator=model_runner.token_to_kv_pool_allocator,
                page_size=model_runner.server_args.page_size,
                is_eagle=False,
                tp_cache_group=None,
            )
        )
        self._count = 0

    @torch.no_grad()
    def __call__(self, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Answers a body of POST /generate that asks for prefill only, as SGLang would."""
        from array import array

        from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
        from sglang.srt.mem_cache.common import release_kv_cache
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch
        from sglang.srt.sampling.sampling_params import SamplingParams
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

        runner, requests = self._runner, []
        ids = [adapter_id(runner.lora_manager, name) for name in body["lora_path"]]
        top = body["top_logprobs_num"]
        for tokens, start, lora_id in zip(body["input_ids"], body["logprob_start_len"], ids, strict=True):
            self._count += 1
            request = Req(
                rid=str(self._count),
                origin_input_text="",
                origin_input_ids=array("q", tokens),
                sampling_params=SamplingParams(temperature=0, max_new_tokens=0),
                return_logprob=True,
                top_logprobs_num=top,
                lora_id=lora_id,
                extra_key=body["extra_key"],
            )
            request.logprob_start_len = start
            request.init_next_round_input(self._tree)
            self._tree.inc_lock_ref(request.last_node)
            request.set_extend_range(len(request.prefix_indices), len(request.full_untruncated_fill_ids))
            requests.append(request)
        runner.lora_manager.fetch_new_loras(set(ids))
        batch = ScheduleBatch.init_new(
            reqs=requests,
            req_to_token_pool=runner.req_to_token_pool,
            token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
            tree_cache=self._tree,
            model_config=runner.model_config,
            enable_overlap=False,
            spec_algorithm=SpeculativeAlgorithm.NONE,
        )
        batch.prepare_for_extend()
        if batch.input_ids is None:
            batch.input_ids = batch.prefill_input_ids_cpu.to(batch.device)
            batch.prefill_input_ids_cpu = None
        forward = ForwardBatch.init_new(batch, runner, return_hidden_states_before_norm=False)
        output = runner.forward(forward).logits_output
        answers, at = [], 0
        logprobs = output.input_token_logprobs.tolist()
        for row, request in enumerate(requests):
            count = batch.extend_lens[row] - batch.extend_logprob_start_lens[row]
            tokens = body["input_ids"][row][len(body["input_ids"][row]) - count :]
            read = [(None, tokens[0]), *zip(logprobs[at : at + count - 1], tokens[1:], strict=True)]
            info: dict[str, Any] = {"input_token_logprobs": read, "cached_tokens": len(request.prefix_indices)}
            if top:
                best = output.input_top_logprobs_idx[row][: count - 1]
                info["input_top_logprobs"] = [None, *([(0.0, entry[0])] for entry in best)]
            answers.append({"meta_info": info})
            at += count
        for request in requests:
            request.finished_len = 0
            release_kv_cache(request, self._tree)
        return answers
