"""Fast versions of the reference code in `mezo.philox`: the same bits, sooner."""
