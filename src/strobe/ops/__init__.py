"""The small operations around attention: embedding, norm, rope, softmax, activation, the cache, sampling."""
