"""The torch engine: transformers models, LoRA, prefixes and dense full-parameter directions on CPU or GPU.

One probe is one plain forward pass inside `PerturbedForward`. Shapes: R rows (sequences), S positions, D hidden size,
V vocabulary or classes, Q positions whose logits are read, T targets, N examples, P probes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from mezo.adapter import canonical_name
from mezo.engines.torch.perturbed import PerturbedForward
from mezo.engines.torch.space import ParameterSpace, tensors_digest
from mezo.estimator import Probe, Record
from mezo.objective import Example, TargetScores, example_losses

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Examples as tensors: padded rows, and where to read which log-probability."""

    input_ids_RS: Tensor
    attention_mask_RS: Tensor
    row_Q: Tensor
    position_Q: Tensor
    query_T: Tensor  # index into Q of each target
    token_T: Tensor

    @classmethod
    def from_examples(cls, examples: Sequence[Example], pad_token_id: int, device: torch.device) -> Batch:
        """Rows padded on the right to the longest one."""
        sequences = [s for e in examples for s in e.sequences]
        longest = max(len(s.input_ids) for s in sequences)
        input_ids_RS = torch.full((len(sequences), longest), pad_token_id)
        attention_mask_RS = torch.zeros_like(input_ids_RS)
        queries: dict[tuple[int, int], int] = {}
        targets: list[tuple[int, int]] = []
        for row, sequence in enumerate(sequences):
            input_ids_RS[row, : len(sequence.input_ids)] = torch.tensor(sequence.input_ids)
            attention_mask_RS[row, : len(sequence.input_ids)] = 1
            for t in sequence.targets:
                targets.append((queries.setdefault((row, t.position), len(queries)), t.token))
        row_Q, position_Q = torch.tensor(list(queries)).T
        query_T, token_T = torch.tensor(targets).T
        tensors = (input_ids_RS, attention_mask_RS, row_Q, position_Q, query_T, token_T)
        return cls(*(t.to(device) for t in tensors))


