"""The command line: ``instar train | evaluate | compare | report | explain | data``."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence

import instar
from instar.errors import UserError, unknown

COMMANDS = {
    "train": "train a robust classifier; writes a run folder",
    "evaluate": "measure robustness of a run or of any weights",
    "sweep": "train and evaluate many runs, and write one table",
    "compare": "tell whether runs differ: paired tests, intervals, classes, images won and lost",
    "bench": "time training steps on this machine, beside the published codes' style",
    "doctor": "look at a model, the machine or a recipe before the work begins",
    "export": "write a trained network as weights, ONNX or a hub folder",
    "analyse": "see why: vulnerability, class pairs, geometry, curvature, overfitting",
    "report": "one page with everything: numbers, curves, analyses, images",
    "explain": "equations, source, cost and expression of a recipe",
    "data": "list, get and check data sets",
}

USAGE = f"""\
Instar {instar.__version__}: instance-adaptive adversarial training, and honest measurement.

usage: instar COMMAND [...]

{"".join(f"  {name:<10} {what}{chr(10)}" for name, what in COMMANDS.items())}
instar COMMAND --help tells more. First steps:
  instar train gairat --data digits --out runs/first
  instar evaluate runs/first --suite quick
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Words of the command line without the program's name; None takes the process's own.

    Returns:
        The exit status: 0 for success, 2 for a mistake of the user (one line on standard error), 1 for a check that
        failed, 128 + signal after an interruption.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "" not in sys.path:  # `--model package.module:function` means the user's code, found from where they stand
        sys.path.insert(0, "")
    warnings.showwarning = _warn  # type: ignore[assignment]  # it takes whatever showwarning is given
    try:
        return _dispatch(words)
    except UserError as error:
        _complain(error)
        return 2
    except KeyboardInterrupt:
        _complain("interrupted; nothing that was saved is lost")
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `instar ... | head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno is None:
            raise
        _complain(f"{error.strerror}: {error.filename or 'the disk'}; nothing that was saved is lost")
        return 2
    except (MemoryError, RuntimeError) as error:
        from instar.room import is_out_of_memory  # a command that came so far has imported torch

        if not is_out_of_memory(error):
            raise
        _complain("out of memory; nothing that was saved is lost. Lower the batch size, or take a larger machine")
        return 2


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if words[0] in ("--version", "-V", "version"):
        print(f"instar {instar.__version__}")
        return 0
    if words[0] not in COMMANDS:
        raise unknown("command", words[0], COMMANDS)
    command = importlib.import_module(f"instar.cli.{words[0]}")
    status: int = command.run(words[1:])
    return status


def _complain(error: object) -> None:
    print("instar: " + " ".join(str(error).split()), file=sys.stderr)


def _warn(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
    """Warnings of ours are one line; those of libraries do not concern the user of a command."""
    if issubclass(category, UserWarning) and os.sep + "instar" + os.sep in filename:
        print(f"instar: note: {message}", file=sys.stderr)
