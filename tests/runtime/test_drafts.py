"""What a step is told of its drafts: tokens, places in the text, what each row sees; against the trees themselves."""

from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.runtime.worker.drafts import Drafts
from slipstream.runtime.worker.inputs import make_inputs, rows_wanted
from slipstream.runtime.worker.tables import BlockTables
from slipstream.schema.request import GenerateRequest
from slipstream.schema.speculative import Speculation
from slipstream.schema.step import SequenceStep, StepPlan
from slipstream.speculative.accept import Accepted
from slipstream.speculative.drafter import Draft, Drafter, Verified
from tests.runtime.fake_worker import make_request

CPU = torch.device("cpu")
MOST, VOCAB = 70, 50  # more nodes than a word has bits


class Given(Drafter):
    can_branch = True

    def __init__(self) -> None:
        super().__init__(Speculation(method="given", max_draft_len=MOST), None)  # type: ignore[arg-type]
        self.drafts: list[Draft] = []

    def start(self, slot: int, token_ids: Sequence[int], request: GenerateRequest) -> None:
        pass

    def draft(self, verified: Verified) -> list[Draft]:
        return self.drafts

    def stop(self, slot: int) -> None:
        pass


@st.composite
def trees(draw: st.DrawFn) -> Draft:
    size = draw(st.sampled_from((0, 1, 3, 8, MOST)))
    rng = draw(st.randoms(use_true_random=False))
    if draw(st.booleans()):
        return Draft([rng.randrange(VOCAB) for _ in range(size)])
    return Draft([rng.randrange(VOCAB) for _ in range(size)], [rng.randint(0, node) for node in range(size)])


@settings(max_examples=60, deadline=None)
@given(st.lists(trees(), min_size=1, max_size=4), st.data())
def test_rows_are_told_where_they_stand_in_their_trees(drafts: list[Draft], data: st.DataObject) -> None:
    drafter, num = Given(), len(drafts)
    last_token_X = torch.zeros(num + 1, dtype=torch.int64)
    books = Drafts(
        drafter, VOCAB, num, CPU, lambda slot: (), last_token_X, max_len=drafter.max_draft_len, can_branch=True
    )  # fmt: skip
    slots = data.draw(st.permutations(range(num)))
    for slot in slots:
        books.add(slot, make_request(str(slot)), ())
    drafter.drafts = drafts
    ones = torch.ones(num, dtype=torch.int64)
    asked = [SequenceStep(slot, 8, (3,), True, max_drafts=data.draw(st.integers(1, MOST))) for slot in slots]
    counts = books.propose(asked, Accepted(ones, ones[:, None], 0 * ones[:, None], ones[:, None]))
    assert counts == [min(len(draft.token_ids), step.max_drafts) for draft, step in zip(drafts, asked, strict=True)]

    # A step takes as many of a tree as it has room for, after a chunk of what is known; some sequences come without.
    taken = [data.draw(st.integers(0, count)) for count in counts]
    chunks = [data.draw(st.integers(1, 5)) for _ in drafts]
    starts = [data.draw(st.integers(0, 30)) for _ in drafts]
    tables = BlockTables(1, num, 16)
    plan = StepPlan(0, tuple(
        SequenceStep(slot, start, (3,) * chunk, True, tuple((p, (p + 1,)) for p in range(8)), None, (), count)
        for slot, start, chunk, count in zip(slots, starts, chunks, taken, strict=True)
    ))  # fmt: skip
    tables.update(plan)
    inputs = make_inputs(plan, rows_wanted(plan, [False] * num), [True] * num, tables, CPU)
    masks_TW = books.fill(inputs)["step.tree_masks"]

    row = row_of_logits = 0
    for index, draft in enumerate(drafts):
        parents = draft.parents or range(len(draft.token_ids))
        root = starts[index] + chunks[index] - 1
        assert inputs["step.tree_starts"][index] == root
        for place in range(starts[index], root + 1):
            assert (inputs["step.token_ids"][row], inputs["step.positions"][row]) == (3, place)
            assert (masks_TW[row] == -1).all()
            row += 1
        ways: list[set[int]] = [{0}]
        for node in range(taken[index] + 1):
            if node:
                ways.append(ways[parents[node - 1]] | {node})
                assert inputs["step.token_ids"][row] == draft.token_ids[node - 1]
                assert inputs["step.positions"][row] == root + len(ways[node]) - 1
                seen = {n for n in range(128) if int(masks_TW[row, n // 64]) >> n % 64 & 1}
                assert seen == ways[node]
                row += 1
            assert inputs["row_positions"][row_of_logits] == root + len(ways[node])
            row_of_logits += 1
    drafted = books.verified_by(plan.sequences)
    assert (drafted is None) == (not any(taken))
