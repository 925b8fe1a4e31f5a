"""bench serve's client: what it reads off a wire of any cut, and what real servers say of the same."""

import json
import random
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import fmean, pstdev

import pytest

from slipstream.bench.dataset import Sample, random_words
from slipstream.bench.gpu import GpuWatch, read_use
from slipstream.bench.http_client import Target
from slipstream.bench.load import Load
from slipstream.bench.protocols import PROTOCOLS
from slipstream.bench.serving import Endpoint, Limits, Measurement, endless
from slipstream.bench.timeline import Timeline
from slipstream.errors import UsageError
from slipstream.text.tokenizer import Tokenizer
from tests.bench.odd_server import CLOSE, HEAD, Answer, chunk, odd_server
from tests.serve.conftest import Server, eventually
from tests.serve.conftest import engine as engine
from tests.serve.conftest import server as server
from tests.serve.load import counts_of

CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
SAMPLES = [Sample("Hello", 3)]


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def word(text: str) -> bytes:
    return event(choices=[{"text": text}])


USAGE = event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 5})
WHOLE = word("one") + word("") + word(" two") + USAGE + b"data: [DONE]\n\n"


def endpoint_of(url: str, protocol: str = "openai", timeout: float = 30, **more: object) -> Endpoint:
    tokenizer = more.pop("tokenizer", None)
    assert tokenizer is None or isinstance(tokenizer, Tokenizer)
    how = PROTOCOLS[protocol]
    return Endpoint(Target(url, {"X-Test": "yes"}, timeout), how, how.default_model or "m", more, tokenizer)


def ask(url: str, count: int = 1, load: Load = Load(concurrency=1), **more: object) -> Measurement:  # noqa: B008
    endpoint = endpoint_of(url, **more)  # type: ignore[arg-type]
    found = endpoint.measure(SAMPLES * count, load, draw=random.Random(0))
    endpoint.close()
    return found


def one_byte_at_a_time(answer: bytes) -> Answer:
    return [answer[index : index + 1] for index in range(len(answer))]


@pytest.mark.parametrize(
    "answer",
    [
        [CHUNKED + chunk(WHOLE) + chunk(b"")],
        [CHUNKED, *(chunk(part) for part in WHOLE.splitlines(True)), chunk(b"")],
        [CHUNKED, chunk(WHOLE[:40]), chunk(WHOLE[40:]) + b"0\r\n", b"\r\n"],
        one_byte_at_a_time(CHUNKED + chunk(WHOLE) + chunk(b"")),
        [HEAD + f"Content-Length: {len(WHOLE)}\r\n\r\n".encode() + WHOLE[:30], WHOLE[30:]],
        [HEAD + b"connection: close\r\n\r\n" + WHOLE, CLOSE],
    ],
    ids=["at once", "by lines", "cut in an event", "by bytes", "with a length", "to the end"],
)
def test_an_answer_is_the_same_however_it_is_cut(answer: Answer) -> None:
    with odd_server(lambda index: answer) as there:
        found = ask(there.url, 3)  # one after the other, over one connection where it stays open
    assert [each.error for each in found.run.timelines] == [None] * 3
    for timeline in found.run.timelines:
        assert (timeline.num_input, timeline.num_output, len(timeline.arrivals)) == (7, 5, 2)
        assert timeline.asked <= timeline.arrivals[0] <= timeline.arrivals[1] <= timeline.ended
    head, _, body = there.asked[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/completions HTTP/1.1\r\n") and b"X-Test: yes" in head
    wanted = {"model": "m", "prompt": "Hello", "max_tokens": 3, "temperature": 0, "ignore_eos": True, "stream": True}
    assert json.loads(body) == wanted | {"stream_options": {"include_usage": True}}


def test_pieces_are_stamped_after_they_were_sent_and_before_the_next() -> None:
    """The server and the client read the same clock; the client may be as late as it likes."""
    parts = [chunk(word("a")), chunk(word("b")), chunk(word("c")), chunk(USAGE), chunk(b"")]
    with odd_server(lambda index: [CHUNKED, *parts], pause=lambda: time.sleep(0.02)) as there:
        found = ask(there.url, 4)
    for timeline, sent in zip(found.run.timelines, there.sent, strict=True):
        first, second, third = sent[1:4]
        assert first <= timeline.arrivals[0] and second <= timeline.arrivals[1] and third <= timeline.arrivals[2]
        assert timeline.asked <= sent[0] and timeline.ttft >= 0.02


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ([b"HTTP/1.1 404 Not Found\r\ncontent-length: 4\r\n\r\nnone"], "404: b'none'"),
        ([CHUNKED, chunk(event(error={"message": "too long"})), chunk(b"")], "too long"),
        ([CHUNKED, chunk(word("a")), CLOSE], "the connection ended before the answer did"),
        ([CHUNKED, CLOSE], "the connection ended before the answer did"),
        ([CHUNKED, chunk(USAGE), chunk(b"")], "no text came"),
    ],
)
def test_an_answer_that_fails_says_why_and_stops_no_other(answer: Answer, error: str) -> None:
    whole = [CHUNKED + chunk(WHOLE) + chunk(b"")]
    with odd_server(lambda index: answer if index == 1 else whole) as there:
        found = ask(there.url, 3)
    assert [each.error for each in found.run.timelines] == [None, error, None]
    assert found.run.num_failed == 1


