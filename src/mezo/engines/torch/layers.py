"""Transformer layers by number: what `trainable_layers` means, and forward passes that start above frozen layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from mezo.errors import UserError

POSITIONS_FIRST = frozenset(["xlnet"])  # models whose hidden states are [S, R, D]
_LAST = re.compile(r"last:(\d+)(?:/(\d+))?")


def first_trainable(spec: str, num_layers: int) -> int | None:
    """Number of the first layer that `trainable_layers` means with `last:k` or a part as `last:1/3`, rounded to whole
    layers and at least one; None if it is a pattern.

    Raises:
        UserError: there are not so many layers.
    """
    found = _LAST.fullmatch(spec)
    if found is None:
        return None
    count, parts = int(found[1]), int(found[2] or 0)
    if parts and 0 < count <= parts:
        count = max(1, (2 * num_layers * count + parts) // (2 * parts))
    elif found[2] is not None or not 0 < count <= num_layers:
        raise UserError(f"trainable_layers {spec}: the model has {num_layers} layers")
    return num_layers - count


def trainable_names(model: PreTrainedModel, spec: str) -> list[str]:
    """Names of the parameters that `trainable_layers` means.

    Raises:
        UserError: there are none, or not so many layers.
    """
    names = [name for name, p in model.named_parameters() if p.is_floating_point()]
    if _LAST.fullmatch(spec) is None:
        try:
            chosen = [name for name in names if re.search(spec, name)]
        except re.error as error:
            raise UserError(f"trainable_layers {spec!r} is no regular expression: {error}") from None
        if not chosen:
            raise UserError(f"trainable_layers {spec!r} matches no parameter; the first are {', '.join(names[:3])}")
        return chosen
    prefix, layers = transformer_layers(model)
    first = first_trainable(spec, len(layers)) or 0
    return [name for name in names if (_number(name, prefix) or 0) >= first or _is_above(model, name, prefix)]


def transformer_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of the model's layers, and its name."""
    wanted = getattr(model.config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted and len(set(map(type, module))) == 1:
            return name, module
    raise UserError(f"trainable_layers: no list of layers was found in {type(model).__name__}")


def first_trained_layer(model: PreTrainedModel, trained: Iterable[Tensor]) -> int:
    """Number of the lowest layer with a trained parameter; 0 if one below all layers is trained."""
    try:
        prefix, layers = transformer_layers(model)
    except UserError:
        return 0
    wanted = {id(p) for p in trained}
    lowest = len(layers)
    for name, parameter in model.named_parameters():
        if id(parameter) in wanted:
            number = _number(name, prefix)
            if number is None:
                number = len(layers) if _is_above(model, name, prefix) else 0
            lowest = min(lowest, number)
    return lowest


def _number(name: str, prefix: str) -> int | None:
    found = re.match(rf"{re.escape(prefix)}\.(\d+)\.", name)
    return int(found[1]) if found else None


def _is_above(model: PreTrainedModel, name: str, prefix: str) -> bool:
    """Norms and classification heads behind the last layer. Embeddings and a language-model head stay out."""
    if _number(name, prefix) is not None or "emb" in name or "project_in" in name or re.search(r"\bw[tp]e\b", name):
        return False
    beside = prefix.rpartition(".")[0] + "."
    if name.startswith(beside) and any(n.startswith(beside + "rel") for n, _ in model.named_parameters()):
        return False  # relative positions that every layer reads, and their norm
    head = model.get_output_embeddings()
    return head is None or all(p is not model.get_parameter(name) for p in head.parameters())


class FrozenLayers:
    """The layers below the first trained one, whose outputs are the same for every probe and step.

    Args:
        model: the transformers model.
        count: how many layers are frozen, from the bottom.
    """

    def __init__(self, model: PreTrainedModel, count: int):
        self.model = model
        self.count = count
        self.layers = transformer_layers(model)[1]
        self._others: int | None = None  # of a tuple that layers return

    @property
    def share(self) -> float:
        """Share of all layers."""
        return self.count / len(self.layers)

    @contextmanager
    def alone(self) -> Iterator[list[Tensor]]:
        """A context in which forward passes end below the first trained layer.

        Yields:
            What enters that layer, [R, S, D] of each pass.
        """
        captured: list[Tensor] = []

        def note_type(module: nn.Module, args: Any, output: Any) -> None:
            self._others = len(output) - 1 if isinstance(output, tuple) else None

        def capture(hidden_RSD: Tensor, *args: Any, **kwargs: Any) -> Any:
            captured.append(hidden_RSD)
            return self._wrapped(hidden_RSD)

        def identity(hidden_RSD: Tensor, *args: Any, **kwargs: Any) -> Any:
            return self._wrapped(hidden_RSD)

        with ExitStack() as stack:
            handle = self.layers[0].register_forward_hook(note_type)
            stack.callback(handle.remove)
            stack.enter_context(_Forward(self.layers[self.count], capture))
            for layer in self.layers[self.count + 1 :]:
                stack.enter_context(_Forward(layer, identity))
            yield captured

    @contextmanager
    def skipped(self, hidden_RSD: Tensor, cache: Cache | None) -> Iterator[None]:
        """A context in which a forward pass takes these hidden states for the frozen layers' output.

        Args:
            hidden_RSD: the rows of the pass, those of each probe.
            cache: the pass's own, if any, whose lower layers are then as long as those above.
        """

        def identity(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            return self._wrapped(hidden_RSD)

        with ExitStack() as stack:
            for layer in self.layers[: self.count]:
                stack.enter_context(_Forward(layer, identity))
            yield
        if cache is not None:  # masks and places go by the length of the lowest layer's keys
            rows, places, _ = hidden_RSD.shape
            for number in range(self.count):
                cache.update(*[hidden_RSD.new_zeros(rows, 1, places, 1)] * 2, number)

    def _wrapped(self, hidden: Tensor) -> Any:
        return hidden if self._others is None else (hidden, *[None] * self._others)


class _Forward:
    """Context in which a module has another `forward`."""

    def __init__(self, module: nn.Module, forward: Any):
        self._module, self._forward = module, forward

    def __enter__(self) -> None:
        self._module.forward = self._forward

    def __exit__(self, *exception: object) -> None:
        del self._module.forward
