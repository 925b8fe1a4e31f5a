"""slipstream run: prompts in, texts out, as TensorRT-LLM's examples/run.py prints them."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slipstream.cli import _options as options
from slipstream.cli._engine import choose_model
from slipstream.cli._errors import USER_ERROR
from slipstream.cli._prompts import Prompt, gather_prompts, read_text
from slipstream.cli._sampling import RunSampling
from slipstream.cli._startup import StartupClock
from slipstream.errors import ModelError, UsageError
from slipstream.schema.sampling import MAX_SEQUENCES

if TYPE_CHECKING:
    from slipstream.api import LLM, RequestOutput
    from slipstream.schema.sampling import SamplingParams


def run(
    model: Annotated[
        str | None, typer.Option(help="Model folder, .gguf file, Hub id or smollm2; built on first use.")
    ] = None,
    engine_dir: Annotated[Path | None, typer.Option(help="Engine folder, instead of --model.")] = None,
    model_cls_file: options.ModelClsFile = None,
    model_cls_name: options.ModelClsName = "Model",
    tokenizer_dir: options.TokenizerDir = None,
    input_text: Annotated[list[str] | None, typer.Option(help="A prompt; several make a batch.")] = None,
    input_file: Annotated[
        Path | None, typer.Option(help="Prompts from a .txt (one a line), .jsonl or .csv (token ids) file.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Each prompt is a message; the model's chat template wraps it.")
    ] = False,
    add_special_tokens: Annotated[
        bool, typer.Option(help="Put the tokenizer's first token before a prompt; no, if the prompt has its own.")
    ] = True,
    system_prompt: options.SystemPrompt = None,
    chat_template: options.ChatTemplate = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Print the text as it comes.")] = False,
    max_output_len: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = RunSampling.max_output_len,
    num_beams: Annotated[
        int, typer.Option(min=1, max=MAX_SEQUENCES, help="Beams of a beam search; 1 is none.")
    ] = RunSampling.num_beams,
    num_return_sequences: Annotated[
        int | None, typer.Option(min=1, max=MAX_SEQUENCES, help="Texts for each prompt.  [default: all beams, else 1]")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Above 1 is bolder, 0 greedy.")] = RunSampling.temperature,
    top_k: Annotated[int, typer.Option(help="Choose among this many tokens; 1 is greedy, 0 all.")] = RunSampling.top_k,
    top_p: Annotated[
        float, typer.Option(help="Choose among tokens of this probability; 0 is off.")
    ] = RunSampling.top_p,
    min_p: Annotated[
        float, typer.Option(help="Leave out what is this much less likely than the best.")
    ] = RunSampling.min_p,
    typical_p: Annotated[float, typer.Option(help="Locally typical sampling; 1 is off.")] = RunSampling.typical_p,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1 discourages tokens of prompt and output.")
    ] = RunSampling.repetition_penalty,
    presence_penalty: Annotated[
        float, typer.Option(help="Taken from each token already in the output.")
    ] = RunSampling.presence_penalty,
    frequency_penalty: Annotated[
        float, typer.Option(help="The same, for each time it is there.")
    ] = RunSampling.frequency_penalty,
    length_penalty: Annotated[
        float, typer.Option(help="Beam score: sum of logprobs / length ** this.")
    ] = RunSampling.length_penalty,
    early_stopping: Annotated[
        int, typer.Option(min=0, max=1, help="1 ends a beam search once all beams have ended.")
    ] = RunSampling.early_stopping,
    no_repeat_ngram_size: Annotated[
        int, typer.Option(help="No run of this many tokens comes twice; 0 is off.")
    ] = RunSampling.no_repeat_ngram_size,
    random_seed: Annotated[int, typer.Option(help="Equal seeds give equal texts.")] = RunSampling.random_seed,
    stop_words: Annotated[list[str] | None, typer.Option(help="End at this text; may be given again.")] = None,
    bad_words: Annotated[list[str] | None, typer.Option(help="Never write this; may be given again.")] = None,
    guided_json: Annotated[
        str | None, typer.Option(help="The text is JSON that follows this schema: a file, or the schema itself: {…}.")
    ] = None,
    guided_regex: Annotated[str | None, typer.Option(help="The whole text matches this regular expression.")] = None,
    guided_choice: Annotated[
        list[str] | None, typer.Option(help="The text is one of these; may be given again.")
    ] = None,
    guided_grammar: Annotated[
        Path | None, typer.Option(help="The text follows this file's Lark or GBNF grammar.")
    ] = None,
    end_id: Annotated[
        int | None, typer.Option(min=-1, help="Token that ends a text instead of the model's own; -1 is none.")
    ] = None,
    dtype: options.Dtype = "auto",
    kv_cache_dtype: options.KvCacheDtype = "auto",
    quantization: options.Quantization = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    tp_size: options.TpSize = None,
    pp_size: options.PpSize = None,
    moe_ep_size: options.MoeEpSize = None,
    max_batch_size: options.MaxBatchSize = None,
    max_num_tokens: options.MaxNumTokens = None,
    max_seq_len: options.MaxSeqLen = None,
    kv_cache_max_tokens: options.KvCacheMaxTokens = None,
    kv_cache_max_bytes: options.KvCacheMaxBytes = None,
    kv_cache_free_memory_fraction: options.KvCacheFraction = 0.9,
    max_attention_window_size: options.AttentionWindow = None,
    sink_token_length: options.SinkTokens = 0,
    kv_cache_enable_block_reuse: options.BlockReuse = True,
    enable_chunked_context: options.ChunkedContext = True,
    capacity_scheduler_policy: options.CapacityPolicy = "guaranteed_no_evict",
    deterministic: options.Deterministic = False,
    speculative: options.Speculative = None,
    plugin: options.Plugin = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Say on stderr where the time went.")] = False,
) -> None:
    """Generate text from prompts.

    Prints `Input [Text 0]: "…"` and `Output [Text 0 Beam 0]: "…"` for each prompt, as TensorRT-LLM's run.py does;
    with --chat --streaming only the answer. A prompt that cannot be run is reported on stderr, the others go on, and
    the exit code is 2.

    Example:
        slipstream run --model smollm2 --chat --streaming --input_text "How do I count to nine in French?"
        slipstream run --engine_dir engines/smollm2 --input_text "The capital of France is" --max_output_len 8
    """
    clock = StartupClock()
    flags = RunSampling(
        max_output_len=max_output_len,
        num_beams=num_beams,
        num_return_sequences=num_return_sequences,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        no_repeat_ngram_size=no_repeat_ngram_size,
        random_seed=random_seed,
        stop_words=tuple(stop_words or ()),
        bad_words=tuple(bad_words or ()),
        guided_json=guided_json,
        guided_regex=guided_regex,
        guided_choice=tuple(guided_choice or ()),
        guided_grammar=guided_grammar,
        end_id=end_id,
    )
    # Mistakes that show without the model are reported without it.
    path = choose_model(model, engine_dir)
    prompts = gather_prompts(input_text or (), input_file)
    sampling = _sampling(flags, streaming=streaming, num_prompts=len(prompts))
    look = _Look(chat=chat, streaming=streaming, system_prompt=system_prompt, add_special_tokens=add_special_tokens)
    _check_chat(look, prompts, chat_template)
    template = None if chat_template is None else read_text(chat_template, "--chat_template")
    import torch  # noqa: F401 - first and alone, for the clock

    clock.lap("import torch")
    from slipstream.api import LLM

    clock.lap("import slipstream")
    llm = LLM(
        path,
        tokenizer=tokenizer_dir,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        quantization=quantization,
        device=device,
        tp_size=tp_size,
        pp_size=pp_size,
        moe_ep_size=moe_ep_size,
        max_batch_size=max_batch_size,
        max_num_tokens=max_num_tokens,
        max_seq_len=max_seq_len,
        kv_cache_max_tokens=kv_cache_max_tokens,
        kv_cache_max_bytes=options.parse_bytes("--kv_cache_max_bytes", kv_cache_max_bytes),
        kv_cache_free_memory_fraction=kv_cache_free_memory_fraction,
        max_attention_window_size=max_attention_window_size,
        sink_token_length=sink_token_length,
        enable_block_reuse=kv_cache_enable_block_reuse,
        enable_chunked_prefill=enable_chunked_context,
        capacity_scheduler_policy=capacity_scheduler_policy,
        deterministic=deterministic,
        speculative=speculative,
        chat_template=template,
        model_cls_file=model_cls_file,
        model_cls_name=model_cls_name,
        plugins=plugin or (),
    )
    clock.add(llm.startup_seconds)
    with llm:
        generate = _run_one if len(prompts) == 1 else _run_batch
        failed = generate(llm, prompts, sampling, look, clock if verbose else None)
    if failed:
        sys.exit(USER_ERROR)


@dataclass(frozen=True)
class _Look:
    """How prompts go in and texts come out."""

    chat: bool
    streaming: bool
    system_prompt: str | None
    add_special_tokens: bool

    @property
    def is_bare(self) -> bool:
        """Only the answer: a person is reading it."""
        return self.chat and self.streaming


def _sampling(flags: RunSampling, *, streaming: bool, num_prompts: int) -> "SamplingParams":
    if streaming and flags.num_beams > 1:
        raise UsageError(
            f"--streaming has nothing to show with --num_beams {flags.num_beams}, where the best text is known only at "
            "the end; leave one of them out."
        )
    if streaming and flags.num_outputs * num_prompts > 1:
        num_texts = flags.num_outputs * num_prompts
        raise UsageError(f"--streaming shows one text as it comes, and {num_texts} are asked for; leave it out.")
    sampling = flags.params()
    if ignored := flags.without_effect():
        names = ", ".join(f"--{name}" for name in ignored)
        print(f"note: no effect: {names}, since --top_k 1 (the default) is greedy; add --top_k 0.", file=sys.stderr)
    return sampling


def _check_chat(look: _Look, prompts: list[Prompt], chat_template: Path | None) -> None:
    for name, value in (("system_prompt", look.system_prompt), ("chat_template", chat_template)):
        if value is not None and not look.chat:
            raise UsageError(f"--{name} means something only with --chat; add it.")
    if look.chat and not all(isinstance(prompt, str) for prompt in prompts):
        raise UsageError("--chat wraps text, and --input_file holds token ids; leave --chat out.")


def _run_one(
    llm: "LLM", prompts: list[Prompt], sampling: "SamplingParams", look: _Look, clock: StartupClock | None
) -> bool:
    """One prompt; returns False, since its failure is an exception."""
    (prompt,) = prompts
    if look.streaming:
        _ = llm.tokenizer  # without one there is no text to show: say so now
    started = time.perf_counter()
    last: RequestOutput | None = None
    for output in llm.stream(_wrapped(llm, prompt, look), sampling):
        if last is None:
            if clock is not None:
                clock.lap("first token")
            if look.streaming and not look.is_bare:  # not earlier: a prompt that is refused leaves stdout empty
                print(_input_line(llm, 0, prompt), 'Output [Text 0 Beam 0]: "', sep="\n", end="")
        last = output
        if look.streaming:
            print(output.outputs[0].text_diff, end="", flush=True)
    assert last is not None
    if look.streaming:
        print("" if look.is_bare else '"')
    else:
        _print_output(llm, 0, prompt, last)
    if clock is not None:
        clock.report()
        _report_speed([last], time.perf_counter() - started)
    return False


def _run_batch(
    llm: "LLM", prompts: list[Prompt], sampling: "SamplingParams", look: _Look, clock: StartupClock | None
) -> bool:
    """Several prompts at once; returns whether one failed."""
    wrapped = [_wrapped(llm, prompt, look) for prompt in prompts]
    started = time.perf_counter()
    outputs = llm.generate(wrapped, sampling, show_progress=True)
    for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        _print_output(llm, index, prompt, output)
    if clock is not None:
        clock.report()
        _report_speed(outputs, time.perf_counter() - started)
    return any(output.error for output in outputs)


def _wrapped(llm: "LLM", prompt: Prompt, look: _Look) -> Prompt:
    """With --chat, the message inside the template; an empty one stays empty, and is refused as any empty prompt."""
    if isinstance(prompt, str) and not look.add_special_tokens and not look.chat:
        return llm.tokenizer.encode(prompt, add_special_tokens=False)
    if not look.chat or not prompt:
        return prompt
    system = [] if look.system_prompt is None else [{"role": "system", "content": look.system_prompt}]
    return llm.chat_prompt([*system, {"role": "user", "content": prompt}])


def _print_output(llm: "LLM", index: int, prompt: Prompt, output: "RequestOutput") -> None:
    if output.error is not None:
        print(f"error: Text {index}: {output.error}", file=sys.stderr)
        return
    print(_input_line(llm, index, prompt))
    for completion in output.outputs:
        shown = f'"{completion.text}"' if _has_tokenizer(llm) else completion.token_ids
        print(f"Output [Text {index} Beam {completion.index}]: {shown}")


def _input_line(llm: "LLM", index: int, prompt: Prompt) -> str:
    if not isinstance(prompt, str) and _has_tokenizer(llm):
        prompt = llm.tokenizer.decode(prompt, skip_special_tokens=False)
    return f'Input [Text {index}]: "{prompt}"' if isinstance(prompt, str) else f"Input [Text {index}]: {prompt}"


def _has_tokenizer(llm: "LLM") -> bool:
    try:
        return bool(llm.tokenizer)
    except ModelError:
        return False


def _report_speed(outputs: list[Any], seconds: float) -> None:
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    cached = sum(output.num_cached_tokens for output in outputs)
    tokens = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    print(
        f"{prompt_tokens} prompt tokens ({cached} cached), {tokens} output tokens in {seconds:.2f} s: "
        f"{tokens / seconds:.1f} tokens/s",
        file=sys.stderr,
    )
