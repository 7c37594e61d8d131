"""Everything that depends on SGLang's release. Read against 0.5.17 and 0.5.20."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import pickle  # nosec B403
import re
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mezo.errors import UserError

logger = logging.getLogger(__name__)

OLDEST, NEWEST = (0, 5, 17), (0, 5, 20)

# Attention backends, by class, that write a layer's new keys and values before they read any; tested.
_WRITE_BEFORE_READING = frozenset(["TritonAttnBackend", "TorchNativeAttnBackend"])
_SMALL_TILE, _SMALL_TILE_WARPS = 16, 2  # the fewest rows of a tensor core's product
_FILLING_TOKENS = 2048  # new tokens that keep a GPU busy while the next batch is prepared

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
    check_version(version, "SGLang here")
    return version


def check_version(version: str, where: str) -> None:
    """Refuses releases older than what this module was read against, and warns of newer ones."""
    numbers = tuple(map(int, re.findall(r"\d+", version)[:3]))
    wanted = f"SGLang {_dotted(OLDEST)} to {_dotted(NEWEST)}"
    if numbers < OLDEST:
        raise UserError(f"engine sglang needs {wanted}; {where} is {version}")
    if numbers > NEWEST:
        logger.warning("engine sglang was tested with %s; %s is %s", wanted, where, version)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def all_ranks(scheduler: Any, value: str) -> list[str]:
    """The value of every tensor-parallel rank."""
    group = getattr(scheduler, "tp_cpu_group", None)
    if group is None or torch.distributed.get_world_size(group) == 1:
        return [value]
    values: list[str] = [""] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def base_parameters(scheduler: Any) -> dict[str, Tensor]:
    """The served model's parameters by SGLang's names."""
    return dict(scheduler.tp_worker.model_runner.model.named_parameters())


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


def adapter_tensors(manager: Any, name: str, templates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float32 tensors of a loaded adapter under PEFT's names, unstacked.

    Args:
        manager: SGLang's LoRA manager.
        name: the adapter.
        templates: tensors under PEFT's names with the right shapes.
    """
    loaded = manager.loras[adapter_id(manager, name)]
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


def base_prefix_cache(params: Any, mark: str) -> Any:
    """SGLang's radix cache, in which a request may take the base model's keys and values for its first tokens.

    Such a request names their number and key under `mark` in its `custom_params`. What it computes depends on its
    adapter from some token on and on the base model before, so it is left out of the tree.
    """
    from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

    class BasePrefixRadixCache(RadixCache):
        def match_prefix(self, params: Any) -> Any:
            request = params.req
            custom = getattr(getattr(request, "sampling_params", None), "custom_params", None)
            if isinstance(custom, dict) and mark in custom:
                length, key = custom[mark]
                request.skip_radix_cache_insert = True
                params.key = RadixKey(params.key.token_ids, key, limit=length)
            return super().match_prefix(params)

    return BasePrefixRadixCache(params)


def register_radix_backend(name: str, mark: str) -> None:
    """Makes `base_prefix_cache` known as --radix-cache-backend."""
    from sglang.srt.mem_cache.registry import register_radix_cache_backend, registered_radix_cache_backends

    if name not in registered_radix_cache_backends():
        register_radix_cache_backend(name, lambda context: base_prefix_cache(context.params, mark))


def new_tree(model_runner: Any, mark: str) -> Any:
    """An empty `base_prefix_cache` on a runner's memory pools."""
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams

    parameters = CacheInitParams(
        disable=False,
        req_to_token_pool=model_runner.req_to_token_pool,
        token_to_kv_pool_allocator=model_runner.token_to_kv_pool_allocator,
        page_size=model_runner.server_args.page_size,
        is_eagle=False,
        tp_cache_group=None,
    )
    return base_prefix_cache(parameters, mark)


