"""Every verb's options, recorded in cli_options.json; and how the command line behaves whatever the verb.

After a change that is meant:  SLIPSTREAM_RECORD=1 pytest tests/surface/test_cli_options.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

import slipstream
import slipstream.cli
from slipstream.cli._app import make_app

RECORD = Path(__file__).with_name("cli_options.json")

GREET = '''
from pathlib import Path
from typing import Annotated
import typer
from slipstream.errors import UsageError


def greet(
    max_output_len: Annotated[int, typer.Option("--max-output-len", "-n", help="Tokens at most.")] = 20,
    input_text: Annotated[list[str] | None, typer.Option(help="Text.")] = None,
    streaming: Annotated[bool, typer.Option(help="As they come.")] = False,
    rest: Annotated[list[str] | None, typer.Argument(help="More.")] = None,
) -> None:
    """Greet somebody.

    Example:
        slipstream greet --input_text "[hello]" \\\\
            --max_output_len 3
    """
    print(max_output_len, input_text, streaming, rest, flush=True)
    if max_output_len == 99:
        raise UsageError("--max_output_len is 99;\\nat most 98 fit.")
    if max_output_len == 98:
        raise KeyboardInterrupt
    if max_output_len == 97:
        for number in range(100_000):
            print(number)
'''


def options_of(verb: str) -> list[str]:
    """One string an option: "--streaming/--no_streaming", "--top_k -k"; arguments by name."""
    command: Any = typer.main.get_command(make_app([verb]))
    for name in verb.split():
        command = command.commands[name]
    named = (" ".join(p.opts) + "".join(f"/{name}" for name in p.secondary_opts) for p in command.params)
    return sorted(named)


def test_the_options_are_the_recorded_ones() -> None:
    options = {verb: options_of(verb) for verb in slipstream.cli.verbs()}
    if os.environ.get("SLIPSTREAM_RECORD"):
        RECORD.write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    assert options == recorded, "meant so? Then record it: the command is at the top of this file."


def test_every_verb_helps_with_an_example() -> None:
    for verb in slipstream.cli.verbs():
        result = CliRunner().invoke(make_app([verb]), [*verb.split(), "--help"])
        assert result.exit_code == 0, verb
        assert "Example:" in result.output, f"the docstring of slipstream/cli/{verb}.py needs an Example:"
        assert f"slipstream {verb}" in result.output.partition("Example:")[2], verb


# From here on with a verb of the test's own, put beside the real ones.


@pytest.fixture
def slipstream_command(tmp_path: Path) -> list[str]:
    """The command line as a subprocess, with `greet` among its verbs."""
    (tmp_path / "greet.py").write_text(GREET, encoding="utf-8")
    return [
        sys.executable,
        "-c",
        f"import slipstream.cli as c; c.__path__.append({str(tmp_path)!r}); c.main()",
    ]


def run(command: list[str], *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "100", **environment},
    )


def test_dash_and_underscore_are_alike_in_names_and_untouched_in_values(slipstream_command: list[str]) -> None:
    for name in ("max_output_len", "max-output-len", "max_output-len"):
        done = run(
            slipstream_command, "greet", f"--{name}", "3", "--input-text=--a-b_c", "--no-streaming", "--", "--d-e_f"
        )
        assert done.stdout == "3 ['--a-b_c'] False ['--d-e_f']\n", done.stderr


def test_help_shows_the_underscored_names_and_the_example_line_by_line(slipstream_command: list[str]) -> None:
    done = run(slipstream_command, "greet", "--help")
    assert "--max_output_len" in done.stdout
    assert "--streaming / --no_streaming" in done.stdout
    assert 'slipstream greet --input_text "[hello]" \\\n' in done.stdout
    assert "greet" in run(slipstream_command, "--help").stdout


def test_an_error_of_ours_is_one_sentence_and_exit_code_2(slipstream_command: list[str]) -> None:
    done = run(slipstream_command, "greet", "-n", "99")
    assert (done.returncode, done.stderr) == (2, "error: --max_output_len is 99; at most 98 fit.\n")
    done = run(slipstream_command, "greet", "-n", "99", SLIPSTREAM_DEBUG="1")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_an_unknown_option_names_the_nearest_one(slipstream_command: list[str]) -> None:
    done = run(slipstream_command, "greet", "--max_output_lne", "3")
    assert done.returncode == 2
    assert "--max_output_len" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_verb_names_the_nearest_one(slipstream_command: list[str]) -> None:
    done = run(slipstream_command, "gret")
    assert done.returncode == 2
    assert "greet" in done.stderr


def test_interrupts_and_closed_pipes_are_quiet(slipstream_command: list[str]) -> None:
    done = run(slipstream_command, "greet", "-n", "98")
    assert (done.returncode, done.stderr) == (130, "")
    with subprocess.Popen([*slipstream_command, "greet", "-n", "97"], stdout=-1, stderr=-1) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_only_the_verb_that_is_called_is_imported(slipstream_command: list[str], tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise RuntimeError('imported')\n", encoding="utf-8")
    assert run(slipstream_command, "greet").returncode == 0
    assert "imported" in run(slipstream_command, "--help").stderr


def test_version() -> None:
    done = run([sys.executable, "-c", "import slipstream.cli; slipstream.cli.main()"], "--version")
    assert (done.returncode, done.stdout) == (0, f"slipstream {slipstream.__version__}\n")
