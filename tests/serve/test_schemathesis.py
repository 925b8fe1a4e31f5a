"""Whatever schemathesis makes of our OpenAPI document gets an answer that the document describes, and never a 5xx."""

import os
import subprocess
import sys
from pathlib import Path

import httpx

from tests.serve.conftest import Server

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",  # what the document does not allow is refused
    "unsupported_method",
)
# A longer run by hand adds the phase coverage (5000 cases a minute), takes other seeds and more examples.
BODILESS = ("/v2/repository/index", "/start_profile", "/stop_profile")


def test_every_answer_is_one_that_the_document_describes(server: Server, tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("schemathesis")
    options = {
        "checks": ",".join(CHECKS), "phases": "fuzzing", "max-examples": 10, "seed": 1, "workers": 1,
        "generation-database": "none",
    }  # fmt: skip
    done = subprocess.run(
        [program, "run", f"{server.url}/openapi.json", *(f"--{name}={value}" for name, value in options.items())],
        capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path,
        env={**os.environ, "SCHEMATHESIS_HOOKS": "tests.serve.schemathesis_hooks", "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    assert done.returncode == 0 and "Fuzzing" in done.stdout, done.stdout + done.stderr


def test_all_endpoints_say_what_they_take_and_how_they_refuse(server: Server) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    for path, methods in document["paths"].items():
        for method, said in methods.items():
            assert method != "post" or path in BODILESS or "application/json" in said["requestBody"]["content"], path
            assert {"4XX", "5XX"} <= said["responses"].keys() or path == "/metrics", path
            assert "422" not in said["responses"], path  # FastAPI's own error body, which no protocol here has
