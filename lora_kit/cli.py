"""The command `lora-kit`: each verb is a public function's signature and docstring, nothing more.

An argument without a default becomes a positional one, the others become options; the help is the docstring's.
Sequences are given with commas (`--methods lora,prefix`), a method's own options as `--options rank=32,dropout=0.1`.
Arguments that only a program can give (callbacks, a tokenizer object) are left out.
"""

import ast
import inspect
import sys
from collections.abc import Callable
from typing import Annotated, Any

from lora_kit import __version__, compare, finetune, merge
from lora_kit.errors import LoraKitError, OptionError
from lora_kit.memory.menu import menu
from lora_kit.storage.inspection import inspect as inspect_folder
from lora_kit.training.preflight import preflight

VERBS: dict[str, Callable[..., Any]] = {
    "compare": compare,
    "finetune": finetune,
    "verify": preflight,
    "merge": merge,
    "plan": menu,
    "inspect": inspect_folder,
}

# Arguments that take objects, which no command line can spell
_PROGRAM_ONLY = ("callbacks", "tokenizer", "training_arguments", "model_kwargs")


def main() -> None:
    """Entry point: run the verb, and end with one line on an error raised on purpose."""
    try:
        import typer
    except ImportError:
        sys.exit("lora-kit needs the package typer: pip install 'lora_kit[train]'")
    application = typer.Typer(
        name="lora-kit",
        help="Fine-tune language models by LoRA, prefix tuning or in full, on a 16-, 8- or 4-bit base.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @application.callback(invoke_without_command=True)
    def version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
        if version:
            typer.echo(f"lora_kit {__version__}")
            raise typer.Exit

    for name, function in VERBS.items():
        summary = _summary(function)
        application.command(name, help=summary, short_help=summary.splitlines()[0])(_command(function))
    try:
        application()
    except LoraKitError as error:
        sys.exit(f"lora-kit: {error}")


def _command(function: Callable[..., Any]) -> Callable[..., None]:
    """A function for typer with the same arguments, of types that a command line can give."""
    import typer

    helps = _argument_helps(function)
    parameters, converters = [], {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in _PROGRAM_ONLY:
            continue
        kind, convert = _command_line_type(parameter)
        converters[name] = convert
        required = parameter.default is inspect.Parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        text = helps.get(name, "")
        marker = typer.Argument(help=text, show_default=False) if required else typer.Option(help=text)
        default = parameter.default
        if isinstance(default, tuple):
            default = ",".join(default)
        elif parameter.kind is parameter.VAR_KEYWORD:
            default = None
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if required else default,
                annotation=Annotated[kind, marker],
            )
        )

    def command(**given: Any) -> None:
        arguments = {name: converters[name](value) for name, value in given.items()}
        _show(function(**arguments.pop("options", {}), **arguments))

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # typer reads it
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _command_line_type(parameter: inspect.Parameter) -> tuple[Any, Callable[[Any], Any]]:
    """(type for the command line, what turns its value into the function's)."""
    if parameter.kind is parameter.VAR_KEYWORD:
        return str | None, _options
    if isinstance(parameter.default, tuple):
        return str, lambda text: tuple(part.strip() for part in text.split(",") if part.strip())
    if isinstance(parameter.default, bool):
        return bool, _same
    annotation = str(parameter.annotation)
    for word, kind in (("int", int), ("float", float)):
        if parameter.annotation is kind:
            return kind, _same
        if word in annotation and "str" not in annotation:
            return kind | None, _same
    return (str if parameter.annotation is str else str | None), _same


def _same(value: Any) -> Any:
    return value


def _options(text: str | None) -> dict[str, Any]:
    """`"rank=32,dropout=0.1"` as keywords."""
    found = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        name, equals, value = part.partition("=")
        if not equals:
            raise OptionError(f"--options has {part!r}; needed is name=value, such as rank=32,dropout=0.1.")
        try:
            found[name.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            found[name.strip()] = value.strip()
    return found


def _show(result: Any) -> None:
    """Print what a verb returned; a run that did not finish, or a check that failed, ends with exit code 1."""
    from lora_kit.checks.report import Report
    from lora_kit.comparison.matrix import Comparison

    if not isinstance(result, Comparison):
        print(result)
        if isinstance(result, Report) and not result.ok:
            sys.exit(1)
        return
    from rich.console import Console

    from lora_kit.comparison import report

    console = Console()
    report.terminal(result.rows, console)
    files = sorted(file.name for file in result.folder.iterdir() if file.is_file())
    console.print(f"\nIn {result.folder}: {', '.join(files)}", highlight=False, soft_wrap=True)
    if report.failures(result.rows):
        sys.exit(1)


def _summary(function: Callable[..., Any]) -> str:
    """The docstring up to its sections, without the line about arguments."""
    text = inspect.getdoc(function) or ""
    return text.partition("\nArgs:")[0].strip()


def _argument_helps(function: Callable[..., Any]) -> dict[str, str]:
    """Name → text, from the docstring's section `Args:`."""
    section = (inspect.getdoc(function) or "").partition("\nArgs:\n")[2]
    helps: dict[str, str] = {}
    current = ""
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break  # the next section
        if line.startswith("    ") and not line.startswith("     "):
            current, _, text = line.strip().partition(":")
            helps[current] = text.strip()
        elif line.strip():
            helps[current] += " " + line.strip()
    return {name: text.replace("`", "") for name, text in helps.items()}


if __name__ == "__main__":
    main()
