"""The image and its compose file. No engine builds them here: hadolint and docker compose read them, and what can be
tried without one is: the health check, the flags, the files that are copied."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from tests.deploy.conftest import DEPLOY, KEY, ROOT, longest_stop, run_tool, serve_options, tool, yaml_of
from tests.serve.conftest import Server

DOCKER = DEPLOY / "docker"
GPU_FILES = ("docker-compose.yml", "docker-compose.gpu.yml")
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")


def exec_form(before: str) -> Any:
    """The words of the one line that begins so."""
    [words] = re.findall(rf"^{before} *(\[.*\])$", DOCKERFILE, re.MULTILINE)
    return json.loads(words)


def compose(*files: str) -> Any:
    """What docker compose makes of the files."""
    given = [word for file in files for word in ("-f", DOCKER / file)]
    said = run_tool("docker-compose", *given, "config", "--format", "json", env={"SLIPSTREAM_API_KEY": KEY})
    return json.loads(said)


def test_hadolint_has_no_objection() -> None:
    run_tool("hadolint", DOCKER / "Dockerfile")


def test_what_is_copied_is_there_and_not_ignored() -> None:
    sources = [line.split()[1:-1] for line in DOCKERFILE.splitlines() if re.match(r"COPY (?!--)", line)]
    copied = {name for names in sources for name in names}
    ignored = (DOCKER / "Dockerfile.dockerignore").read_text().split()
    assert ignored[0] == "*" and {f"!{name}" for name in copied} <= {*ignored}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {project["readme"], *project["license-files"], "pyproject.toml", "slipstream"} == copied
    assert all((ROOT / name).exists() for name in copied)


def test_it_installs_what_the_scripts_install() -> None:
    [torch] = re.findall(r"torch==(\S+)", DOCKERFILE)
    assert f"CPU_TORCH={torch}\n" in (ROOT / "scripts" / "_setup.sh").read_text(encoding="utf-8")
    [extras] = re.findall(r'"\.\[(.*)\]"', DOCKERFILE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {*extras.split(",")} <= {*project["optional-dependencies"]}


def test_process_1_is_the_server_and_no_shell() -> None:
    command = exec_form("ENTRYPOINT") + exec_form("CMD")
    assert command[:2] == ["slipstream", "serve"]
    assert serve_options(command[2:])["host"] == "0.0.0.0"
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE)[-1] not in ("0", "root")


def test_the_health_check_is_green_over_a_server_and_red_over_none(guarded: Server) -> None:
    program, *words = exec_form("HEALTHCHECK .*CMD")
    assert program == "python"
    here = [word.replace("127.0.0.1:8000", guarded.url.removeprefix("http://")) for word in words]
    assert subprocess.run([sys.executable, *here], check=False).returncode == 0
    nobody = [word.replace("127.0.0.1:8000", "127.0.0.1:1") for word in words]
    assert subprocess.run([sys.executable, *nobody], stderr=subprocess.DEVNULL, check=False).returncode == 1


def test_compose_starts_the_server_with_options_that_it_has() -> None:
    service = compose("docker-compose.yml")["services"]["slipstream"]
    options = serve_options(exec_form("ENTRYPOINT")[2:] + service["command"])
    assert service["ports"][0]["target"] == options["port"]
    assert int(service["stop_grace_period"].removesuffix("m0s")) * 60 >= longest_stop(options)
    assert service["environment"]["SLIPSTREAM_API_KEY"] == KEY
    assert service["volumes"][0]["target"] == "/cache" and "VOLUME /cache\n" in DOCKERFILE


def test_compose_refuses_to_start_without_a_key() -> None:
    command = [tool("docker-compose"), "-f", str(DOCKER / "docker-compose.yml"), "config"]
    done = subprocess.run(command, capture_output=True, text=True, env={}, check=False)
    assert done.returncode != 0 and "SLIPSTREAM_API_KEY" in done.stderr


def test_compose_mounts_files_that_are_there() -> None:
    services = compose("docker-compose.yml")["services"]
    mounts = [volume for service in services.values() for volume in service["volumes"] if volume["type"] == "bind"]
    assert len(mounts) == 3 and all(Path(mount["source"]).exists() for mount in mounts)
    [dashboards] = yaml_of(DEPLOY / "grafana/provisioning/dashboards/slipstream.yml")["providers"]
    assert dashboards["options"]["path"] in {str(Path(mount["target"]).parent) for mount in mounts}
    [source] = yaml_of(DEPLOY / "grafana/provisioning/datasources/prometheus.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in services


def test_a_gpu_changes_the_image_and_nothing_else() -> None:
    plain, gpu = (compose(*files)["services"]["slipstream"] for files in (GPU_FILES[:1], GPU_FILES))
    assert gpu["build"].pop("args") == {"DEVICE": "cuda"} and "AS system-cuda\n" in DOCKERFILE
    assert gpu.pop("gpus") == [{"count": -1}]
    assert gpu.pop("image") != plain.pop("image") and gpu == plain
