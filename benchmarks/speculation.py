"""Drafts on SmolLM2, greedy: acceptance length and speed beside plain decoding in the same run, on a CPU or a GPU.

    python benchmarks/speculation.py --device cuda --heads heads    trained ones are in heads/medusa, heads/eagle, …
    python benchmarks/speculation.py --rounds 3 --drafts 4 8        of each step at most, a run for each number
    python benchmarks/speculation.py --batch_size 16                so many requests at a time, numbered
    python benchmarks/speculation.py --engine '{"method": "eagle", "width": 4}' --engine …    these and plain alone

Seconds are those of all tokens, with prompts that a round before has left in the prefix cache. A round asks each
engine once; ratios are medians over rounds of plain decoding's time by that of the drafting engine in the same round,
so that a busy machine slows both. At the end, for each engine and kind of prompt (chat, code, copy), the medians over
its prompts. On a CPU each engine has a process of its own (two in one would fight over torch's thread pools), and there
is a ratio of processor time, too; on a GPU all are in this process, and their engines wait in turn.

The number of drafts is fixed, unless --adaptive or an --engine says so. Where texts part from plain decoding, as they
may where rounding depends on the number of rows (docs/speculation.md), it is said at which token.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slipstream import LLM, SamplingParams
from slipstream.build.tune import describe_device
from slipstream.schema.request import EngineStats

PROMPTS = {
    "chat, sky": "Why is the sky blue? Explain it to a child.",
    "chat, advice": "I have an interview next week and I am nervous. What should I do?",
    "chat, list": "Give me five ideas for a rainy weekend with two children.",
    "chat, history": "Who was Marie Curie and what is she known for?",
    "chat, story": "Tell me a short story about a lighthouse keeper and a cat.",
    "chat, bread": "My bread does not rise. What am I doing wrong?",
    "chat, compare": "What is the difference between a virus and a bacterium?",
    "chat, plan": "Help me plan a week of dinners for a family of four.",
    "code, CSV": "How do I read a CSV file in Python and add up one of its columns?",
    "code, prime": "Write a Python function that says whether a number is prime, and explain it.",
    "code, edit": "Add type hints to this code and change nothing else. Answer with the code only.\n\n"
    "def area(width, height):\n    return width * height\n\n"
    "def perimeter(width, height):\n    return 2 * (width + height)\n\n"
    "def describe(width, height):\n    print('area', area(width, height))\n"
    "    print('perimeter', perimeter(width, height))\n",
    "copy, harbour": "Repeat this text word for word.\n\nThe harbour opened at dawn. Three boats came in with herring, "
    "one with cod, and the ice house had none to sell. The buyers from the city waited in the rain until noon, paid "
    "what was asked, and left. Nobody spoke of the storm.\n",
    "copy, list": "Repeat this list, one item a line, with nothing added.\n\nflour, 500 g\nbutter, 250 g\n"
    "sugar, 200 g\neggs, 4\nbaking powder, 1 teaspoon\nmilk, 100 ml\nlemon, 1\nsalt, 1 pinch\nvanilla, 1 pod\n"
    "almonds, 50 g\n",
    "copy, letter": "Repeat this letter word for word.\n\nDear Anna, thank you for the photographs. The garden looks "
    "better than it has for years, and the children have grown so much. We will come on the first weekend of "
    "September, if the trains run. Please tell Peter that his book has arrived. With love, Margaret\n",
}
DRAFTS = {"cpu": (2, 4, 8), "cuda": (8, 24)}  # of heads: of a step at most
LONGEST_CHAIN = 8  # of the draft model


@dataclass
class Run:
    token_ids: list[list[int]]
    seconds: float  # a token
    processor_seconds: float
    before: EngineStats
    after: EngineStats

    def gained(self, name: str) -> int:
        return getattr(self.after, name) - getattr(self.before, name)

    @property
    def num_accepted(self) -> int:
        return sum(self.after.num_accepted_tokens) - sum(self.before.num_accepted_tokens)

    @property
    def acceptance_length(self) -> float:
        drafts = self.gained("num_drafts")
        return 1 + self.num_accepted / drafts if drafts else 1.0

    @property
    def acceptance_rate(self) -> float:
        tokens = self.gained("num_draft_tokens")
        return self.num_accepted / tokens if tokens else 0.0

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids))


Ask = Callable[[list[str], int], Run]


def open_llm(model: str, device: str, dtype: str, batch_size: int, speculative: dict[str, Any] | None) -> LLM:
    return LLM(
        model, device=device, dtype=dtype, speculative=speculative, max_batch_size=batch_size,
        kv_cache_max_tokens=1024 * batch_size,
    )  # fmt: skip


def ask(llm: LLM, texts: list[str], max_tokens: int) -> Run:
    prompts = [llm.chat_prompt([{"role": "user", "content": text}]) for text in texts]
    before, start, processor_start = llm.stats, time.perf_counter(), time.process_time()
    outputs = llm.generate(prompts, SamplingParams(max_tokens=max_tokens, temperature=0))
    seconds, processor_seconds = time.perf_counter() - start, time.process_time() - processor_start
    token_ids = [output.outputs[0].token_ids for output in outputs]
    count = sum(map(len, token_ids))
    return Run(token_ids, seconds / count, processor_seconds / count, before, llm.stats)


_llm: LLM | None = None  # of a process that runs one


def start(*arguments: Any) -> None:
    global _llm
    _llm = open_llm(*arguments)


def ask_own(texts: list[str], max_tokens: int) -> Run:
    assert _llm is not None
    return ask(_llm, texts, max_tokens)


def opened(arguments: argparse.Namespace, speculative: dict[str, Any] | None) -> Ask:
    given = (arguments.model, arguments.device, arguments.dtype, arguments.batch_size, speculative)
    if arguments.device == "cuda":
        llm = open_llm(*given)
        return lambda texts, max_tokens: ask(llm, texts, max_tokens)
    context = multiprocessing.get_context("spawn")
    process = ProcessPoolExecutor(1, mp_context=context, initializer=start, initargs=given)
    return lambda texts, max_tokens: process.submit(ask_own, texts, max_tokens).result()


def engines_of(arguments: argparse.Namespace) -> dict[str, dict[str, Any] | None]:
    if arguments.engine:
        given = {each: {"adaptive": arguments.adaptive} | json.loads(each) for each in arguments.engine}
        return {"plain": None} | given
    found: dict[str, dict[str, Any] | None] = {"plain": None}
    found["ngram, 8 drafts"] = {"method": "ngram", "max_draft_len": 8, "adaptive": arguments.adaptive}
    for method in ("medusa", "redrafter", "eagle", "draft_model"):
        folder = Path(arguments.heads or "") / method
        if arguments.heads and folder.is_dir():
            for count in arguments.drafts or DRAFTS[arguments.device]:
                if method != "draft_model" or count <= LONGEST_CHAIN:
                    found[f"{method}, {count} drafts"] = {
                        "method": method, "model": str(folder), "max_draft_len": count, "adaptive": arguments.adaptive
                    }  # fmt: skip
    if arguments.device == "cuda":
        found["lookahead, 7 5 7"] = {"method": "lookahead", "adaptive": arguments.adaptive}
    return found


def parts_at(found: list[list[int]], expected: list[list[int]]) -> int | None:
    """The first place where two texts differ."""
    places = (
        next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
        for one, other in zip(found, expected, strict=True)
    )
    return min((place for place in places if place is not None), default=None)


@dataclass
class Row:
    acceptance_length: float
    ratio: float
    by_processor: float


def compare(plain: list[Run], runs: list[Run]) -> Row:
    """The first round, which has computed the prompt that the others find, is left out."""
    pairs = list(zip(plain[1:], runs[1:], strict=True))
    ratio = statistics.median(its.seconds / mine.seconds for its, mine in pairs)
    by_processor = statistics.median(its.processor_seconds / mine.processor_seconds for its, mine in pairs)
    return Row(runs[-1].acceptance_length, ratio, by_processor)


def print_row(prompt: str, name: str, runs: list[Run], plain: list[Run], row: Row) -> None:
    last, times = runs[-1], [1000 * each.seconds for each in runs[1:]]
    parting = parts_at(last.token_ids, plain[-1].token_ids)
    said = f"{last.num_tokens}{'' if parting is None else f', parts at {parting}'}"
    accepted = f"{last.acceptance_length:.2f} | {last.acceptance_rate:.0%}" if name != "plain" else "- | -"
    ratios = f"{row.ratio:.2f} | {row.by_processor:.2f}"
    print(
        f"| {prompt} | {name} | {said} | {accepted} | {statistics.median(times):.2f} ({min(times):.2f}) | {ratios} |",
        flush=True,
    )


def print_summary(rows: dict[str, dict[str, Row]]) -> None:
    kinds = sorted({prompt.partition(",")[0] for prompt in rows})
    print("\n| engine | " + " | ".join(f"{kind}: acceptance length | times plain" for kind in kinds) + " |")
    print("| --- " * (1 + 2 * len(kinds)) + "|")
    for name in next(iter(rows.values())):
        cells = []
        for kind in kinds:
            of_kind = [found[name] for prompt, found in rows.items() if prompt.startswith(kind)]
            cells.append(f"{statistics.median(each.acceptance_length for each in of_kind):.2f}")
            cells.append(f"{statistics.median(each.ratio for each in of_kind):.2f}")
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", choices=DRAFTS, default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max_tokens", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=1, help="requests at a time")
    parser.add_argument("--adaptive", action="store_true", help="as many drafts as pay, instead of a fixed number")
    parser.add_argument("--prompts", nargs="+", choices=PROMPTS, default=list(PROMPTS))
    parser.add_argument("--heads", help="a folder with a folder for each method that was trained for the model")
    parser.add_argument("--drafts", type=int, nargs="+", help="of heads, of a step at most")
    parser.add_argument("--engine", action="append", default=[], help="as --speculative has it, instead of all these")
    arguments = parser.parse_args()
    load = f"load average {os.getloadavg()[0]:.1f}"
    print(f"{arguments.model} on {describe_device(torch.device(arguments.device))}, torch {torch.__version__}, {load}")
    engines = {name: opened(arguments, speculative) for name, speculative in engines_of(arguments).items()}
    print("\n| prompt | engine | tokens | acceptance length | rate | ms a token, median (least) | times plain | "
          "by processor time |\n" + "| --- " * 8 + "|", flush=True)  # fmt: skip
    rows: dict[str, dict[str, Row]] = {}
    for prompt in arguments.prompts:
        texts = [PROMPTS[prompt]]
        if arguments.batch_size > 1:
            texts = [f"{number}. {texts[0]}" for number in range(1, 1 + arguments.batch_size)]
        runs: dict[str, list[Run]] = {name: [] for name in engines}
        for _ in range(arguments.rounds + 1):
            for name, engine in engines.items():
                runs[name].append(engine(texts, arguments.max_tokens))
        rows[prompt] = {}
        for name, found in runs.items():
            rows[prompt][name] = compare(runs["plain"], found)
            print_row(prompt, name, found, runs["plain"], rows[prompt][name])
    print_summary(rows)


if __name__ == "__main__":
    main()
