"""What AutoModel saves, models for embeddings among it: the body of a model under names without the model's prefix."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from slipstream import LLM
from slipstream.checkpoint import convert, open_checkpoint, resolve
from slipstream.checkpoint.random import write_random_model
from slipstream.errors import CorruptFile
from slipstream.models import known_models, model_file
from tests.oracle import pooled

TEXT = list(range(2, 60))


def body_of(whole: Path, folder: Path) -> Path:
    """Saved by transformers, but for the config, which it would write anew."""
    AutoModel.from_pretrained(whole, dtype=torch.float32).save_pretrained(folder)
    (folder / "config.json").write_text((whole / "config.json").read_text())
    return folder


@pytest.mark.parametrize("name", [name for name in known_models() if name != "baichuan"])  # which transformers lacks
def test_every_body_is_the_model_without_its_head(name: str, tmp_path: Path) -> None:
    tiny = model_file(name).TINY | {"tie_word_embeddings": True}
    whole = write_random_model(tmp_path / "whole", tiny)
    body = body_of(whole, tmp_path / "body")
    assert not {key for key in load_file(body / "model.safetensors") if key.startswith(("model.", "lm_head"))}
    expected, found = (open_checkpoint(resolve(folder), "float32") for folder in (whole, body))
    assert found.shapes == expected.shapes
    assert all(torch.equal(found.read(each), expected.read(each)) for each in expected.shapes)


def test_a_body_without_a_head_makes_embeddings(tmp_path: Path) -> None:
    """As E5-Mistral is published: its config has a head of its own, which is not there. Converted once, too."""
    whole = write_random_model(tmp_path / "whole", model_file("mistral").TINY)
    body = body_of(whole, tmp_path / "body")
    with pytest.warns(UserWarning, match="body has no head: it is for embeddings"):
        convert(body, tmp_path / "converted")
    with torch.no_grad():
        states = AutoModel.from_pretrained(whole, dtype=torch.float32)(torch.tensor([TEXT])).last_hidden_state[0]
    with LLM(tmp_path / "converted", dtype="float32", kv_cache_max_tokens=256) as llm:
        vector = torch.from_numpy(llm.embed(TEXT, pooling="last").embedding)
    torch.testing.assert_close(vector, pooled(states, "last"), atol=1e-5, rtol=0)


def test_a_whole_model_that_lacks_its_head_is_refused(tmp_path: Path) -> None:
    whole = write_random_model(tmp_path / "whole", model_file("llama").TINY)
    reference = AutoModelForCausalLM.from_pretrained(whole)
    state = {name: tensor for name, tensor in reference.state_dict().items() if name != "lm_head.weight"}
    reference.save_pretrained(tmp_path / "cut", state_dict=state)
    with pytest.raises(CorruptFile, match=r"lacks the tensor for lm_head\.weight"):
        open_checkpoint(resolve(tmp_path / "cut"))
