"""Running servers over HTTP: replicas, ordinary requests in between, and everything that can go wrong."""

import http.server
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from safetensors.torch import load_file, save_file

from mezo import MeZOConfig, journal, mezo_finetune
from mezo.api import build_trainer, replay
from mezo.engines.sglang import build
from mezo.engines.sglang.client import Server as Client
from mezo.errors import EngineError, JournalError, UserError
from tests.sglang.conftest import ROOT, environment, finish, start_job
from tests.sglang.jobs import ENGINE_ARGS, RANK, SETTING, rows
from tests.sglang.test_trajectory import assert_same_adapter, assert_same_run

KEY = "a-secret"
HEADERS = {"Authorization": f"Bearer {KEY}"}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Server:
    """`python -m sglang.launch_server` with LoRA and an API key."""

    def __init__(self, model: str, log: Path, *options: str):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        command = [
            sys.executable, "-W", "ignore", "-m", "sglang.launch_server", "--model-path", model, "--host", "127.0.0.1",
            "--port", str(self.port), "--api-key", KEY, "--device", "cpu", "--dtype", "float32",
            "--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--grammar-backend", "none",
            "--lora-backend", "torch_native", "--disable-cuda-graph", "--disable-overlap-schedule",
            "--skip-server-warmup", "--sleep-on-idle", "--mem-fraction-static", str(ENGINE_ARGS["mem_fraction_static"]),
            "--max-total-tokens", str(ENGINE_ARGS["max_total_tokens"]), "--enable-lora", "--max-lora-rank", str(RANK),
            "--lora-target-modules", "q_proj", "v_proj", "--max-loras-per-batch", "5", "--log-level", "error", *options,
        ]  # fmt: skip
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self) -> "Server":
        for _ in range(1200):
            assert self.process.poll() is None, self.log.read_text()[-5000:]
            try:
                if requests.get(f"{self.url}/health", headers=HEADERS, timeout=5).status_code == 200:
                    return self
            except requests.RequestException:
                pass
            time.sleep(0.3)
        raise AssertionError(self.log.read_text()[-5000:])

    def post(self, path: str, body: dict[str, object]) -> requests.Response:
        return requests.post(self.url + path, json=body, headers=HEADERS, timeout=60)

    def logprobs(self, adapter: str | None) -> list[float]:
        """Of a prompt and of three generated tokens."""
        body = {
            "input_ids": [5, 9, 12, 7, 20, 11, 30, 8],
            "sampling_params": {"max_new_tokens": 3, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "lora_path": adapter,
        }
        answer = self.post("/generate", body).json()["meta_info"]
        return [entry[0] for entry in (*answer["input_token_logprobs"][1:], *answer["output_token_logprobs"])]

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def servers(model_folder, tmp_path_factory) -> Iterator[list[Server]]:
    folder = tmp_path_factory.mktemp("servers")
    started = [Server(model_folder("llama"), folder / f"{i}.log") for i in range(2)]
    try:
        yield [server.wait() for server in started]
    finally:
        for server in started:
            server.kill()


def options(urls: list[str], **more: object) -> dict[str, object]:
    return {
        **SETTING, "engine": "sglang", "sglang_mode": "server", "sglang_server_base_url": urls, "sglang_api_key": KEY,
        **more,
    }  # fmt: skip


def adapters(server: Server) -> set[str]:
    listed = requests.get(f"{server.url}/v1/models", headers=HEADERS, timeout=10).json()["data"]
    return {entry["id"] for entry in listed if entry.get("parent")}


def test_two_replicas_and_ordinary_requests_in_between(servers, reference, model_folder, tmp_path):
    """The trajectory of the torch engine, while base and another adapter are served with right results."""
    other = str(reference("llama"))
    for server in servers:
        assert server.post("/load_lora_adapter", {"lora_name": "other", "lora_path": other}).status_code == 200
    expected = {name: servers[0].logprobs(name) for name in (None, "other")}
    assert max(abs(a - b) for a, b in zip(*expected.values(), strict=True)) > 1e-2
    seen: list[bool] = []
    stop = threading.Event()

    def ordinary() -> None:
        while not stop.is_set():
            for server in servers:
                for name, values in expected.items():
                    seen.append(server.logprobs(name) == pytest.approx(values, abs=1e-5))

    thread = threading.Thread(target=ordinary)
    thread.start()
    run = tmp_path / "run"
    try:
        mezo_finetune(model_folder("llama"), rows(), output_dir=run, **options([s.url for s in servers]))
    finally:
        stop.set()
        thread.join()
    assert len(seen) >= 20
    assert all(seen)
    assert_same_run(run, reference("llama"), 50)
    assert_same_adapter(run, reference("llama"))
    assert all(adapters(server) == {"other"} for server in servers)  # ours are gone
    assert KEY not in "".join(p.read_text(errors="replace") for p in run.rglob("*") if p.is_file())
    # The result serves as it is.
    assert servers[0].post("/load_lora_adapter", {"lora_name": "ours", "lora_path": str(run)}).status_code == 200
    assert servers[0].logprobs("ours") == pytest.approx(expected["other"], abs=1e-3)


def test_replay_of_a_run_on_sglang(servers, model_folder, tmp_path):
    run = tmp_path / "run"
    mezo_finetune(model_folder("llama"), rows(), output_dir=run, **options([servers[0].url], num_steps=5))
    rebuilt = replay(run, tmp_path / "rebuilt")
    name = "adapter_model.safetensors"
    assert (rebuilt / name).read_bytes() == (run / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sglang_api_key": "wrong"}, "refuses sglang_api_key"),
        ({"sglang_api_key": None}, "refuses sglang_api_key"),
        ({"sglang_server_base_url": ["http://127.0.0.1:9"]}, "no answer from http://127.0.0.1:9"),
        ({"sglang_server_base_url": None}, "sglang_server_base_url"),
        ({"lora_rank": RANK + 4}, "--max-lora-rank 4"),
        ({"lora_target_modules": ["o_proj"]}, "lora-target-modules"),
        ({"lora_target_modules": ["k_proj"]}, "q_proj and v_proj"),
        ({"lora_rank": None, "learning_rate": 1e-6}, "use_peft"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(change, message, servers, model_folder, tmp_path):
    values = {**options([servers[0].url]), **change}
    with pytest.raises((EngineError, UserError), match=message) as caught:
        mezo_finetune(model_folder("llama"), rows(), output_dir=tmp_path / "run", **values)
    assert "\n" not in str(caught.value)
    assert not adapters(servers[0]) & {"mezo"}


def test_full_adapter_slots(servers, reference, model_folder, tmp_path):
    """Other pinned adapters leave no room; theirs are not touched."""
    pinned = ["p1", "p2", "p3"]
    for name in pinned:
        body = {"lora_name": name, "lora_path": str(reference("llama")), "pinned": True}
        assert servers[1].post("/load_lora_adapter", body).status_code == 200
    with pytest.raises(EngineError, match="max-loras-per-batch"):
        mezo_finetune(model_folder("llama"), rows(), output_dir=tmp_path / "run", **options([servers[1].url]))
    assert set(pinned) <= adapters(servers[1])
    assert not any(name.startswith("mezo") for name in adapters(servers[1]))
    for name in pinned:
        assert servers[1].post("/unload_lora_adapter", {"lora_name": name}).status_code == 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"enable_lora": False}, "--enable-lora"),
        ({"max_loras_per_batch": 2}, "--max-loras-per-batch 3"),
        ({"version": "0.5.9"}, "0.5.17 to 0.5.20; .* is 0.5.9"),
    ],
)
def test_servers_started_in_another_way(change, message, servers, model_folder):
    config = MeZOConfig(model_name_or_path=model_folder("llama"), use_peft=True, lora_r=RANK)
    info = Client(servers[0].url, KEY).info()
    build.check_server(info, servers[0].url, config, 2)
    with pytest.raises((EngineError, UserError), match=message):
        build.check_server({**info, **change}, servers[0].url, config, 2)


