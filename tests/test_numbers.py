"""Losses that are no numbers, losses that never differ, labels that hardly occur: said once, by name."""

import logging
import math

import pytest
import torch

from mezo import journal
from mezo.api import build_trainer
from mezo.config import MeZOConfig
from mezo.data import BatchSampler
from mezo.errors import NonFiniteLossError
from tests.conftest import SENTIMENT_ROWS

WORDS = {"0": "terrible", "1": "great"}


@pytest.fixture(autouse=True)
def _to_caplog(monkeypatch):
    """The command line, which other tests call, keeps the package's log lines to itself."""
    monkeypatch.setattr(logging.getLogger("mezo"), "propagate", True)


def trainer_of(model, output_dir, rows=SENTIMENT_ROWS, **options):
    values = {
        "model_name_or_path": model,
        "template": "{text} it was",
        "label_words": WORDS,
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "use_peft": True,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "disable_tqdm": True,
    }
    return build_trainer(MeZOConfig.from_dict({**values, **options}), rows)


def spoil(trainer, row, value):
    """Gives one training row the loss `value`."""
    bad, losses = trainer.train_examples[row], trainer.engine.losses

    def spoiled(examples, probes, loss):
        losses_PN = losses(examples, probes, loss)
        return losses_PN.masked_fill(torch.tensor([e is bad for e in examples]), value)

    trainer.engine.losses = spoiled


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_bad_row_is_named_by_number_and_text(model_folder, tmp_path, value):
    trainer = trainer_of(model_folder("llama"), tmp_path / "run")
    sampler = BatchSampler(len(SENTIMENT_ROWS), 4, seed=42)
    row = sampler(3)[2]
    assert all(row not in sampler(step) for step in range(3))
    spoil(trainer, row, value)
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.train()
    message = str(caught.value)
    assert f"loss of step 3 is not finite for training rows {row};" in message
    text = " ".join(SENTIMENT_ROWS[row]["text"].replace(".", " .").replace("!", " !").replace(",", " ,").split())
    assert f"Row {row} begins {text + ' it was'!r:.20}" in message
    assert len(journal.read(tmp_path / "run" / "journal").steps) == 3


def test_losses_whose_mean_overflows_are_no_single_rows(model_folder, tmp_path):
    trainer = trainer_of(model_folder("llama"), tmp_path / "run", epsilon=1e-300)
    trainer.engine.losses = lambda examples, *_: torch.tensor([[3e38], [-3e38]]).expand(-1, len(examples))
    with pytest.raises(NonFiniteLossError, match="their mean overflows"):
        trainer.train()


@pytest.mark.parametrize(
    "estimator", [{}, {"estimator": "fzoo", "num_queries": 2}, {"estimator": "es", "num_queries": 2}]
)
def test_losses_that_never_differ_are_said_once(model_folder, tmp_path, caplog, estimator):
    trainer = trainer_of(model_folder("llama"), tmp_path / "run", max_steps=400, save_steps=1000, **estimator)
    calls = []

    def losses(examples, probes, loss):
        calls.append(1)
        flat = torch.ones(len(probes), len(examples))
        if len(calls) in (99, 250):  # a lively step: 99 flat ones say nothing yet, and it is said once
            flat[0] = 2.0
        return flat

    trainer.engine.losses = losses
    trainer.engine.update = lambda records: None
    trainer.train()
    said = [r.getMessage() for r in caplog.records if "projected_grad was 0" in r.getMessage()]
    assert len(said) == 1
    assert "100 steps in a row" in said[0]
    assert len(calls) == 400


def test_losses_that_differ_are_not_warned_about(model_folder, tmp_path, caplog):
    trainer_of(model_folder("llama"), tmp_path / "run", max_steps=110, save_steps=1000).train()
    assert "projected_grad" not in caplog.text


def rows_of(*labels):
    return [{"text": f"{word} film", "label": label} for label, word in zip(labels, 20 * WORDS_IN_ROWS, strict=False)]


WORDS_IN_ROWS = ("good", "bad", "lovely", "dull")


@pytest.mark.parametrize(
    ("labels", "said"),
    [([1] * 10, "no training row has label 0"), ([0] * 1 + [1] * 19, "19 of 20 training rows have label 1"),
     ([0] * 2 + [1] * 18, None), ([0, 1], None)],
    ids=["missing", "95 %", "90 %", "even"],
)  # fmt: skip
@pytest.mark.parametrize("model", ["llama", "bert", "head"])
def test_labels_out_of_balance(model_folder, tmp_path, caplog, model, labels, said):
    options = {"template": "{text} it was [MASK] ."} if model == "bert" else {}
    if model == "head":
        if said == "no training row has label 0":
            pytest.skip("a head has the labels that the rows have")
        options = {"template": None, "label_words": None}
    trainer_of(model_folder("llama" if model == "llama" else "bert"), tmp_path / "run", rows_of(*labels), **options)
    warnings = [r.getMessage() for r in caplog.records if "training row" in r.getMessage()]
    assert len(warnings) == (said is not None)
    assert said is None or said in warnings[0]


def test_rows_without_labels_have_no_balance(model_folder, tmp_path, caplog):
    rows = [{"prompt": "the film was", "completion": "good"}] * 8
    trainer_of(model_folder("llama"), tmp_path / "run", rows, template=None, label_words=None)
    assert "training row" not in caplog.text
