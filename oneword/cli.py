"""The command `oneword`: learn, evaluate, serve, deploy, status, top, generate, jobs, concepts, ...

Only the command that was asked for is imported: a client needs neither PyTorch nor ONNX Runtime.
"""

import argparse
import importlib
import importlib.metadata
import logging
import sys
from collections.abc import Sequence
from types import ModuleType

from engine.errors import OneWordError
from engine.operations.log_lines import LineFormatter
from engine.printing import printable

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130

# Command -> (module with `add_arguments(parser)` and `run(arguments) -> exit code`, summary).
COMMANDS = {
    "learn": ("trainer.cli", "learn a word from a folder of images"),
    "evaluate": ("trainer.evaluate_cli", "measure how faithful and editable learned words are"),
    "serve": ("oneword.serve", "serve a bundle over gRPC"),
    "deploy": ("oneword.deploy", "put another bundle in service while a server serves"),
    "status": ("oneword.status", "say whether a server serves, what it is and how busy"),
    "top": ("oneword.top", "watch what a server does"),
    "generate": ("oneword.generate", "draw images, from a server or in this process"),
    "jobs": ("oneword.jobs", "have a server draw images later: submit, watch, get, cancel"),
    "trainings": ("oneword.trainings", "have a server learn words: create, watch, list, cancel"),
    "concepts": ("oneword.concepts", "import, list, show, export, alias, delete learned words"),
    "tokens": ("oneword.tokens", "say who may call a server: create, list and revoke tokens"),
    "pack": ("oneword.pack", "pack a bundle and its words for a device, signed and checked"),
    "prepare": ("oneword.prepare", "make a bundle load in a fraction of the time on this machine"),
    "keys": ("oneword.keys", "make keys that sign bundles, sign and verify"),
    "doctor": ("oneword.doctor", "say what of this machine works, and what would mend the rest"),
    "demo": ("oneword.demo", "teach the embedded model a word, serve it, draw a contact sheet"),
}


class ExtraMissing(OneWordError):
    """A command needs packages of an extra that is not installed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; an expected failure is one line on stderr and exit code 1."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _log_to_stderr()
    try:
        parsed = _parser(arguments[0] if arguments else "").parse_args(arguments)
        return parsed.run(parsed)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_FAILED
    except (OneWordError, OSError) as error:
        print(f"oneword: {printable(error)}", file=sys.stderr)
        return EXIT_FAILED


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler])


def _parser(command: str) -> argparse.ArgumentParser:
    """The parser with the arguments of `command`; of the others it knows the names."""
    parser = argparse.ArgumentParser(
        prog="oneword",
        description="Teach a text-to-image model a new word from a few images, and serve it.",
    )
    version = f"oneword {importlib.metadata.version('oneword')}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (module_name, summary) in COMMANDS.items():
        description = f"{summary[0].upper()}{summary[1:]}."
        subparser = commands.add_parser(name, help=summary, description=description)
        if name == command:
            module = _import(module_name)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser


def _import(module_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name in ("torch", "diffusers", "transformers"):
            raise ExtraMissing(
                f"this command needs {error.name}; install it with: pip install 'oneword[train]'"
            ) from error
        raise
