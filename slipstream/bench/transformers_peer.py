"""transformers' generate(), as its users call it: batches that are padded on the left, each as long as its longest."""

import time
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

from slipstream.bench.dataset import Sample, open_tokenizer
from slipstream.bench.timeline import Run, Timeline
from slipstream.build.cache import device_for, dtype_for
from slipstream.checkpoint import resolve
from slipstream.text.tokenizer import Tokenizer


class Peer:
    """A Hugging Face folder or a GGUF file, in transformers."""

    def __init__(self, model: str, dtype: str, device: str) -> None:
        source, where = resolve(model), device_for(device)
        kind = dtype_for(dtype, where)
        is_file = source.kind == "gguf"
        opened = AutoModelForCausalLM.from_pretrained(
            source.path.parent if is_file else source.path, gguf_file=source.path.name if is_file else None,
            dtype=kind if kind == "auto" else getattr(torch, kind),
        )  # fmt: skip
        self._model, self._device, self._name = opened.eval().to(where), where, model

    def turn(self, samples: Sequence[Sample], concurrency: int) -> Run:
        """A batch of `concurrency` after the other; each is asked when the one before has ended."""
        prompts = [self._encode(sample) for sample in samples]
        timelines: list[Timeline] = []
        for start in range(0, len(samples), concurrency):
            here = slice(start, start + concurrency)
            timelines += self._batch(prompts[here], [sample.output_tokens for sample in samples[here]])
        return Run(f"{concurrency} at a time", timelines)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return open_tokenizer(self._name)

    def _encode(self, sample: Sample) -> list[int]:
        return self._tokenizer.encode(sample.prompt) if isinstance(sample.prompt, str) else sample.prompt

    def _batch(self, prompts: Sequence[list[int]], lengths: Sequence[int]) -> list[Timeline]:
        asked, width, stamps = time.perf_counter(), max(map(len, prompts)), _Stamps(self._device)
        ids_RT = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts], device=self._device)
        mask_RT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=self._device)
        with torch.inference_mode():
            self._model.generate(
                ids_RT, attention_mask=mask_RT, do_sample=False, min_new_tokens=max(lengths),
                max_new_tokens=max(lengths), pad_token_id=0, logits_processor=LogitsProcessorList([stamps]),
            )  # fmt: skip
        return [
            Timeline(asked, len(ids), num_output=size, arrivals=stamps.times[:size], ended=stamps.times[size - 1])
            for ids, size in zip(prompts, lengths, strict=True)
        ]


class _Stamps(LogitsProcessor):
    """When each step of a batch had its logits."""

    def __init__(self, device: torch.device) -> None:
        self.times: list[float] = []
        self._device = device

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.times.append(time.perf_counter())
        return scores
