"""The commands together: global options, and what every way of failing looks like."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import click

from p2pnode import __version__
from p2pnode.cli import interrupts
from p2pnode.cli.app import EXIT_BROKEN_PIPE, App, OutputClosed
from p2pnode.cli.cache import cache
from p2pnode.cli.doctor import doctor
from p2pnode.cli.fetch import fetch
from p2pnode.cli.images import images
from p2pnode.cli.mirror import mirror
from p2pnode.cli.peers import peers
from p2pnode.cli.pin import pin, unpin
from p2pnode.cli.provide import provide
from p2pnode.cli.rm import rm
from p2pnode.cli.run import run
from p2pnode.cli.show import show
from p2pnode.cli.status import status
from p2pnode.cli.verify import verify
from p2pnode.config import LOG_LEVELS
from p2pnode.errors import EXIT_USAGE
from p2pnode.failures import Failure, describe, most_telling


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 2 usage, 3 not found, 4 not verified, 5 disk, 6 network, 7 trust, 130 interrupted.",
)
@click.option("--home", metavar="DIR", envvar="P2PNODE_HOME", help="The node's directory (P2PNODE_HOME).")
@click.option("--json", "as_json", is_flag=True, envvar="P2PNODE_JSON", help="One JSON object per result on stdout.")
@click.option(
    "--log-level", type=click.Choice(LOG_LEVELS, case_sensitive=False), help="How much to log to stderr (warning)."
)
@click.option("-q", "--quiet", is_flag=True, envvar="P2PNODE_QUIET", help="No progress.")
@click.version_option(__version__, prog_name="p2pnode")
@click.pass_obj
def cli(app: App, home: str | None, as_json: bool, log_level: str | None, quiet: bool) -> None:
    """Share and get Nix-built VM images, peer to peer: chunked, verified, never fetched twice.

    \b
    Examples:
      p2pnode provide disk.img                  prints a link, and serves until Ctrl-C
      p2pnode fetch 'p2pnode:...' -o disk.img   on another machine: gets it
      p2pnode run                               the node of this machine, for all its images
    """
    app.home = Path(home) if home else None
    app.as_json = as_json
    app.quiet = quiet
    app.log_level = log_level


for command in (run, provide, cache, fetch, mirror, images, show, verify, pin, unpin, rm, status, peers, doctor):
    cli.add_command(command)


def execute(arguments: Sequence[str]) -> int:
    """Run one command line; its exit code."""
    # What --json asks for also goes for errors that are found before click has read it.
    app = App(as_json="--json" in _global_options(arguments))
    try:
        return _execute(app, arguments)
    except OutputClosed:
        _close_stdout()
        return EXIT_BROKEN_PIPE


def _execute(app: App, arguments: Sequence[str]) -> int:
    try:
        outcome = cli.main(list(arguments), prog_name="p2pnode", standalone_mode=False, obj=app)
        return outcome if isinstance(outcome, int) else 0
    except click.exceptions.NoArgsIsHelpError as exc:
        click.echo(exc.ctx.get_help() if exc.ctx else "", err=True)
        return EXIT_USAGE
    except click.ClickException as exc:
        hint = f" (see p2pnode {_command(exc)}--help)" if isinstance(exc, click.UsageError) else ""
        message = " ".join(exc.format_message().split()).rstrip(".")
        app.fail(Failure("UsageError", message + hint, EXIT_USAGE))
        return EXIT_USAGE
    except (OutputClosed, BrokenPipeError) as exc:
        raise OutputClosed from exc
    except (KeyboardInterrupt, click.Abort):
        return interrupts.EXIT_INTERRUPTED
    except interrupts.Interrupted as exc:
        return exc.exit_code
    except BaseException as exc:
        if isinstance(exc, SystemExit):
            raise
        return _failed(app, exc)


def _failed(app: App, exc: BaseException) -> int:
    leaf = most_telling(exc)
    if isinstance(leaf, OutputClosed):
        raise OutputClosed from exc
    failure = describe(exc)
    if app.log_level == "debug":
        import traceback

        traceback.print_exception(exc)
    elif failure.internal:
        failure = Failure(
            failure.error,
            f"{failure.message} (--log-level debug shows where)",
            failure.exit_code,
            internal=True,
        )
    app.fail(failure)
    return failure.exit_code


def _global_options(arguments: Sequence[str]) -> list[str]:
    """The arguments before the command, or before the first thing that is no option."""
    found = []
    skip = False
    for argument in arguments:
        if not (skip or argument.startswith("-")):
            break
        skip = not skip and argument in ("--home", "--log-level")
        found.append(argument)
    return found


def _command(exc: click.UsageError | click.ClickException) -> str:
    context = getattr(exc, "ctx", None)
    if context is None or context.parent is None:
        return ""
    return f"{context.command_path.partition(' ')[2]} "  # `cache publish`


def _close_stdout() -> None:
    """Keep the interpreter from flushing what nobody reads, which would print an error."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
