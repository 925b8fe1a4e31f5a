"""NVIDIA's Triton Inference Server, the real one, in front of our engine.

repository.py writes a model repository and template.py fills its ${keys}; launch.py starts the server and server.py
finds it. Inside the server, each model folder's model.py is one import of preprocessing.py, engine.py (the model
tensorrt_llm, over desk.py), postprocessing.py or bls.py; wire.py is all that knows Triton's Python module.
"""