def scheduler_prefill(scheduler: Any) -> Prefill | None:
    """`Prefill` in a scheduler's process, or None where a batch needs more than the scheduler's model and cache."""
    from sglang.srt.mem_cache.chunk_cache import ChunkCache
    from sglang.srt.mem_cache.radix_cache import RadixCache

    if hasattr(scheduler, "mezo_prefill"):  # no scheduler, a bare ModelRunner
        prefill: Prefill = scheduler.mezo_prefill
        return prefill
    arguments = scheduler.tp_worker.model_runner.server_args
    tree = type(scheduler.tree_cache)
    plain = (
        arguments.pp_size == 1
        and arguments.dp_size == 1
        and arguments.speculative_algorithm is None
        and arguments.disaggregation_mode == "null"
        and (tree in (RadixCache, ChunkCache) or tree.__base__ is RadixCache)
    )
    return Prefill(scheduler.tp_worker.model_runner, scheduler.tree_cache) if plain else None


class Prefill:
    """Prefill batches on a ModelRunner, without the way through tokenizer, scheduler and detokenizer.

    Inside a scheduler it runs between two of its batches and takes from its memory pools and its radix cache what a
    batch of the scheduler would.

    Args:
        model_runner: with memory pools and attention backends made.
        tree: the radix cache.

    Attributes:
        shares_within_batch: rows of one batch share what they begin with even where it is not cached yet. Each layer
            writes all new keys and values before it reads any, so a row may read slots that another row of its batch
            fills.
    """

    def __init__(self, model_runner: Any, tree: Any):
        self._runner = model_runner
        self._tree = tree
        self._count = 0
        self.shares_within_batch = (
            type(model_runner.attn_backend).__name__ in _WRITE_BEFORE_READING
            and model_runner.server_args.page_size == 1
            and hasattr(tree, "root_node")
            and not tree.disable
        )
        self._matches = _Matches(tree, self.shares_within_batch)
        self._under_way = False
        arguments = model_runner.server_args
        chunk = arguments.chunked_prefill_size or 0  # what memory was set aside for
        self._limit = min(arguments.max_prefill_tokens, chunk) if chunk > 0 else arguments.max_prefill_tokens

    def close(self) -> None:
        """Gives the cache's part of the memory pools back."""
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        self._tree.evict(EvictParams(num_tokens=self._runner.max_total_num_tokens))

    @torch.no_grad()
    def __call__(self, body: Mapping[str, Any]) -> Callable[[], list[dict[str, Any]]]:
        """Starts a body of POST /generate that asks for prefill only; what is returned gives SGLang's answers.

        Keys and values count as cached at once: whatever comes later is behind them in the same stream.
        """
        if torch.cuda.is_available() and not self._under_way:
            torch.cuda.synchronize()  # a batch of the scheduler may be under way
        self._under_way = True
        parts: list[Callable[[], list[dict[str, Any]]]] = []
        requests: list[Any] = []
        tokens = 0
        body = {**body, "input_ids": [array("q", ids) for ids in body["input_ids"]]}
        order = self._order(body)
        try:
            for number in order:
                ids = body["input_ids"][number]
                request = self._request(body, number)
                if requests and self._closes(requests, tokens, request):
                    self._tree.dec_lock_ref(request.last_node)
                    batch, requests, tokens = requests, [], 0
                    parts.append(self._forward(batch, body))
                    request = self._request(body, number)  # what was computed meanwhile counts
                requests.append(request)
                tokens += len(ids) - len(request.prefix_indices)
            batch, requests = requests, []
            parts.append(self._forward(batch, body))
        except BaseException:
            self._under_way = False
            self._unlock(requests)
            raise
        return lambda: self._finish(parts, order)

    def _order(self, body: Mapping[str, Any]) -> list[int]:
        """Rows of one probe after those of another, and sorted: of all rows before, the last one is most like a row.

        Sorted by bytes, which compare faster than tokens: rows with a common beginning stand together all the same.
        """
        probes = {name: place for place, name in enumerate(dict.fromkeys(body["lora_path"]))}
        rows = range(len(body["input_ids"]))
        if not self.shares_within_batch:
            return list(rows)
        return sorted(rows, key=lambda n: (probes[body["lora_path"][n]], body["input_ids"][n].tobytes()))

    def _finish(
        self, parts: Sequence[Callable[[], list[dict[str, Any]]]], order: Sequence[int]
    ) -> list[dict[str, Any]]:
        self._under_way = False
        answers = (answer for part in parts for answer in part())
        found = dict(zip(order, answers, strict=True))
        return [found[number] for number in range(len(order))]

    def _unlock(self, requests: Sequence[Any]) -> None:
        self._matches.forget()
        for request in requests:
            self._tree.dec_lock_ref(request.last_node)

    def _closes(self, requests: Sequence[Any], tokens: int, request: Any) -> bool:
        """Whether a batch of so many new tokens runs without one more request.

        There is no room for it, or the request is another probe's and the batch keeps the GPU busy while that one's
        rows are prepared.
        """
        busy = tokens >= _FILLING_TOKENS and request.lora_id != requests[-1].lora_id
        return busy or not self._fits(request, tokens, len(requests))

    def _fits(self, request: Any, tokens: int, rows: int) -> bool:
        """Whether a batch of so many rows and new tokens has room for one more."""
        pools = self._runner.req_to_token_pool, self._runner.token_to_kv_pool_allocator
        tokens += len(request.origin_input_ids) - len(request.prefix_indices)
        room = pools[1].available_size() + self._tree.evictable_size()
        return bool(tokens <= min(self._limit, room) and rows < pools[0].available_size())

    def _request(self, body: Mapping[str, Any], number: int) -> Any:
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        name, wanted = body["lora_path"][number], body["return_logprob"]
        self._count += 1
        request = Req(
            rid=f"mezo-{self._count}",
            origin_input_text="",
            origin_input_ids=body["input_ids"][number],
            sampling_params=SamplingParams(**body["sampling_params"][number]),
            return_logprob=wanted,
            top_logprobs_num=body.get("top_logprobs_num", 0),
            lora_id=None if name is None else adapter_id(self._runner.lora_manager, name),
            extra_key=body["extra_key"][number],
        )
        request.logprob_start_len = body["logprob_start_len"][number] if wanted else -1
        request.init_next_round_input(self._matches)
        self._tree.inc_lock_ref(request.last_node)
        return request

    def _forward(self, requests: list[Any], body: Mapping[str, Any]) -> Callable[[], list[dict[str, Any]]]:
        from sglang.srt.managers.schedule_batch import ScheduleBatch
        from sglang.srt.mem_cache.common import release_kv_cache
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

        runner = self._runner
        for request in requests:
            request.set_extend_range(len(request.prefix_indices), len(request.full_untruncated_fill_ids))
        runner.lora_manager.fetch_new_loras({request.lora_id for request in requests})
        batch = ScheduleBatch.init_new(
            reqs=requests,
            req_to_token_pool=runner.req_to_token_pool,
            token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
            tree_cache=self._tree,
            model_config=runner.model_config,
            enable_overlap=False,
            spec_algorithm=SpeculativeAlgorithm.NONE,
        )
        try:
            batch.prepare_for_extend()
        except RuntimeError:  # no room in the memory pools
            self._unlock(requests)
            raise
        try:
            self._lend(requests, batch.req_pool_indices_cpu.tolist())
            if batch.input_ids is None:
                batch.input_ids = batch.prefill_input_ids_cpu.to(batch.device, non_blocking=True)
                batch.prefill_input_ids_cpu = None
            forward = ForwardBatch.init_new(batch, runner, return_hidden_states_before_norm=False)
            with small_tiles(max(batch.extend_lens)), logprobs_in_one_go():
                output = runner.forward(forward).logits_output
            counts = [
                end - start for end, start in zip(batch.extend_lens, batch.extend_logprob_start_lens, strict=True)
            ]
            return functools.partial(_read, requests, counts, output, body.get("top_logprobs_num", 0))
        finally:
            self._matches.forget()
            runner.token_to_kv_pool_allocator.free_group_begin()
            for request in requests:  # in their order: lenders hand their slots to the tree before borrowers do
                request.finished_len = 0
                release_kv_cache(request, self._tree)
            runner.token_to_kv_pool_allocator.free_group_end()

    def _lend(self, requests: Sequence[Any], pool_rows: Sequence[int]) -> None:
        """Enters lenders' slots into the table of slots for the rows that begin like them."""
        row_of = {id(request): row for request, row in zip(requests, pool_rows, strict=True)}
        loans = {request: parts for request, parts in self._matches.loans.items() if request in row_of}
        if not loans:
            return
        table = self._runner.req_to_token_pool.req_to_token
        width = max(parts[-1][1] for parts in loans.values())
        runs: list[tuple[int, int]] = []  # of each borrower: its row of the table, then whose slots it has and how many
        for borrower, parts in loans.items():
            runs.append((row_of[borrower], 1))
            start = 0
            for owner, stop in [*((id(request), stop) for request, stop in parts), (borrower, width)]:
                runs.append((row_of[owner], stop - start))
                start = stop
        row_N, count_N = torch.tensor(runs).unbind(1)
        row_BT = row_N.repeat_interleave(count_N).view(len(loans), 1 + width)
        if table.is_cuda:
            row_BT = row_BT.pin_memory().to(table.device, non_blocking=True)  # does not wait for the batch before
        table[row_BT[:, 0], :width] = table[row_BT[:, 1:], torch.arange(width, device=table.device)]


