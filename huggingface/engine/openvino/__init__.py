"""The second runner: the same weights as an OpenVINO graph, for a machine without a GPU.

`graph.py` makes the graph of a transformers model, `paged_cache.py` holds the KV cache for its paged attention,
`runner.py` computes rows with it, `agreement.py` compares the results with torch's. `encoder.py` does all of this for
models that read texts and generate none. Only `library.py` imports openvino, on first use.
"""
