"""LLM: open a model and generate. The offline front door.

    with LLM("smollm2") as llm:
        print(llm.generate("The capital of France is").outputs[0].text)

A folder, a GGUF file or a Hub id is built into an engine on first use and found again afterwards; an engine folder is
opened as it is. One thread steps the engine; any number of callers add requests to the running batch.
"""

import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

from slipstream.api.answers import AnswerReader
from slipstream.api.building import BuildOptions, engine_path
from slipstream.api.calls import Call, Calls
from slipstream.api.drafting import open_draft_engine
from slipstream.api.embeddings import EmbeddingOutput, embedding_of
from slipstream.api.frozen import Frozen
from slipstream.api.options import check_limits, check_options, choice
from slipstream.api.outputs import RequestOutput, ScoreOutput
from slipstream.api.requests import Message, ModelFacts, Prompt, RequestMaker, default_sampling
from slipstream.build.cache import device_for, tuned_choices
from slipstream.build.extensions import import_plugin
from slipstream.checkpoint import OwnModel, resolve
from slipstream.engine.folder import open_engine
from slipstream.errors import RequestError, UsageError
from slipstream.progress import Stopwatch
from slipstream.runtime.engine import start_engine
from slipstream.runtime.loop import EngineLoop
from slipstream.runtime.meeting import check_ranks
from slipstream.runtime.rank_process import follow
from slipstream.runtime.worker.memory import check_kv_size
from slipstream.schema.build import CapacityPolicy, QueuePolicy
from slipstream.schema.launch import Launch
from slipstream.schema.request import EngineStats, Pooling
from slipstream.schema.sampling import SamplingParams
from slipstream.schema.speculative import Speculation
from slipstream.text.tokenizer import Tokenizer
from slipstream.text.tools import answer_format

_SCORING = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)


