"""No code comes out of files: no pickles, no remote code unasked; no path leads out of a run, no secret into it."""

import ast
import contextlib
import dataclasses
import json
import pickle
import shutil
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file

from mezo import journal
from mezo.api import build_trainer, replay
from mezo.config import MeZOConfig
from mezo.engines.torch.loading import with_safetensors
from mezo.errors import UserError
from mezo.fingerprint import checkpoint_digest
from mezo.header import _without_secrets, make_header
from mezo.hub import converted_revision
from tests.conftest import SENTIMENT_ROWS
from tests.test_cli import FULL, LORA, MASKED, PROMPTED, assert_same_weights, error_line, mezo, run_cli, train_arguments

SOURCE = Path(__file__).resolve().parents[1] / "src" / "mezo"
FORBIDDEN = {
    "torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.load", "yaml.load_all", "yaml.unsafe_load",
    "yaml.full_load", "eval", "exec", "compile", "os.system", "os.popen", "__import__", "marshal.loads", "dill.loads",
}  # fmt: skip


# --- source -----------------------------------------------------------------------------------------------------------


def violations(source):
    """Calls that run what they read, imports of pickle, remote code switched on."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute | ast.Name) and ast.unparse(node) in FORBIDDEN:
            yield ast.unparse(node)
        if isinstance(node, ast.Import) and any(name.name.split(".")[0] in PICKLES for name in node.names):
            yield ast.unparse(node)
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = {f"{node.module}.{name.name}" for name in node.names}
            if node.module.split(".")[0] in PICKLES or names & FORBIDDEN:
                yield ast.unparse(node)
        if isinstance(node, ast.keyword) and f"{node.arg}={ast.unparse(node.value)}" in SWITCHES:
            yield node.arg
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            yield from (
                k.value for k, v in pairs if k and f"{ast.unparse(k)}={ast.unparse(v)}".replace("'", "") in SWITCHES
            )


SWITCHES = {"trust_remote_code=True", "shell=True", "allow_pickle=True"}
PICKLES = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")


def test_no_module_runs_what_it_reads():
    found = {
        (str(path.relative_to(SOURCE)), violation)
        for path in SOURCE.rglob("*.py")
        for violation in violations(path.read_text())
    }
    # SGLang reads adapters from pickles; here they are only written.
    assert found == {("engines/sglang/versions.py", "import pickle")}
    assert "pickle.dumps" in (SOURCE / "engines" / "sglang" / "versions.py").read_text()


@pytest.mark.parametrize(
    "line",
    ["torch.load(f)", "import pickle", "from pickle import loads", "yaml.load(f, Loader=L)", "eval('1')",
     "f(trust_remote_code=True)", "f(**{'trust_remote_code': True})", "import dill as d", "from torch import load",
     "np.load(f, allow_pickle=True)", "run('x', shell=True)"],
)  # fmt: skip
def test_the_search_finds(line):
    assert list(violations(line))


def test_every_model_is_loaded_from_safetensors():
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("from_pretrained"):
                called = ast.unparse(node.func)
                if not called.startswith(("AutoConfig", "AutoTokenizer", "PeftConfig", "PeftModel")):
                    assert "use_safetensors" in ast.unparse(node) or "**options" in ast.unparse(node), called


# --- pickles ----------------------------------------------------------------------------------------------------------


class Harm:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("index", [False, True], ids=["one file", "shards"])
def test_a_model_with_pickled_weights_alone_is_refused(capsys, model_folder, tmp_path, jsonl, index):
    folder = Path(shutil.copytree(model_folder("bert"), tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harm(tmp_path / "harm")))
    if index:
        weight_map = {"weight_map": {"bert.embeddings.word_embeddings.weight": "pytorch_model.bin"}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(weight_map))
    data = jsonl(SENTIMENT_ROWS)
    for arguments in (
        train_arguments(str(folder), data, tmp_path / "run", *MASKED, *FULL),
        ("eval", "--model_name_or_path", folder, "--dataset_name", data, *MASKED),
    ):
        message = error_line(run_cli(capsys, *arguments))
        assert "no safetensors weights" in message
        assert str(folder) in message
    assert not (tmp_path / "harm").exists()
    assert not (tmp_path / "run").exists()


def test_harmless_pickled_weights_are_refused_too(model_folder, tmp_path):
    folder = Path(shutil.copytree(model_folder("bert"), tmp_path / "model"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no safetensors weights"):
        checkpoint_digest(str(folder))


def test_the_copy_that_the_hubs_bot_converted(monkeypatch, model_folder, tmp_path):
    """Of a repository with pickled weights alone; not one that somebody else offers under the bot's title."""
    folder, asked = model_folder("llama"), []
    digest = checkpoint_digest(str(folder))

    def request(number, author, title="Adding `safetensors` variant of this model"):
        return SimpleNamespace(git_reference=f"refs/pr/{number}", author=author, title=title)

    def discussions(self, repo_id, **wanted):
        asked.append((repo_id, wanted["discussion_type"], wanted["discussion_status"]))
        return [request(3, "mallory"), request(4, "SFconvertbot", "Upload README.md"), *offered]

    def cached_file(name, file, revision, **_):
        found = Path(folder, file)
        return str(found) if revision == "refs/pr/9" and found.exists() else None

    sound = []
    monkeypatch.setattr("mezo.hub.HfApi.file_exists", lambda self, repo_id, file: file in sound)
    monkeypatch.setattr("mezo.hub.HfApi.get_repo_discussions", discussions)
    monkeypatch.setattr("mezo.fingerprint.cached_file", cached_file)
    offered = [request(9, "SFconvertbot")]
    config = MeZOConfig(model_name_or_path="facebook/opt-13b")
    assert with_safetensors(config) == dataclasses.replace(config, model_revision="refs/pr/9")
    assert asked == [("facebook/opt-13b", "pull_request", "open")]
    assert checkpoint_digest("facebook/opt-13b", "refs/pr/9") == digest
    offered = []
    assert with_safetensors(config) == config
    with pytest.raises(UserError, match="no safetensors weights"):
        checkpoint_digest("facebook/opt-13b")
    sound.append("model.safetensors.index.json")
    assert with_safetensors(config) == config
    named = dataclasses.replace(config, model_revision="v1")
    for other in (named, MeZOConfig(model_name_or_path=str(folder))):
        assert with_safetensors(other) is other
    assert len(asked) == 2


