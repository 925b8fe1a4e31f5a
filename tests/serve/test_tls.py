"""HTTP and gRPC over TLS, by a certificate of an authority that the test makes; pairs that are none."""

import datetime
import ipaddress
import re
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from openai import OpenAI
from tritonclient.utils import InferenceServerException

from tests.serve.conftest import Server, serving

KEY = {"authorization": "Bearer mine"}


@dataclass(frozen=True)
class Pair:
    certificate: Path
    key: Path

    @property
    def flags(self) -> list[object]:
        return ["--ssl_certfile", self.certificate, "--ssl_keyfile", self.key]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> "Authority":
    return Authority(tmp_path_factory.mktemp("tls"))


class Authority:
    def __init__(self, folder: Path) -> None:
        self._folder, self._key = folder, ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name.from_rfc4514_string("CN=An authority of this test")
        own = self._builder(self._name, self._key).add_extension(x509.BasicConstraints(True, None), critical=True)
        self.certificate = folder / "authority.pem"
        self.certificate.write_bytes(pem(own.sign(self._key, hashes.SHA256())))

    def pair(self, name: str, passphrase: bytes | None = None) -> Pair:
        """A certificate for 127.0.0.1, and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        builder = self._builder(x509.Name.from_rfc4514_string(f"CN={name}"), key).add_extension(here, critical=False)
        pair = Pair(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        pair.certificate.write_bytes(pem(builder.sign(self._key, hashes.SHA256())))
        locked = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
        pair.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked))
        return pair

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self._name)
        builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
        return builder.not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(now + datetime.timedelta(1))


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


@pytest.fixture(scope="module")
def secure(engine: Path, authority: Authority) -> Iterator[Server]:
    with serving(engine, "--grpc_port", 0, "--api_key", "mine", *authority.pair("server").flags) as server:
        yield server


@pytest.fixture(scope="module")
def trusting(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(authority.certificate))


def rpc_address(server: Server) -> str:
    [address] = re.findall(r" and grpc://(\S+) ", server.ready_line)
    return str(address)


def asking(text: str) -> list[Any]:
    prompt = triton.InferInput("text_input", [1, 1], "BYTES").set_data_from_numpy(np.array([[text]], dtype=object))
    return [prompt, triton.InferInput("max_tokens", [1, 1], "INT32").set_data_from_numpy(np.array([[8]], np.int32))]


def test_openai_streams_over_https(secure: Server, trusting: ssl.SSLContext, offline: Any) -> None:
    assert secure.url.startswith("https://")
    with OpenAI(base_url=f"{secure.url}/v1", api_key="mine", http_client=httpx.Client(verify=trusting)) as client:
        name = client.models.list().data[0].id
        chunks = client.completions.create(model=name, prompt="The", max_tokens=8, temperature=0, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == greedy(offline, "The")


def greedy(offline: Any, prompt: str) -> str:
    from slipstream import SamplingParams

    text: str = offline.generate(prompt, SamplingParams(max_tokens=8, temperature=0)).outputs[0].text
    return text


def test_a_client_without_the_authority_leaves_and_plain_http_gets_nowhere(secure: Server) -> None:
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{secure.url}/health")
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{secure.url.replace('https', 'http')}/health")


def test_keys_are_asked_for_over_tls_as_well(secure: Server, trusting: ssl.SSLContext) -> None:
    assert httpx.get(f"{secure.url}/health", verify=trusting).status_code == 200
    assert httpx.get(f"{secure.url}/v1/models", verify=trusting).status_code == 401


def test_tritonclient_asks_over_tls(secure: Server, authority: Authority, offline: Any) -> None:
    with triton.InferenceServerClient(
        rpc_address(secure), ssl=True, root_certificates=str(authority.certificate)
    ) as client:
        assert client.is_server_ready()
        answer = client.infer("ensemble", asking("The"), headers=KEY)
        assert answer.as_numpy("text_output").item().decode() == greedy(offline, "The")
        with pytest.raises(InferenceServerException, match="API key"):
            client.infer("ensemble", asking("The"))


def test_grpc_lets_nobody_in_without_tls(secure: Server, authority: Authority) -> None:
    trusts_nobody = grpc.ssl_channel_credentials()
    for channel in (
        grpc.insecure_channel(rpc_address(secure)),
        grpc.secure_channel(rpc_address(secure), trusts_nobody),
    ):
        with channel, pytest.raises(grpc.FutureTimeoutError):
            grpc.channel_ready_future(channel).result(timeout=1.5)


def test_a_pair_that_is_none_is_refused_before_the_engine_starts(authority: Authority, tmp_path: Path) -> None:
    one, other, locked = authority.pair("one"), authority.pair("other"), authority.pair("locked", b"secret")
    (tmp_path / "text.pem").write_text("no certificate")
    for certificate, key in (
        (one.certificate, other.key),
        (locked.certificate, locked.key),
        (tmp_path / "text.pem", one.key),
        (one.certificate, tmp_path / "text.pem"),
    ):
        words = ["serve", "smollm2", *map(str, Pair(certificate, key).flags)]
        command = [sys.executable, "-c", "import slipstream.cli; slipstream.cli.main()", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        assert done.returncode == 2 and "--ssl_keyfile" in done.stderr and "give" in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and str(certificate) in done.stderr, done.stderr
