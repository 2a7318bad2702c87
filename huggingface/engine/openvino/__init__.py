"""The second runner: the same weights as a graph of OpenVINO's, for a machine without a GPU.

`graph.py` makes the graph of a transformers model, `paged_cache.py` holds the KV cache that its paged attention reads,
`runner.py` computes rows with it, `agreement.py` tells whether what comes out is what torch gives. `encoder.py` is all
of that for a model that reads texts and generates none. `library.py` is the only one that imports openvino, when it is
first needed.
"""
