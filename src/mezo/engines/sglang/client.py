"""How a SGLang is reached: an engine in this process, or servers over HTTP. Bodies are those of SGLang's HTTP API."""

from __future__ import annotations

import base64
import itertools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from mezo.engines.sglang import versions
from mezo.engines.sglang.plugin import BASE_PREFIX, command_key
from mezo.errors import EngineError, UserError
from mezo.objective import TokenSequence

_ADMIN = frozenset(["/set_internal_state", "/unload_lora_adapter"])  # want the admin key where there is one
_PREFILL_ONLY = {"max_new_tokens": 0, "temperature": 0.0}


class Client(Protocol):
    """One SGLang: an engine or a server, with all its tensor-parallel ranks."""

    name: str

    def command(self, command: dict[str, object]) -> None:
        """Runs a command of `worker.Worker` on every rank; raises EngineError with the reason if it fails."""
        ...

    def info(self) -> Mapping[str, Any]:
        """SGLang's server information; `["internal_states"][0]["mezo"]` is the worker's state."""
        ...

    def generate(self, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        """POST /generate with a batch of input_ids."""
        ...

    def load_adapter(self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, object]) -> None:
        """Loads an adapter from tensors under PEFT's names."""
        ...

    def unload_adapter(self, name: str) -> None:
        """Unloads it; no error if there is none."""
        ...

    def close(self) -> None:
        """Ends what this client started."""
        ...


def worker_state(client: Client) -> Mapping[str, Any]:
    """State of the worker on the first rank; empty if the plugin was not loaded or never called."""
    state: Mapping[str, Any] = client.info()["internal_states"][0].get("mezo", {})
    return state


def _raise_failed(client: Client, command: Mapping[str, object]) -> None:
    reason = worker_state(client).get("error")
    if reason:
        raise EngineError(f"{client.name}: {reason}")
    raise EngineError(
        f"{client.name}: SGLang does not know mezo's command {command['op']!r}; is mezo installed beside it?"
    )


class Colocated:
    """`sgl.Engine` in this process, started by us.

    Args:
        arguments: `ServerArgs` of the engine.
    """

    name = "SGLang"

    def __init__(self, arguments: Mapping[str, Any]):
        versions.installed()
        import sglang

        # SGLang's own handler kills this process when a scheduler dies; that it is replaced, SGLang logs as an error.
        logging.getLogger("sglang.srt.entrypoints.engine").addFilter(lambda record: "SIGQUIT" not in str(record.msg))
        try:
            self._engine = sglang.Engine(custom_sigquit_handler=_scheduler_died, **arguments)
        except (RuntimeError, ValueError, TypeError, AssertionError, OSError) as error:
            raise EngineError(f"SGLang did not start: {error}") from error

    def command(self, command: dict[str, object]) -> None:
        """See `Client.command`."""
        request = versions.set_state_request({command_key(command): 1})
        if not all(self._run(self._manager.set_internal_state(request))):
            _raise_failed(self, command)

    def info(self) -> Mapping[str, Any]:
        """See `Client.info`."""
        info: Mapping[str, Any] = self._engine.get_server_info()
        return info

    def generate(self, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        """See `Client.generate`."""

        async def first() -> Any:
            return await anext(self._manager.generate_request(versions.generate_request(body), None))

        answer: list[dict[str, Any]] = self._run(first())
        return answer

    def load_adapter(self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, object]) -> None:
        """See `Client.load_adapter`."""
        info = self.info()
        payload = [versions.serialized(tensors)] * int(info["tp_size"])
        body = {"lora_name": name, "config_dict": dict(config), "serialized_named_tensors": payload, "pinned": True}
        result = self._run(self._manager.load_lora_adapter_from_tensors(versions.load_request(body), None))
        if not result.success:
            raise EngineError(f"{self.name}: {result.error_message}")

    def unload_adapter(self, name: str) -> None:
        """See `Client.unload_adapter`."""
        self._run(self._manager.unload_lora_adapter(versions.unload_request(name), None))

    def close(self) -> None:
        """See `Client.close`."""
        self._engine.shutdown()

    @property
    def _manager(self) -> Any:
        return self._engine.tokenizer_manager

    def _run(self, coroutine: Any) -> Any:
        try:
            return self._engine.loop.run_until_complete(coroutine)
        except (ValueError, RuntimeError) as error:
            raise EngineError(f"{self.name}: {error}") from error


def _scheduler_died(*_: object) -> None:
    kill_children()
    raise EngineError("SGLang: its scheduler died; the reason stands above")


def kill_children() -> None:
    """Ends what SGLang started from this process."""
    from sglang.srt.utils import kill_process_tree

    kill_process_tree(os.getpid(), include_parent=False)