@contextlib.contextmanager
def small_tiles(longest: int) -> Iterator[None]:
    """Context in which SGLang's Triton attention has query tiles of 16, if no row has more new tokens than that.

    SGLang's own have 64 or 128 rows, which a few tokens behind a stored prompt fill with padding: eight times the work.
    """
    module = sys.modules.get("sglang.kernels.ops.attention.extend_attention")
    if longest > _SMALL_TILE or module is None:
        yield
        return
    usual: Callable[[int, int], tuple[int, ...]] = module._get_block_sizes_for_extend_attention

    def small(query_width: int, value_width: int) -> tuple[int, ...]:
        *widths, _, keys, _ = usual(query_width, value_width)
        return (*widths, _SMALL_TILE, keys, _SMALL_TILE_WARPS)

    module._get_block_sizes_for_extend_attention = small  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module._get_block_sizes_for_extend_attention = usual  # type: ignore[attr-defined]


@contextlib.contextmanager
def logprobs_in_one_go() -> Iterator[None]:
    """Context in which SGLang computes log-probabilities of a batch's tokens without making the host wait.

    Its own way picks positions by masks, whose number of rows the host must know: it could not prepare the next batch
    while this one runs. Here all positions are read. The operations on them are the same.
    """
    from sglang.srt.layers import logprob_processor

    processors = logprob_processor.InputLogprobProcessor
    usual: Callable[..., tuple[Any, Tensor]] = processors._forward_by_chunk

    def in_one_go(processor: Any, states_PH: Tensor, *others: Any) -> tuple[Any, Tensor]:
        last_R, read_P, _, head, get_logits, metadata, chunk_size = others
        all_read = len(read_P) == len(states_PH) <= chunk_size
        if not all_read or metadata.extend_return_top_logprob or metadata.extend_token_ids_logprob:
            return usual(processor, states_PH, *others)
        logits_PV = get_logits(states_PH, head, metadata)
        tokens = torch.arange(len(states_PH), device=states_PH.device), metadata.extend_input_logprob_token_ids_gpu
        if getattr(processor, "enable_fast_input_logprobs", False):  # 0.5.20
            largest_P, rest_P = logprob_processor.compute_row_log_normalizer(logits_PV)
            logprobs_P = (logits_PV[tokens].float() - largest_P) - rest_P
        else:
            logprobs_P = torch.log_softmax(logits_PV, dim=-1)[tokens]
        return logprob_processor.LogprobResult(token_logprobs=logprobs_P), logits_PV[last_R]

    processors._forward_by_chunk = in_one_go
    try:
        yield
    finally:
        processors._forward_by_chunk = usual


