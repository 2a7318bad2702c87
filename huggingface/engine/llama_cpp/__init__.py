"""Text generation with llama.cpp's library: rows of tokens in, logits out, from a GGUF file as it is."""
