"""LoRA under several probes in one traversal of the model.

Rows come probe by probe: of P · R rows, p · R … (p + 1) · R − 1 see the adapter of probe p. The base weights are read
once for all of them, and an adapted layer costs two small batched products, y += s · (x A_pᵀ) B_pᵀ.

Shapes: P probes, N rows × positions of one probe, I inputs and O outputs of a layer, r the rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from mezo import philox
from mezo.adapter import canonical_name
from mezo.engines.torch.space import ParameterSpace
from mezo.estimator import Probe


class BatchedLoRA:
    """The adapters of a PEFT LoRA model at θ + scale · z(seed), for several probes at once.

    Args:
        model: all of its trained parameters are LoRA matrices of linear layers, see `fits`.
        space: its trained parameters.
    """

    def __init__(self, model: PeftModel, space: ParameterSpace):
        self.space = space
        self.layers = _lora_layers(model)
        self._masters = [p.detach() for p in space.parameters.values()]
        sizes = [p.numel() for p in self._masters]
        stops = list(itertools.accumulate(sizes))
        # Of each parameter in a row of all of them.
        self.ranges = dict(zip(space.parameters, zip([0, *stops[:-1]], stops, strict=True), strict=True))
        self._buffers: dict[int, _Buffer] = {}  # by number of probes; they stay where they are, for CUDA graphs
        self.read_names: set[str] = set()

    @staticmethod
    def fits(model: torch.nn.Module, space: ParameterSpace) -> bool:
        """Whether everything that is trained is a LoRA matrix of a plain linear layer."""
        if not isinstance(model, PeftModel) or model.peft_config["default"].peft_type != "LORA":
            return False
        names = {name for layer in _lora_layers(model).values() for name in layer}
        return names == set(space.parameters)

    def __call__(self, probes: Sequence[Probe]) -> _Patched:
        """A context in which the model's rows see the probes' adapters."""
        return _Patched(self, self.write(probes), len(probes))

    def changed(self) -> None:
        """The trained parameters have moved."""
        for buffer in self._buffers.values():
            buffer.written = ()

    def write(self, probes: Sequence[Probe]) -> Tensor:
        """All adapters one after the other, float32 [P, trained parameters], always in the same memory."""
        if len(probes) not in self._buffers:
            self._buffers[len(probes)] = _Buffer(self._masters, self.space.streams(), len(probes))
        buffer = self._buffers[len(probes)]
        if tuple(probes) != buffer.written:
            for probe, segments, outs in zip(probes, buffer.segments, buffer.outs, strict=True):
                if probe.scale == 0.0:
                    torch._foreach_copy_(outs, self._masters)
                    continue
                factors = [probe.scale * self.space.scale(name, probe.seed) for name in self.space.parameters]
                segments.add_normals(factors, probe.seed)
            buffer.written = tuple(probes)
        return buffer.flat_PN


class _Buffer:
    def __init__(self, masters: Sequence[Tensor], streams: Sequence[int], num_probes: int):
        sizes = [p.numel() for p in masters]
        self.flat_PN = torch.empty(num_probes, sum(sizes), device=masters[0].device)
        self.outs = [
            [part.view(p.shape) for part, p in zip(row_N.split(sizes), masters, strict=True)] for row_N in self.flat_PN
        ]
        self.segments = [philox.Segments(masters, outs, streams) for outs in self.outs]
        self.written: tuple[Probe, ...] = ()


class _Patched:
    def __init__(self, adapters: BatchedLoRA, flat_PN: Tensor, num_probes: int):
        self._adapters = adapters
        self._flat_PN = flat_PN
        self._num_probes = num_probes
        self._cast: dict[torch.dtype, Tensor] = {}

    def __enter__(self) -> None:
        for module, (name_a, name_b) in self._adapters.layers.items():
            module.forward = self._forward_of(module, name_a, name_b)

    def __exit__(self, *exception: object) -> None:
        for module in self._adapters.layers:
            del module.forward

    def _forward_of(self, module: Any, name_a: str, name_b: str) -> Any:
        base_layer, scaling = module.base_layer, module.scaling["default"]

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self._adapters.read_names.update((name_a, name_b))
            y: Tensor = base_layer(x)
            a_PrI, b_POr = self._matrix(name_a, y.dtype), self._matrix(name_b, y.dtype)
            x_PNI = x.to(y.dtype).reshape(self._num_probes, -1, a_PrI.shape[2])
            y_PNO = y.reshape(self._num_probes, -1, b_POr.shape[1])
            low_PNr = torch.bmm(x_PNI, a_PrI.mT)
            return torch.baddbmm(y_PNO, low_PNr, b_POr.mT, alpha=scaling).view(y.shape)

        return forward

    def _matrix(self, name: str, dtype: torch.dtype) -> Tensor:
        """The matrix under all probes, in the type that the layer computes in."""
        if dtype not in self._cast:
            self._cast[dtype] = self._flat_PN.to(dtype)
        start, stop = self._adapters.ranges[name]
        shape = self._adapters.space.parameters[name].shape
        return self._cast[dtype][:, start:stop].view(-1, *shape)


def _lora_layers(model: PeftModel) -> dict[Any, tuple[str, str]]:
    """LoRA's linear layers with the canonical names of their two matrices."""
    layers: dict[Any, tuple[str, str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and "default" in module.lora_A:
            a, b = (canonical_name(f"{name}.lora_{matrix}.default.weight") for matrix in "AB")
            layers[module] = (a, b)
    return layers
