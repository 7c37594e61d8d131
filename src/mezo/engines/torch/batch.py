"""Rows of a batch as tensors, and where to read which logit."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from mezo.engines.torch.reuse import Stage
from mezo.objective import TargetScores, TokenSequence


class Padded(NamedTuple):
    """Rows of one probe on the CPU, padded on the right to the longest one."""

    input_ids_RS: Tensor
    mask_RS: Tensor
    position_ids_RS: Tensor

    @classmethod
    def of(cls, stage: Stage, pad_token_id: int) -> Padded:
        """The rows of a stage."""
        lengths_R = np.array(list(map(len, stage.chunks)))
        place_S = np.arange(lengths_R.max())
        mask_RS = place_S < lengths_R[:, None]
        input_ids_RS = np.full(mask_RS.shape, pad_token_id)
        input_ids_RS[mask_RS] = np.fromiter(chain.from_iterable(stage.chunks), np.int64, stage.num_tokens)
        position_ids_RS = (np.array(stage.starts)[:, None] + place_S) * mask_RS
        return cls(*map(torch.from_numpy, (input_ids_RS, mask_RS.astype(np.int64), position_ids_RS)))

    def inputs(self, num_probes: int, device: torch.device) -> dict[str, Tensor]:
        """What models take, [P · R, S]: all rows once for each probe, probe by probe."""
        names = ("input_ids", "attention_mask", "position_ids")
        return {name: t.repeat(num_probes, 1).to(device) for name, t in zip(names, self, strict=True)}


class Reads(NamedTuple):
    """The Q positions of one probe's rows that are read and the T targets there, on the CPU or beside the model."""

    row_Q: Tensor
    position_Q: Tensor
    query_T: Tensor  # index into Q
    token_T: Tensor

    @classmethod
    def of(cls, stage: Stage, sequences: Sequence[TokenSequence]) -> Reads:
        """The targets of `sequences`, which are the rows of the stage."""
        queries: dict[tuple[int, int], int] = {}
        targets: list[tuple[int, int]] = []
        for row, (sequence, start) in enumerate(zip(sequences, stage.starts, strict=True)):
            for t in sequence.targets:
                targets.append((queries.setdefault((row, t.position - start), len(queries)), t.token))
        return cls(*torch.tensor(list(queries)).T, *torch.tensor(targets).T)

    def to(self, device: torch.device) -> Reads:
        """The same there."""
        return Reads(*(t.to(device) for t in self))

    def places(self, num_probes: int, num_rows: int) -> tuple[Tensor, Tensor]:
        """Rows and positions of all probes, [P · Q]; a probe has `num_rows` rows."""
        first_P1 = torch.arange(num_probes, device=self.row_Q.device)[:, None] * num_rows
        return (self.row_Q + first_P1).flatten(), self.position_Q.repeat(num_probes)

    def scores(self, logits_QV: Tensor, num_probes: int, *, greedy: bool) -> Tensor:
        """Log-probability of every target under each probe, float32 [1, P, T].

        With `greedy` [2, P, T]: also 1.0 where the target is the most probable token, else 0.0.
        """
        parts = []
        for own_QV in logits_QV.chunk(num_probes):
            part_QV = own_QV.float()
            logprobs_T = part_QV[self.query_T, self.token_T] - part_QV.logsumexp(dim=1)[self.query_T]
            hits = [(part_QV.argmax(dim=1)[self.query_T] == self.token_T).float()] if greedy else []
            parts.append(torch.stack([logprobs_T, *hits]))
        return torch.stack(parts, dim=1)


def target_scores(scores: Tensor, num_targets: int) -> list[TargetScores]:
    """What `Reads.scores` returned, on the CPU and by probe; behind `num_targets` is padding."""
    scores_PT = scores[:, :, :num_targets].cpu()
    logprobs_PT = scores_PT[0]
    hits_PT = scores_PT[1] > 0 if len(scores_PT) > 1 else torch.zeros_like(logprobs_PT, dtype=torch.bool)
    return list(map(TargetScores, logprobs_PT, hits_PT))


class LastHidden:
    """A context in which a language-model head sees only the hidden states whose logits are read, as one row [1, Q, D].

    A classification head pools by itself and sees everything.
    """

    def __init__(self, model: PreTrainedModel, row_Q: Tensor, position_Q: Tensor):
        self._model = model
        self._where = (row_Q, position_Q)

    def __enter__(self) -> None:
        self._handle = None
        if not classifies(self._model):
            # Not `base_model`: some models (OPT) call the decoder inside it. ModernBERT's "decoder" is its head.
            body = self._model.get_decoder()
            body = self._model.base_model if isinstance(body, torch.nn.Linear) else body
            self._handle = body.register_forward_hook(self._select)

    def __exit__(self, *exception: object) -> None:
        if self._handle is not None:
            self._handle.remove()

    def _select(self, module: torch.nn.Module, args: object, output: BaseModelOutput) -> BaseModelOutput:
        hidden_RSD = output.last_hidden_state
        output.last_hidden_state = hidden_RSD[self._where][None]
        return output


def classifies(model: PreTrainedModel) -> bool:
    """Whether the head gives classes, not tokens."""
    return type(model).__name__.endswith("ForSequenceClassification")
