"""What all commands share: settings, output, and the choice between the daemon and working in this process."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from p2pnode import config as configuration
from p2pnode.cli import display, interrupts, text
from p2pnode.cli.client import Daemon
from p2pnode.config import Config
from p2pnode.errors import UsageError
from p2pnode.failures import Failure
from p2pnode.home import Home, lock
from p2pnode.progress import Report

if TYPE_CHECKING:
    from p2pnode.node import Node
    from p2pnode.store import Store

T = TypeVar("T")
Result = dict[str, Any]
EXIT_BROKEN_PIPE = 141  # as a process has that SIGPIPE killed
ANY_PORT = ("/ip4/0.0.0.0/tcp/0",)


class OutputClosed(Exception):
    """Nobody reads stdout any more."""


@dataclass
class App:
    """The global options, and what follows from them."""

    home: Path | None = None
    as_json: bool = False
    quiet: bool = False
    log_level: str | None = None

    def load(self, **overrides: object) -> Config:
        """The settings, with a command's own options on top; empty ones count as not given."""
        given = {key: value for key, value in overrides.items() if value not in (None, ())}
        config = configuration.load(self.home, {"log_level": self.log_level, **given}, os.environ)
        self.log_level = config.log_level
        return config

    def emit(self, result: Result, human: Callable[[Result], str]) -> None:
        """Print one result to stdout."""
        write(json.dumps(result, ensure_ascii=True) if self.as_json else human(result))

    def emit_all(self, results: Iterable[Result], human: Callable[[list[Result]], str]) -> None:
        """Print a list: with --json one object per line, else one text made of all."""
        rows = list(results)
        if not self.as_json:
            write(human(rows))
        else:
            for row in rows:
                write(json.dumps(row, ensure_ascii=True))

    def fail(self, failure: Failure) -> None:
        """Tell the user, or the script, why it did not work."""
        if self.as_json:
            write(json.dumps(failure.to_dict(), ensure_ascii=True))
        else:
            with suppress(OSError, ValueError):
                print(f"p2pnode: {text.safe(failure.message)}", file=sys.stderr, flush=True)

    def ask(
        self, config: Config, operation: str, args: Mapping[str, Any], embedded: Callable[[Store, Report], list[Result]]
    ) -> list[Result]:
        """Have `operation` done by the daemon if there is one, else by `embedded` on the store of this home."""
        with display.progress(self.quiet) as report:
            daemon = Daemon.connect(Home(config.home).control_socket)
            if daemon is not None:
                return list(daemon.call(operation, args, report))
            start_logging(config)
            with lock(config.home):
                from p2pnode.store import Store

                with Store.open(config.home) as store:
                    return embedded(store, report)

    def daemon(self, config: Config, **own: object) -> Daemon | None:
        """The daemon of this home, if one runs; then the node options in `own` must not have been given."""
        daemon = Daemon.connect(Home(config.home).control_socket)
        if daemon is not None:
            for option, value in own.items():
                if value not in (None, (), True):
                    raise UsageError(
                        f"a daemon is running on {config.home} and has its own --{option.replace('_', '-')}; leave the "
                        "option out, or give another --home"
                    )
        return daemon

    def run_node(self, config: Config, command: Callable[[Node], Awaitable[T]], *, serving: bool) -> T:
        """Run a node in this process for as long as `command` takes.

        `serving`: other commands on this home may use the node meanwhile, through the control socket. Raises
        `Interrupted` when a signal ended it.
        """
        if serving:
            interrupts.terminate_quietly()
        start_logging(config)
        import trio

        from p2pnode import control
        from p2pnode.node import Node

        async def main() -> T:
            token = trio.lowlevel.current_trio_token()
            scope = trio.CancelScope()

            def stop() -> None:  # called by a signal handler, between any two lines
                token.run_sync_soon(scope.cancel)

            with interrupts.winding_down(stop, serving=serving), scope:
                async with Node.open(config) as node, trio.open_nursery() as nursery:
                    if serving:
                        await nursery.start(control.serve, Home(config.home).control_socket, node)
                    result = await command(node)
                    nursery.cancel_scope.cancel()
            return result

        return trio.run(main)


def own_port(config: Config) -> Config:
    """For a node that lives as long as its command: any port unless one was asked for; the usual one is a daemon's."""
    return config if "listen" in config.given else replace(config, listen=ANY_PORT)


def write(line: str) -> None:
    """One result to stdout, at once."""
    try:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    except (BrokenPipeError, ValueError, AttributeError):  # closed by the reader, or closed from the start
        raise OutputClosed from None


def start_logging(config: Config) -> None:
    """Log to stderr, one line per record: tracebacks are for --log-level debug."""
    import logging

    class OneLine(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            if config.log_level == "debug":
                return super().format(record)
            line = f"{record.levelname.lower()}: {record.getMessage()}"
            if record.exc_info and record.exc_info[1] is not None:
                line += f": {type(record.exc_info[1]).__name__}: {record.exc_info[1]}"
            return f"p2pnode: {text.safe(line)}"

    handler = logging.StreamHandler()
    handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler], force=True)


def absolute(path: str) -> str:
    """As the daemon, which has another working directory, must hear it. Links are kept: they may be what is meant."""
    return os.path.abspath(path)


pass_app = click.make_pass_decorator(App, ensure=True)