def test_a_server_may_close_what_it_said_would_stay_open() -> None:
    """As llama.cpp's does after each stream."""
    with odd_server(lambda index: [CHUNKED + chunk(WHOLE) + chunk(b""), CLOSE]) as there:
        found = ask(there.url, 20)
    assert [each.error for each in found.run.timelines] == [None] * 20


def test_silence_ends() -> None:
    with odd_server(lambda index: [CHUNKED]) as there:
        found = ask(there.url, timeout=1.5)
    assert found.run.timelines[0].error == "nothing came for 1.5 s"


def test_fields_can_be_added_and_left_out() -> None:
    with odd_server(lambda index: [CHUNKED + chunk(WHOLE) + chunk(b"")]) as there:
        ask(there.url, ignore_eos=None, top_k=1)
    body = json.loads(there.asked[0].partition(b"\r\n\r\n")[2])
    assert body["top_k"] == 1 and "ignore_eos" not in body


def test_a_server_that_is_not_there_is_a_sentence() -> None:
    with pytest.raises(UsageError, match=r"http://127\.0\.0\.1:9 cannot be reached .*; start the server"):
        ask("http://127.0.0.1:9")


def test_arrivals_by_chance_are_poissons() -> None:
    times = Load(rate=5.0).arrivals(4000, random.Random(0))
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert fmean(gaps) == pytest.approx(0.2, rel=0.05) and pstdev(gaps) == pytest.approx(0.2, rel=0.05)


def test_an_open_load_asks_without_waiting() -> None:
    """Answers come only when all have been asked, which closed clients would never come to."""
    asked_all = 5

    def wait() -> None:
        while len(there.asked) < asked_all:
            time.sleep(0.001)

    with odd_server(lambda index: [CHUNKED + chunk(WHOLE) + chunk(b"")], pause=wait) as there:
        found = ask(there.url, asked_all, Load(rate=100.0))
    assert len(found.run.whole) == asked_all and str(Load(rate=100.0)) == "100 requests/s"
    assert all(timeline.lag >= 0 for timeline in found.run.timelines)


def test_good_answers_keep_every_limit() -> None:
    timeline = Timeline(0.0, num_output=3, arrivals=[0.1, 0.2, 0.3], ended=0.4)
    assert Limits(ttft=100, tpot=100.5, latency=400).are_kept(timeline)
    for limits in (Limits(ttft=99), Limits(tpot=99), Limits(latency=399)):
        assert not limits.are_kept(timeline)
    assert not Limits().are_kept(Timeline(0.0, error="refused"))


def test_samples_begin_again() -> None:
    take = endless([Sample(text, 1) for text in "abc"])
    assert ["".join(str(each.prompt) for each in take(count)) for count in (2, 2, 5)] == ["ab", "ca", "bcabc"]


def test_gpus_as_nvml_says() -> None:
    use = read_use("0, 100, 50.0\n1, 10, 20.0\n0, 300, 70.0\n1, 10, [N/A]\n0, 2")
    assert use is not None and (use.memory_mib, use.watts) == (310, 80)
    assert read_use("") is None


def test_a_machine_without_nvml_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with GpuWatch() as watch:
        pass
    assert watch.use is None


# --- a real server ---


@pytest.fixture(scope="module")
def tokenizer(engine: Path) -> Iterator[Tokenizer]:
    yield Tokenizer.open(engine / "tokenizer")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tokens_are_as_many_as_the_server_made(protocol: str, server: Server, tokenizer: Tokenizer) -> None:
    samples = random_words(random.Random(1), 12, 8, 17)
    before = counts_of(server)
    endpoint = endpoint_of(server.url, protocol, model="talker" if "openai" in protocol else None)
    found = endpoint.measure(samples, Load(concurrency=4), draw=random.Random(0), limits=Limits(latency=1e9))
    endpoint.close()
    assert [each.error for each in found.run.timelines] == [None] * 12
    # The server's own counts, once it has told them of all twelve.
    asked = before["request_generation_tokens_count"] + 12
    eventually(lambda: counts_of(server)["request_generation_tokens_count"] == asked, seconds=60)
    after = counts_of(server)
    made = after["request_generation_tokens_sum"] - before["request_generation_tokens_sum"]
    output_tokens = sum(each.num_output for each in found.run.timelines)
    if PROTOCOLS[protocol].counts_tokens:
        assert output_tokens == made
        assert protocol == "tgi" or made == 12 * 17  # TGI has no way to go beyond the end of a text
    else:
        assert 12 <= output_tokens <= made == 12 * 17  # events
    if "openai" in protocol:
        prompts = after["request_prompt_tokens_sum"] - before["request_prompt_tokens_sum"]
        assert sum(each.num_input for each in found.run.timelines) == prompts
    assert found.num_good == 12 and found.client_share > 0


def test_token_ids_become_text_where_a_protocol_takes_no_other(server: Server, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The capital of France")
    endpoint = endpoint_of(server.url, "tgi")
    with pytest.raises(UsageError, match="token ids, and this protocol takes texts; give --tokenizer"):
        endpoint.measure([Sample(ids, 4)], Load(concurrency=1), draw=random.Random(0))
    endpoint.close()
    endpoint = endpoint_of(server.url, "triton", tokenizer=tokenizer)
    found = endpoint.measure([Sample(ids, 6)], Load(concurrency=1), draw=random.Random(0))
    endpoint.close()
    assert found.run.timelines[0].error is None and found.run.timelines[0].num_output >= 1
