"""slipstream eval --tasks: what it writes, prints and refuses."""

import json
import sys
from pathlib import Path

import pytest

from tests.bench.lm_eval_tasks import task_folder
from tests.cli.conftest import Call

__all__ = ["task_folder"]


def words(text: str) -> str:
    return " ".join(text.split())


def test_tasks_on_a_model_and_its_reference(call: Call, talker: Path, task_folder: Path, tmp_path: Path) -> None:
    written = tmp_path / "found.json"
    flags = ("--tasks", "capitals, spelling", "--tasks_dir", str(task_folder), "--output_file", str(written))
    done = call(
        "eval", "--model_dir", str(talker), "--num_fewshot", "1", "--limit", "4", "--apply_chat_template", *flags
    )
    assert done.code == 0, done.err
    found = json.loads(written.read_text())
    assert found["tasks"]["n-shot"] == {"capitals": 1, "spelling": 1} and "quality" not in found
    assert found["tasks"]["n-samples"]["capitals"] == {"original": 10, "effective": 4}
    capitals = found["tasks"]["results"]["capitals"]
    line = f"capitals 1 4 acc {capitals['acc,none']:.4f} ± {capitals['acc_stderr,none']:.4f}"
    assert line in words(done.out)

    quantized = tmp_path / "quantized"
    made = call("quantize", "--model_dir", str(talker), "--output_dir", str(quantized), "--qformat", "int8_wo",
                "--calib_size", "0")  # fmt: skip
    assert made.code == 0, made.err
    done = call("eval", "--model_dir", str(quantized), "--reference_dir", str(talker), "--eval_size", "2",
                "--max_seq_length", "16", *flags)  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads(written.read_text())
    assert found["quality"]["tokens"] == 2 * 15
    assert [*found["tasks"]["results"]] == [*found["reference_tasks"]["results"]] == ["capitals", "spelling"]
    of_model, of_reference = (found[key]["results"]["capitals"] for key in ("tasks", "reference_tasks"))
    assert of_model["sample_len"] == 10
    line = (f"capitals 0 10 acc {of_model['acc,none']:.4f} ± {of_model['acc_stderr,none']:.4f} "
            f"{of_reference['acc,none']:.4f} ± {of_reference['acc_stderr,none']:.4f}")  # fmt: skip
    assert line in words(done.out)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "Give --reference_dir, a model to compare with, or --tasks; neither was given."),
        (("--limit", "4", "--reference_dir", "x"), "--limit is about --tasks; give these, too, such as"),
        (("--num_fewshot", "0", "--reference_dir", "x"), "--num_fewshot is about --tasks"),
        (("--tasks_dir", "x", "--reference_dir", "x"), "--tasks_dir is about --tasks"),
        (
            ("--tasks", "capital", "--tasks_dir", "{folder}"),
            "'capital' is no task of {folder}; the nearest are capitals.",
        ),
        (("--tasks", "capitals,", "--tasks_dir", "{folder}"), "'' is no task of {folder}; those of lm-eval need no"),
        (("--tasks", "helaswag"), "'helaswag' is no task of lm-eval; the nearest are hellaswag"),
    ],
)
def test_mistakes_end_in_a_sentence(
    call: Call, talker: Path, task_folder: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    given = (each.format(folder=task_folder) for each in arguments)
    done = call("eval", "--model_dir", str(talker), *given)
    assert done.code == 2 and sentence.format(folder=task_folder) in words(done.err)


def test_lm_eval_is_an_extra(call: Call, talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "slipstream.bench.lm_eval", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = call("eval", "--model_dir", str(talker), "--tasks", "capitals")
    assert done.code == 2
    assert words(done.err) == "error: --tasks needs lm_eval; install it with: pip install 'slipstream[eval]'."
