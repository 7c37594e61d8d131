"""What SGLang loads in each of its processes, entry point `sglang.srt.plugins`. No file of SGLang is changed.

Commands travel in SGLang's own control request, `set_internal_state`, as one JSON text in place of a setting's name:
the request reaches every tensor-parallel rank in order with the batches, does not wait for requests that are being
served, and over HTTP stands behind SGLang's authentication. The answer is read from `get_internal_state`. Requests
without such a name go on to SGLang untouched.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

PREFIX = "mezo "
RADIX_BACKEND = "mezo"  # --radix-cache-backend
BASE_PREFIX = "mezo_base_prefix"  # custom_params of a request: [tokens, key under which the base model computed them]
ADAPTER_MARK = "mezo"  # key of an adapter's config that makes workers keep its tensors in float32

logger = logging.getLogger(__name__)


def register() -> None:
    """Entry point."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from mezo.engines.sglang import versions

    versions.complete_opt()
    versions.register_radix_backend(RADIX_BACKEND, BASE_PREFIX)
    HookRegistry.register(versions.SET_STATE, _set_state, HookType.AROUND)
    HookRegistry.register(versions.GET_STATE, _get_state, HookType.AFTER)
    HookRegistry.register(versions.LOAD_TENSORS, _load_tensors, HookType.AFTER)


def command_key(command: dict[str, object]) -> str:
    """The name under which a command travels."""
    return PREFIX + json.dumps(command, separators=(",", ":"))


def _set_state(original: Callable[..., Any], scheduler: Any, request: Any) -> Any:
    names = list(request.server_args)
    if len(names) != 1 or not names[0].startswith(PREFIX):
        return original(scheduler, request)
    from mezo.engines.sglang import versions
    from mezo.engines.sglang.worker import Worker

    if not hasattr(scheduler, "mezo_worker"):
        scheduler.mezo_worker = Worker(scheduler)
    # An exception here would end the server for everybody; the client asks for the state and raises.
    return versions.set_state_answer(scheduler.mezo_worker.run(names[0].removeprefix(PREFIX)))


def _get_state(answer: Any, scheduler: Any, request: Any) -> Any:
    worker = getattr(scheduler, "mezo_worker", None)
    if worker is not None:
        answer.internal_state["mezo"] = worker.state()
    return answer


def _load_tensors(result: Any, manager: Any, lora_ref: Any, tensors: Any, config_dict: Any, *_: Any, **__: Any) -> Any:
    if result.success and ADAPTER_MARK in config_dict:
        keep_tensors(manager, lora_ref.lora_name, tensors)
    return result


def keep_tensors(manager: Any, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Keeps an adapter's tensors in float32; SGLang itself keeps what fits its slots."""
    if not hasattr(manager, "mezo_tensors"):
        manager.mezo_tensors = {}
    manager.mezo_tensors[name] = {key: t.detach().float().clone() for key, t in tensors.items()}
