"""/metrics, against what clients were told they got; two fronts, which must say the same."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.conftest import Server, eventually, serving
from tests.surface.sources import ROOT

NAME = "talker"
Samples = dict[tuple[str, str], float]  # by name and finished_reason or le


@pytest.fixture(scope="module")
def measured(patient_engine: Path) -> Iterator[Server]:
    with serving(patient_engine, "--num_fronts", 2, "--served_model_name", NAME, "--max_batch_size", 4) as server:
        yield server


def scrape(server: Server) -> Samples:
    response = httpx.get(f"{server.url}/metrics")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/plain; version=")
    found: Samples = {}
    for family in text_string_to_metric_families(response.text):
        assert family.documentation
        for sample in family.samples:
            assert sample.labels.pop("model_name") == NAME and sample.labels.pop("engine") == "0"
            found[sample.name.removeprefix("slipstream:"), "".join(sample.labels.values())] = sample.value
    return found


def value(samples: Samples, name: str, label: str = "") -> float:
    return samples.get((name, label), 0.0)


def test_the_numbers_are_those_of_the_clients(measured: Server) -> None:
    assert value(scrape(measured), "prompt_tokens_total") == 0
    usages: list[dict[str, Any]] = []

    def ask(**fields: Any) -> Any:
        answer = measured.post("/v1/completions", {"ignore_eos": True, "temperature": 0, **fields}).json()
        usages.append(answer["usage"])
        return answer["choices"][0]

    for length in (3, 40, 70):
        text = ask(prompt=list(range(2, length + 2)), max_tokens=length)["text"]
    ask(prompt=list(range(2, 72)), max_tokens=5)  # as before: from the prefix cache
    stopped = ask(prompt=list(range(2, 72)), max_tokens=70, stop=text[3:6])
    assert stopped["finish_reason"] == "stop"
    assert measured.post("/v1/completions", {"prompt": [1], "max_tokens": 0}).status_code == 400

    samples = numbers_of_both(measured, num_ended=5)
    total = {kind: sum(usage[f"{kind}_tokens"] for usage in usages) for kind in ("prompt", "completion")}
    assert value(samples, "prompt_tokens_total") == total["prompt"] == 3 + 40 + 3 * 70
    # Behind a stop string the engine is further than the text, until the front has seen it and said so.
    most_behind = 70 - usages[-1]["completion_tokens"]
    assert 0 <= value(samples, "generation_tokens_total") - total["completion"] <= most_behind
    assert 0 <= value(samples, "request_generation_tokens_sum") - total["completion"] <= most_behind
    assert value(samples, "request_prompt_tokens_sum") == total["prompt"]
    assert value(samples, "prefix_cache_queries_total") == total["prompt"]
    assert value(samples, "prefix_cache_hits_total") >= 2 * 32
    ends = [value(samples, "request_success_total", reason) for reason in ("length", "stop")]
    assert ends in ([4, 1], [5, 0])  # the engine of a slow front is done before it hears of the stop
    for name in ("time_to_first_token_seconds", "request_queue_time_seconds", "e2e_request_latency_seconds"):
        assert value(samples, f"{name}_count") == 5
    num_tokens = value(samples, "request_generation_tokens_sum")
    assert value(samples, "inter_token_latency_seconds_count") == num_tokens - 5
    steps = value(samples, "iteration_tokens_total_sum")
    assert steps == value(samples, "generation_tokens_total") + total["prompt"] - value(
        samples, "prefix_cache_hits_total"
    )
    spent = [value(samples, f"{name}_sum") for name in ("request_queue_time_seconds", "request_prefill_time_seconds")]
    assert sum(spent) == pytest.approx(value(samples, "time_to_first_token_seconds_sum"))
    assert sum(spent) < value(samples, "e2e_request_latency_seconds_sum")


def numbers_of_both(server: Server, num_ended: int) -> Samples:
    """What both fronts say, once both have heard of the end of so many sequences, and that nothing runs."""
    said = []

    def all_agree() -> bool:
        said[:] = [scrape(server) for _ in range(4)]  # a connection each
        done = [value(each, "e2e_request_latency_seconds_count") == num_ended for each in said]
        return all(done) and all(each == said[0] for each in said)

    eventually(all_agree)
    assert value(said[0], "num_requests_running") == value(said[0], "kv_cache_usage_perc") == 0
    return said[0]


def test_what_runs_and_waits_shows_at_once_and_a_client_that_leaves_counts_as_abort(measured: Server) -> None:
    before = scrape(measured)
    body = {"prompt": [1, 2, 3], "max_tokens": 8000, "ignore_eos": True, "stream": True, "n": 6, "best_of": 6}
    with httpx.stream("POST", f"{measured.url}/v1/completions", json=body, timeout=30) as stream:
        lines = stream.iter_lines()
        next(lines)
        eventually(lambda: value(scrape(measured), "num_requests_running") == 4)
        samples = scrape(measured)
        assert value(samples, "num_requests_waiting") == 2 and 0 < value(samples, "kv_cache_usage_perc") <= 1
    eventually(lambda: value(scrape(measured), "request_success_total", "abort") == 6)
    after = scrape(measured)
    for reason in ("stop", "length"):
        assert value(after, "request_success_total", reason) == value(before, "request_success_total", reason)


def names_served(server: Server) -> set[str]:
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
    return {family.name + ("_total" if family.type == "counter" else "") for family in families}


def names_on_the_page() -> set[str]:
    page = (ROOT / "docs" / "serving" / "metrics.md").read_text(encoding="utf-8")
    return set(re.findall(r"^\| `(slipstream:\w+)` \|", page, re.MULTILINE))


def test_the_page_names_every_metric(measured: Server) -> None:
    of_drafts = {name for name in names_on_the_page() if "spec_decode" in name}
    assert len(of_drafts) == 5
    assert names_served(measured) == names_on_the_page() - of_drafts


def test_an_engine_that_drafts_counts_what_is_accepted(engine: Path) -> None:
    """The numbers agree with each other and with the tokens that the client got."""
    drafting = '{"method": "ngram", "max_draft_len": 5, "adaptive": false}'
    with serving(engine, "--speculative", drafting, "--served_model_name", NAME) as server:
        body = {"prompt": [5, 6, 7] * 8, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
        assert server.post("/v1/completions", body).json()["usage"]["completion_tokens"] == 40
        eventually(lambda: value(scrape(server), "generation_tokens_total") == 40)
        samples = scrape(server)
        assert names_served(server) == names_on_the_page()
    drafts, tokens, accepted = (
        value(samples, f"spec_decode_num_{name}_total") for name in ("drafts", "draft_tokens", "accepted_tokens")
    )
    assert 0 < drafts <= tokens <= 5 * drafts
    assert 0 < accepted <= min(tokens, 39)
    name = "spec_decode_num_accepted_tokens_per_pos_total"
    by_position = [value(samples, name, str(position)) for position in range(5)]
    assert value(samples, "spec_decode_draft_length") in (0, 5)  # the request may be over
    assert sum(by_position) == accepted and by_position == sorted(by_position, reverse=True)


def test_the_dashboard_shows_what_there_is(measured: Server) -> None:
    served = {f"slipstream:{name}" for name, _ in scrape(measured)} | {"slipstream:request_success_total"}
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "slipstream.json").read_text(encoding="utf-8"))
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [variable["query"] for variable in dashboard["templating"]["list"]]
    used = {name for expression in expressions for name in re.findall(r"slipstream:\w+", expression)}
    assert len(used) > 20 and used <= served
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in dashboard["panels"]})