def _read(requests: Sequence[Any], counts: Sequence[int], output: Any, top: int) -> list[dict[str, Any]]:
    """What SGLang would answer to each request; `counts` are the positions of each that have a log-probability."""
    if not requests[0].return_logprob:
        return [{"meta_info": {"cached_tokens": len(request.prefix_indices)}} for request in requests]
    answers, at = [], 0
    logprobs = output.input_token_logprobs.tolist()
    for row, (request, count) in enumerate(zip(requests, counts, strict=True)):
        tokens = request.origin_input_ids[len(request.origin_input_ids) - count :]
        read = [(None, tokens[0]), *zip(logprobs[at : at + count - 1], tokens[1:], strict=True)]
        info: dict[str, Any] = {"input_token_logprobs": read, "cached_tokens": len(request.prefix_indices)}
        if top:
            best = output.input_top_logprobs_idx[row][: count - 1]
            info["input_top_logprobs"] = [None, *([(0.0, entry[0])] for entry in best)]
        answers.append({"meta_info": info})
        at += count
    return answers


class _Matches:
    """A radix cache that looks each prefix of a batch up once; its nodes stay as they are until the batch has run.

    Args:
        tree: the radix cache.
        within_batch: a row also finds what an earlier row of its batch will have computed. Rows come sorted, so the one
            before is most like it.

    Attributes:
        loans: for a request (by id) that begins like an earlier one: which request computes its first tokens, as pairs
            of a request and the token where its part ends.
    """

    def __init__(self, tree: Any, within_batch: bool):
        self._tree = tree
        self._within_batch = within_batch
        self._found: dict[tuple[bytes, str | None], Any] = {}
        self._last: dict[str | None, Any] = {}  # request, by key
        self._no_slots = torch.zeros(0, dtype=torch.int64)
        self.loans: dict[int, list[tuple[Any, int]]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tree, name)

    def forget(self) -> None:
        """The batch has run."""
        self._found.clear()
        self._last.clear()
        self.loans.clear()

    def match_prefix(self, params: Any) -> Any:
        """See SGLang's `RadixCache.match_prefix`."""
        length, key = len(params.key), params.key.extra_key
        custom = params.req.sampling_params.custom_params
        if custom:
            (length, key), params.req.skip_radix_cache_insert = next(iter(custom.values())), True
        prompt = params.key.token_ids[:length].tobytes()
        if (prompt, key) not in self._found:
            self._found[prompt, key] = self._tree.match_prefix(params)
        found = self._found[prompt, key]
        return self._with_loan(found, params.req, prompt, key) if self._within_batch and not custom else found

    def _with_loan(self, found: Any, request: Any, prompt: bytes, key: str | None) -> Any:
        lender, self._last[key] = self._last.get(key), request
        tokens = 0 if lender is None else _shared_tokens(lender.origin_input_ids.tobytes(), prompt)
        if tokens <= len(found.device_indices):
            return found
        # What the lender itself has borrowed it cannot lend: that comes from where the lender has it.
        parts = [(owner, min(stop, tokens)) for owner, stop in self.loans.get(id(lender), [])]
        kept = [part for n, part in enumerate(parts) if n == 0 or part[1] > parts[n - 1][1]]
        self.loans[id(request)] = kept if kept and kept[-1][1] == tokens else [*kept, (lender, tokens)]
        if len(self._no_slots) < tokens:
            self._no_slots = torch.zeros(2 * tokens, dtype=torch.int64, device=found.device_indices.device)
        return found._replace(device_indices=self._no_slots[:tokens])


def _shared_tokens(a: bytes, b: bytes) -> int:
    """How many 8-byte tokens two rows have in common at their beginnings."""
    low, high = 0, min(len(a), len(b)) // 8
    if a[: 8 * high] == b[: 8 * high]:
        return high
    while high - low > 1:  # the first `low` are the same, the first `high` are not
        middle = (low + high) // 2
        low, high = (middle, high) if a[: 8 * middle] == b[: 8 * middle] else (low, middle)
    return low