class TorchEngine:
    """`mezo.engines.base.Engine` on a transformers model.

    Args:
        model: a transformers model or a PEFT model around one, in eval mode, with a language-model head or a
            classification head. Its trained parameters are those of `trained_parameters`.
        tokenizer: saved beside the weights; its padding token fills rows.
        normalize_perturbations: see `ParameterSpace`.
        widths: see `ParameterSpace`.
        weight_decay: decoupled weight decay of `update`.
        train_batch_size: examples in one forward pass of `losses`.
        eval_batch_size: examples in one forward pass of `score`.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        normalize_perturbations: bool = False,
        widths: Mapping[str, float] | None = None,
        weight_decay: float = 0.0,
        train_batch_size: int = 64,
        eval_batch_size: int = 64,
    ):
        self._model = model
        self._tokenizer = tokenizer
        self.space = ParameterSpace(trained_parameters(model), normalize_perturbations, widths or {})
        self.weight_decay = weight_decay
        self.train_batch_size = train_batch_size
        self.eval_batch_size = eval_batch_size
        self._transformer: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
        self._checked_reads = False

    @property
    def model(self) -> PreTrainedModel | PeftModel:
        """The transformers model, inside its PEFT wrapper if there is one."""
        return self._model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self._tokenizer

    @torch.no_grad()
    def losses(self, examples: Sequence[Example], probes: Sequence[Probe]) -> Tensor:
        """See `Engine.losses`."""
        losses_PN = torch.empty(len(probes), len(examples))
        for group_G in self._groups(examples, self.train_batch_size):
            part = [examples[n] for n in group_G]
            batch = self._batch(part)
            for p, probe in enumerate(probes):
                scores = self._forward(batch, probe, greedy=False)
                losses_PN[p, group_G] = example_losses(part, scores.logprobs_T).cpu()
        return losses_PN

    @torch.no_grad()
    def score(self, examples: Sequence[Example]) -> TargetScores:
        """See `Engine.score`."""
        parts: dict[int, TargetScores] = {}
        for group_G in self._groups(examples, self.eval_batch_size):
            part = [examples[n] for n in group_G]
            scores = self._forward(self._batch(part), None, greedy=True)
            counts_G = [sum(len(s.targets) for s in e.sequences) for e in part]
            columns = [t.cpu().split(counts_G) for t in scores]
            parts |= {n: TargetScores(*column) for n, column in zip(group_G, zip(*columns, strict=True), strict=True)}
        return TargetScores(*map(torch.cat, zip(*(parts[n] for n in range(len(examples))), strict=True)))

    @torch.no_grad()
    def update(self, records: Sequence[Record]) -> None:
        """See `Engine.update`."""
        self.space.update(records, self.weight_decay)

    def save(self, folder: Path) -> None:
        """See `Engine.save`."""
        if isinstance(self.model, PeftModel):
            self.model.save_pretrained(str(folder), save_embedding_layers=False)
        else:
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """See `Engine.load`."""
        if isinstance(self.model, PeftModel):
            weights = load_peft_weights(str(folder), device="cpu")
            set_peft_model_state_dict(self.model, weights)
            return
        saved = type(self.model).from_pretrained(folder, dtype=self.model.dtype)
        for name, parameter in saved.named_parameters():
            self.space.parameters[name].copy_(parameter)

    def digest(self) -> str:
        """See `Engine.digest`. Covers what is saved, frozen parts of a fresh head included."""
        if isinstance(self.model, PeftModel):
            return tensors_digest(get_peft_model_state_dict(self.model, save_embedding_layers=False))
        return self.space.digest()

    def close(self) -> None:
        """See `Engine.close`."""

    def _groups(self, examples: Sequence[Example], batch_size: int) -> list[list[int]]:
        """Indices of the examples of each forward pass: at most `batch_size`, of similar length."""
        groups: list[list[int]] = []
        for first in range(0, len(examples), batch_size):
            part = examples[first : first + batch_size]
            shapes = [(len(e.sequences), max(len(s.input_ids) for s in e.sequences)) for e in part]
            dense = not isinstance(self.model, PeftModel)
            groups += [[first + n for n in group] for group in length_groups(shapes, 500 if dense else 100)]
        return groups

    def _batch(self, examples: Sequence[Example]) -> Batch:
        pad_token_id = self.tokenizer.pad_token_id
        return Batch.from_examples(examples, 0 if pad_token_id is None else pad_token_id, self.model.device)

    def _forward(self, batch: Batch, probe: Probe | None, *, greedy: bool) -> TargetScores:
        perturbed = PerturbedForward(self.space, probe) if probe is not None else nullcontext()
        with perturbed, _LastHidden(self._transformer, batch):
            logits = self.model(input_ids=batch.input_ids_RS, attention_mask=batch.attention_mask_RS).logits
        if isinstance(perturbed, PerturbedForward) and not self._checked_reads:
            self._report_unread(perturbed.read_names)
        assert logits.ndim == 2 or logits.shape[:2] == (1, len(batch.row_Q)), "the head did not see the selected states"
        logits_QV = (logits[batch.row_Q] if logits.ndim == 2 else logits[0]).float()
        logprobs_T = logits_QV[batch.query_T, batch.token_T] - logits_QV.logsumexp(dim=1)[batch.query_T]
        best_T = logits_QV.argmax(dim=1)[batch.query_T] if greedy else torch.zeros_like(batch.token_T)
        return TargetScores(logprobs_T, best_T == batch.token_T)

    def _report_unread(self, read_names: set[str]) -> None:
        self._checked_reads = True
        unread = sorted(set(self.space.parameters) - read_names)
        if unread:
            logger.warning("%d trained parameters do not take part in the loss: %s", len(unread), ", ".join(unread[:5]))


def length_groups(shapes: Sequence[tuple[int, int]], pass_cost: int) -> list[list[int]]:
    """Splits examples into forward passes so that padding and number of passes together cost least.

    Args:
        shapes: rows and longest row, in tokens, of each example.
        pass_cost: what one more pass costs, in tokens. A dense direction is drawn anew in each pass, which on a CPU
            takes as long as some 75 tokens and on a GPU as long as some 700; an adapter's costs little.

    Returns:
        Indices of the examples of each pass, shortest rows first; the order of equal lengths is kept.
    """
    order = sorted(range(len(shapes)), key=lambda n: shapes[n][1])
    best: list[tuple[float, int]] = [(0.0, 0)]  # cost of the first k examples, and where their last pass starts
    for stop in range(1, len(order) + 1):
        longest, rows, choices = shapes[order[stop - 1]][1], 0, []
        for start in range(stop - 1, -1, -1):
            rows += shapes[order[start]][0]
            choices.append((best[start][0] + rows * longest + pass_cost, start))
        best.append(min(choices))
    groups: list[list[int]] = []
    stop = len(order)
    while stop:
        start = best[stop][1]
        groups.insert(0, order[start:stop])
        stop = start
    return groups


class _LastHidden:
    """Context in which a language-model head sees only the hidden states whose logits are read, as one row [1, Q, D].

    A classification head pools by itself and sees everything.
    """

    def __init__(self, model: PreTrainedModel, batch: Batch):
        self._model = model
        self._batch = batch

    def __enter__(self) -> None:
        self._handle = None
        if not type(self._model).__name__.endswith("ForSequenceClassification"):
            # Not `base_model`: some models (OPT) call the decoder inside it.
            self._handle = self._model.get_decoder().register_forward_hook(self._select)

    def __exit__(self, *exception: object) -> None:
        if self._handle is not None:
            self._handle.remove()

    def _select(self, module: torch.nn.Module, args: object, output: BaseModelOutput) -> BaseModelOutput:
        hidden_RSD = output.last_hidden_state
        output.last_hidden_state = hidden_RSD[self._batch.row_Q, self._batch.position_Q][None]
        return output


def trained_parameters(model: PreTrainedModel | PeftModel) -> dict[str, Tensor]:
    """Parameters to train by canonical name: those of the adapter, or all of a bare model."""
    if not isinstance(model, PeftModel):
        return {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    return {canonical_name(name): p for name, p in model.named_parameters() if p.requires_grad}
