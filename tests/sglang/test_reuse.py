"""Keys and values that are reused give the losses of computing everything, also after evictions."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from mezo import MeZOConfig, journal
from mezo.engines.sglang import build
from mezo.engines.sglang.engine import SGLangEngine
from mezo.engines.sglang.scoring import Row, Scorer, waves
from mezo.engines.sglang.versions import Prefill
from mezo.errors import EngineError
from mezo.objective import Target, TokenSequence
from tests.sglang.conftest import finish, start_job
from tests.sglang.test_trajectory import assert_same_adapter, assert_same_run
from tests.speed_table import TABLE

STEPS = 20
ALORA = {"lora_variant": "alora", "num_steps": STEPS}


@pytest.mark.parametrize("how", ["reuse", "everything computed", "requests"])
def test_activated_lora_takes_the_torch_engines_trajectory(how, reference, model_folder, tmp_path):
    run = tmp_path / "run"
    reuse = how != "everything computed"
    options = {**ALORA, "enable_kv_cache_optimization": reuse}
    # Room for one batch and little more: prompts are evicted all the time.
    if how == "reuse":
        options["sglang_engine_args"] = {"max_total_tokens": 300}
    elif how == "requests":
        options |= {
            "sglang_updates": "public",
            "sglang_engine_args": {"max_total_tokens": 300, "chunked_prefill_size": -1},
        }
    finish(start_job("finetune", model=model_folder("llama"), out=str(run), engine="sglang", **options))
    expected = reference("llama", **ALORA)
    assert_same_run(run, expected, STEPS)
    assert_same_adapter(run, expected)
    ours, theirs = (
        json.loads((folder / "adapter_config.json").read_text())["alora_invocation_tokens"]
        for folder in (run, expected)
    )
    assert ours and ours == theirs  # for PEFT
    steps = [records[0] for records in journal.read(run / "journal").steps]
    computed, asked = sum(r.computed_tokens for r in steps), sum(2 * r.num_tokens for r in steps)
    assert computed < asked if reuse else computed == asked
    last = json.loads((run / "trainer_state.json").read_text())["log_history"]
    (entry,) = [e for e in last if e.get("step") == STEPS and "tokens_asked" in e]
    assert (entry["tokens_asked"], entry["tokens_computed"]) == (asked, computed)


def test_random_batches(reference, model_folder, tmp_path):
    out = tmp_path / "found.json"
    finish(start_job("reuse", model=model_folder("llama"), out=str(out), start=str(reference("llama"))))
    found = json.loads(out.read_text())
    assert found["difference"] < 1e-5 and found["difference_in_waves"] < 1e-5
    assert found["computed"] == found["expected"]  # no token more than necessary
    assert set(found["turns"][:12]) == {4}  # with sharing and without: all rows of one probe, then all of the other
    assert sum(found["computed"]) < 0.8 * found["asked"][0]
    assert found["all_computed"][1] == found["asked"][1] == found["asked"][0]
    assert found["all_computed"][0] <= found["all_computed"][2] < 0.9 * found["asked"][0]
    prompts = dict(found["prompts"])  # tokens of prompts that were computed in a step
    assert all(prompts[step] > 0 for step in range(12, 16))
    assert all(prompts[step] == 0 for step in range(16, 20))
    # After an eviction the answers with the adapter on the prompt were thrown away and the prompts computed again.
    assert prompts[20] > 0 and prompts[21] > 0 and prompts[25] > 0
    (warning,) = found["warned"]  # of the engine that shares what is cached only
    assert "--attention-backend triton" in warning
    assert found["left"] == 0  # the memory pools are as they were


def test_the_tables_rows_reuse_what_can_be(model_folder, tmp_path):
    out = tmp_path / "found.json"
    settings = {
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"
    }  # random weights: positions beyond the model's will do
    finish(start_job("table", settings, model=model_folder("llama"), out=str(out)))
    assert json.loads(out.read_text()) == pytest.approx({row: percent for row, (_, percent) in TABLE.items()}, abs=1e-9)


def test_attention_that_shares_within_a_batch_is_the_default_on_a_gpu(model_folder, monkeypatch):
    config = MeZOConfig(model_name_or_path=model_folder("llama"), use_peft=True)
    adapter = build.adapter_on_meta(config)
    assert build.engine_arguments(config, adapter, 2)["attention_backend"] == "torch_native"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert build.engine_arguments(config, adapter, 2)["attention_backend"] == "triton"
    config = dataclasses.replace(config, sglang_engine_args={"attention_backend": "fa3"})
    assert build.engine_arguments(config, adapter, 2)["attention_backend"] == "fa3"


def test_chunks_of_activated_rows_are_refused():
    def engine(invocation, size):
        adapter = SimpleNamespace(peft_config={"default": SimpleNamespace(alora_invocation_tokens=invocation)})
        client = SimpleNamespace(name="http://one", info=lambda: {"chunked_prefill_size": size})
        return SimpleNamespace(_adapter=adapter, _clients=[client])

    for invocation, size in (([7], -1), ([7], None), (None, 2048)):
        SGLangEngine._refuse_chunks(engine(invocation, size))
    with pytest.raises(EngineError, match="start http://one with --chunked-prefill-size -1"):
        SGLangEngine._refuse_chunks(engine([7], 2048))


def test_waves_by_hand():
    def row(name, *ids, read):
        return Row(name, TokenSequence(ids, (Target(read, 0, 0),)), "")

    rows = [row(name, 1, 2, 3, last, option, read=4) for name in "+-" for last in (4, 5) for option in (8, 9)]
    assert waves(rows, 0) == [[0, 4], [2, 6], [1, 3, 5, 7]]
    assert waves(rows, 15) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert waves(rows, 16) == [[0, 4], [1, 2, 3, 5, 6, 7]]
    assert waves(rows, 100) == [list(range(8))]
    assert waves([rows[0], rows[4]], 0) == [[0, 1]]


def test_after_a_batch_that_fails_the_next_one_waits_for_the_scheduler():
    def failing(requests, body):
        raise RuntimeError("out of memory")

    prefill = Prefill.__new__(Prefill)
    prefill.shares_within_batch, prefill._under_way, prefill._forward = False, False, failing
    prefill._request = lambda body, number: SimpleNamespace(prefix_indices=())
    prefill._matches = SimpleNamespace(forget=lambda: None)
    with pytest.raises(RuntimeError, match="out of memory"):
        prefill({"input_ids": [[1, 2]], "lora_path": [None]})
    assert not prefill._under_way


def test_prompts_that_never_stay_are_an_error():
    def forgetful(body):
        return lambda: [{"meta_info": {"cached_tokens": 0}} for _ in body["input_ids"]]

    row = Row("a", TokenSequence((1, 2, 3), (Target(1, 3, 0),), adapter_start=1), "key")
    with pytest.raises(EngineError, match="KV cache is too small"):
        Scorer(forgetful, 0).scores([row], share=True, greedy=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"radix_cache_backend": None}, "--radix-cache-backend mezo"),
        ({"page_size": 16}, "--page-size 1"),
        ({"disable_radix_cache": True}, "--disable-radix-cache False"),
    ],
)
def test_servers_that_cannot_keep_prompts(change, message):
    config = MeZOConfig(model_name_or_path="m", use_peft=True, lora_variant="alora")
    info = {
        "enable_lora": True, "version": "0.5.20", "radix_cache_backend": "mezo", "page_size": 1,
        "disable_radix_cache": False,
    }  # fmt: skip
    build.check_server(info, "SGLang", config, 2)
    with pytest.raises(EngineError, match=message):
        build.check_server({**info, **change}, "SGLang", config, 2)
