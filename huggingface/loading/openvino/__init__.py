"""Models as OpenVINO's graphs: made of the transformers model once, kept beside its files, read again at the next load.

`loading.py` decides and loads, `generator.py` and `encoder.py` make and read the graphs of models that write and of
those that only read, `place.py` keeps them on the disk, `process.py` is the process that makes them. What a graph
computes is `engine/openvino/`'s business.
"""
