"""The whole of Slipstream in one file: a tiny random model becomes text. Read this first.

Each step leaves a folder that the next one reads. docs/ARCHITECTURE.md follows the same two stories, the build and the
request, file by file.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from slipstream import LLM, SamplingParams
from slipstream.build import build
from slipstream.build.cache import tuned_choices
from slipstream.checkpoint import convert, open_checkpoint, resolve
from slipstream.checkpoint.random import write_random_model
from slipstream.engine.folder import open_engine
from slipstream.models.llama import TINY
from slipstream.runtime.engine import start_engine
from slipstream.schema.build import BuildConfig
from slipstream.schema.request import GenerateRequest
from slipstream.text.completion import Completion
from slipstream.text.tokenizer import Tokenizer

TEXT = "In-flight batching lets a new request join as soon as another has left."


def test_a_tiny_model_from_convert_to_text(tmp_path: Path) -> None:
    # A model as people have it: config.json, weights under Hugging Face's names, a tokenizer.
    model = write_random_model(tmp_path / "model", TINY | {"vocab_size": 300}, seed=0)
    write_tokenizer(model)

    # Station 1, convert: our names, one dtype; every tensor accounted for.
    convert(model, tmp_path / "checkpoint", dtype="float32")
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == [
        "config.json",
        "rank0.safetensors",
        "tokenizer",
    ]

    # Station 3, build (station 2, quantize, is optional): capture the model as a graph, rewrite it, choose kernels.
    checkpoint = open_checkpoint(resolve(tmp_path / "checkpoint"))
    report = build(checkpoint, tmp_path / "engine", BuildConfig(max_batch_size=4, max_num_tokens=32))
    matches = {each.name: each.matches for each in report.passes}
    assert matches["fuse_qkv"] == matches["fuse_gate_up"] == matches["fuse_rope_kv_write"] == 3  # one a layer
    assert sum(report.ops_final.values()) < sum(report.ops_captured.values())

    # The engine folder is the border: what follows knows nothing of models.
    folder = open_engine(tmp_path / "engine")
    assert folder.graph.text().splitlines()[-1].startswith("return ")
    assert json.loads((tmp_path / "engine" / "config.json").read_text())["graph_sha256"] == folder.graph.digest()

    # The runtime: add a request, step until it has ended. Each step is plan → execute → commit.
    cpu = torch.device("cpu")
    engine = start_engine(folder, tuned_choices(folder, cpu), cpu, kv_cache_max_tokens=256)
    tokenizer = Tokenizer.open(tmp_path / "engine" / "tokenizer")
    prompt = tuple(tokenizer.encode(TEXT))
    sampling = SamplingParams(temperature=0, max_tokens=20)
    engine.add(GenerateRequest("story", prompt, sampling, seed=0, max_tokens=20))
    completion = Completion(tokenizer, prompt, sampling)
    streamed = ""
    while engine.has_work:
        for event in engine.step():
            streamed += completion.push(event)
    assert completion.finish_reason == "length" and len(completion.token_ids) == 20
    assert streamed == completion.text == tokenizer.decode(completion.token_ids)

    # The front door does all of it in two lines, with the engine kept in a cache.
    with LLM(model, max_batch_size=4, max_num_tokens=32, kv_cache_max_tokens=256) as llm:
        assert llm.generate(TEXT, sampling).outputs[0].text == completion.text


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE trained on one sentence; random weights have nothing to say in any case."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    backend.save(str(folder / "tokenizer.json"))
