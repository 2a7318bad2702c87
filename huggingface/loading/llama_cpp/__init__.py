"""llama.cpp as a backend: a GGUF file is computed as it is, mapped into memory.

`load.py` is the backend; `reference.py` computes what the file's unpacked model gives, for the check at load.
"""
