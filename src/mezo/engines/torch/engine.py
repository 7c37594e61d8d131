"""The torch engine: transformers models, LoRA, prefixes and dense full-parameter directions on CPU or GPU.

One probe is one plain forward pass inside `PerturbedForward`; the probes of a LoRA are one pass inside `BatchedLoRA`.
A batch may be cut into stages, so that prefixes are computed once. Shapes: R rows (sequences), S positions, D hidden
size, V vocabulary or classes, Q positions whose logits are read, T targets, N examples, P probes.
"""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from mezo.adapter import canonical_name
from mezo.engines.base import Loss, Work
from mezo.engines.torch.batch import LastHidden, Padded, Reads, classifies, target_scores
from mezo.engines.torch.buffer import ProbeBuffers
from mezo.engines.torch.deferred import DeferredUpdate, is_capturing
from mezo.engines.torch.dense import Copies, Dense, DenseOnGPU, ProbeKeys, is_paired
from mezo.engines.torch.generation import generate
from mezo.engines.torch.graphs import Graphs, Shape, StaticInputs, unmasked_attention
from mezo.engines.torch.layers import POSITIONS_FIRST, FrozenLayers, first_trained_layer
from mezo.engines.torch.loading import num_weights
from mezo.engines.torch.lora import BatchedLoRA
from mezo.engines.torch.low_rank import LowRank
from mezo.engines.torch.optimizer import Optimizer, load_state, save_state
from mezo.engines.torch.passes import Costs, length_groups
from mezo.engines.torch.perturbed import BATCHED_MODELS, PerturbedForward, Weights
from mezo.engines.torch.reuse import (
    Beginning,
    Past,
    Stage,
    TensorStore,
    cache_of_rows,
    cut_rows,
    joined_rows,
    prompt_length,
    reach,
    rows_of_cache,
    shared_prefixes,
)
from mezo.engines.torch.space import ParameterSpace, tensors_digest
from mezo.errors import EngineError, UserError, is_out_of_memory
from mezo.estimator import UNPERTURBED, Probe, Record
from mezo.kernels import gpu as gpu_kernels
from mezo.objective import Example, TargetScores, TokenSequence, common_prefix, example_losses

logger = logging.getLogger(__name__)
_P = ParamSpec("_P")
_T = TypeVar("_T")

_COPY_BYTES = 5 << 28  # memory of a GPU for whole copies of a small model's parameters


