"""`oneword status`: one screen about a server, and whether it serves."""

import argparse

from google.protobuf.json_format import MessageToJson

from engine.client import Client
from oneword import connection
from oneword.load_display import is_serving, status_lines

EXIT_SERVING = 0
EXIT_NOT_SERVING = 1
_TIMEOUT_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Say what a server is and how it is. Exit code 0: it serves; 1: it does not, or is not "
        "there."
    )
    add_server(parser)
    parser.add_argument("--json", action="store_true", help="all that it says, for programs")


def add_server(parser: argparse.ArgumentParser) -> None:
    connection.add_server_arguments(parser)
    parser.add_argument(
        "--timeout-s", type=float, default=_TIMEOUT_S, help="for its answer (default: %(default)s)"
    )


def connect(arguments: argparse.Namespace) -> Client:
    return connection.connect(arguments, timeout_s=arguments.timeout_s)


def run(arguments: argparse.Namespace) -> int:
    """Ask once; a server that is not there is an error of the client, and exit code 1 too."""
    with connect(arguments) as client:
        info = client.server_info()
    if arguments.json:
        print(MessageToJson(info, always_print_fields_with_no_presence=True, sort_keys=True))
    else:
        print("\n".join(status_lines(info, arguments.server)))
    return EXIT_SERVING if is_serving(info) else EXIT_NOT_SERVING