class LLM:
    """A model ready to generate. Close it, or use it in a `with`, to free its memory.

    Under generate() and its kin lie `request_maker` and `loop`, whose GenerateRequests a server brings itself.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: str | Path | None = None,
        dtype: str = "auto",
        kv_cache_dtype: str = "auto",
        quantization: str | None = None,
        device: str = "auto",
        tp_size: int | None = None,
        pp_size: int | None = None,
        moe_ep_size: int | None = None,
        max_batch_size: int | None = None,
        max_num_tokens: int | None = None,
        max_seq_len: int | None = None,
        kv_cache_max_tokens: int | None = None,
        kv_cache_max_bytes: int | None = None,
        kv_cache_free_memory_fraction: float = 0.9,
        max_attention_window_size: int | Sequence[int] | None = None,
        sink_token_length: int = 0,
        enable_block_reuse: bool = True,
        enable_chunked_prefill: bool = True,
        capacity_scheduler_policy: str = "guaranteed_no_evict",
        queue_policy: str = "fifo",
        deterministic: bool = False,
        speculative: Mapping[str, Any] | str | None = None,
        chat_template: str | None = None,
        model_cls_file: str | Path | None = None,
        model_cls_name: str = "Model",
        disabled_passes: Sequence[str] = (),
        extra_passes: Sequence[str] = (),
        plugins: Sequence[str] = (),
        show_progress: bool = True,
    ) -> None:
        """
        model: a Hugging Face folder, a .gguf file, a checkpoint or engine folder, a Hub id, or "smollm2".
        dtype: float32, bfloat16, float16; "auto" is float32 on a CPU and the model's own on a GPU, and for a GGUF file
        on a CPU with native kernels the file's own numbers of 4 and 8 bits (quantization "gguf").
        kv_cache_dtype: fp8, int8, the dtype, or bfloat16 or float16 under float32; "auto" is what the model says of its
        KV cache, else float16 on a CPU with a quantization that rounds activations, else the dtype.
        quantization: fp8, fp8_block, int8, int8_wo, int4_wo or nvfp4 rounds weights as they are read; slipstream
        quantize makes better ones, with calibration. gguf rounds activations alone, on a CPU.
        tp_size: processes that share each layer (docs/parallelism.md), on as many GPUs or on the cores of a CPU.
        pp_size: stages that follow each other, each with some of the layers, of tp_size processes each. moe_ep_size: as
        tp_size where each process is to have some experts whole. By default 1, or as an engine was built.
        max_batch_size, max_num_tokens: sequences and tokens in one step. max_seq_len: prompt and output of a sequence.
        kv_cache_max_tokens, kv_cache_max_bytes: size of the KV cache; by default what is useful and fits in
        kv_cache_free_memory_fraction of the memory that weights and the largest step leave.
        max_attention_window_size: tokens that a token sees, for all layers or one each (a shorter list is repeated over
        them); it narrows what the model has, and older blocks are freed. sink_token_length: of these, the first tokens
        of a sequence, which stay in sight (StreamingLLM); max_seq_len may then be more than the model's own.
        capacity_scheduler_policy: guaranteed_no_evict, max_utilization or static_batch. queue_policy: fifo or priority.
        deterministic: each request's tokens and logprobs are to the last bit those that it gets alone, whatever runs
        beside it and however its prompt is cut up. On a GPU alone; slower, most for long prompts.
        speculative: how to guess several tokens for a step to verify, such as {"method": "ngram", "max_draft_len": 8}
        (docs/speculation.md), or that as JSON. Texts stay as they are without it; they come in fewer steps.
        chat_template: a jinja template that replaces the model's own.
        model_cls_file: a model file of your own (docs/adding/model.md), run as Python; model_cls_name: the class in it.
        extra_passes: rewrites of your own, "module:name" each (docs/adding/pass.md). plugins: modules to import first,
        for an engine whose graph has ops of their own; only those named here are ever imported.
        show_progress: a bar on stderr while an engine is built, where stderr is a terminal.
        """
        watch = Stopwatch()
        check_options({
            "tokenizer": tokenizer, "dtype": dtype, "kv_cache_dtype": kv_cache_dtype, "device": device,
            "quantization": quantization, "tp_size": tp_size, "pp_size": pp_size, "moe_ep_size": moe_ep_size,
            "enable_block_reuse": enable_block_reuse, "enable_chunked_prefill": enable_chunked_prefill,
            "deterministic": deterministic,
            "max_attention_window_size": max_attention_window_size, "sink_token_length": sink_token_length,
            "chat_template": chat_template, "model_cls_file": model_cls_file, "model_cls_name": model_cls_name,
            "disabled_passes": disabled_passes, "extra_passes": extra_passes, "plugins": plugins,
            "show_progress": show_progress,
        })  # fmt: skip
        launch = Launch.read()
        if launch is not None and launch.rank:  # torchrun's or mpirun's: it has from the first one what to do
            follow(launch)
        where = device_for(device)
        if deterministic and where.type == "cpu":
            raise UsageError(
                "deterministic needs a GPU (on a CPU a library's products sum in an order that depends on the batch); "
                "leave it out."
            )
        speculation = None if speculative is None else Speculation.read(speculative)
        capacity_policy = choice(CapacityPolicy, "capacity_scheduler_policy", capacity_scheduler_policy)
        order = choice(QueuePolicy, "queue_policy", queue_policy)
        limits = {"max_batch_size": max_batch_size, "max_num_tokens": max_num_tokens, "max_seq_len": max_seq_len}
        check_limits(limits)
        check_kv_size(kv_cache_free_memory_fraction, kv_cache_max_tokens, kv_cache_max_bytes)
        for module in plugins:
            import_plugin(module)
        source = resolve(model, None if model_cls_file is None else OwnModel(Path(model_cls_file), model_cls_name))
        build = BuildOptions(
            dtype=dtype, kv_cache_dtype=kv_cache_dtype, quantization=quantization,
            disabled_passes=tuple(disabled_passes), extra_passes=tuple(extra_passes),
            max_batch_size=max_batch_size, max_num_tokens=max_num_tokens,
            tp_size=tp_size, pp_size=pp_size, moe_ep_size=moe_ep_size,
        )  # fmt: skip
        if source.kind != "engine":
            check_ranks(build.config.tp_size * build.config.pp_size, where)
        at_most = None if sink_token_length else max_seq_len
        self.engine_path = engine_path(source, build, where, at_most=at_most, show_progress=show_progress)
        watch.lap("find or build the engine")
        self._folder = open_engine(self.engine_path)
        self.manifest = self._folder.manifest
        build.check_opened(self.engine_path, self.manifest)
        choices = tuned_choices(self._folder, where)
        watch.lap("open the engine")
        self.tokenizer_folder = self._folder.tokenizer_folder if tokenizer is None else Path(tokenizer)
        opened = None if self.tokenizer_folder is None else Tokenizer.open(self.tokenizer_folder)
        watch.lap("open the tokenizer")
        draft_engine = None
        if speculation is not None:
            draft_engine = open_draft_engine(
                speculation, build.of_draft_model(), where, self.manifest, opened, show_progress=show_progress
            )
            watch.lap("find or build the draft model")
        engine = start_engine(
            self._folder, choices, where, **limits,
            kv_cache_max_tokens=kv_cache_max_tokens,
            kv_cache_max_bytes=kv_cache_max_bytes,
            kv_cache_free_memory_fraction=kv_cache_free_memory_fraction,
            max_attention_window_size=_windows(max_attention_window_size),
            sink_token_length=sink_token_length,
            capacity_policy=capacity_policy,
            queue_policy=order,
            enable_block_reuse=enable_block_reuse,
            enable_chunked_prefill=enable_chunked_prefill,
            deterministic=deterministic,
            speculation=speculation,
            draft_engine=draft_engine,
            read_tokenizer=None if opened is None else opened.to_json,
            plugins=plugins,
        )  # fmt: skip
        self.runtime_config = engine.config
        watch.lap("load the weights, reserve the KV cache")
        facts = ModelFacts(
            self.manifest.name,
            self.manifest.vocab_size,
            self.runtime_config.max_seq_len,
            self.manifest.eos_token_ids,
            self.manifest.generation,
            self.manifest.hidden_size if self._folder.has_hidden_states else 0,
        )
        self.request_maker = RequestMaker(facts, opened, chat_template)
        self.loop = EngineLoop(engine)
        self._frozen = Frozen()
        self._calls = Calls(self.loop, self.request_maker)
        self.startup_seconds = watch.seconds

    # --- generating ---

    @overload
    def generate(
        self, prompts: str, sampling_params: SamplingParams | None = ..., *,
        priority: int = ..., cache_salt: str = ..., show_progress: bool = ...,
    ) -> RequestOutput: ...  # fmt: skip

    @overload
    def generate(
        self, prompts: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = ..., *,
        priority: int = ..., cache_salt: str = ..., show_progress: bool = ...,
    ) -> Any: ...  # fmt: skip

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
        show_progress: bool = False,
    ) -> RequestOutput | list[RequestOutput]:
        """Complete one prompt (a string or token ids), or a list of prompts all at once.

        sampling_params: one for all, or one a prompt; None takes the model's own defaults (generation_config.json).
        One prompt that cannot be run raises RequestError; in a list it comes back with `error` set, the others run on.
        show_progress: a bar on stderr that counts the prompts done, where stderr is a terminal.
        """
        if _is_one_prompt(prompts):
            call = Call(prompts, self._params(sampling_params), priority, cache_salt)  # type: ignore[arg-type]
            return _raise_error(*self._calls.run([call], show_progress))
        if isinstance(sampling_params, Sequence):
            if len(sampling_params) != len(prompts):
                raise RequestError(
                    f"{len(sampling_params)} sampling_params for {len(prompts)} prompts; give one or one each."
                )
            params = [self._params(each) for each in sampling_params]
        else:
            params = [self._params(sampling_params)] * len(prompts)
        calls = [Call(*each, priority, cache_salt) for each in zip(prompts, params, strict=True)]  # type: ignore[arg-type]
        return self._calls.run(calls, show_progress)

    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        cache_salt: str = "",
        **template_values: Any,
    ) -> RequestOutput:
        """Answer a conversation: [{"role": "user", "content": "…"}, …], rendered by the model's chat template.

        tools: functions that may be called, in OpenAI's form. tool_choice: auto, none, required, or one function as
        {"type": "function", "function": {"name": "…"}}. Each output's `content`, `reasoning` and `tool_calls` are what
        its `text` says. Raises RequestError for tools where the template shows no format that is read here.
        """
        reader, prompt, sampling = self._chat(messages, sampling_params, tools, tool_choice, template_values)
        return reader.read(self.generate(prompt, sampling, cache_salt=cache_salt))

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> Iterator[RequestOutput]:
        """Yield the output as it grows; `outputs[i].text_diff` is what is new. Leaving the loop aborts the request."""
        call = Call(prompt, self._params(sampling_params), priority, cache_salt)
        with contextlib.closing(self._calls.follow(call)) as steps:
            for handle in steps:
                if handle.has_news or handle.finished:
                    yield _raise_error(handle.output())

    async def generate_async(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> RequestOutput:
        """Like generate() for one prompt, from a coroutine; cancelling it aborts the request."""
        call = Call(prompt, self._params(sampling_params), priority, cache_salt)
        return _raise_error(await self._calls.run_async(call))

    async def stream_async(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> AsyncIterator[RequestOutput]:
        """Like stream(), from a coroutine."""
        call = Call(prompt, self._params(sampling_params), priority, cache_salt)
        async with contextlib.aclosing(self._calls.follow_async(call)) as steps:
            async for handle in steps:
                if handle.has_news or handle.finished:
                    yield _raise_error(handle.output())

    async def chat_async(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        cache_salt: str = "",
        **template_values: Any,
    ) -> RequestOutput:
        """Like chat(), from a coroutine."""
        reader, prompt, sampling = self._chat(messages, sampling_params, tools, tool_choice, template_values)
        return reader.read(await self.generate_async(prompt, sampling, cache_salt=cache_salt))

    async def score_async(self, prompt: Prompt) -> ScoreOutput:
        """Like score() for one prompt, from a coroutine."""
        return _score(await self.generate_async(prompt, _SCORING))

    def score(self, prompts: Prompt | Sequence[Prompt]) -> Any:
        """Logprobs of given texts: a ScoreOutput for one prompt, a list of them for a list."""
        is_one = _is_one_prompt(prompts)
        outputs = self.generate([prompts] if is_one else list(prompts), _SCORING)
        scores = [_score(_raise_error(output)) for output in outputs]
        return scores[0] if is_one else scores

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: str = "mean",
        dimensions: int | None = None,
        priority: int = 0,
        cache_salt: str = "",
        show_progress: bool = False,
    ) -> Any:
        """Given texts as vectors of length 1: an EmbeddingOutput for one prompt, a list of them for a list.

        pooling: mean, of the last layer's normed hidden states over all tokens, or last, that of the last token.
        dimensions: only so many of a vector's first numbers, for a model trained for it (arXiv:2205.13147).
        Raises RequestError where one of them cannot be run.
        """
        is_one, kind = _is_one_prompt(prompts), choice(Pooling, "pooling", pooling)
        self.request_maker.check_embedding(dimensions)
        texts: list[Any] = [prompts] if is_one else list(prompts)
        outputs = self._calls.run([Call(text, kind, priority, cache_salt) for text in texts], show_progress)
        vectors = [_embedding(_raise_error(output), dimensions) for output in outputs]
        return vectors[0] if is_one else vectors

    async def embed_async(
        self,
        prompt: Prompt,
        *,
        pooling: str = "mean",
        dimensions: int | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> EmbeddingOutput:
        """Like embed() for one prompt, from a coroutine; cancelling it aborts the request."""
        kind = choice(Pooling, "pooling", pooling)
        self.request_maker.check_embedding(dimensions)
        output = await self._calls.run_async(Call(prompt, kind, priority, cache_salt))
        return _embedding(_raise_error(output), dimensions)

    # --- what it is ---

    @property
    def tokenizer(self) -> Tokenizer:
        return self.request_maker.tokenizer

    @property
    def default_sampling_params(self) -> SamplingParams:
        """The model's generation_config.json; greedy unless it says do_sample, as in Hugging Face's generate()."""
        return default_sampling(self.manifest.generation)

    @property
    def stats(self) -> EngineStats:
        return self.loop.stats

    def chat_prompt(self, messages: Sequence[Message], **template_values: Any) -> list[int]:
        """A conversation as token ids, ending where the answer begins. Other names go to the chat template."""
        return self.request_maker.chat_prompt(messages, **template_values)

    def close(self) -> None:
        """Abort what runs, and free weights and KV cache. Closing twice does nothing."""
        self.loop.close()
        self._folder.close()
        self._frozen.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None,
        tools: Sequence[Mapping[str, Any]] | None,
        tool_choice: str | Mapping[str, Any],
        template_values: Mapping[str, Any],
    ) -> tuple[AnswerReader, list[int], SamplingParams]:
        """What reads the answer to a conversation, its prompt, and what is asked for."""
        reader = AnswerReader(answer_format(self.request_maker.chat_template), tools, tool_choice)
        prompt = self.chat_prompt(messages, tools=reader.tools, **template_values)
        return reader, prompt, reader.sampling(self._params(sampling_params), prompt, self.tokenizer)

    def _params(self, sampling_params: Any) -> SamplingParams:
        """Those of one request. Raises RequestError for what is no SamplingParams."""
        if sampling_params is None:
            return self.default_sampling_params
        if not isinstance(sampling_params, SamplingParams):
            raise RequestError(f"sampling_params is {sampling_params!r}; it must be SamplingParams(...), or one each.")
        return sampling_params


def _windows(asked: int | Sequence[int] | None) -> Sequence[int]:
    return () if asked is None else (asked,) if isinstance(asked, int) else asked


def _is_one_prompt(prompts: Any) -> bool:
    if isinstance(prompts, str):
        return True
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes | bytearray):
        raise RequestError(f"The prompt is {prompts!r}; it must be a string, token ids, or a list of those.")
    return len(prompts) > 0 and all(isinstance(each, Integral) for each in prompts)


def _raise_error(output: RequestOutput) -> RequestOutput:
    if output.error is not None:
        raise RequestError(output.error)
    return output


def _embedding(output: RequestOutput, dimensions: int | None) -> EmbeddingOutput:
    assert output.vector is not None
    return EmbeddingOutput(output.prompt_token_ids, embedding_of(output.vector, dimensions))


def _score(output: RequestOutput) -> ScoreOutput:
    assert output.prompt_logprobs is not None
    logprobs = [None if entry is None else entry.logprob for entry in output.prompt_logprobs]
    return ScoreOutput(output.prompt_token_ids, logprobs)
