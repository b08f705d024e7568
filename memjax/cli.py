"""The command line: parse, call, print.

Exit status: 0 done; 1 the work failed; 2 a mistake in the config, the arguments or the files, in
one line; 75 stopped by SIGTERM after saving (run the same command again); 76 another process of
the run was lost (start all of them again); 130 stopped by Ctrl-C.
"""

import difflib
import json
import logging
import os
import signal
import sys
import threading
import traceback

from memjax import __version__
from memjax.commands import COMMANDS
from memjax.commands.base import make_parser, refuse_unknown
from memjax.config import ConfigError
from memjax.distributed import leave
from memjax.platform import enable_compilation_cache, restart_with_fast_allocator

INTERRUPTED = 130
AGAIN_S = 0.05


def _overview() -> str:
    lines = [f"memjax {__version__}: train, stress and compare memory architectures", ""]
    lines += ["usage: memjax COMMAND [arguments]; memjax COMMAND --help tells more", ""]
    lines += [f"  {name:<12}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(lines)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(_overview())
        return 0
    if argv[0] in ("--version", "version"):
        print(f"memjax {__version__}")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(COMMANDS)}"
        raise ConfigError(f"{name}: no such command; {hint}")
    parser = make_parser(name, COMMANDS[name])
    args, unknown = parser.parse_known_args(rest)
    known = tuple(flag for action in parser._actions for flag in action.option_strings)
    refuse_unknown([a for a in unknown if a.startswith("-") and not COMMANDS[name].takes(a)], known)
    enable_compilation_cache()
    result = COMMANDS[name].run(args, unknown)
    if args.json:
        print(json.dumps(result))
    else:
        from memjax.tables import show

        show(name, result)
    return 1 if COMMANDS[name].failed(result) else 0


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status; mistakes of the user become one line."""
    from memjax.errors import Stopped, WorkError

    try:
        return _dispatch(sys.argv[1:] if argv is None else argv)
    except Stopped as stop:
        print(f"memjax: {stop}", file=sys.stderr)
        return stop.status
    except WorkError as error:
        print(f"memjax: error: {error}", file=sys.stderr)
        return 1
    except ConfigError as error:
        print(f"memjax: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("memjax: interrupted", file=sys.stderr)
        return INTERRUPTED


def _lost(unraisable: "sys.UnraisableHookArgs") -> None:
    """Python ignores what a finaliser raises, a Ctrl-C that came just then too: send it again."""
    if unraisable.exc_type is KeyboardInterrupt:  # later: this function could do no more than raise
        threading.Timer(AGAIN_S, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(unraisable)


def entry() -> None:
    """The console script."""
    restart_with_fast_allocator()
    sys.unraisablehook = _lost
    # Orbax logs the traceback of an error that it also raises, and that `main` tells in one line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        status = main()
    except Exception:  # a fault of ours: Python would print the same, but wait for other processes
        traceback.print_exc()
        status = 1
    leave(status)
    if status == INTERRUPTED:  # threads of XLA that compile or compute may crash a slow end
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
