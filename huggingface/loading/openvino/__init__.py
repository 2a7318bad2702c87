"""Models as OpenVINO's graphs: made of the transformers model once, kept beside its files, read again at the next load.

`load.py` decides and loads, `decoder.py` and `encoder.py` make and read the graphs of models that write and of those
that only read, `graph_store.py` keeps them on the disk. `subprocess.py` runs `convert.py`, the process that makes them.
What a graph computes is `engine/openvino/`'s business.
"""
