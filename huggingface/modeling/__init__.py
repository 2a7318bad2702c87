"""Facts about transformers models that several folders need: rotary embeddings, usable logits, memory of `generate`."""
