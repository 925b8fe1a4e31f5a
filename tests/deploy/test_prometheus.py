"""Prometheus itself, with our configuration, over a server with a key: what the alerts, the dashboard and the
autoscaler ask it for is there."""

import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deploy.conftest import BEARER, DEPLOY, KEY, run_tool, tool, yaml_of
from tests.serve.conftest import Server, eventually

FOLDER = DEPLOY / "prometheus"
POD = {"namespace": "default", "pod": "slipstream-0"}  # what Kubernetes' discovery would add


class Prometheus:
    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, expression: str) -> list[Any]:
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", answer
        found: list[Any] = answer["data"]["result"]
        return found


@pytest.fixture(scope="module")
def prometheus(guarded: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "key").write_text(KEY)
    shutil.copy(FOLDER / "alerts.yml", folder)
    config = (FOLDER / "prometheus.yml").read_text(encoding="utf-8")
    target = f'"{guarded.url.removeprefix("http://")}"]\n        labels: {json.dumps(POD)}'
    for ours, here in (
        ("/run/secrets/slipstream_api_key", str(folder / "key")),
        ('"slipstream:8000"]', target),
        ("_interval: 10s", "_interval: 1s"),
    ):
        assert ours in config
        config = config.replace(ours, here)
    (folder / "prometheus.yml").write_text(config, encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        tool("prometheus"), f"--config.file={folder / 'prometheus.yml'}", f"--web.listen-address={address}",
        f"--storage.tsdb.path={folder / 'data'}", "--log.level=error",
    ]  # fmt: skip
    process = subprocess.Popen(command)
    try:
        found = Prometheus(f"http://{address}")
        eventually(lambda: is_ready(found), 20)
        for num_scrapes in (1, 3):  # rates need some before and after a request
            eventually(lambda: num_scrapes_of(found) >= num_scrapes, 20)  # noqa: B023
            httpx.post(f"{guarded.url}/v1/completions", json={"prompt": "The", "max_tokens": 4}, headers=BEARER)
        yield found
    finally:
        process.terminate()
        process.wait()


def is_ready(prometheus: Prometheus) -> bool:
    try:
        return httpx.get(f"{prometheus.url}/-/ready").status_code == 200
    except httpx.ConnectError:
        return False


def num_scrapes_of(prometheus: Prometheus) -> float:
    return sum(float(each["value"][1]) for each in prometheus.ask('sum_over_time(up{job="slipstream"}[1m])'))


def test_promtool_has_no_objection(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "prometheus")
    config = (FOLDER / "prometheus.yml").read_text(encoding="utf-8")
    (tmp_path / "key").write_text(KEY)
    config = config.replace("/run/secrets/slipstream_api_key", str(tmp_path / "key"))
    (tmp_path / "prometheus" / "prometheus.yml").write_text(config, encoding="utf-8")
    assert "4 rules found" in run_tool("promtool", "check", "config", tmp_path / "prometheus" / "prometheus.yml")


def test_the_dashboard_shows_numbers(prometheus: Prometheus) -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "slipstream.json").read_text(encoding="utf-8"))
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert expressions
    for expression in expressions:
        asked = expression.replace("$model", ".*").replace("$__rate_interval", "1m")
        assert prometheus.ask(asked), f"no data for {expression}"


def test_the_autoscaler_gets_its_number(prometheus: Prometheus) -> None:
    [rule] = yaml_of(DEPLOY / "kubernetes/autoscaling/prometheus-adapter.yaml")["rules"]["custom"]
    [series] = prometheus.ask(rule["seriesQuery"])
    values = {"Series": series["metric"]["__name__"], "LabelMatchers": 'namespace="default"', "GroupBy": "pod"}
    query = rule["metricsQuery"]
    for name, value in values.items():
        query = query.replace(f"<<.{name}>>", value)
    assert [found["metric"] for found in prometheus.ask(query)] == [{"pod": POD["pod"]}]


def test_alerts_are_quiet_where_all_is_well_and_ask_for_what_there_is(prometheus: Prometheus) -> None:
    [group] = httpx.get(f"{prometheus.url}/api/v1/rules").json()["data"]["groups"]
    assert [(rule["state"], rule["health"]) for rule in group["rules"]] == [("inactive", "ok")] * 4
    names = {name for rule in group["rules"] for name in re.findall(r"slipstream:\w+", rule["query"])}
    assert len(names) == 4
    for name in names:
        assert prometheus.ask(name), f"there is no {name}"


MORE_LABELS = {"Errors": {"finished_reason": "error"}}
TROUBLE = """\
rule_files: [alerts.yml]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {series: 'up{job="slipstream",instance="dead"}', values: 0x20}
      - {series: 'up{job="slipstream",instance="stuck"}', values: 1x20}
      - {series: 'slipstream:num_requests_running{job="slipstream",instance="stuck"}', values: 2x20}
      - {series: 'slipstream:num_requests_waiting{job="slipstream",instance="stuck"}', values: 3x20}
      - {series: 'slipstream:iteration_tokens_total_count{job="slipstream",instance="stuck"}', values: 7x20}
      - {series: 'slipstream:num_requests_running{job="slipstream",instance="well"}', values: 2x20}
      - {series: 'slipstream:num_requests_waiting{job="slipstream",instance="well"}', values: 0x20}
      - {series: 'slipstream:iteration_tokens_total_count{job="slipstream",instance="well"}', values: 7+9x20}
      - {series: 'slipstream:request_success_total{finished_reason="error",instance="well"}', values: 0+1x20}
    alert_rule_test:
"""


def test_each_alert_is_raised_by_its_trouble_alone(tmp_path: Path) -> None:
    shutil.copy(FOLDER / "alerts.yml", tmp_path)
    text = TROUBLE
    for name, instance in (("Down", "dead"), ("Stuck", "stuck"), ("Queue", "stuck"), ("Errors", "well")):
        raised = {
            "exp_labels": {"instance": instance, **MORE_LABELS.get(name, {"job": "slipstream"})},
            "exp_annotations": {"summary": summary(name, instance)},
        }
        case = {"alertname": f"Slipstream{name}", "eval_time": "15m", "exp_alerts": [raised]}
        text += f"      - {json.dumps(case)}\n"
    (tmp_path / "test.yml").write_text(text, encoding="utf-8")
    run_tool("promtool", "test", "rules", "test.yml", cwd=tmp_path)


def summary(name: str, instance: str) -> str:
    [group] = yaml_of(FOLDER / "alerts.yml")["groups"]
    [text] = [each["annotations"]["summary"] for each in group["rules"] if each["alert"] == f"Slipstream{name}"]
    return str(text.replace("{{ $labels.instance }}", instance))
