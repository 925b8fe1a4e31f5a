"""slipstream chat, fed by a pipe: a turn a line."""

import io
import signal
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pexpect
import pytest

from slipstream.cli import chat as chat_verb
from slipstream.cli.chat import Conversation
from tests.cli.conftest import Call


@pytest.fixture
def say(call: Call, monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(text: str, *arguments: object) -> Any:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        return call("chat", *arguments)

    return run


def test_each_line_is_a_turn(say: Any, engine: Path) -> None:
    alone = say("Hello\n", engine, "--max_output_len", 6)
    assert (alone.code, alone.err) == (0, "")
    twice = say("Hello\n\nHello\n", engine, "--max_output_len", 6)
    assert twice.out.startswith(alone.out)
    assert twice.out != alone.out * 2  # the second turn knows the first
    reset = say("Hello\n/reset\nHello\n/exit\nHello\n", engine, "--max_output_len", 6)
    assert reset.out == alone.out * 2


def test_commands(say: Any, engine: Path) -> None:
    done = say("/help\n/what\n", engine)
    assert done.out == chat_verb.HELP + "\n"
    assert done.err == "error: /what is no command; /help lists them.\n"


def test_flags_change_the_answer(say: Any, engine: Path) -> None:
    usual = say("Hello\n", engine, "--max_output_len", 6).out
    assert say("Hello\n", engine, "--max_output_len", 6, "--system_prompt", "You are a cat.").out != usual
    drawn = ("--max_output_len", 6, "--temperature", 1, "--random_seed", 3)
    assert say("Hello\n", engine, *drawn).out == say("Hello\n", engine, *drawn).out != usual
    refused = say("Hello\n", engine, "--top_p", 0.5)
    assert (refused.code, refused.out) == (2, "")
    assert "--top_p has no effect on this model" in refused.err


def test_the_oldest_turns_are_dropped(say: Any, engine: Path) -> None:
    done = say("How do I count to nine?\n" * 6, engine, "--max_seq_len", 96, "--max_output_len", 12)
    assert done.code == 0
    assert done.err.splitlines()[0] == "note: the conversation no longer fits; the oldest turn is dropped."
    assert done.out.count("\n") >= 6


def test_with_sinks_no_turn_is_dropped(say: Any, engine: Path) -> None:
    """They are in sight or not, but the conversation goes on beyond the 256 tokens of the model."""
    said = ("How do I count to nine?\n" * 12, engine, "--max_output_len", 12)
    assert "the oldest turn is dropped" in say(*said).err
    done = say(*said, "--max_attention_window_size", 64, "--sink_token_length", 4, "--max_seq_len", 2000)
    assert (done.code, done.err) == (0, "")


def test_a_message_that_cannot_fit_is_refused_and_forgotten(say: Any, engine: Path) -> None:
    done = say("x " * 500 + "\nHello\n", engine, "--max_output_len", 6)
    assert done.code == 2
    assert done.err.startswith("error: The prompt has ")
    assert done.out == say("Hello\n", engine, "--max_output_len", 6).out


def test_the_conversation_keeps_what_fits() -> None:
    def chat_prompt(messages: list[dict[str, str]]) -> list[int]:
        return [0] * sum(len(message["content"]) for message in messages)

    llm: Any = SimpleNamespace(chat_prompt=chat_prompt, runtime_config=SimpleNamespace(max_seq_len=40))
    conversation = Conversation(llm, "sys", max_output_len=100)  # a quarter, 10, is kept for the answer
    assert conversation.ask("a" * 10) == ([0] * 13, 0)
    conversation.answer("b" * 10)
    assert conversation.ask("c" * 10) == ([0] * 13, 1)
    conversation.take_back()
    assert conversation.ask("d" * 27) == ([0] * 30, 0)
    conversation.answer("e")
    assert conversation.ask("f" * 50) == ([0] * 53, 1)


def test_ctrl_c_ends_the_answer_only(capsys: pytest.CaptureFixture[str]) -> None:
    closed = []

    def stream(prompt: list[int], sampling: Any) -> Any:
        try:
            yield SimpleNamespace(outputs=[SimpleNamespace(text="Half", text_diff="Half")])
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    llm: Any = SimpleNamespace(stream=stream)
    assert chat_verb._stream_answer(llm, [1], None) == "Half"  # type: ignore[arg-type]
    assert capsys.readouterr().out == "Half\n"
    assert closed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["./nowhere"], "No such folder or file"),
        (["{engine}", "--chat_template", "./nowhere"], "cannot be read"),
        (["{engine}", "--temperature", "-2"], "temperature is -2.0"),
        (["{engine}", "--max_output_len", "0"], "--max_output_len is 0; it must be greater than or equal to 1."),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], sentence: str, say: Any, engine: Path) -> None:
    done = say("Hello\n", *(argument.replace("{engine}", str(engine)) for argument in arguments))
    assert (done.code, done.out) == (2, "")
    assert sentence in done.err


def test_a_model_without_a_tokenizer_cannot_talk(say: Any, tiny_model: Path) -> None:
    done = say("Hello\n", tiny_model)
    assert done.code == 2
    assert "has no tokenizer" in done.err


@pytest.mark.real_model
def test_a_person_interrupts_and_leaves(smollm2_gguf: Path) -> None:
    """In a terminal of its own: Ctrl-C stops the answer, Ctrl-D ends the conversation."""
    command = ["-c", "import slipstream.cli; slipstream.cli.main()", "chat", "smollm2"]
    # A shell starts what it runs in the background, these tests perhaps, deaf to Ctrl-C.
    hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with pexpect.spawn(sys.executable, command, timeout=120, encoding="utf-8", preexec_fn=hears) as terminal:
        terminal.expect_exact("SmolLM2-135M-Instruct, 8192 tokens of context")
        terminal.expect_exact("> ")
        terminal.sendline("Tell me a long story of dragons.")
        terminal.expect_exact("dragons.")  # the terminal's echo
        terminal.expect(r"\w+ \w+ ")  # the answer has begun
        terminal.sendintr()
        terminal.expect_exact("> ")
        time.sleep(0.5)  # readline misses a signal that comes while it prints its prompt
        terminal.sendintr()
        terminal.expect_exact("(Ctrl-D or /exit leaves)")
        terminal.expect_exact("> ")
        terminal.sendeof()
        terminal.expect(pexpect.EOF)
        terminal.wait()
    assert terminal.exitstatus == 0
