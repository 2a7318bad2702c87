"""Models as OpenVINO graphs: made from the transformers model once, stored beside its files, read at the next load.

`load.py` decides and loads; `decoder.py` and `encoder.py` make and read the graphs of models that generate and of
models that only read; `graph_store.py` stores them on the disk. `subprocess.py` runs `convert.py`, the process that
makes them. `engine/openvino/` computes with them.
"""
