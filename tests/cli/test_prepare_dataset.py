"""slipstream bench prepare-dataset: each kind's requests, the seed's command as it is written, a sentence a mistake."""

import json
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from slipstream.bench.dataset import read_dataset
from slipstream.text.tokenizer import Tokenizer
from tests.cli.conftest import Call

# Seed 000, with the program's name changed.
SEED = """slipstream bench prepare-dataset --output token-norm-dist.json --tokenizer {talker}/ token-norm-dist
    --num-requests 1000 --input-mean 500 --input-stdev 0 --output-mean 200 --output-stdev 0"""


def lines(call: Call, *arguments: object) -> list[dict[str, Any]]:
    done = call("bench", "prepare-dataset", *arguments)
    assert (done.code, done.err) == (0, "")
    return [json.loads(line) for line in done.out.splitlines()]


def test_the_seeds_command(call: Call, talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = call(*shlex.split(SEED.format(talker=talker))[1:])
    assert (done.code, done.err) == (0, "token-norm-dist.json: 1000 requests\n")
    assert Path("token-norm-dist.json").read_text() == done.out  # stdout leads to /tmp/synthetic.txt there
    requests = [json.loads(line) for line in done.out.splitlines()]
    assert [request["task_id"] for request in requests] == list(range(1000))
    assert {(len(request["input_ids"]), request["output_tokens"]) for request in requests} == {(500, 200)}
    special = Tokenizer.open(talker).special_ids
    seen = {token_id for request in requests for token_id in request["input_ids"]}
    assert seen == set(range(320)) - special
    assert len(read_dataset(Path("token-norm-dist.json"))) == 1000


def test_lengths_follow_their_distribution_and_the_seed(call: Call, talker: Path) -> None:
    normal = ("--tokenizer", talker, "token-norm-dist", "--num_requests", 500, "--input_mean", 40, "--input_stdev", 8,
              "--output_mean", 3, "--output_stdev", 9)  # fmt: skip
    requests = lines(call, *normal)
    sizes = [len(request["input_ids"]) for request in requests]
    assert 39 < sum(sizes) / 500 < 41 and 7 < (sum((size - 40) ** 2 for size in sizes) / 500) ** 0.5 < 9
    assert min(request["output_tokens"] for request in requests) == 1
    assert lines(call, *normal) == requests != lines(call, *normal, "--random_seed", 1)
    flat = lines(call, "--tokenizer", talker, "token-unif-dist", "--num_requests", 200, "--input_min", 3,
                 "--input_max", 5, "--output_min", 7, "--output_max", 8)  # fmt: skip
    assert {len(request["input_ids"]) for request in flat} == {3, 4, 5}
    assert {request["output_tokens"] for request in flat} == {7, 8}


def test_prompts_share_a_few_prefixes(call: Call, talker: Path) -> None:
    requests = lines(call, "--tokenizer", talker, "shared-prefix", "--num_requests", 60, "--num_prefixes", 3,
                     "--prefix_len", 20, "--input_mean", 5, "--output_mean", 2)  # fmt: skip
    prefixes = Counter(tuple(request["input_ids"][:20]) for request in requests)
    assert len(prefixes) == 3 and min(prefixes.values()) > 5
    assert len({tuple(request["input_ids"]) for request in requests}) == 60
    assert {len(request["input_ids"]) for request in requests} == {25}


def test_rows_of_a_file(call: Call, talker: Path, tmp_path: Path) -> None:
    rows = [{"article": "The capital of France", "short": "Paris"}, {"article": "a" * 200, "short": "x"}] * 2
    encode = Tokenizer.open(talker).encode
    for name, text in (("r.json", json.dumps(rows)), ("r.jsonl", "\n".join(map(json.dumps, rows)))):
        file = tmp_path / name
        file.write_text(text)
        keys = ("--dataset_input_key", "article", "--dataset_output_key", "short", "--dataset_prompt", "Shorten:")
        found = lines(call, "--tokenizer", talker, "dataset", "--dataset_name", file, *keys, "--max_input_len", 50)
        wanted = {"prompt": "Shorten: The capital of France", "output_tokens": len(encode("Paris"))}
        assert found == [{"task_id": index, **wanted} for index in range(2)]
    found = lines(call, "--tokenizer", talker, "dataset", "--dataset_name", file, "--dataset_input_key", "article",
                  "--output_len_dist", "9,0", "--num_requests", 3)  # fmt: skip
    assert [request["output_tokens"] for request in found] == [9, 9, 9]


def test_turns_of_conversations(call: Call, talker: Path, tmp_path: Path) -> None:
    chats = [
        {"conversations": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "two"},
                           {"from": "human", "value": "Three?"}, {"from": "gpt", "value": "four five"}]},
        {"messages": [{"role": "system", "content": "Brief."}, {"role": "user", "content": "Hello"},
                      {"role": "assistant", "content": "the world"}]},
    ]  # fmt: skip
    file = tmp_path / "chats.json"
    file.write_text(json.dumps(chats))
    tokenizer = Tokenizer.open(talker)
    found = lines(call, "--tokenizer", talker, "conversations", "--dataset_name", file)
    texts = [tokenizer.decode(request["input_ids"], skip_special_tokens=False) for request in found]
    first = "<|im_start|>user One?<|im_end|>"
    assert texts == [
        first + "<|im_start|>assistant ",
        "<|im_start|>system Brief.<|im_end|><|im_start|>user Hello<|im_end|><|im_start|>assistant ",
        first + "<|im_start|>assistant two<|im_end|><|im_start|>user Three?<|im_end|><|im_start|>assistant ",
    ]
    answers = ("two", "the world", "four five")
    assert [request["output_tokens"] for request in found] == [len(tokenizer.encode(each)) for each in answers]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("token-norm-dist --num_requests 5", "token-norm-dist needs --input_mean; give it, such as --input_mean 100."),
        ("token-gauss", "The kind is 'token-gauss'; it must be one of token-norm-dist, token-unif-dist, shared-prefix, "
         "dataset, conversations."),
        ("conversations --dataset_name x.json --prefix_len 3", "--prefix_len means nothing to conversations; leave it "
         "out."),
        ("token-unif-dist --num_requests 5 --input_min 5 --input_max 4 --output_min 1 --output_max 2",
         "--input_min is 5, more than --input_max 4; swap them."),
        ("dataset --dataset_name {empty} --dataset_input_key x --output_len_dist 9", "--output_len_dist is '9'; it "
         "must be mean,deviation, such as 200,10."),
        ("dataset --dataset_name {empty} --dataset_input_key x --output_len_dist 9,1", "--dataset_name {empty} must be "
         "a list of objects, or one object a line (.jsonl)."),
        ("dataset --dataset_name {rows} --dataset_input_key x --output_len_dist 9,1", "--dataset_input_key is 'x', "
         "which is no text of each row; there are a, b."),
        ("conversations --dataset_name {rows}", '--dataset_name must hold conversations: rows with "conversations" or '
         '"messages".'),
    ],
)  # fmt: skip
def test_a_mistake_is_a_sentence(call: Call, talker: Path, tmp_path: Path, arguments: str, sentence: str) -> None:
    places = {"empty": tmp_path / "e.json", "rows": tmp_path / "r.json"}
    places["empty"].write_text("[]")
    places["rows"].write_text('[{"a": "b", "b": 1}]')
    done = call("bench", "prepare-dataset", "--tokenizer", talker, *arguments.format(**places).split())
    assert (done.code, done.err) == (2, f"error: {sentence.format(**places)}\n")


@pytest.mark.parametrize("line", ["7", "{}", '{"prompt": "a"}', '{"prompt": "", "output_tokens": 1}', "[",
                                  '{"input_ids": ["a"], "output_tokens": 1}'])  # fmt: skip
def test_a_line_that_is_no_request_is_named(tmp_path: Path, line: str) -> None:
    from slipstream.errors import UsageError

    file = tmp_path / "d.txt"
    file.write_text('{"input_ids": [1], "output_tokens": 1}\n' + line)
    with pytest.raises(UsageError, match="line 2"):
        read_dataset(file)
    assert [sample.prompt for sample in read_dataset(file, 1)] == [[1]]
