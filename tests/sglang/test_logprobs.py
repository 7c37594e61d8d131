"""Log-probabilities without waiting for the GPU: SGLang's own bits, and no operation whose result the host needs."""

import types

import pytest

from mezo.engines.sglang.versions import logprobs_in_one_go

torch = pytest.importorskip("torch")
module = pytest.importorskip("sglang.srt.layers.logprob_processor")

POSITIONS, WIDTH, VOCABULARY = 7, 5, 50
WAITING = {"aten.nonzero.default", "aten._local_scalar_dense.default"}


class Operations(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.add(str(function))
        return function(*arguments, **(keywords or {}))


def logprobs(*, top=0, chunk=2048, read=POSITIONS, fast=True):
    """(log-probabilities, logits of the last position of each row, operations) of rows with 3 and 4 positions."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(POSITIONS, WIDTH, generator=generator)
    head = torch.randn(WIDTH, VOCABULARY, generator=generator)
    metadata = types.SimpleNamespace(
        extend_return_top_logprob=top > 0,
        extend_token_ids_logprob=False,
        top_logprobs_nums=[top, top],
        extend_logprob_pruned_lens_cpu=[3, read - 3],
        extend_input_logprob_token_ids_gpu=torch.arange(read),
    )
    processor = module.InputLogprobProcessor()
    processor.logprobs_chunk_size, processor.enable_logprobs_chunk = chunk, True
    processor.enable_fast_input_logprobs = fast
    with Operations() as operations:
        result, last = processor.forward(
            states,
            torch.tensor([2, 6]),
            torch.arange(read),
            [0] * 3 + [1] * 4,
            head,
            lambda states, head, *_, **__: states @ head,
            metadata,
        )
    return result, last, operations.names


@pytest.mark.parametrize("fast", [True, False])
def test_the_same_bits_without_waiting(fast):
    usual, last_usual, names_usual = logprobs(fast=fast)
    with logprobs_in_one_go():
        result, last, names = logprobs(fast=fast)
    assert torch.equal(result.token_logprobs, usual.token_logprobs)
    assert torch.equal(last, last_usual)
    assert names_usual & WAITING
    assert not names & WAITING


@pytest.mark.parametrize("case", [{"top": 2}, {"chunk": 4}, {"read": POSITIONS - 1}])
def test_whatever_else_goes_sglangs_way(case):
    usual, _, names_usual = logprobs(**case)
    with logprobs_in_one_go():
        result, _, names = logprobs(**case)
    assert torch.equal(result.token_logprobs, usual.token_logprobs)
    assert (result.top_logprobs_val, names) == (usual.top_logprobs_val, names_usual)
