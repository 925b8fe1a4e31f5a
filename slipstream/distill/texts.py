"""The texts that a drafter learns from: the target's own answers, kept as JSON lines, so that they are made once.

    {"settings": {…}}                          what they were made with; others are not mixed in
    {"prompt": [1, 9, …], "answer": [4, …]}    token ids, one text a line

Prompts are given, or the target makes them too: after the opening of a user's turn a chat model says what users say
(Magpie, arXiv:2406.08464). Three of four prompts go on from first words that it is given, so that they are of many
kinds. A model without a chat template goes on from single tokens.
"""

import json
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from slipstream.api.llm import LLM
from slipstream.errors import UsageError
from slipstream.progress import Progress
from slipstream.schema.sampling import SamplingParams

PROMPT_TOKENS, PROMPT_TOP_P = 128, 0.9  # of a prompt that the target makes: tokens at most, and how it is drawn
BATCHES_AT_ONCE = 2  # of texts that are made, then written
FIRST_WORDS = (
    *("Why", "Why do", "Why is", "How", "How do", "How does", "How can", "What", "What is", "What are", "What does"),
    *("What happens", "When", "When did", "Where", "Where is", "Which", "Who", "Who is", "Who was", "Whose"),
    *("Explain", "Explain how", "Describe", "Define", "Compare", "List", "Name", "Give me", "Tell me about", "Show me"),
    *(
        "Write",
        "Write a",
        "Write a story about",
        "Write a poem",
        "Write an email",
        "Write a Python function",
        "Fix this",
    ),
    *("Summarize", "Summarize this text:", "Rewrite", "Translate", "Correct", "Repeat", "Complete", "Classify"),
    *("Can you", "Could you", "Do you", "Is it", "Is there", "Are there", "Should I", "I am", "I have", "I want to"),
    *("I need", "I would like", "My", "We", "The", "In", "If", "Suppose", "Imagine", "Help me", "Please", "Plan"),
    *("Suggest", "Recommend", "Create", "Design", "Calculate", "Solve", "Find", "Prove", "Hello", "Let's"),
)


class Text(NamedTuple):
    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    model: str
    num_texts: int
    max_output_len: int  # tokens of an answer
    temperature: float  # of answers; prompts that the target makes are drawn at 1
    seed: int
    prompts: str | None = None  # a digest of those that were given
    dtype: str = "auto"  # that the target computes in, as LLM has it

    def first_line(self) -> dict[str, Any]:
        """What the texts of a file have in common: there may be more of them, and of these the first are taken."""
        left_out = {"num_texts"} | ({"dtype"} if self.dtype == "auto" else set())  # which older files do not have
        return {"settings": {name: value for name, value in asdict(self).items() if name not in left_out}}


class PromptSource(Protocol):
    def __call__(self, llm: LLM, first: int, count: int) -> list[list[int]]: ...


def own_prompts(seed: int) -> PromptSource:
    """What the target itself would be asked."""

    def make(llm: LLM, first: int, count: int) -> list[list[int]]:
        if llm.request_maker.chat_template is None:
            return [[_seed(seed, first + index, "prompt") % llm.manifest.vocab_size] for index in range(count)]
        most = min(PROMPT_TOKENS, llm.manifest.max_seq_len // 4)  # what is said may have more tokens when it is asked
        begun = [_first_words(seed, first + index) for index in range(count)]
        asked = [
            SamplingParams(top_p=PROMPT_TOP_P, max_tokens=most, seed=_seed(seed, first + index, "prompt"))
            for index in range(count)
        ]
        openings = {words: opening_of_user_turn(llm, words) for words in {*begun}}
        outputs = llm.generate([openings[words] for words in begun], asked)
        texts = [(words + output.outputs[0].text).strip() for words, output in zip(begun, outputs, strict=True)]
        return [llm.chat_prompt([{"role": "user", "content": text or "Hello"}]) for text in texts]

    return make


def _first_words(seed: int, index: int) -> str:
    return random.Random(f"{seed} {index} words").choice(FIRST_WORDS) if index % 4 else ""


def opening_of_user_turn(llm: LLM, words: str = "") -> list[int]:
    """How a conversation begins, to where the user goes on after these words."""
    others = (f"{words} why", f"{words} how") if words else ("Why", "how")
    one, other = (llm.chat_prompt([{"role": "user", "content": text}]) for text in others)
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]


def answer(llm: LLM, path: Path, settings: TextSettings, prompts: PromptSource, progress: Progress) -> list[Text]:
    """The texts of `path`, and those that are missing there, which the target writes now.

    Raises UsageError where the file holds texts of other settings.
    """
    texts = read_texts(path, settings)
    with path.open("a", encoding="utf-8") as file:
        if not path.stat().st_size:
            file.write(json.dumps(settings.first_line()) + "\n")
        while len(texts) < settings.num_texts:
            progress("answer", len(texts), settings.num_texts)
            first, at_once = len(texts), BATCHES_AT_ONCE * llm.runtime_config.max_batch_size
            given = prompts(llm, first, min(at_once, settings.num_texts - first))
            made = _answers(llm, given, settings, first)
            file.writelines(json.dumps(text._asdict()) + "\n" for text in made)
            file.flush()
            texts += made
    return texts


def _answers(llm: LLM, prompts: Sequence[list[int]], settings: TextSettings, first: int) -> list[Text]:
    asked = [
        SamplingParams(
            temperature=settings.temperature, max_tokens=settings.max_output_len,
            seed=_seed(settings.seed, first + index, "answer"),
        )
        for index in range(len(prompts))
    ]  # fmt: skip
    outputs = llm.generate(list(prompts), asked)
    failed = next((output.error for output in outputs if output.error), None)
    if failed is not None:
        raise UsageError(f"The model does not answer a prompt ({failed}); take others for --data.")
    return [Text(prompt, output.outputs[0].token_ids) for prompt, output in zip(prompts, outputs, strict=True)]


def _seed(seed: int, index: int, what: str) -> int:
    return random.Random(f"{seed} {index} {what}").getrandbits(62)


def read_texts(path: Path, settings: TextSettings) -> list[Text]:
    """Those that are whole; a line that was being written when its run was killed is cut off."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    lines: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]
    if lines and lines[0] != settings.first_line():
        raise UsageError(
            f"{path} holds texts that were made with other settings; give those ({lines[0].get('settings')}) or "
            "another --output_dir."
        )
    return [Text(line["prompt"], line["answer"]) for line in lines[1 : 1 + settings.num_texts]]
