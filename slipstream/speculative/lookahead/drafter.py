"""Drafts of n-grams that the model itself makes in passing: in each step, columns of guesses go on by a token.

    place      0    1    2    3    4    behind the text; the root is "the"
    column 0   the  cat │sat                      │ what the model says after a column's last token
    column 1        red  fox │ran                   its way down: the, red, fox
    column 2             old  dog │and              its way down: the, red, old, dog
    n-grams    the cat sat    red fox ran    old dog and

W columns of N - 1 tokens are the window, and each sees the first tokens of those before it; so a window is a tree like
any, whose nodes are verified as drafts are. A column goes on by leaving its first token (Jacobi iteration). Its n-gram
is kept under its first token, with those of the text itself; when that token is the last one known, the G that were met
last are drafted as well. New columns are pieces of the text.

The reference (github.com/hao-ai-lab/LookaheadDecoding) takes the likeliest token of each row in the window; here it is
the one that the request would have chosen there, which is the same where it is greedy.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from slipstream.errors import UsageError
from slipstream.kernels.sampling import NOTHING_TO_SAMPLE
from slipstream.schema.request import GenerateRequest
from slipstream.schema.speculative import MAX_DRAFT_LEN, Speculation
from slipstream.speculative.drafter import Draft, Target, Verified, read_options
from slipstream.speculative.drafter import Drafter as Base
from slipstream.speculative.tree import merged


@dataclass(frozen=True)
class Options:
    window: int = 7  # W: columns
    ngram: int = 5  # N: tokens of what is kept
    guesses: int = 7  # G: n-grams that are kept of one first token


class Drafter(Base):
    can_branch = True
    can_be_cut = False  # the window comes last

    def __init__(self, speculation: Speculation, target: Target) -> None:
        super().__init__(speculation, target)
        self._options = options = read_options(Options, speculation)
        if speculation.max_draft_len is not None:
            raise UsageError(
                "speculative has max_draft_len, which of lookahead follows from window, ngram and guesses; give these."
            )
        if options.ngram < 2:
            raise UsageError(f"speculative has ngram {options.ngram}; it must be at least 2, such as 5.")
        self.max_draft_len = (options.window + options.guesses) * (options.ngram - 1) - 1
        if self.max_draft_len > MAX_DRAFT_LEN:
            raise UsageError(
                f"speculative has (window + guesses) · (ngram - 1) - 1 = {self.max_draft_len} drafts a step; lower "
                f"them to at most {MAX_DRAFT_LEN}, such as window 7, ngram 5, guesses 7."
            )
        self._texts: dict[int, Text] = {}  # by slot

    def start(self, slot: int, token_ids: Sequence[int], request: GenerateRequest) -> None:
        self._texts[slot] = Text(self._options, token_ids)

    def draft(self, verified: Verified) -> list[Draft]:
        rows = zip(verified.slots, verified.lists(), verified.chosen.tolist(), strict=True)
        return [self._texts[slot].draft(token_ids, chosen) for slot, token_ids, chosen in rows]

    def stop(self, slot: int) -> None:
        self._texts.pop(slot, None)


class Text:
    """One that grows, with its window and its n-grams."""

    def __init__(self, options: Options, token_ids: Sequence[int]) -> None:
        self._options = options
        self._token_ids: list[int] = []
        self._followers: dict[int, list[list[int]]] = {}  # of a token, those met last at the end
        self._columns: list[list[int]] = []
        self._tips: list[int] = []  # the node of each column's last token
        self._rng = random.Random(0)
        self._extend(token_ids)

    def draft(self, token_ids: Sequence[int], chosen: Sequence[int]) -> Draft:
        """token_ids: what the step gave. chosen: after each node of the last draft, as far as it was verified."""
        self._extend(token_ids)
        said = [chosen[tip] if tip < len(chosen) else NOTHING_TO_SAMPLE for tip in self._tips]
        going_on = [self._gone_on(column, token_id) for column, token_id in zip(self._columns, said, strict=True)]
        columns = going_on[len(token_ids) - 1 :]  # each has left one place behind, as the text has with one token
        columns += [self._new_column() for _ in range(self._options.window - len(columns))]
        columns[0][0] = last = token_ids[-1]
        above = [column[0] for column in columns]
        window = [[*above[1 : 1 + index], *column[1:]] for index, column in enumerate(columns)]
        guesses = self._followers.get(last, [])[::-1]
        tree = merged([*guesses, *window])
        self._columns, self._tips = columns, tree.ends[len(guesses) :]
        return Draft(tree.token_ids, tree.parents)

    def _gone_on(self, column: list[int], token_id: int) -> list[int]:
        """Where nothing was said, the step had no room for the column, or a grammar refuses it."""
        if token_id == NOTHING_TO_SAMPLE:
            return self._new_column()
        self._keep([*column, token_id])
        return [*column[1:], token_id]

    def _new_column(self) -> list[int]:
        start, known = self._rng.randrange(len(self._token_ids)), self._token_ids
        return [known[(start + place) % len(known)] for place in range(self._options.ngram - 1)]

    def _extend(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            self._token_ids.append(token_id)
            if len(self._token_ids) >= self._options.ngram:
                self._keep(self._token_ids[-self._options.ngram :])

    def _keep(self, ngram: list[int]) -> None:
        first, *rest = ngram
        kept = self._followers.setdefault(first, [])
        if rest in kept:
            kept.remove(rest)
        kept.append(rest)
        del kept[: -self._options.guesses]
