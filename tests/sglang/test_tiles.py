"""Query tiles of SGLang's Triton attention: small ones for few new tokens, its own otherwise."""

import pytest

from mezo.engines.sglang.versions import small_tiles

attention = pytest.importorskip("sglang.kernels.ops.attention.extend_attention")


@pytest.mark.parametrize("width", [64, 128, 256])
def test_small_tiles(width):
    def sizes():
        return attention._get_block_sizes_for_extend_attention(width, width)

    usual = sizes()
    with small_tiles(3):
        assert sizes() == (*usual[:3], 16, usual[4], 2)
    with small_tiles(17):
        assert sizes() == usual
    with pytest.raises(KeyError), small_tiles(3):
        raise KeyError
    assert sizes() == usual
