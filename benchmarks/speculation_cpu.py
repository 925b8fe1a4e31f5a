"""Drafts on a CPU: SmolLM2, greedy, engines with and without drafts in turns.

    python benchmarks/speculation_cpu.py --rounds 9
    python benchmarks/speculation_cpu.py --batch_size 16    as many requests at a time, each with a number before it
    python benchmarks/speculation_cpu.py --heads heads      Medusa's, of slipstream train-drafter, as well
    python benchmarks/speculation_cpu.py --lookahead 7 5 7  window, n-gram and guesses

Seconds are those of all tokens, with prompts that a round before has left in the prefix cache. A round asks each engine
once, each in a process of its own (two engines in one would fight over torch's thread pools); ratios are medians over
rounds of plain decoding's time by that of the drafting engine in the same round, so that a busy machine slows both: of
the time on the wall, and of the processors' time. Fixed drafts are as many as asked for, adaptive ones at most
(docs/speculation.md); an engine's measurements go on from prompt to prompt. Texts must be equal, or it ends; but those
of trees, which may part from plain decoding at a near tie in int8 (docs/speculation.md): it is said where.
"""

import argparse
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from slipstream import LLM, SamplingParams
from slipstream.schema.request import EngineStats

PROMPTS = {
    "copy": "Repeat this text word for word.\n\nThe harbour opened at dawn. Three boats came in with herring, one with "
    "cod, and the ice house had none to sell. The buyers from the city waited in the rain until noon, paid what was "
    "asked, and left. Nobody spoke of the storm.\n",
    "edit": "Add type hints to this code and change nothing else. Answer with the code only.\n\n"
    "def area(width, height):\n    return width * height\n\n"
    "def perimeter(width, height):\n    return 2 * (width + height)\n\n"
    "def describe(width, height):\n    print('area', area(width, height))\n"
    "    print('perimeter', perimeter(width, height))\n",
    "chat": "Why is the sky blue? Explain it to a child.",
    "chat, advice": "I have an interview next week and I am nervous. What should I do?",
    "chat, list": "Give me five ideas for a rainy weekend with two children.",
    "chat, code": "How do I read a CSV file in Python and add up one of its columns?",
}
ENGINES: dict[str, dict[str, Any] | None] = {"plain": None} | {
    f"ngram, {length} drafts{', adaptive' * adaptive}": {
        "method": "ngram", "max_draft_len": length, "adaptive": adaptive
    }
    for length in (4, 8)
    for adaptive in (False, True)
}  # fmt: skip


@dataclass
class Run:
    token_ids: list[list[int]]
    seconds: float  # a token
    processor_seconds: float
    before: EngineStats
    after: EngineStats

    def gained(self, name: str) -> int:
        return getattr(self.after, name) - getattr(self.before, name)

    def describe(self) -> str:
        drafts, tokens = self.gained("num_drafts"), self.gained("num_draft_tokens")
        accepted = sum(self.after.num_accepted_tokens) - sum(self.before.num_accepted_tokens)
        length = f"{1 + accepted / drafts:.2f}" if drafts else "-"
        rate = f"{accepted / tokens:.0%}" if tokens else "-"
        return f"{self.num_tokens / self.gained('num_steps') / len(self.token_ids):.2f} | {length} | {rate}"

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids))


_llm: LLM | None = None  # of a process that runs one


def start(speculative: dict[str, Any] | None) -> None:
    global _llm
    _llm = LLM("smollm2", speculative=speculative, max_batch_size=16, kv_cache_max_tokens=8192)


def run(texts: list[str], max_tokens: int) -> Run:
    assert _llm is not None
    prompts = [_llm.chat_prompt([{"role": "user", "content": text}]) for text in texts]
    before, start, processor_start = _llm.stats, time.perf_counter(), time.process_time()
    outputs = _llm.generate(prompts, SamplingParams(max_tokens=max_tokens, temperature=0))
    seconds, processor_seconds = time.perf_counter() - start, time.process_time() - processor_start
    token_ids = [output.outputs[0].token_ids for output in outputs]
    count = sum(map(len, token_ids))
    return Run(token_ids, seconds / count, processor_seconds / count, before, _llm.stats)


def parts_at(found: list[list[int]], expected: list[list[int]]) -> int | None:
    """The first place where two texts differ."""
    places = (
        next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
        for one, other in zip(found, expected, strict=True)
    )
    return min((place for place in places if place is not None), default=None)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--max_tokens", type=int, default=96)
    parser.add_argument("--batch_size", type=int, default=1, help="requests at a time, at most 16")
    parser.add_argument("--prompts", nargs="+", choices=PROMPTS, default=list(PROMPTS))
    parser.add_argument("--heads", help="a folder of Medusa's heads for smollm2")
    parser.add_argument("--lookahead", type=int, nargs=3, action="append", default=[], metavar=("W", "N", "G"))
    arguments = parser.parse_args()
    for window, ngram, guesses in arguments.lookahead:
        options = {"method": "lookahead", "window": window, "ngram": ngram, "guesses": guesses, "adaptive": False}
        ENGINES[f"lookahead, {window} {ngram} {guesses}"] = options
    if arguments.heads:
        for length in (2, 4, 8, 16):
            medusa = {"method": "medusa", "model": arguments.heads, "max_draft_len": length, "adaptive": False}
            ENGINES[f"medusa, {length} drafts"] = medusa
    context = multiprocessing.get_context("spawn")
    engines = {
        name: ProcessPoolExecutor(1, mp_context=context, initializer=start, initargs=(speculative,))
        for name, speculative in ENGINES.items()
    }
    print(
        "| prompt | engine | tokens | tokens a step | acceptance length | rate | ms a token, median (least) | ratio | "
        "by processor time |"
    )
    print("| --- " * 9 + "|")
    for kind in arguments.prompts:
        texts = [PROMPTS[kind]]
        if arguments.batch_size > 1:
            texts = [f"{number}. {texts[0]}" for number in range(1, 1 + arguments.batch_size)]
        runs: dict[str, list[Run]] = {name: [] for name in engines}
        for _ in range(arguments.rounds + 1):
            for name, engine in engines.items():
                runs[name].append(engine.submit(run, texts, arguments.max_tokens).result())
        for name, found in runs.items():
            parting = parts_at(found[-1].token_ids, runs["plain"][-1].token_ids)
            assert parting is None or name.startswith(("medusa", "lookahead")), f"{kind}: {name} says something else"
            timed = found[1:]  # the first has computed the prompt, the others find it
            times = [1000 * each.seconds for each in timed]
            pairs = list(zip(runs["plain"][1:], timed, strict=True))
            ratio = statistics.median(its.seconds / mine.seconds for its, mine in pairs)
            by_processor = statistics.median(its.processor_seconds / mine.processor_seconds for its, mine in pairs)
            print(
                f"| {kind} | {name} | {found[-1].num_tokens}{'' if parting is None else f', parts at {parting}'} | "
                f"{found[-1].describe()} | "
                f"{statistics.median(times):.1f} ({min(times):.1f}) | {ratio:.2f} | {by_processor:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