def test_no_connection_to_the_hub(monkeypatch):
    monkeypatch.setattr("mezo.hub.HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9"))
    assert converted_revision("facebook/opt-13b") is None


@pytest.mark.parametrize("command", ["eval", "merge"])
@pytest.mark.parametrize("damage", ["pickled", "missing", "cut"])
def test_an_adapter_without_whole_safetensors_is_refused(capsys, model_folder, tmp_path, jsonl, damage, command):
    model, data, run = model_folder("llama"), jsonl(SENTIMENT_ROWS), tmp_path / "run"
    mezo(capsys, *train_arguments(model, data, run, *PROMPTED, *LORA, steps=2))
    weights = run / "adapter_model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:300])
    else:
        weights.unlink()
    if damage == "pickled":
        (run / "adapter_model.bin").write_bytes(pickle.dumps(Harm(tmp_path / "harm")))
    options = {
        "eval": ("--model_name_or_path", model, "--dataset_name", data, *PROMPTED),
        "merge": ("--output_dir", tmp_path / "merged"),
    }[command]
    message = error_line(run_cli(capsys, command, "--adapter_name_or_path", run, *options))
    assert f"adapter_name_or_path {str(run)!r}" in message
    assert damage == "cut" or "adapter_model.safetensors" in message
    assert not (tmp_path / "harm").exists()
    assert not (tmp_path / "merged").exists()


# --- paths ------------------------------------------------------------------------------------------------------------


def config_of(model, output_dir, **options):
    values = {
        "model_name_or_path": model,
        "template": "{text} it was [MASK] .",
        "label_words": {"0": "terrible", "1": "great"},
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "use_peft": True,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "save_steps": 2,
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "disable_tqdm": True,
    }
    return MeZOConfig.from_dict({**values, **options})


def train(config):
    return build_trainer(config, SENTIMENT_ROWS[:40], SENTIMENT_ROWS[40:50]).train()


@pytest.mark.parametrize(
    "named",
    [{"best_model_checkpoint": "../../other"}, {"best_model_checkpoint": "/other", "best_global_step": None},
     {"best_global_step": "2/../../other"}, {"best_global_step": "../other"}],
    ids=str,
)  # fmt: skip
def test_a_state_cannot_lead_out_of_the_run(model_folder, tmp_path, named):
    config = config_of(model_folder("bert"), tmp_path / "run")
    train(config)
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "other")
    (tmp_path / "other" / "adapter_model.safetensors").write_bytes(b"not to be read")
    state = tmp_path / "run" / "trainer_state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), **named}))
    resumed = train(MeZOConfig.from_dict({**config.to_dict(), "resume_from_checkpoint": True}))
    assert resumed.best_checkpoint is None or resumed.best_checkpoint.parent == tmp_path / "run"
    assert (tmp_path / "other" / "adapter_model.safetensors").read_bytes() == b"not to be read"


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", 3])
def test_an_index_of_shards_cannot_lead_out_of_the_model(model_folder, tmp_path, shard):
    folder = Path(shutil.copytree(model_folder("bert"), tmp_path / "model"))
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(UserError, match=r"outside its folder|is damaged"):
        checkpoint_digest(str(folder))