def test_a_server_with_another_base_model(servers, model_folder, tmp_path):
    """Same shapes, other weights: nothing is trained."""
    other = tmp_path / "other"
    shutil.copytree(model_folder("llama"), other)
    weights = load_file(str(other / "model.safetensors"))
    weights["model.layers.1.self_attn.o_proj.weight"][0, 0] += 0.5
    save_file(weights, str(other / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(EngineError, match=r"another base model.*layers\.1\.self_attn\.o_proj"):
        mezo_finetune(str(other), rows(), output_dir=tmp_path / "run", **options([servers[0].url]))
    assert not any(name.startswith("mezo") for name in adapters(servers[0]))


@pytest.mark.parametrize("text", ["x", "1", "[]", '{"op": "_init__"}', '{"op": "step", "no": 1}', "{}"])
def test_a_bad_command_does_not_end_the_server(servers, text):
    answer = servers[0].post("/set_internal_state", {"server_args": {f"mezo {text}": 1}})
    assert answer.status_code == 200
    assert answer.json() == [False]
    assert servers[0].logprobs(None)


def test_an_admin_key_besides_the_key(model_folder, tmp_path):
    server = Server(model_folder("llama"), tmp_path / "log", "--admin-api-key", "another-secret")
    try:
        server.wait()
        values = options([server.url], num_steps=2)
        with pytest.raises(EngineError, match="refuses"):
            mezo_finetune(model_folder("llama"), rows(), output_dir=tmp_path / "run", **values)
        mezo_finetune(
            model_folder("llama"), rows(), output_dir=tmp_path / "run", sglang_admin_api_key="another-secret",
            resume_from_checkpoint=True, **values,
        )  # fmt: skip
    finally:
        server.kill()
    assert "another-secret" not in "".join(
        p.read_text(errors="replace") for p in tmp_path.rglob("*") if p.is_file() and p.name != "log"
    )


def test_a_key_in_the_address_is_refused(model_folder, tmp_path):
    values = {**options(["http://user:secret@127.0.0.1:9"])}
    with pytest.raises(UserError, match="sglang_api_key") as caught:
        mezo_finetune(model_folder("llama"), rows(), output_dir=tmp_path / "run", **values)
    assert "secret" not in str(caught.value).replace("sglang_api_key", "")


def test_an_engine_that_does_not_start_is_an_error(model_folder, tmp_path):
    """SGLang's GPT-2 cannot take adapters; without a handler SGLang would kill this process."""
    process = start_job(
        "finetune", model=model_folder("gpt2"), out=str(tmp_path / "run"), engine="sglang",
        lora_target_modules=["c_attn"],
    )  # fmt: skip
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert output.strip().splitlines()[-1].startswith("mezo.errors.EngineError: SGLang")


def test_one_run_at_a_time(servers, model_folder, tmp_path):
    """A second run does not disturb the first; what a run left that ended without a word is taken over by itself."""
    values = options([servers[0].url], num_steps=2)
    config = MeZOConfig.from_dict(
        {
            "model_name_or_path": model_folder("llama"), "use_peft": True, "lora_r": RANK, "engine": "sglang",
            "sglang_mode": "server", "sglang_server_base_url": [servers[0].url], "sglang_api_key": KEY,
            "learning_rate": 1e-2, "output_dir": str(tmp_path / "first"), "max_steps": 2,
        }
    )  # fmt: skip
    first = build_trainer(config, rows())
    first.engine.score(first.train_examples[:2])  # attached from here on
    with pytest.raises(EngineError, match="trains there"):
        mezo_finetune(model_folder("llama"), rows(), output_dir=tmp_path / "second", **values)
    mezo_finetune(model_folder("llama"), rows(), output_dir=tmp_path / "first", **values)
    assert not any(name.startswith("mezo") for name in adapters(servers[0]))


def test_a_server_that_dies_in_mid_run(reference, model_folder, tmp_path):
    """Training stops with one line, the journal is whole, and a new server finishes the same run."""
    run = tmp_path / "run"
    server = Server(model_folder("llama"), tmp_path / "first.log")
    second = Server(model_folder("llama"), tmp_path / "second.log")
    try:
        server.wait()
        process = start_job("finetune", model=model_folder("llama"), out=str(run), **_plain(options([server.url])))
        while not (run / "journal").exists() or (run / "journal").stat().st_size < 3000:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        server.kill()
        output, _ = process.communicate(timeout=120)
        assert process.returncode != 0
        assert "no answer from" in output.strip().splitlines()[-1]
        contents = journal.read(run / "journal")
        assert 0 < len(contents.steps) < 50
        assert contents.dropped_bytes == 0
        second.wait()
        again = _plain(options([second.url], resume_from_checkpoint=True))
        finish(start_job("finetune", model=model_folder("llama"), out=str(run), **again))
    finally:
        server.kill()
        second.kill()
    assert_same_run(run, reference("llama"), 50)
    assert_same_adapter(run, reference("llama"))


@pytest.mark.parametrize(("seconds", "connections"), [(60.0, 1), (0.0, 3)])
def test_idle_connections_are_not_used_again(monkeypatch, seconds, connections):
    """A server may be closing them."""
    monkeypatch.setattr("mezo.engines.sglang.client._KEEP_ALIVE", seconds)
    seen = set()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            seen.add(self.client_address)
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        client = Client(f"http://127.0.0.1:{server.server_port}")
        for _ in range(3):
            client.info()
        client.close()
        server.shutdown()
    assert len(seen) == connections


def _plain(values: dict[str, object]) -> dict[str, object]:
    return {k: v for k, v in values.items() if k not in SETTING}


def test_another_model_than_the_journals(servers, reference, model_folder, tmp_path):
    run = tmp_path / "run"
    mezo_finetune(model_folder("llama"), rows(), output_dir=run, **options([servers[0].url], num_steps=3))
    more = options([servers[0].url], num_steps=6, resume_from_checkpoint=True)
    with pytest.raises(JournalError, match="model_digest"):
        mezo_finetune(model_folder("qwen2"), rows(), output_dir=run, **more)
