"""slipstream run: what it prints for whom, and a sentence for each mistake."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slipstream.cli._prompts import read_prompts
from slipstream.cli._sampling import RunSampling
from slipstream.errors import SlipstreamError
from slipstream.schema.sampling import SamplingParams
from tests.cli.conftest import Call

PROMPT = "The capital of France is"


def outputs(text: str) -> dict[tuple[int, int], str]:
    """(text, beam) → what was printed for it."""
    found = re.findall(r'^Output \[Text (\d+) Beam (\d+)\]: "(.*?)"$', text, re.MULTILINE | re.DOTALL)
    return {(int(index), int(beam)): output for index, beam, output in found}


@pytest.fixture(scope="module")
def expected(engine: Path) -> str:
    """What the library says to PROMPT in eight greedy tokens."""
    from slipstream import LLM

    with LLM(engine) as llm:
        return llm.generate(PROMPT, SamplingParams(max_tokens=8, temperature=0)).outputs[0].text


def test_the_lines_are_those_of_run_py(call: Call, engine: Path, expected: str) -> None:
    done = call("run", "--engine_dir", engine, "--input_text", PROMPT, "--max_output_len", 8)
    assert (done.code, done.err) == (0, "")
    assert done.out == f'Input [Text 0]: "{PROMPT}"\nOutput [Text 0 Beam 0]: "{expected}"\n'


def test_streaming_prints_the_same(call: Call, engine: Path, expected: str) -> None:
    done = call("run", "--engine-dir", engine, "--input-text", PROMPT, "--max-output-len", 8, "--streaming")
    assert done.out == f'Input [Text 0]: "{PROMPT}"\nOutput [Text 0 Beam 0]: "{expected}"\n'


def test_chat_and_streaming_print_the_answer_only(call: Call, engine: Path) -> None:
    arguments = ("run", "--engine_dir", engine, "--chat", "--input_text", "Hello", "--max_output_len", 8)
    plain, bare = call(*arguments), call(*arguments, "--streaming")
    assert plain.out.startswith('Input [Text 0]: "Hello"\n')
    assert bare.out == outputs(plain.out)[0, 0] + "\n"
    told = call(*arguments, "--system_prompt", "You are a cat.")
    assert outputs(told.out) != outputs(plain.out)


def test_a_template_of_ones_own(call: Call, engine: Path, tmp_path: Path, expected: str) -> None:
    template = tmp_path / "plain.jinja"
    template.write_text("{{ messages[0].content }}", encoding="utf-8")
    arguments = ("--chat", "--chat_template", template, "--input_text", PROMPT, "--max_output_len", 8)
    assert outputs(call("run", "--engine_dir", engine, *arguments).out)[0, 0] == expected


def test_a_prompt_that_fails_leaves_the_others_running(call: Call, engine: Path, expected: str) -> None:
    texts = (PROMPT, "", "way too long " * 100, PROMPT)
    flags = [part for text in texts for part in ("--input_text", text)]
    done = call("run", "--engine_dir", engine, *flags, "--max_output_len", 8)
    assert done.code == 2
    assert outputs(done.out) == {(0, 0): expected, (3, 0): expected}
    first, second = done.err.splitlines()
    assert first.startswith("error: Text 1: The prompt is empty")
    assert second.startswith("error: Text 2: The prompt has ")


def test_beams(call: Call, engine: Path) -> None:
    arguments = ("run", "--engine_dir", engine, "--input_text", PROMPT, "--max_output_len", 4, "--num_beams", 3)
    assert list(outputs(call(*arguments).out)) == [(0, 0), (0, 1), (0, 2)]
    best = call(*arguments, "--num_return_sequences", 1, "--length_penalty", 1, "--early_stopping", 0)
    assert list(outputs(best.out)) == [(0, 0)]


def test_several_samples_and_the_seed(call: Call, engine: Path) -> None:
    arguments = ("run", "--engine_dir", engine, "--input_text", PROMPT, "--max_output_len", 6, "--top_k", 0)
    first = outputs(call(*arguments, "--num_return_sequences", 3).out)
    assert list(first) == [(0, 0), (0, 1), (0, 2)]
    assert len(set(first.values())) == 3
    assert outputs(call(*arguments, "--num_return_sequences", 3).out) == first
    assert outputs(call(*arguments, "--random_seed", 7).out)[0, 0] != first[0, 0]


def test_stop_words_and_end_id(call: Call, engine: Path, expected: str) -> None:
    arguments = ("run", "--engine_dir", engine, "--input_text", PROMPT, "--max_output_len", 8)
    word = expected[3:5]
    stopped = outputs(call(*arguments, "--stop_words", word).out)[0, 0]
    assert stopped == expected[: expected.index(word)]
    ids = call(*arguments, "--end_id", 5)
    assert ids.code == 0


def test_prompts_from_files(call: Call, engine: Path, tmp_path: Path, expected: str) -> None:
    lines, objects = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text(f"{PROMPT}\n\n{PROMPT}\n", encoding="utf-8")
    objects.write_text(json.dumps({"task_id": 1, "prompt": PROMPT}) + '\n{"input_ids": [5, 6]}\n', encoding="utf-8")
    done = call("run", "--engine_dir", engine, "--input_file", lines, "--max_output_len", 8)
    assert outputs(done.out) == {(0, 0): expected, (1, 0): expected}
    done = call("run", "--engine_dir", engine, "--input_file", objects, "--max_output_len", 8)
    assert outputs(done.out)[0, 0] == expected
    assert 'Input [Text 1]: "' in done.out


def test_windows_and_sinks_are_those_of_the_library(call: Call, tiny_model: Path, tmp_path: Path) -> None:
    from slipstream import LLM

    ids = list(range(60, 90))
    rows = tmp_path / "ids.csv"
    rows.write_text(",".join(map(str, ids)), encoding="utf-8")
    arguments = ("run", "--model", tiny_model, "--input_file", rows, "--max_output_len", 20)
    seen = set()
    for flags, options in (
        ((), {}),
        (("--max_attention_window_size", 8), {"max_attention_window_size": 8}),
        (("--max_attention_window_size", 8, 20), {"max_attention_window_size": [8, 20]}),
        (
            ("--max_attention_window_size", 8, "--sink_token_length", 4),
            {"max_attention_window_size": 8, "sink_token_length": 4},
        ),
    ):
        with LLM(tiny_model, **options) as llm:
            token_ids = llm.generate(ids, SamplingParams(max_tokens=20, temperature=0)).outputs[0].token_ids
        assert call(*arguments, *flags).out.endswith(f"Output [Text 0 Beam 0]: {token_ids}\n")
        seen.add(tuple(token_ids))
    assert len(seen) == 4
    done = call(*arguments, "--max_attention_window_size", 8, "--sink_token_length", 8)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "sink_token_length is 8; it must be less than the window of 8 tokens" in done.err


def test_token_ids_without_a_tokenizer(call: Call, tiny_model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "ids.csv"
    rows.write_text("1, 2, 3\n4,5,6,127\n", encoding="utf-8")
    done = call("run", "--model", tiny_model, "--input_file", rows, "--max_output_len", 3)
    assert done.code == 0
    assert re.fullmatch(
        r"Input \[Text 0\]: \[1, 2, 3\]\nOutput \[Text 0 Beam 0\]: \[\d+, \d+, \d+\]\n"
        r"Input \[Text 1\]: \[4, 5, 6, 127\]\nOutput \[Text 1 Beam 0\]: \[\d+, \d+, \d+\]\n",
        done.out,
    )
    done = call("run", "--model", tiny_model, "--input_text", "Hello")
    assert (done.code, done.out) == (2, "")
    assert "has no tokenizer; give one with --tokenizer_dir" in done.err


def test_a_tokenizer_from_elsewhere(call: Call, tiny_model: Path, tmp_path: Path) -> None:
    from tests.cli.conftest import write_tokenizer

    write_tokenizer(tmp_path, vocab_size=320)
    arguments = ("run", "--model", tiny_model, "--tokenizer_dir", tmp_path, "--max_output_len", 3)
    assert call(*arguments, "--input_text", "Hello").out.startswith(
        'Input [Text 0]: "Hello"\nOutput [Text 0 Beam 0]: "'
    )
    done = call(*arguments, "--input_text", "The capital")  # merges of this tokenizer that the model does not know
    assert (done.code, done.out) == (2, "")
    assert "the vocabulary of tiny-llama" in done.err


def test_runtime_flags_reach_the_engine(call: Call, engine: Path, expected: str) -> None:
    flags = "--no_kv_cache_enable_block_reuse --no_enable_chunked_context --capacity_scheduler_policy max_utilization"
    sizes = "--max_batch_size 2 --max_num_tokens 64 --max_seq_len 64 --kv_cache_max_tokens 128"
    memory = "--kv_cache_free_gpu_memory_fraction 0.2 --dtype float32 --device cpu"
    everything = f"{flags} {sizes} {memory}".split()
    done = call("run", "--engine_dir", engine, "--input_text", PROMPT, "--max_output_len", 8, *everything)
    assert outputs(done.out) == {(0, 0): expected}


def test_verbose_says_where_the_time_went(engine: Path) -> None:
    """In a process of its own, as a person starts it."""
    arguments = ["run", "--engine_dir", str(engine), "--input_text", PROMPT, "--verbose", "--streaming", "--chat"]
    done = subprocess.run(
        [sys.executable, "-c", "import slipstream.cli; slipstream.cli.main()", *arguments],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},  # as in a terminal that cannot show everything
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    stages = [line.partition(" s  ")[2] for line in done.stderr.splitlines()]
    assert stages[:3] == ["start Python, read the command line", "import torch", "import slipstream"]
    assert "first token" in stages
    seconds = [float(line.split()[0]) for line in done.stderr.splitlines() if " s  " in line]
    assert seconds[-1] == pytest.approx(sum(seconds[:-1]), abs=0.02)
    assert "beyond import torch" in done.stderr
    assert re.search(r"\d+ prompt tokens \(0 cached\), \d+ output tokens in \S+ s: \S+ tokens/s", done.stderr)


def test_threads_that_compute(engine: Path) -> None:
    at_end = "atexit.register(lambda: print('threads', sys.modules['torch'].get_num_threads()))"
    done = subprocess.run(
        [sys.executable, "-c", f"import atexit, sys, slipstream.cli; {at_end}; slipstream.cli.main()",
         "run", "--engine_dir", str(engine), "--input_text", PROMPT, "--max_output_len", "2", "--threads", "2"],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("threads 2\n")


def test_greedy_says_what_it_ignores(call: Call, engine: Path) -> None:
    done = call("run", "--engine_dir", engine, "--input_text", "a", "--max_output_len", 1, "--temperature", 0.7)
    assert done.err == "note: no effect: --temperature, since --top_k 1 (the default) is greedy; add --top_k 0.\n"


# Run with the engine and the prompt "a" ...
FLAG_MISTAKES = {
    "--temperature -1": "temperature is -1.0",
    "--top_p 1.5": "top_p is 1.5",
    "--max_output_len 0": "--max_output_len is 0; it must be greater than or equal to 1.",
    "--top-k=x": "--top_k is x; it must be a valid integer.",
    "--end_id 999": "is 999; the vocabulary of talker",
    "--num_beams 500": "--num_beams is 500; it must be",
    "--num_return_sequences 500 --top_k 0": "--num_return_sequences is 500; it must be",
    "--num_beams 2 --streaming": "--streaming has nothing to show with --num_beams 2",
    "--input_text b --streaming": "--streaming shows one text as it comes, and 2 are asked for",
    "--num_return_sequences 2": "add --top_k 0",
    "--num_beams 2 --num_return_sequences 3": "--num_return_sequences is 3",
    "--num_beams 2 --top_k 5": "--top_k means nothing to a beam search",
    "--length_penalty 2": "add --num_beams 2",
    "--system_prompt b": "--system_prompt means something only with --chat",
    "--chat --chat_template nowhere.jinja": "cannot be read (No such file or directory)",
    "--tokenizer_dir nowhere": "nowhere",
    "--input_file b.txt": "both given",
    "--device tpu": "device is 'tpu'",
    "--dtype float16": "was built in float32",
    "--capacity_scheduler_policy x": "must be one of guaranteed_no_evict",
    "--max_batch_size 9": "max_batch_size is 9",
    "--kv_cache_free_memory_fraction 1.5": "kv_cache_free_memory_fraction is 1.5",
    "--kv_cache_max_tokens 999999999999": "lower --kv_cache_max_tokens to",
    "--kv_cache_max_bytes 999TiB": "lower --kv_cache_max_bytes to",
    "--kv_cache_max_bytes 1": "kv_cache_max_bytes is 1, less than the smallest KV cache takes; raise it to",
    "--kv_cache_max_bytes 8GB": "--kv_cache_max_bytes is '8GB'; it must be a number of bytes, KiB",
    "--model smollm2": "both were given",
    "--guided_regex a --guided_choice b": "--guided_regex and --guided_choice were both given",
    "--guided_regex a --end_id 5": "--end_id means nothing with --guided_regex",
    "--guided_regex a --num_beams 2": "--guided_regex means nothing to a beam search",
    "--guided_json nowhere.json": "--guided_json nowhere.json cannot be read (No such file or directory)",
    "--guided_grammar nowhere.lark": "--guided_grammar nowhere.lark cannot be read (No such file or directory)",
    "--guided_regex a": "guided needs a token that ends a text, and this model has none",
    "--top_kk 1": "--top_k",
}
# ... and from scratch.
MISTAKES = {
    "--input_text a": "Give either --model",
    "--engine_dir {engine}": "There is no prompt",
    "--engine_dir nowhere/x --input_text a": "nowhere/x is not a folder",
    "--engine_dir {talker} --input_text a": "is a model, not an engine",
    "--engine_dir {empty} --input_text a": "is not an engine folder",
    "--model ./nowhere --input_text a": "No such folder or file './nowhere'",
    "--model {talker} --input_text a --dtype int3": "dtype is 'int3'",
    "--engine_dir {engine} --input_text=": "The prompt is empty",
    "--engine_dir {engine} --input_text= --chat": "The prompt is empty",
    "--engine_dir {engine} --input_text= --streaming": "The prompt is empty",
    "--engine_dir {engine} --input_file {empty}/x.txt": "cannot be read (No such file or directory)",
    "--engine_dir {engine} --input_file x.npy": "ends in '.npy'; --input_file reads .txt, .jsonl, .csv.",
    "--engine_dri x": "--engine_dir",
} | {f"--engine_dir {{engine}} --input_text a {flags}": sentence for flags, sentence in FLAG_MISTAKES.items()}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_sentence(line: str, call: Call, engine: Path, talker: Path, tmp_path: Path) -> None:
    done = call("run", *line.format(engine=engine, talker=talker, empty=tmp_path).split())
    assert (done.code, done.out) == (2, "")
    assert MISTAKES[line] in done.err
    assert "Traceback" not in done.err
    if "Usage:" not in done.err:  # typer's own, which shows the usage too
        assert done.err.startswith("error: ")
        assert done.err.count("\n") == 1


def test_of_an_option_given_twice_the_last_is_named(call: Call, engine: Path) -> None:
    done = call("run", "--engine_dir", engine, "--input_text", "a", "--max_output_len", 2, "--max_output_len", "many")
    assert done.code == 2 and done.err == "error: --max_output_len is many; it must be a valid integer.\n"


def test_a_sentence_about_a_megabyte_stays_short(call: Call) -> None:
    done = call("run", "--model", "x" * 2**20, "--input_text", "a")
    assert done.code == 2 and len(done.err) < 1100
    assert done.err.startswith("error: No such folder or file 'xxx") and done.err.endswith("or smollm2.\n")


@pytest.mark.parametrize(
    ("streams", "code", "sentence"),
    [
        (">&-", 0, b""),
        ("<&-", 0, b""),
        (
            ">/dev/full",
            2,
            b"error: The output cannot be written (No space left on device); send it elsewhere.\n",
        ),
    ],
)
def test_streams_that_are_closed_or_full(streams: str, code: int, sentence: bytes, engine: Path) -> None:
    if "full" in streams and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    line = f'"{sys.executable}" -c "import slipstream.cli; slipstream.cli.main()" chat "{engine}" --max_output_len 2'
    turns = "" if streams == "<&-" else "printf 'hi\\n' | "
    done = subprocess.run(["sh", "-c", f"{turns}{line} {streams}"], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (code, sentence)


def test_a_prompt_that_is_too_long(call: Call, engine: Path) -> None:
    done = call("run", "--engine_dir", engine, "--input_text", "a b " * 300)
    assert (done.code, done.out) == (2, "")
    assert "and a sequence holds 256; shorten it to 255" in done.err


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": 3}\n', "line 2: expected an object"),
        ("a.jsonl", b'{"prompt": "a", "input_ids": [1]}\n', "line 1: expected an object"),
        ("a.jsonl", b"[" * 100_000, "line 1"),
        ("a.csv", b"1,2,x\n", "line 1: expected token ids"),
        ("a.txt", b"\xff\xfe\x00", "a file of UTF-8 text"),
        ("a", b"a", "ends in 'no suffix'"),
    ],
)
def test_input_files_that_cannot_be_used(name: str, content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SlipstreamError, match=re.escape(sentence)):
        read_prompts(tmp_path / name)


def test_sampling_flags_in_our_words() -> None:
    assert RunSampling().params() == SamplingParams(top_k=1, max_tokens=128, seed=0)
    sampled = RunSampling(top_k=0, top_p=0.9, num_return_sequences=2, stop_words=("a",), end_id=-1).params()
    assert sampled == SamplingParams(n=2, top_p=0.9, stop=("a",), ignore_eos=True, max_tokens=128, seed=0)
    ended = RunSampling(end_id=3).params()
    assert (ended.ignore_eos, ended.stop_token_ids) == (True, (3,))
    beams = RunSampling(num_beams=3, num_return_sequences=2, length_penalty=0.5).params()
    assert beams == SamplingParams(
        n=2, best_of=3, use_beam_search=True, length_penalty=0.5, early_stopping=True, max_tokens=128, seed=0
    )


@pytest.mark.real_model
def test_the_real_model_answers(call: Call, smollm2_gguf: Path) -> None:
    arguments = ("run", "--model", "smollm2", "--input_text", PROMPT, "--max_output_len", 2)
    assert outputs(call(*arguments).out)[0, 0].startswith(" Paris")