def with_config(path, **values):
    """Forges a journal's config under a right checksum."""
    data, header = path.read_bytes(), journal.read(path).header
    size = struct.unpack_from("<I", data, 8)[0] + 16
    header["config"] |= values
    text = json.dumps(header).encode()
    start = journal.MAGIC + struct.pack("<I", len(text)) + text
    path.write_bytes(start + struct.pack("<I", zlib.crc32(start)) + data[size:])


def test_a_journal_cannot_ask_for_remote_code(model_folder, tmp_path):
    folder = Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))
    train(config_of(str(folder), tmp_path / "run", template="{text} it was"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "remote.Remote"}}))
    harm = tmp_path / "harm"
    (folder / "remote.py").write_text(
        f"import pathlib\npathlib.Path({str(harm)!r}).touch()\n"
        "from transformers import LlamaConfig\nclass Remote(LlamaConfig):\n    pass\n"
    )
    with_config(tmp_path / "run" / "journal", trust_remote_code=True)
    replay(tmp_path / "run", tmp_path / "replayed")
    assert_same_weights(tmp_path / "run", tmp_path / "replayed")
    assert not harm.exists()
    with contextlib.suppress(UserError):
        replay(tmp_path / "run", tmp_path / "trusted", trust_remote_code=True)
    assert harm.exists()


# --- secrets ----------------------------------------------------------------------------------------------------------

SECRET = "sk-0123456789-never-to-be-written"


def test_what_looks_like_a_secret_is_left_out():
    arguments = {
        "API_KEY": SECRET, "authorization": SECRET, "hf_token_2": SECRET, "custom_secret": SECRET,
        "headers": {"x_token": SECRET, "accept": "json"}, "max_total_tokens": 300, "tokenizer_path": "t",
    }  # fmt: skip
    config = MeZOConfig(
        model_name_or_path="m", dataset_name=f"https://host/data.jsonl?token={SECRET}", sglang_engine_args=arguments,
        sglang_server_base_url=[f"http://user:{SECRET}@host:30000"],
    )  # fmt: skip
    cleaned = _without_secrets(config)
    assert SECRET not in json.dumps(cleaned)
    assert cleaned["sglang_engine_args"] == {
        "headers": {"accept": "json"},
        "tokenizer_path": "t",
        "max_total_tokens": 300,
    }
    assert cleaned["sglang_server_base_url"] == ["http://host:30000"]
    assert cleaned["dataset_name"] == "https://host/data.jsonl"


def test_no_secret_is_written_anywhere(capsys, model_folder, tmp_path, jsonl, monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "SGLANG_API_KEY", "SGLANG_ADMIN_API_KEY", "WANDB_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    config = tmp_path / "run.yaml"
    config.write_text(f"sglang_admin_api_key: {SECRET}\nsglang_engine_args: {{api_key: {SECRET}, log_level: info}}\n")
    arguments = train_arguments(
        model_folder("llama"), jsonl(SENTIMENT_ROWS), tmp_path / "run", *PROMPTED, *LORA, "--sglang_api_key", SECRET,
        "--config", config, "--save_steps", 2, "--validation_size", 8, "--eval_steps", 2, steps=4,
    )  # fmt: skip
    said = run_cli(capsys, *arguments)
    assert said.status == 0, said.err
    resumed = run_cli(capsys, *arguments, "--resume_from_checkpoint")
    inspected = run_cli(capsys, "inspect", tmp_path / "run", "--json")
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"journal", "README.md", "trainer_state.json"} <= {path.name for path in files}
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path
    for finished in (said, resumed, inspected):
        assert SECRET not in finished.out + finished.err
    recorded = journal.read(tmp_path / "run" / "journal").header["config"]
    assert recorded["sglang_engine_args"] == {"log_level": "info"}
    assert recorded["sglang_api_key"] is recorded["sglang_admin_api_key"] is None


def test_a_wrong_secret_is_not_repeated(capsys, model_folder, tmp_path, jsonl):
    config = tmp_path / "run.yaml"
    config.write_text(f"sglang_api_key: [{SECRET}]\n")
    arguments = train_arguments(model_folder("llama"), jsonl(SENTIMENT_ROWS), tmp_path / "run", "--config", config)
    message = error_line(run_cli(capsys, *arguments))
    assert "sglang_api_key" in message
    assert SECRET not in message


def test_the_header_that_is_tested_is_the_one_that_is_written(model_folder, tmp_path):
    config = config_of(model_folder("bert"), tmp_path / "run", sglang_api_key=SECRET)
    facts = {"objective": "o", "kind": "k", "labels": (), "model_digest": "", "initial_digest": ""}
    assert SECRET not in json.dumps(make_header(config, **facts, train_examples=()))
