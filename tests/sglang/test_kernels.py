"""GPU kernels without a GPU. Here, because this environment has Triton."""

import subprocess
import sys

import pytest

from tests.sglang.conftest import ROOT, environment


def test_triton_kernels_give_the_bits_of_the_reference():
    pytest.importorskip("triton", reason="Triton is not installed")
    settings = {**environment(), "TRITON_INTERPRET": "1", "MEZO_PLAIN_KERNELS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.sglang.interpreted"], cwd=ROOT, env=settings, capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    assert done.stdout.strip() == "equal", done.stderr[-3000:]
