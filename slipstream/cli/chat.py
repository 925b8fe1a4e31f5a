"""slipstream chat: a conversation in the terminal."""

import contextlib
import io
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slipstream.cli import _options as options
from slipstream.cli._errors import USER_ERROR
from slipstream.cli._prompts import read_text
from slipstream.errors import RequestError, UsageError

if TYPE_CHECKING:
    from slipstream.api import LLM
    from slipstream.schema.sampling import SamplingParams

HELP = """/reset   forget the conversation
/help    this list
/exit    leave (Ctrl-D does, too)
Ctrl-C   stop the answer"""


def chat(
    model: Annotated[
        str, typer.Argument(help="Model folder, .gguf file, engine folder, Hub id or smollm2.")
    ] = "smollm2",
    tokenizer_dir: options.TokenizerDir = None,
    system_prompt: options.SystemPrompt = None,
    chat_template: options.ChatTemplate = None,
    max_output_len: Annotated[int, typer.Option(min=1, help="Most tokens of one answer.")] = 512,
    temperature: Annotated[
        float | None, typer.Option(help="Above 1 is bolder, 0 greedy.  [default: the model's own, as of all below]")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Choose among this many tokens; 0 is all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Choose among tokens of this probability.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Leave out what is this much less likely than the best.")] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1 discourages tokens of prompt and output.")
    ] = None,
    random_seed: Annotated[int | None, typer.Option(help="Equal seeds give equal answers.")] = None,
    dtype: options.Dtype = "auto",
    kv_cache_dtype: options.KvCacheDtype = "auto",
    quantization: options.Quantization = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    tp_size: options.TpSize = None,
    pp_size: options.PpSize = None,
    moe_ep_size: options.MoeEpSize = None,
    max_seq_len: options.MaxSeqLen = None,
    kv_cache_max_tokens: options.KvCacheMaxTokens = None,
    kv_cache_max_bytes: options.KvCacheMaxBytes = None,
    kv_cache_free_memory_fraction: options.KvCacheFraction = 0.9,
    max_attention_window_size: options.AttentionWindow = None,
    sink_token_length: options.SinkTokens = 0,
    plugin: options.Plugin = None,
) -> None:
    """Talk with a model.

    Each turn computes only what is new: the conversation so far is in the KV cache. /help lists the commands.
    Where stdin is not a terminal, each of its lines is a turn.

    Example:
        slipstream chat smollm2 --system_prompt "You answer in one sentence."
    """
    template = None if chat_template is None else read_text(chat_template, "--chat_template")
    from slipstream.api import LLM

    llm = LLM(
        model,
        tokenizer=tokenizer_dir,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        quantization=quantization,
        device=device,
        tp_size=tp_size,
        pp_size=pp_size,
        moe_ep_size=moe_ep_size,
        max_seq_len=max_seq_len,
        kv_cache_max_tokens=kv_cache_max_tokens,
        kv_cache_max_bytes=options.parse_bytes("--kv_cache_max_bytes", kv_cache_max_bytes),
        kv_cache_free_memory_fraction=kv_cache_free_memory_fraction,
        max_attention_window_size=max_attention_window_size,
        sink_token_length=sink_token_length,
        chat_template=template,
        plugins=plugin or (),
    )
    given = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": random_seed,
    }
    with llm:
        sampling = replace(
            llm.default_sampling_params,
            max_tokens=max_output_len,
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        )
        _check_has_effect(sampling, given)
        failed = _converse(llm, sampling, Conversation(llm, system_prompt, max_output_len))
    if failed:
        sys.exit(USER_ERROR)


class Conversation:
    """The turns so far. What no longer fits is forgotten, the oldest turn first; the system prompt stays."""

    def __init__(self, llm: "LLM", system_prompt: str | None, max_output_len: int) -> None:
        self._llm = llm
        self._system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        self._messages: list[dict[str, Any]] = []
        longest = llm.runtime_config.max_seq_len
        self._limit = longest - min(max_output_len, longest // 4)  # leaves room for an answer

    def reset(self) -> None:
        self._messages.clear()

    def ask(self, text: str) -> tuple[list[int], int]:
        """Add a question; returns the prompt and how many old turns were dropped to make it fit."""
        self._messages.append({"role": "user", "content": text})
        num_dropped = 0
        while len(prompt := self._llm.chat_prompt([*self._system, *self._messages])) > self._limit:
            if len(self._messages) == 1:
                break  # too long by itself: the engine says so, unless a shorter answer still fits
            del self._messages[:2]
            num_dropped += 1
        return prompt, num_dropped

    def answer(self, text: str) -> None:
        self._messages.append({"role": "assistant", "content": text})

    def take_back(self) -> None:
        """The last question got no answer."""
        self._messages.pop()


def _check_has_effect(sampling: "SamplingParams", given: dict[str, Any]) -> None:
    if sampling.is_greedy and given["temperature"] is None:
        for name in ("top_k", "top_p", "min_p"):
            if given[name] not in (None, 1):
                raise UsageError(
                    f"--{name} has no effect on this model, which is greedy by default; add --temperature 1."
                )


def _converse(llm: "LLM", sampling: "SamplingParams", conversation: Conversation) -> bool:
    """Returns whether a turn of a script failed; a person has seen it."""
    is_person = sys.stdin.isatty() and sys.stdout.isatty()
    if is_person:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() then has history and editing
        print(f"{llm.manifest.name}, {llm.runtime_config.max_seq_len} tokens of context. /help lists the commands.")
    elif isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    failed = False
    while (line := _read_line(is_person)) is not None:
        if line == "/exit":
            break
        if line == "/reset":
            conversation.reset()
        elif line == "/help":
            print(HELP)
        elif line.startswith("/") and " " not in line:
            print(f"error: {line} is no command; /help lists them.", file=sys.stderr)
        elif line:
            failed |= not _take_turn(llm, sampling, conversation, line)
    return failed and not is_person


def _read_line(is_person: bool) -> str | None:
    """The next line without blanks around it; None at the end."""
    while True:
        try:
            return input("> " if is_person else "").strip()
        except EOFError:
            if is_person:
                print()
            return None
        except KeyboardInterrupt:
            if not is_person:
                raise
            print("\n(Ctrl-D or /exit leaves)")


def _take_turn(llm: "LLM", sampling: "SamplingParams", conversation: Conversation, question: str) -> bool:
    prompt, num_dropped = conversation.ask(question)
    if num_dropped:
        turns = "turn is" if num_dropped == 1 else f"{num_dropped} turns are"
        print(f"note: the conversation no longer fits; the oldest {turns} dropped.", file=sys.stderr)
    try:
        answer = _stream_answer(llm, prompt, sampling)
    except RequestError as error:
        print(f"error: {error}", file=sys.stderr)
        conversation.take_back()
        return False
    conversation.answer(answer)
    return True


def _stream_answer(llm: "LLM", prompt: list[int], sampling: "SamplingParams") -> str:
    """Print the answer as it comes; Ctrl-C ends it where it is, which also ends the request."""
    answer = ""
    with contextlib.suppress(KeyboardInterrupt):
        for output in llm.stream(prompt, sampling):
            answer = output.outputs[0].text
            print(output.outputs[0].text_diff, end="", flush=True)
    print()
    return answer