class Server:
    """A running SGLang server.

    Args:
        base_url: its address, `http://host:30000`.
        api_key: its `--api-key`.
        admin_api_key: its `--admin-api-key`, if it has one besides.
        timeout: seconds that one request may take.
    """

    def __init__(
        self, base_url: str, api_key: str | None = None, admin_api_key: str | None = None, timeout: float = 600.0
    ):
        try:
            import requests
        except ModuleNotFoundError:
            raise UserError("sglang_mode server needs requests: pip install 'mezo[sglang-client]'") from None
        self.name = base_url.rstrip("/")
        self._timeout = (10.0, timeout)
        if "@" in self.name.split("://")[-1].split("/")[0]:
            raise UserError("sglang_server_base_url: give the key as sglang_api_key, not in the address")
        self._keys = (api_key, admin_api_key or api_key)
        self._http = requests.Session()

    def command(self, command: dict[str, object]) -> None:
        """See `Client.command`."""
        if not all(self._post("/set_internal_state", {"server_args": {command_key(command): 1}})):
            _raise_failed(self, command)

    def info(self) -> Mapping[str, Any]:
        """See `Client.info`."""
        info: Mapping[str, Any] = self._request("GET", "/server_info")
        return info

    def generate(self, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        """See `Client.generate`."""
        answer: list[dict[str, Any]] = self._post("/generate", body)
        return answer

    def load_adapter(self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, object]) -> None:
        """See `Client.load_adapter`."""
        payload = base64.b64encode(versions.serialized(tensors)).decode()
        copies = [payload] * int(self.info()["tp_size"])
        body = {"lora_name": name, "config_dict": dict(config), "serialized_named_tensors": copies, "pinned": True}
        self._post("/load_lora_adapter_from_tensors", body)

    def unload_adapter(self, name: str) -> None:
        """See `Client.unload_adapter`."""
        try:
            self._post("/unload_lora_adapter", {"lora_name": name})
        except EngineError:
            if name in str(self._request("GET", "/v1/models")):
                raise

    def close(self) -> None:
        """See `Client.close`."""
        self._http.close()

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._request("POST", path, body)

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        import requests

        try:
            response = self._http.request(
                method, self.name + path, json=body, timeout=self._timeout, auth=_bearer(self._keys[path in _ADMIN])
            )
        except requests.ConnectionError:
            raise EngineError(f"no answer from {self.name}: is the server running there?") from None
        except requests.RequestException as error:
            raise EngineError(f"no answer from {self.name}{path}: {error}") from None
        if response.status_code in (401, 403):
            raise EngineError(f"{self.name} refuses sglang_api_key ({response.status_code} for {path})")
        if response.status_code != 200:
            raise EngineError(f"{self.name}{path}: {_reason(response)}")
        try:
            return response.json()
        except ValueError:
            raise EngineError(f"{self.name}{path}: the answer is not SGLang's") from None


def _bearer(key: str | None) -> Callable[[Any], Any]:
    """requests' `auth`, so that no ~/.netrc gets in between."""

    def authorised(request: Any) -> Any:
        if key:
            request.headers["Authorization"] = f"Bearer {key}"
        return request

    return authorised


def _reason(response: Any) -> str:
    try:
        answer = response.json()
    except ValueError:
        return f"status {response.status_code}"
    for key in ("error_message", "message"):
        if isinstance(answer, dict) and answer.get(key):
            return str(answer[key])
    if isinstance(answer, dict) and isinstance(answer.get("error"), dict):
        return str(answer["error"].get("message", answer))
    return str(answer)[:300]


def split(count: int, parts: int) -> list[slice]:
    """`count` rows over `parts` replicas, as evenly as can be."""
    bounds = [count * part // parts for part in range(parts + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


class Row(NamedTuple):
    """One sequence under one probe."""

    name: str  # of the adapter slot
    sequence: TokenSequence
    key: str  # keys and values are shared under the same one only

    @property
    def prompt(self) -> tuple[int, ...]:
        """What stands before an activated LoRA acts."""
        return self.sequence.input_ids[: self.sequence.adapter_start]


def rows_body(rows: Sequence[Row], top: int, *, base: bool = False) -> dict[str, Any]:
    """A prefill-only request for the log-probabilities from each row's first target on, `top` best tokens beside each.

    With `base`, a row takes keys and values of its prompt from what the base model computed under its key, and leaves
    nothing behind.
    """
    sampling: list[dict[str, Any]] = [dict(_PREFILL_ONLY) for _ in rows]
    if base:
        for options, row in zip(sampling, rows, strict=True):
            options["custom_params"] = {BASE_PREFIX: [row.sequence.adapter_start, row.key]}
    return {
        "input_ids": [list(r.sequence.input_ids) for r in rows],
        "sampling_params": sampling,
        "return_logprob": True,
        "logprob_start_len": [r.sequence.read_start for r in rows],
        "top_logprobs_num": top,
        "lora_path": [r.name for r in rows],
        "extra_key": [r.key for r in rows],
    }


def base_body(input_ids: Sequence[Sequence[int]], keys: Sequence[str]) -> dict[str, Any]:
    """A request that has the base model compute keys and values of these rows."""
    return {
        "input_ids": [list(ids) for ids in input_ids],
        "sampling_params": [dict(_PREFILL_ONLY) for _ in keys],
        "return_logprob": False,
        "lora_path": [None] * len(keys),
        "extra_key": list(keys),
    }
