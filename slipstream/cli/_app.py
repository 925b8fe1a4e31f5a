"""The typer app around the verbs. Imported by main(), because typer itself costs some 50 ms."""

import inspect
from collections.abc import Iterable
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from slipstream import __version__
from slipstream.cli._arguments import OwnOptions, answer_seed_flags, underscored
from slipstream.cli._errors import plain_errors
from slipstream.cli._seed_flags import help_rows
from slipstream.errors import UsageError


class VerbCommand(TyperCommand):
    """A verb: `-` and `_` are alike in its options, and its errors are sentences.

    The seeds write `--max_output_len`, so that is the spelling in the help; `--max-output-len` works as well.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.context_settings = {**(self.context_settings or {}), "token_normalize_func": _dashes_to_underscores}
        for option in self.params:
            option.opts = [underscored(name) for name in option.opts]
            option.secondary_opts = [underscored(name) for name in option.secondary_opts]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        typed = args = answer_seed_flags(_verb(ctx), args, self._own_options(ctx))
        try:
            return super().parse_args(ctx, list(args))
        except typer.BadParameter as error:
            from_file = [f"--{name}={value}" for name, value in (ctx.default_map or {}).items()]
            sentence = _name_the_value(error, [*from_file, *typed])
            if sentence is None:
                raise
            raise UsageError(sentence) from None

    def _own_options(self, ctx: Any) -> OwnOptions:
        switches, single, repeatable = list[str](), list[str](), list[str]()
        for option in self.get_params(ctx):  # --help is one of them
            if option.param_type_name == "option":
                group = switches if getattr(option, "is_flag", False) else repeatable if option.multiple else single
                group += [*option.opts, *option.secondary_opts]
        return OwnOptions(switches, single, repeatable)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        super().format_options(ctx, formatter)
        if rows := help_rows(_verb(ctx)):
            with formatter.section("Flags of other tools"):
                formatter.write_dl(rows)

    def invoke(self, ctx: Any) -> Any:
        # Inside typer's own handlers, which would turn Ctrl-C and a closed pipe into messages of theirs.
        with plain_errors():
            return super().invoke(ctx)


def _verb(ctx: Any) -> str:
    """ "build", "bench latency"."""
    return str(ctx.command_path.partition(" ")[2])


def make_app(verbs: Iterable[str]) -> typer.Typer:
    """A typer app that knows these verbs; their modules are imported."""
    app = _group("Build, run and serve large language models.")
    app.callback()(_slipstream)
    groups: dict[str, typer.Typer] = {}
    for verb in verbs:
        module = import_module(f"slipstream.cli.{verb.replace(' ', '.').replace('-', '_')}")
        group, _, name = verb.rpartition(" ")
        if group and group not in groups:
            groups[group] = _group(import_module(f"slipstream.cli.{group}").__doc__ or "")
            app.add_typer(groups[group], name=group)
        function = getattr(module, name.replace("-", "_"))
        text, epilog = _split_example(function.__doc__ or "")
        groups.get(group, app).command(name, cls=VerbCommand, help=text, epilog=epilog)(function)
    return app


def _group(text: str) -> typer.Typer:
    app = typer.Typer(
        help=text,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(lambda: None)  # else typer would make a lone verb the group itself
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"slipstream {__version__}")
        raise typer.Exit()


def _slipstream(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """The options that stand before a verb."""


def _split_example(docstring: str) -> tuple[str, str | None]:
    """Help text and epilog: the docstring's "Example:" goes below the options, its lines kept as they are."""
    text, found, example = inspect.cleandoc(docstring).partition("Example:")
    return text.strip(), f"\b\nExample:{example.rstrip()}" if found else None


def _name_the_value(error: Any, typed: list[str]) -> str | None:
    """A sentence with the value in it, which typer's "Input should be a valid integer, …" lacks; None for others."""
    what, found, rule = error.message.partition("Input should be ")
    if not found or what or error.param is None:
        return None
    names = error.param.opts
    for argument, following in reversed([*zip(typed, [*typed[1:], ""], strict=True)]):  # the last one counts
        name, is_joined, value = argument.partition("=")
        if underscored(name) in names:
            rule = rule.partition(",")[0].removesuffix(".")
            return f"{names[0]} is {value if is_joined else following}; it must be {rule}."
    return None


def _dashes_to_underscores(name: str) -> str:
    return name.replace("-", "_")
