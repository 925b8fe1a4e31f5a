"""SmolLM2 says the same to the clients of every protocol."""

from pathlib import Path

import numpy as np
import pytest
import text_generation
import tritonclient.grpc
import tritonclient.http
from huggingface_hub import InferenceClient

from tests.serve.conftest import serving
from tests.serve.test_kserve_grpc import address_of, asking


@pytest.mark.real_model
def test_the_real_model_answers_the_clients_of_tgi_and_triton(smollm2_gguf: Path) -> None:
    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    with serving("smollm2", "--grpc_port", 0, OMP_NUM_THREADS="2") as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        hub = InferenceClient(server.url)
        said = hub.text_generation(text, max_new_tokens=8)
        assert "Paris" in said
        assert "".join(hub.text_generation(text, max_new_tokens=8, stream=True)) == f"{said}<|im_end|>"  # as TGI has it
        assert text_generation.Client(server.url).generate(text, max_new_tokens=8).generated_text == said
        prompt, count = (np.array([[value]], dtype=dtype) for value, dtype in ((text, object), (8, np.int32)))
        inputs = [
            tritonclient.http.InferInput("text_input", [1, 1], "BYTES").set_data_from_numpy(prompt),
            tritonclient.http.InferInput("max_tokens", [1, 1], "INT32").set_data_from_numpy(count),
        ]
        with tritonclient.http.InferenceServerClient(server.url.removeprefix("http://")) as client:
            assert client.infer("ensemble", inputs).as_numpy("text_output")[0][0].decode() == said
        with tritonclient.grpc.InferenceServerClient(address_of(server)) as client:
            found = client.infer("ensemble", asking(text, max_tokens=8))
            assert found.as_numpy("text_output")[0][0].decode() == said
