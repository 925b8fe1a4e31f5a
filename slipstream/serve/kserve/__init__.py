"""KServe's inference protocol, version 2, with Triton's extensions: tensors.py is how tensors travel, ensemble.py the
tensors that the model takes and gives, model.py runs them, http.py and rpc.py are the two ways in.
"""
