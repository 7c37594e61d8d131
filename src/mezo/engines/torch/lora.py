"""LoRA under several probes in one traversal of the model.

Rows come probe by probe: of P · R rows, p · R … (p + 1) · R − 1 see the adapter of probe p. The base weights are read
once for all of them, and an adapted layer costs two small batched products, y += s · (x A_pᵀ) B_pᵀ.

Shapes: P probes, N rows × positions of one probe, I inputs and O outputs of a layer, r the rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from mezo.adapter import canonical_name
from mezo.engines.torch.buffer import ProbeBuffers
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
        self.buffers = ProbeBuffers(space)
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
        self.buffers.changed()

    def write(self, probes: Sequence[Probe]) -> Tensor:
        """All adapters one after the other, float32 [P, trained parameters], always in the same memory."""
        return self.buffers.write(probes)


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
            return y_PNO.baddbmm_(low_PNr, b_POr.mT, alpha=scaling).view(y.shape)

        return forward

    def _matrix(self, name: str, dtype: torch.dtype) -> Tensor:
        """The matrix under all probes, in the type that the layer computes in."""
        if dtype not in self._cast:
            self._cast[dtype] = self._flat_PN.to(dtype)
        return self._adapters.buffers.part(self._cast[dtype], name)


def _lora_layers(model: PeftModel) -> dict[Any, tuple[str, str]]:
    """LoRA's linear layers with the canonical names of their two matrices."""
    layers: dict[Any, tuple[str, str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and "default" in module.lora_A:
            a, b = (canonical_name(f"{name}.lora_{matrix}.default.weight") for matrix in "AB")
            layers[module] = (a, b)
    return layers
