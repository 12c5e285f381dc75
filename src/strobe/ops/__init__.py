"""The small operations around attention: norm, rope, activation, cache writes, sampling."""
