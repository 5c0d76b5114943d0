"""Translation: an encoder-decoder host, steered by a decoder-only expert of the target text."""
