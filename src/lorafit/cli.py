"""The command ``lorafit``: which commands there are, and how each way of ending becomes a line and an exit code.

A command's module is imported when that command runs (or its help is asked for), so that ``lorafit --help`` needs
nothing of torch. Exit codes: 0 done, 2 something the user can mend, 1 something of ours, 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, TextIO

from cyclopts import App, CycloptsError, Parameter
from cyclopts.completion import ShellDetectionError
from cyclopts.config import Dict
from cyclopts.exceptions import MissingArgumentError, UnusedCliTokensError

from lorafit import __version__
from lorafit.config import read_settings
from lorafit.errors import ConfigError, LorafitError, LorafitWarning, MissingFileError

INTERRUPTED = 130

# Of two settings that exclude each other, one on the command line removes the other from the file.
_EXCLUDES = {"steps": "epochs", "epochs": "steps", "no_eval": "eval_data", "eval_data": "no_eval"}


def fill_from_settings(app: App, commands: tuple[str, ...], arguments: Any) -> None:
    """Gives the options of ``train`` that the command line left open the values of ``--config`` or of ``--resume``.

    Args:
        app: The command being parsed.
        commands: Its name.
        arguments: cyclopts' arguments; those that the command line set already have tokens and are left alone.
    """
    given = {argument.name: argument.tokens[0].value for argument in arguments if argument.tokens}
    if "--config" in given and "--resume" in given:
        raise ConfigError("--resume takes the settings of its run; leave out --config")
    if "--resume" in given:
        path = os.path.join(given["--resume"], "config.yaml")
        if not os.path.isfile(path):
            raise MissingFileError(f"{given['--resume']} is not a run: it has no config.yaml")
    elif "--config" in given:
        path = given["--config"]
    else:
        return
    settings = read_settings(path)
    for name, other in _EXCLUDES.items():
        if "--" + name.replace("_", "-") in given:
            settings.pop(other, None)
    Dict(data=settings, source=path, use_commands_as_keys=False)(app, commands, arguments)


# In the order of use, which is also the order of the help.
_COMMANDS = {
    "train": "Train an adapter on a model and a file of examples.",
    "preview": "Show which tokens would be trained, how long the rows are, and what would be cut.",
    "evaluate": "Measure a model on a file of examples; for a run, base against tuned.",
    "generate": "Answer one prompt.",
    "chat": "Talk with a model or a run.",
    "merge": "Write the tuned model as one GGUF file or a directory of safetensors, with a certificate of what it is.",
    "export": "Write a model in a form that other tools read, with a certificate of what it is.",
    "adapters": "List, show, compare and combine adapters.",
    "bench": "Measure what this machine does with a model, and how close to its limit.",
    "pull": "Fetch an embedded model into the cache.",
}

app = App(
    name="lorafit",
    help="Fine-tune a 4-bit GGUF as it lies in the file, and get a 4-bit GGUF back.",
    help_epilogue="Every command takes --debug, which shows the traceback of an error.",
    version=__version__,
    config=fill_from_settings,
    # A switch that is off needs no "[default: False]".
    default_parameter=Parameter(
        negative=(), show_default=lambda value: None if value is None or value is False else str(value)
    ),
    result_action="return_value",
    exit_on_error=False,
    print_error=False,
    suppress_keyboard_interrupt=False,
)
for _order, (_name, _help) in enumerate(_COMMANDS.items()):
    app.command(f"lorafit.commands.{_name}:{_name}_command", name=_name, help=_help, sort_key=_order)
app.register_install_completion_command(help="Install completion for your shell and exit.", group="Options")
for _flag in ("--help", "--version"):
    app[_flag].group = "Options"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line.

    Args:
        arguments: The words after ``lorafit``; by default those of this process.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    # After "--" stand values, never options.
    options = words[: words.index("--")] if "--" in words else words
    debug = "--debug" in options
    if debug:
        words.remove("--debug")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            app(words)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        code, message = INTERRUPTED, "interrupted"
    except BrokenPipeError:
        # Whoever read our output has gone. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        code, message = _explain(error)
        if debug:
            traceback.print_exc()
    print(message, file=sys.stderr)
    return code


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Ours in one line for the user, others with the place in the code that they come from; see ``warnings``."""
    where = "" if issubclass(category, LorafitWarning) else f"{filename}:{lineno}: {category.__name__}: "
    print(f"warning: {where}{message}", file=file or sys.stderr)


def _explain(error: Exception) -> tuple[int, str]:
    """The exit code and the one line for an error."""
    if isinstance(error, CycloptsError):
        return 2, f"error: {_parse_error(error)}"
    if isinstance(error, ShellDetectionError):
        return 2, "error: cannot tell which shell this is; name it, as in `lorafit --install-completion --shell bash`"
    if isinstance(error, LorafitError):
        return error.exit_code, f"error: {_one_line(error)}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = error.filename or "the disk that was written to"
        return 2, f"error: no space left on {where}; free some and run this again"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return 2, f"error: {error.filename}: {error.strerror}"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return 1, "error: not enough memory; a shorter --max-length and a smaller --pass-tokens need less"
    return 1, (
        f"internal error: {type(error).__name__}: {_one_line(error)}; "
        "run this again with --debug to see where, and please report it"
    )


def _parse_error(error: CycloptsError) -> str:
    """What is wrong with the command line, and where to look."""
    command = " ".join(["lorafit", *(error.command_chain or ())])
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        name = error.argument.name
        if error.argument.tokens or error.argument.index is None:
            text = f"{name} needs a value"
        else:
            text = f"{name.lstrip('-').upper()} is missing"
    elif isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        text = f"unexpected argument {error.unused_tokens[0]!r}"
    else:
        text = _one_line(error).rstrip(".")
    return f"{text} (see `{command} --help`)"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
