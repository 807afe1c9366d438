"""The command line's entry.  In: argv.  Out: a subcommand's work and a meaningful exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from contextlib import suppress
from importlib import import_module
from types import FrameType, ModuleType
from typing import Any

import click

from zinfer import __version__
from zinfer.errors import MachineError, ZinferError

COMMANDS = {
    "generate": ("zinfer.cli.generate", "Generate text from prompts, under a memory budget."),
    "run-batch": ("zinfer.cli.run_batch", "Answer a file of requests; interrupted, it goes on where it was."),
    "score": ("zinfer.cli.score", "Say how likely given text is after a prompt."),
    "classify": ("zinfer.cli.classify", "Label texts with an encoder, under a memory budget."),
    "embed": ("zinfer.cli.embed", "Turn texts into vectors with an encoder."),
    "serve": ("zinfer.cli.serve", "Answer requests over HTTP with an encoder or a group of students."),
    "distill": ("zinfer.cli.distill", "Distil an encoder into a group of shallow students."),
    "plan": ("zinfer.cli.plan", "Say where a model would live and how fast it would run."),
    "shard": ("zinfer.cli.store", "Write a model as an aligned, checksummed store."),
    "verify": ("zinfer.cli.store", "Check every block of a store against its checksum."),
    "inspect": ("zinfer.cli.store", "Describe a checkpoint or store."),
    "doctor": ("zinfer.cli.doctor", "Measure this machine and save the profile that plans use."),
    "bench": ("zinfer.cli.bench", "Measure throughput or latency under a memory budget."),
    "trace": ("zinfer.cli.trace", "Draw a trace that `generate --trace` wrote."),
}


class LazyGroup(click.Group):
    """Subcommands are imported when called: `zinfer --help` imports no engine."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All subcommands, in the order of a first session."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module that holds the subcommand."""
        if cmd_name not in COMMANDS:
            return None
        module = _whole_import(COMMANDS[cmd_name][0])
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Nobody reads on (`| head -1`): the end, and no error.  Raises MachineError ZI-5932 for a full output."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            _close_output()
            return 0
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            _close_output()
            raise MachineError(
                "ZI-5932", f"the output cannot be written: {error.strerror}", remedy="df -h   # make room"
            ) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List names and one line each without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="zinfer")
@click.option("-v", "--verbose", count=True, help="Say more; twice also shows tracebacks.")
@click.pass_context
def cli(ctx: click.Context, verbose: int) -> None:
    """Run models larger than the memory they are given.

    Sizes: 20GiB and 20G are binary, 20GB is decimal, 80% is of this machine's (or container's) memory.
    """
    from zinfer.log import log_to_stderr

    ctx.obj = verbose
    log_to_stderr(verbose)


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit: 0 ok, 1 bug, 2 usage, 3 model, 4 resource, 5 environment, 6 integrity,
    7 partial success, 130 interrupted."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> int:
    """The exit code of one invocation; every error is one message on stderr."""
    is_verbose = "-vv" in argv or argv.count("-v") + argv.count("--verbose") >= 2
    try:
        result: Any = cli.main(args=argv, prog_name="zinfer", standalone_mode=False)
    except ZinferError as error:
        _show(error, is_verbose)
        return error.exit_code
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted: nothing half-written is left; run the same command to go on", err=True)
        return 130
    except Exception as error:
        click.echo(f"error ZI-0001  a bug in zinfer: {type(error).__name__}: {error}", err=True)
        click.echo("  try: the same command with -vv, and report what it prints", err=True)
        if is_verbose:
            traceback.print_exc()
        return 1
    return result if isinstance(result, int) else 0


def _whole_import(name: str) -> ModuleType:
    """Import a module; Ctrl-C meanwhile is raised afterwards, a second one at once.

    What initialises libraries (torch takes a second) swallows errors now and then, and with them the interruption.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return import_module(name)  # somebody else's way of being interrupted
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if came:
            signal.default_int_handler(number, frame)
        came.append(number)

    try:
        signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread, which alone is interrupted
        return import_module(name)
    try:
        module = import_module(name)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt
    return module


def _close_output() -> None:
    """What is still in its buffer would fail again when the interpreter ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show(error: ZinferError, is_verbose: bool) -> None:
    click.echo(f"error {error}", err=True)
    if is_verbose:
        traceback.print_exception(error)
