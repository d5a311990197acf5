"""The command `vattention`: what it knows, and what becomes of errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError

from vattention.errors import VAttentionError

USER_ERROR = 2
"""Exit status where the user can put it right: a wrong option, a model that cannot be served, too little memory."""


def create_app() -> App:
    """The command line. A command is imported when it is called, so that help waits for nobody's imports."""
    app = App(
        name="vattention",
        help="Serve language models from a KV cache that is contiguous in virtual memory.",
        version_flags=["--version"],
        help_format="plaintext",
        suppress_keyboard_interrupt=False,
    )
    bench = App(name="bench", help="Measure the engine.")
    for parent, target, text in (
        (app, "serve:serve", "Serve a model over HTTP with OpenAI's API."),
        (app, "generate:generate", "Complete prompts, and write one line of JSON for each."),
        (app, "chat:chat", "Chat with a model in the terminal."),
        (app, "info:info", "Show what this machine can do."),
        (app, "numerics:numerics", "Measure how exact this machine's attention kernels are."),
        (bench, "bench:throughput", "Measure offline throughput: all requests at once."),
        (bench, "bench:memory", "Compare memory managers: what share of the KV cache holds tokens."),
    ):
        parent.command(f"vattention.cli.{target}", help=text)
    app.command(bench)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        arguments: without the program's name; by default this process's.
    """
    try:
        create_app()(arguments, print_error=False, exit_on_error=False, result_action="return_value")
    except (CycloptsError, VAttentionError) as error:
        print(f"vattention: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output is gone (`| head`): nothing to tell anybody, nor anything left to flush to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0
