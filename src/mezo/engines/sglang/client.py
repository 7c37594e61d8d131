"""How a SGLang is reached: an engine in this process, or servers over HTTP. Bodies are those of SGLang's HTTP API."""

from __future__ import annotations

import base64
import itertools
import logging
import os
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from mezo.engines.sglang import versions
from mezo.engines.sglang.plugin import command_key
from mezo.errors import EngineError, UserError

_ADMIN = frozenset(["/set_internal_state", "/unload_lora_adapter"])  # want the admin key where there is one
_KEEP_ALIVE = 2.0  # seconds; SGLang closes a connection after 5 idle ones, maybe just as we write to it

_DIED = "its scheduler died; the reason stands above"


class Client(Protocol):
    """One SGLang: an engine or a server, with all its tensor-parallel ranks."""

    name: str

    def command(self, command: dict[str, object]) -> Any:
        """Runs a command of `worker.Worker` on every rank and returns the first one's answer.

        Raises:
            EngineError: it failed somewhere; with the reason.
        """
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


def _answer(client: Client, command: Mapping[str, object], answers: Sequence[Any]) -> Any:
    if all(answers):
        return answers[0]
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
        self._died = False
        self._manager.signal_handler_class = lambda _: types.SimpleNamespace(
            sigterm_handler=self._stop, running_phase_sigquit_handler=self._stop
        )

    def _stop(self, *_: object) -> None:
        """In place of SGLang's handlers, which kill this process together with a scheduler that died."""
        self._died = True
        kill_children()
        self._engine.loop.stop()

    def command(self, command: dict[str, object]) -> Any:
        """See `Client.command`."""
        request = versions.set_state_request({command_key(command): 1})
        return _answer(self, command, self._run(self._manager.set_internal_state(request)))

    def info(self) -> Mapping[str, Any]:
        """See `Client.info`."""
        try:
            info: Mapping[str, Any] = self._engine.get_server_info()
        except RuntimeError as error:
            raise EngineError(f"{self.name}: {_DIED if self._died else error}") from error
        return info

    def generate(self, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        """See `Client.generate`."""

        body = {**body, "input_ids": [list(ids) for ids in body["input_ids"]]}

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
            if not self._died:
                return self._engine.loop.run_until_complete(coroutine)
            coroutine.close()
        except (ValueError, RuntimeError) as error:
            if not self._died:
                raise EngineError(f"{self.name}: {error}") from error
        raise EngineError(f"{self.name}: {_DIED}")


def _scheduler_died(*_: object) -> None:
    kill_children()
    raise EngineError(f"SGLang: {_DIED}")


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
        self._last_answer = 0.0

    def command(self, command: dict[str, object]) -> Any:
        """See `Client.command`."""
        answers = self._post("/set_internal_state", {"server_args": {command_key(command): 1}})
        return _answer(self, command, answers)

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

        if time.monotonic() - self._last_answer > _KEEP_ALIVE:
            self._http.close()  # its connections; the next request opens a new one
        try:
            response = self._http.request(
                method, self.name + path, json=body, timeout=self._timeout, auth=_bearer(self._keys[path in _ADMIN])
            )
        except requests.ConnectionError:
            raise EngineError(f"no answer from {self.name}: is the server running there?") from None
        except requests.RequestException as error:
            raise EngineError(f"no answer from {self.name}{path}: {error}") from None
        self._last_answer = time.monotonic()
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