def _making_room(method: Callable[Concatenate[TorchEngine, _P], _T]) -> Callable[Concatenate[TorchEngine, _P], _T]:
    """A method that may run twice: where memory runs out it does, without captured passes."""

    @functools.wraps(method)
    def with_room(self: TorchEngine, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return method(self, *args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if self._graphs is None or not is_out_of_memory(error):
                raise
        self._make_room()
        return method(self, *args, **kwargs)

    return with_room


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
        share: compute once what is exactly the same, see `mezo.engines.torch.reuse`; if not, every row whole.
        store_bytes: memory for what is kept from step to step.
        store_device: where that lies; beside the model if not given.
        low_rank: rank and window of low-rank directions; dense ones if not given. Not for adapters.
        subspace: low-rank directions in a subspace that is held for a window, see `LowRank`.
        optimizer: momentum or Adam, for an adapter or low-rank directions; plain SGD if not given.
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
        share: bool = True,
        store_bytes: int = 4_000_000_000,
        store_device: torch.device | None = None,
        low_rank: tuple[int, int] | None = None,
        subspace: bool = False,
        optimizer: Optimizer | None = None,
    ):
        self._model = model
        self._tokenizer = tokenizer
        self.space = ParameterSpace(trained_parameters(model), normalize_perturbations, widths or {})
        self.weight_decay = weight_decay
        self.train_batch_size = train_batch_size
        self.eval_batch_size = eval_batch_size
        self._transformer: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
        self._checked_reads = False
        self._defers = False  # updates may wait for the next pass
        self._beginning: Beginning | None = None  # of the pass before, under the present weights
        self._common: tuple[int, ...] = ()  # what all rows of a call begin with, if it takes several passes
        self._most_tokens: float = math.inf  # probes × rows × longest row that fit into memory, as far as known
        self._frozen_once: dict[Hashable, Tensor] | None = None  # what frozen layers hand on, for all probes of a call
        self._share = share
        self._store = TensorStore(store_bytes if share else 0, store_device or model.device)
        self.work = Work()
        self._kept_work = Work()  # of it what went into the store
        self._lora = BatchedLoRA(model, self.space) if BatchedLoRA.fits(model, self.space) else None
        self.resumes_every = low_rank[1] if low_rank is not None else 1
        on_gpu = model.device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()  # what lives as long as the engine would hold on to what loading has left
        self._low_rank: LowRank | None = None
        if low_rank is not None:
            self._low_rank = LowRank(self.space, *low_rank, optimizer, subspace=subspace)
        if self._low_rank is None:
            self.space.optimizer = optimizer
        arguments = inspect.signature(self._transformer.forward).parameters
        self._is_decoder = "past_key_values" in arguments and not self._transformer.config.is_encoder_decoder
        self._reach = reach(self._transformer.config) if self._is_decoder else 0.0
        self._accepted = {n for n in ("attention_mask", "position_ids", "use_cache") if n in arguments}
        # PEFT's prefix tuning brings keys and values of its own.
        self._has_prefix = isinstance(model, PeftModel) and model.peft_config["default"].is_prompt_learning
        self._prefix_tokens = model.peft_config["default"].num_virtual_tokens if self._has_prefix else 0
        if self._has_prefix:  # PEFT leaves the indices of its rows on the CPU, from where no graph can take them
            model.prompt_tokens["default"] = model.prompt_tokens["default"].to(model.device)
        text = self._transformer.config.get_text_config()
        self._most_positions = (getattr(text, "max_position_embeddings", None) or math.inf) - self._prefix_tokens
        self._takes_masks = text._attn_implementation in ("eager", "sdpa")  # of four dimensions, others' kernels don't
        self._frozen = self._frozen_layers()
        self._copies = self._copies_within(_COPY_BYTES if on_gpu and share else 0)
        keeps_keys = on_gpu and self._forms_weights and gpu_kernels.enabled()
        self._keys = ProbeKeys(self.space, model.device) if keeps_keys else None
        # Where launching kernels costs more than running them.
        by_outliers = getattr(self._transformer, "is_loaded_in_8bit", False)  # which every pass looks for
        self._graphs = Graphs(model.device, captures=not by_outliers) if on_gpu else None
        self._token_flops = 2 * num_weights(model)
        self._vocab_size = None if classifies(self._transformer) else text.vocab_size
        self._is_float32 = model.dtype == torch.float32

    @property
    def model(self) -> PreTrainedModel | PeftModel:
        """The transformers model, inside its PEFT wrapper if there is one."""
        return self._model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self._tokenizer

    @property
    def graph_bytes(self) -> int:
        """Memory that captured passes keep to themselves."""
        return 0 if self._graphs is None else self._graphs.num_bytes

    @torch.no_grad()
    def losses(self, examples: Sequence[Example], probes: Sequence[Probe], loss: Loss = example_losses) -> Tensor:
        """See `Engine.losses`."""
        self._beginning = None
        losses_PN = torch.empty(len(probes), len(examples))
        self.work.asked += len(probes) * sum(e.num_tokens for e in examples)
        first, together = 0, self._together(probes)
        most, groups, fitted = max(map(len, together), default=1), list[list[int]](), -1.0
        self._frozen_once = {} if len(together) > 1 else None
        for some in together:
            if fitted != self._most_tokens:  # at first, and after memory ran out
                fitted, groups = self._most_tokens, self._groups(examples, self.train_batch_size, most)
            for group_G in groups:
                part = [examples[n] for n in group_G]
                for p, score in enumerate(self._fitting(part, some, greedy=False), first):
                    losses_PN[p, group_G] = loss(part, score.logprobs_T)
            first += len(some)
        self._beginning = self._frozen_once = None
        return losses_PN

    def score(self, examples: Sequence[Example]) -> TargetScores:
        """See `Engine.score`."""
        if self._graphs is not None and self._costs.is_large:
            self._graphs.clear()  # it is captured anew after the evaluation
        return self._scored(examples)

    @torch.no_grad()
    def _scored(self, examples: Sequence[Example]) -> TargetScores:
        self._settle()
        self._beginning = None
        parts: dict[int, TargetScores] = {}
        computed, padding = self.work.computed, self.work.padding
        for group_G in self._groups(examples, self.eval_batch_size):
            part = [examples[n] for n in group_G]
            (scores,) = self._fitting(part, [UNPERTURBED], greedy=True)
            counts_G = [sum(len(s.targets) for s in e.sequences) for e in part]
            columns = [t.split(counts_G) for t in scores]
            parts |= {n: TargetScores(*column) for n, column in zip(group_G, zip(*columns, strict=True), strict=True)}
        self._beginning = None
        self.work.computed, self.work.padding = computed, padding  # the work of training is counted
        return TargetScores(*map(torch.cat, zip(*(parts[n] for n in range(len(examples))), strict=True)))

    @_making_room
    @torch.no_grad()
    def generate(
        self, prompts: Sequence[tuple[int, ...]], probes: Sequence[Probe], max_new_tokens: int, stop: str | None
    ) -> list[list[str]]:
        """See `Engine.generate`."""
        self._settle()
        known = self._num_known
        found = self._generated(prompts, probes, max_new_tokens, stop)
        if self._num_known != known:  # as in `_scores`
            found = self._generated(prompts, probes, max_new_tokens, stop)
        return found

    def _generated(
        self, prompts: Sequence[tuple[int, ...]], probes: Sequence[Probe], max_new_tokens: int, stop: str | None
    ) -> list[list[str]]:
        found = []
        for some in self._together(probes):
            with self._perturbed(some):
                found += generate(
                    self.model,
                    self.tokenizer,
                    prompts,
                    num_probes=len(some),
                    batch_size=max(1, self.eval_batch_size // len(some)),
                    max_new_tokens=max_new_tokens,
                    stop=stop,
                )
        return found

    def update(self, records: Sequence[Record]) -> None:
        """See `Engine.update`."""
        deferred = self._deferred_for(len(records))
        if deferred is not None:
            deferred.put_off(records)
        else:
            self._settle()
            (self._low_rank or self.space).update(records, self.weight_decay)
        self._changed()

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """See `Engine.deferring`."""
        self._defers = True
        try:
            yield
        finally:
            self._defers = False
            self._settle()

    def _deferred_for(self, num_records: int) -> DeferredUpdate | None:
        """Where an update waits for the next pass, if it may and can: dense directions in 16 bits on a GPU."""
        keys = self._keys
        if not self._defers or keys is None or not self._checked_reads:
            return None
        if keys.deferred is None:
            keys.deferred = keys.new_deferred(num_records, self.weight_decay)
            if self._graphs is not None and keys.deferred is not None:
                self._graphs.clear()  # captured without it
        return keys.deferred if keys.deferred is not None and keys.deferred.num_records == num_records else None

    def _settle(self) -> None:
        """Makes the update that waits."""
        if self._keys is not None and self._keys.deferred is not None:
            self._keys.deferred.settle()

    @_making_room
    def save(self, folder: Path) -> None:
        """See `Engine.save`."""
        self._settle()
        if isinstance(self.model, PeftModel):
            self.model.save_pretrained(str(folder), save_embedding_layers=False)
        elif self._low_rank is None or self._low_rank.is_folded:
            self.model.save_pretrained(folder)
        else:
            self.model.save_pretrained(folder, state_dict=self._folded_state())
        self.tokenizer.save_pretrained(folder)

    def save_optimizer(self, folder: Path) -> None:
        """See `Engine.save_optimizer`."""
        if self.space.optimizer is not None:
            save_state(self.space.optimizer.state, folder)

    def load_optimizer(self, folder: Path) -> None:
        """See `Engine.load_optimizer`."""
        if self.space.optimizer is not None:
            self.space.optimizer.state = load_state(folder, self.model.device)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """See `Engine.load`."""
        self._settle()
        if isinstance(self.model, PeftModel):
            weights = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
            set_peft_model_state_dict(self.model, weights)
            self._changed()
            return
        saved = type(self.model).from_pretrained(folder, dtype=self.model.dtype, use_safetensors=True)
        for name, parameter in saved.named_parameters():
            if name in self.space.parameters:
                self.space.parameters[name].copy_(parameter)
        if self._low_rank is not None:
            self._low_rank.reset()
        self._changed()

    def num_parameters(self) -> int:
        """See `Engine.num_parameters`."""
        return self.space.num_parameters()

    @_making_room
    def digest(self) -> str:
        """See `Engine.digest`. Covers what is saved, frozen parts of a fresh head included."""
        self._settle()
        if isinstance(self.model, PeftModel):
            return tensors_digest(get_peft_model_state_dict(self.model, save_embedding_layers=False))
        return (self._low_rank or self.space).digest()

    def close(self) -> None:
        """See `Engine.close`."""

    def _changed(self) -> None:
        """The trained parameters have moved."""
        self._beginning = None
        if self._lora is not None:
            self._lora.changed()
        if self._copies is not None:
            self._copies.changed()

    def _copies_within(self, num_bytes: int) -> ProbeBuffers | None:
        """Buffers for whole copies of the parameters, if two fit into the memory."""
        parameters = list(self.space.parameters.values())
        of_peft = isinstance(self.model, PeftModel) and not self._has_prefix
        if self._lora is not None or self._low_rank is not None or of_peft:
            return None
        if not parameters or any(p.dtype != torch.float32 for p in parameters):
            return None
        if 8 * self.space.num_parameters() > num_bytes:
            return None
        return ProbeBuffers(self.space)

    def _folded_state(self) -> dict[str, Tensor]:
        """The model's state with the trained parameters at their present values, on the CPU; tied ones stay tied."""
        assert self._low_rank is not None
        names = {id(p): name for name, p in self.space.parameters.items()}
        folded = {name: self._low_rank.folded(name).cpu() for name in self.space.parameters}
        state = self.model.state_dict(keep_vars=True)
        return {key: folded[names[id(t)]] if id(t) in names else t.detach() for key, t in state.items()}

    def _together(self, probes: Sequence[Probe]) -> list[Sequence[Probe]]:
        """Which probes go through the model in one traversal: where its layers can tell their rows apart all, but no
        more than there is memory for."""
        # A prefix is read by one embedding; the model behind it has no trained parameters.
        known = self._lora is not None or self._has_prefix
        known |= not isinstance(self.model, PeftModel) and self.model.config.model_type in BATCHED_MODELS
        if not known or not self._share:
            return [[probe] for probe in probes]
        copies = math.inf if self._copies is None else _COPY_BYTES // (4 * self.space.num_parameters())
        step = int(min(copies, self._costs.most_probes, max(1, len(probes))))
        return [probes[first : first + step] for first in range(0, len(probes), step)]

    def _perturbed(self, probes: Sequence[Probe]) -> AbstractContextManager[object]:
        """A context in which the model's rows see the trained parameters under the probes."""
        if self._lora is not None:
            return self._lora(probes)
        weights = self._weights(probes)
        return PerturbedForward(weights) if weights is not None else nullcontext()

    def _weights(self, probes: Sequence[Probe]) -> Weights | None:
        """The trained parameters under the probes, unless they are the model's own."""
        moved = any(probe.scale != 0.0 for probe in probes)
        if self._lora is not None:
            return None
        if self._low_rank is not None:
            return self._low_rank.probes(probes) if moved or not self._low_rank.is_folded else None
        if self._copies is not None and moved:
            return Copies(self.space, self._copies, probes)
        if not moved:
            self._settle()
            return None
        return Dense(self.space, probes) if self._keys is None else DenseOnGPU(self.space, self._keys, probes)

    def _groups(self, examples: Sequence[Example], batch_size: int, num_probes: int = 1) -> list[list[int]]:
        """Indices of the examples of each forward pass: at most `batch_size`, of similar length.

        What all passes begin with, if they are several, is noted.
        """
        costs = self._costs
        groups: list[list[int]] = []
        beginnings: list[tuple[int, ...]] = []
        for first in range(0, len(examples), batch_size):
            part = examples[first : first + batch_size]
            shapes = [(len(e.sequences), max(len(s.input_ids) - s.adapter_start for s in e.sequences)) for e in part]
            most_tokens = min(self._most_tokens / num_probes, costs.most_tokens(num_probes, shapes))
            beginnings.append(self._common_beginning(part))
            parts = length_groups(
                shapes,
                self._cost_of_pass(num_probes),
                most_tokens,
                costs.step(shapes, most_tokens),
                len(beginnings[-1]),
            )
            groups += [[first + n for n in group] for group in parts]
        reads = [sum(len({t.position for t in s.targets}) for s in e.sequences) for e in examples]
        passes = [part for group in groups for part in costs.within_logits(reads, group, num_probes)]
        self._common = beginnings[0][: common_prefix(beginnings)] if len(passes) > 1 else ()
        return passes

    @property
    def _shares_prefixes(self) -> bool:
        """Whether rows of a pass go on from a prompt that was computed once."""
        return self._share and self._reach > 0

    def _common_beginning(self, examples: Sequence[Example]) -> tuple[int, ...]:
        """Tokens of all rows that each pass over some of them may compute once."""
        sequences = [s for e in examples for s in e.sequences]
        if not self._shares_prefixes or any(s.adapter_start for s in sequences):
            return ()
        if self._prefix_tokens + max(len(s.input_ids) for s in sequences) > self._reach:
            return ()
        return sequences[0].input_ids[: prompt_length(sequences)]

    @property
    def _num_known(self) -> int:
        """How much of what a low-rank pass on a GPU goes by has been shown by passes before."""
        return 0 if self._low_rank is None or self._graphs is None else self._low_rank.readers.num_known

    @property
    def _forms_weights(self) -> bool:
        """Whether the weights under a probe are formed anew where a pass reads them."""
        return self._lora is None and self._low_rank is None and self._copies is None

    @property
    def _costs(self) -> Costs:
        """What decides how batches are cut, as the engine is now."""
        return Costs(
            token_flops=self._token_flops,
            on_gpu=self._graphs is not None,
            is_float32=self._is_float32,
            forms_weights=self._forms_weights and not self._has_prefix,
            vocab_size=self._vocab_size,
        )

    def _cost_of_pass(self, num_probes: int) -> int:
        """What one more forward pass costs, in tokens of one probe."""
        return self._costs.of_pass(num_probes)

    def _fitting(self, examples: Sequence[Example], probes: Sequence[Probe], *, greedy: bool) -> list[TargetScores]:
        """`_scores`, in halves where memory does not hold them at once; later passes are cut to what did not fit."""
        before = self._work_of_passes()
        try:
            return self._scores(examples, probes, greedy=greedy)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler, whose traceback holds the pass's tensors.
        self._undo_work(before)
        held = self.graph_bytes
        self._make_room()
        if greedy and held:  # by captured passes
            return self._fitting(examples, probes, greedy=greedy)
        half = len(examples) // 2
        if half:
            self._common = self._common or self._common_beginning(examples)
            rows = sum(len(e.sequences) for e in examples)
            longest = max(len(s.input_ids) - s.adapter_start for e in examples for s in e.sequences)
            self._most_tokens = min(self._most_tokens, len(probes) * rows * longest / 2)
            logger.warning("%d rows of up to %d tokens do not fit into memory; going on in halves", rows, longest)
            parts = [self._fitting(part, probes, greedy=greedy) for part in (examples[:half], examples[half:])]
            return [TargetScores(*map(torch.cat, zip(*both, strict=True))) for both in zip(*parts, strict=True)]
        if len(probes) > 1:
            return [score for probe in probes for score in self._fitting(examples, [probe], greedy=greedy)]
        raise EngineError(f"one example of {examples[0].num_tokens} tokens does not fit into memory")

    def _make_room(self) -> None:
        """Gives back the memory of captured passes and of what this process keeps for itself."""
        if self._graphs is not None:
            self._graphs.clear()
        self._beginning = None
        gc.collect()
        torch.cuda.empty_cache()

    def _scores(self, examples: Sequence[Example], probes: Sequence[Probe], *, greedy: bool) -> list[TargetScores]:
        """Scores under each probe, from one traversal of the model."""
        sequences = [s for e in examples for s in e.sequences]
        if any(s.adapter_start for s in sequences):
            return self._scores_activated(sequences, probes, greedy)
        may_capture = self._graphs is not None and self._share
        if may_capture and not self._checked_reads and any(p.scale != 0.0 for p in probes):
            self._learn(examples, probes)
        if self._beginning is not None and self._beginning.probes != tuple(probes):
            self._beginning = None
        ready = () if self._beginning is None else self._beginning.tokens
        stages = self._trained_stages(examples, len(probes), ready, self._common)
        if len(stages) == 1 and not greedy and self._is_static(stages[0], probes):
            return self._read_static(stages[0], sequences, probes, greedy)
        known, before = self._num_known, self._work_of_passes()
        scores, read_names = self._launched(stages, sequences, probes, greedy)
        if read_names is not None and not self._checked_reads:
            self._report_unread(read_names)
        if self._num_known != known:  # the bits of a pass must not depend on those before
            self._undo_work(before)
            self._beginning = None
            return self._scores(examples, probes, greedy=greedy)
        return scores

    def _learn(self, examples: Sequence[Example], probes: Sequence[Probe]) -> None:
        """What of the trained parameters a pass reads, and how; from one example if that reads all of them.

        A pass that does not know it yet takes more memory than the later ones.
        """
        before, self._beginning = self._work_of_passes(), None
        read_names: set[str] = set()
        try:
            for some in (examples[:1], examples[1:]):
                sequences = [s for e in some for s in e.sequences]
                stages = self._trained_stages(some, len(probes))
                found = self._launched(stages, sequences, probes, greedy=False)[1]
                assert found is not None
                read_names |= found
                if not self._unread(read_names) or len(examples) == 1:
                    break
        finally:
            self._beginning = None
            self._undo_work(before)
        self._report_unread(read_names)

    def _launched(
        self, stages: Sequence[Stage], sequences: Sequence[TokenSequence], probes: Sequence[Probe], greedy: bool
    ) -> tuple[list[TargetScores], set[str] | None]:
        """Scores from kernels that are launched one by one, and what of the trained parameters was read if they were
        under probes."""
        past: Past | None = None
        with self._perturbed(probes) as inside:
            for stage in stages[:-1]:
                begins = past is None and len(stage.chunks) == 1
                past = self._begin(stage, probes) if begins else self._extend(past, stage, len(probes))
            scores = self._read(past, stages[-1], sequences, len(probes), greedy)
        if all(p.scale == 0.0 for p in probes):
            return scores, None
        reader = inside.weights if isinstance(inside, PerturbedForward) else self._lora
        return scores, None if reader is None else reader.read_names

    def _trained_stages(
        self, examples: Sequence[Example], num_probes: int, known: tuple[int, ...] = (), wanted: tuple[int, ...] = ()
    ) -> list[Stage]:
        """`_stages`, above frozen layers if there are any."""
        stages = self._stages(examples, num_probes, known, wanted)
        if self._frozen is None:
            return stages
        return self._above(self._frozen, self._hidden_states(self._frozen, examples), stages)

    def _stages(
        self, examples: Sequence[Example], num_probes: int, known: tuple[int, ...] = (), wanted: tuple[int, ...] = ()
    ) -> list[Stage]:
        """A pass over the examples, cut where that computes less; see `shared_prefixes`."""
        rows = [s.input_ids for e in examples for s in e.sequences]
        whole = [Stage(rows, list(range(len(rows))), [0] * len(rows))]
        if not self._shares_prefixes:
            return whole
        cut = shared_prefixes(examples, self._cost_of_pass(num_probes), known, wanted)
        places = self._prefix_tokens + sum(max(map(len, stage.chunks)) for stage in cut)
        return cut if places <= self._reach else whole

    def _begin(self, stage: Stage, probes: Sequence[Probe]) -> Past:
        """Keys and values of the tokens that all rows of a pass begin with, from those of the pass before."""
        (tokens,), kept = stage.chunks, self._beginning
        start = 0 if kept is None else common_prefix([kept.tokens, tokens])
        past = kept.cut(start) if kept is not None and start else None
        if past is None or start < len(tokens):
            past = self._extend(past, stage.after(start), len(probes))
        layers = [(layer.keys, layer.values) for layer in past.cache.layers]
        self._beginning = Beginning(tuple(probes), tokens, layers)
        return past

    def _scores_activated(
        self, sequences: Sequence[TokenSequence], probes: Sequence[Probe], greedy: bool
    ) -> list[TargetScores]:
        """Scores of rows whose first tokens the adapter does not act on."""
        assert self._lora is not None
        starts = [s.adapter_start for s in sequences]
        chunks = [s.input_ids[start:] for s, start in zip(sequences, starts, strict=True)]
        longest = max(starts) + max(map(len, chunks))
        if longest > self._reach:
            raise UserError(
                f"lora_variant alora: {longest} tokens of prompt and answer are more than the {self._reach:g} of the "
                "model's sliding window; set a shorter max_length"
            )
        prefixes = self._prompts(sequences)
        stage = Stage(chunks, list(range(len(sequences))), starts)
        if self._graphs is not None and self._share and self._takes_masks:
            return self._read_static(stage, sequences, probes, greedy, prefixes)
        past = Past(*cache_of_rows(prefixes, len(probes), self.model.device))
        with self._lora(probes):
            return self._read(past, stage, sequences, len(probes), greedy)

    def _is_static(self, stage: Stage, probes: Sequence[Probe]) -> bool:
        """Whether launching the pass may cost more than running it, and it reads nothing that moves in memory."""
        moved = any(probe.scale != 0.0 for probe in probes)
        if self._graphs is None or not self._share or (moved and not self._checked_reads):
            return False
        if self._transformer.config.is_encoder_decoder or (self._has_prefix and not self._takes_prefix(stage)):
            return False
        if not self._takes_masks and (self._has_prefix or not self._is_decoder):
            return False
        if self._low_rank is not None:
            known = self._low_rank.keep == 1.0
        else:
            known = self._lora is not None or not moved or self._copies is not None or self._keys is not None
        return known and self._costs.is_small(len(probes) * (stage.num_tokens + stage.num_padding))

    def _takes_prefix(self, stage: Stage) -> bool:
        """Whether the model itself takes a trained prefix as PEFT hands it over, and all of a stage sees it."""
        if self._is_decoder:
            return self._prefix_tokens + max(map(len, stage.chunks)) <= self._reach
        return not classifies(self._transformer) and self._transformer.config.model_type in BATCHED_MODELS

    def _read_static(
        self,
        stage: Stage,
        sequences: Sequence[TokenSequence],
        probes: Sequence[Probe],
        greedy: bool,
        prefixes: Sequence[Tensor] = (),
    ) -> list[TargetScores]:
        """As `_read`, on static tensors, so that a CUDA graph can replay it."""
        assert self._graphs is not None
        rows, reads = Padded.of(stage, self._pad), Reads.of(stage, sequences)
        num_rows, tokens = rows.input_ids_RS.shape
        positions = max((p.shape[3] for p in prefixes), default=0)
        num_reads, num_targets = len(reads.row_Q), len(reads.token_T)
        sizes = (num_rows, tokens, positions, num_reads, num_targets)
        moved = not isinstance(self._perturbed(probes), nullcontext)  # writes the parameters, which no graph must hold
        shape = Shape.of(len(probes), is_paired(probes), moved, *sizes, greedy, self._most_positions)
        self._count(stage, len(probes), shape.rows * shape.tokens - stage.num_tokens)
        static = self._graphs.inputs(shape, prefixes[0] if prefixes else None, stage.hidden_RSD)
        static.fill(rows, reads, self._pad, prefixes, stage.hidden_RSD)
        deferred = None if self._keys is None else self._keys.deferred
        is_causal = not prefixes and not self._has_prefix and shape.tokens <= self._reach

        def forward(static: StaticInputs) -> Tensor:
            row_Q, position_Q = static.reads.places(len(probes), shape.rows)
            attention = unmasked_attention(self._transformer) if is_causal else nullcontext()
            last = LastHidden(self._transformer, row_Q, position_Q)
            with self._perturbed(probes) as inside, self._skipping(static.hidden_RSD, len(probes)), last, attention:
                prefix = self._root(len(probes) * shape.rows).cache if self._has_prefix else None
                arguments = static.arguments(self.model.dtype, prefix, encoder=not self._is_decoder)
                if "use_cache" in self._accepted:
                    arguments.setdefault("use_cache", False)
                logits = self._transformer(**arguments).logits
            if deferred is not None:
                weights = inside.weights if isinstance(inside, PerturbedForward) else None
                if is_capturing(logits):
                    deferred.captured(shape, weights.captured if isinstance(weights, DenseOnGPU) else ())
                else:
                    deferred.settle(partly=True)  # before what was captured after it is replayed
            logits_QV = logits[row_Q] if logits.ndim == 2 else logits[0]
            return static.reads.scores(logits_QV, len(probes), greedy=greedy)

        if deferred is not None:
            deferred.settle(partly=True)
        scores = self._graphs.run(shape, forward)
        if deferred is not None and self._graphs.is_captured(shape):
            deferred.replayed(shape)
        return target_scores(scores, len(reads.token_T))

    def _prompts(self, sequences: Sequence[TokenSequence]) -> list[Tensor]:
        """Keys and values [L, 2, H, S, D] of each row's tokens before the adapter acts, from the store if there."""
        wanted = [s.input_ids[: s.adapter_start] for s in sequences]
        found: dict[tuple[int, ...], Tensor] = {}
        for key in set(wanted):
            kept = self._store.get(key)
            if kept is not None:
                found[key] = kept
        rows = set(wanted) if self._share else wanted
        missing = sorted((key for key in rows if key and key not in found), key=len)
        assert isinstance(self.model, PeftModel)
        for first in range(0, len(missing), self.train_batch_size):
            keys = missing[first : first + self.train_batch_size]
            common = min(common_prefix(keys), len(keys[0]) - 1) if self._share else 0
            if common * (len(keys) - 1) <= self._cost_of_pass(1):
                common = 0
            beginning = [Stage([keys[0][:common]], [0], [0])] if common else []
            rest = Stage([key[common:] for key in keys], [0] * len(keys), [common] * len(keys))
            past: Past | None = None
            with self._keeping(), self.model.disable_adapter():
                for stage in (*beginning, rest):
                    past = self._extend(past, stage, 1)
            assert past is not None
            for key, prefix in zip(keys, rows_of_cache(past.cache, list(map(len, keys))), strict=True):
                found[key] = prefix
                self._store.put(key, prefix)
        some = next(iter(found.values()))
        found[()] = some[:, :, :, :0]
        return [found[key] for key in wanted]

    def _hidden_states(self, frozen: FrozenLayers, examples: Sequence[Example]) -> list[Tensor]:
        """What frozen layers hand on, [S, D] of each row, from the store or computed once.

        The store keeps an example's together: of the tokens that its rows begin with, and of what follows in each.
        """
        keys = [
            (
                prompt_length(e.sequences) if self._shares_prefixes and len(e.sequences) > 1 else 0,
                tuple(s.input_ids for s in e.sequences),
            )
            for e in examples
        ]
        once = self._frozen_once or {}
        found = {k: kept for k in set(keys) if (kept := once.get(k, self._store.get(k))) is not None}
        missing = {key: n for n, key in enumerate(keys) if key not in found}
        if missing:
            computed = iter(self._frozen_rows(frozen, [examples[n] for n in missing.values()]))
            for start, ids in missing:
                rows = [next(computed) for _ in ids]
                found[start, ids] = torch.cat((rows[0][:start], *(row_SD[start:] for row_SD in rows)))
                self._store.put((start, ids), found[start, ids])
                if self._frozen_once is not None:
                    self._frozen_once[start, ids] = found[start, ids]
        rows = []
        for start, ids in keys:
            kept = found[start, ids].to(self.model.device)
            first_SD, *rests = kept.split([start, *(len(row) - start for row in ids)])
            rows += [torch.cat((first_SD, rest_SD)) for rest_SD in rests] if start else rests
        return rows

    def _frozen_rows(self, frozen: FrozenLayers, examples: Sequence[Example]) -> list[Tensor]:
        """The same, computed."""
        stages = [replace(stage, share=frozen.share) for stage in self._stages(examples, 1)]
        past: Past | None = None
        with self._keeping(), frozen.alone() as hidden:
            for stage in stages[:-1]:
                past = self._extend(past, stage, 1)
            self._transformer.base_model(**self._arguments(past, stages[-1], 1))
        return joined_rows(stages, hidden)

    def _above(self, frozen: FrozenLayers, rows: Sequence[Tensor], stages: Sequence[Stage]) -> list[Stage]:
        """The stages with what frozen layers hand on to them."""
        hidden = cut_rows(stages, rows)
        share = 1.0 - frozen.share
        return [replace(s, hidden_RSD=h, share=share) for s, h in zip(stages, hidden, strict=True)]

    def _skipping(
        self, hidden_RSD: Tensor | None, num_probes: int, cache: DynamicCache | None = None
    ) -> AbstractContextManager[object]:
        """A context in which a pass takes a probe's hidden states for the frozen layers' output, if there are any."""
        if self._frozen is None or hidden_RSD is None:
            return nullcontext()
        return self._frozen.skipped(hidden_RSD.repeat(num_probes, 1, 1), cache)

    def _extend(self, past: Past | None, stage: Stage, num_probes: int) -> Past:
        """Keys and values of one more stage."""
        if past is None:
            past = self._root(num_probes * len(stage.chunks))
            stage = replace(stage, parents=list(range(len(stage.chunks))))
        decoder = self._transformer.get_decoder()
        arguments = self._arguments(past, stage, num_probes)
        with self._skipping(stage.hidden_RSD, num_probes, arguments["past_key_values"]):
            decoder(**arguments)
        return Past(arguments["past_key_values"], arguments["attention_mask"])

    def _root(self, num_rows: int) -> Past:
        """What stands before a first stage: a trained prefix, or nothing."""
        mask_RS = torch.ones(num_rows, self._prefix_tokens, dtype=torch.long, device=self.model.device)
        if not self._has_prefix:
            return Past(DynamicCache(), mask_RS)
        assert isinstance(self.model, PeftModel)
        prefix: Any = self.model.get_prompt(batch_size=num_rows)
        return Past(prefix, mask_RS)

    def _read(
        self, past: Past | None, stage: Stage, sequences: Sequence[TokenSequence], num_probes: int, greedy: bool
    ) -> list[TargetScores]:
        """The last stage, and the log-probabilities of its targets under each probe."""
        reads = Reads.of(stage, sequences).to(self.model.device)
        row_Q, position_Q = reads.places(num_probes, len(sequences))
        arguments = self._arguments(past, stage, num_probes)
        model = self.model if self._has_prefix and past is None else self._transformer
        above = self._skipping(stage.hidden_RSD, num_probes, arguments.get("past_key_values"))
        with above, LastHidden(self._transformer, row_Q, position_Q):
            logits = model(**arguments).logits
        assert logits.ndim == 2 or logits.shape[:2] == (1, len(row_Q)), "the head did not see the selected states"
        logits_QV = logits[row_Q] if logits.ndim == 2 else logits[0]
        return target_scores(reads.scores(logits_QV, num_probes, greedy=greedy), len(reads.token_T))

    def _arguments(self, past: Past | None, stage: Stage, num_probes: int) -> dict[str, Any]:
        """What the model takes of a stage; its work is counted."""
        self._count(stage, num_probes, stage.num_padding)
        inputs = Padded.of(stage, self._pad).inputs(num_probes, self.model.device)
        if past is None:
            return self._inputs(inputs, None) | ({"use_cache": False} if "use_cache" in self._accepted else {})
        past = past.of_rows(stage.parents, num_probes)
        return self._inputs(inputs, past) | {"past_key_values": past.cache, "use_cache": True}

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """A context whose work is not undone with that of the pass it is for."""
        before = (self.work.computed, self.work.padding)
        yield
        self._kept_work.computed += self.work.computed - before[0]
        self._kept_work.padding += self.work.padding - before[1]

    def _work_of_passes(self) -> tuple[float, float]:
        return self.work.computed - self._kept_work.computed, self.work.padding - self._kept_work.padding

    def _undo_work(self, before: tuple[float, float]) -> None:
        """Back to what `_work_of_passes` was."""
        self.work.computed = before[0] + self._kept_work.computed
        self.work.padding = before[1] + self._kept_work.padding

    def _count(self, stage: Stage, num_probes: int, padding: int) -> None:
        self.work.computed += num_probes * stage.share * stage.num_tokens
        self.work.padding += num_probes * stage.share * padding

    def _inputs(self, inputs: dict[str, Tensor], past: Past | None) -> dict[str, Tensor]:
        """The same, as tensors. Positions go with a past only, which may hold padding in the middle."""
        taken = {"input_ids": inputs["input_ids"]}
        if past is not None:
            taken["attention_mask"] = torch.cat((past.mask_RS, inputs["attention_mask"]), dim=1)
            taken["position_ids"] = inputs["position_ids"] + self._prefix_tokens
        elif not self._is_decoder or self._has_prefix:
            taken["attention_mask"] = inputs["attention_mask"]
        # A decoder's rows are padded behind what is read, so without a past they need no mask, and attention no
        # kernel that takes one.
        return {name: t for name, t in taken.items() if name == "input_ids" or name in self._accepted}

    @property
    def _pad(self) -> int:
        pad_token_id = self.tokenizer.pad_token_id
        return 0 if pad_token_id is None else pad_token_id

    def _frozen_layers(self) -> FrozenLayers | None:
        if not self._share or self._has_prefix or not self.space.parameters:
            return None
        if self._transformer.config.model_type in POSITIONS_FIRST:
            return None
        count = first_trained_layer(self._transformer, self.space.parameters.values())
        if not count:
            return None
        return FrozenLayers(self._transformer, min(count, self._transformer.config.num_hidden_layers - 1))

    def _unread(self, read_names: set[str]) -> list[str]:
        return sorted(set(self.space.parameters) - read_names)

    def _report_unread(self, read_names: set[str]) -> None:
        self._checked_reads = True
        unread = self._unread(read_names)
        if unread:
            logger.warning("%d trained parameters do not take part in the loss: %s", len(unread), ", ".join(unread[:5]))


def trained_parameters(model: PreTrainedModel | PeftModel) -> dict[str, Tensor]:
    """Parameters to train, which require gradients in PyTorch's terms, by canonical name."""
    if not isinstance(model, PeftModel):
        return {name: p for name, p in model.named_parameters() if p.is_floating_point() and p.requires_grad}
    return {canonical_name(name): p for name, p in model.named_parameters() if p.requires_grad}
