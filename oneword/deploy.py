"""`oneword deploy`: another bundle in service on a server that goes on serving."""

import argparse
from datetime import UTC

import grpc

from engine.client import Client, ServerError
from engine.printing import printable
from oneword.connection import add_server_arguments, connect
from protos.oneword.v1.admin_pb2 import Bundle, Deployment

_TIMEOUT_S = 900.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Put another bundle in service while requests run. Without NAME: list what there is. Needs "
        "the scope admin, and a server with --bundle-dir."
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="of a folder in its --bundle-dir")
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=_TIMEOUT_S,
        help="how long to wait; the server goes on all the same (default: %(default)s)",
    )
    add_server_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    with connect(arguments, timeout_s=arguments.timeout_s) as client:
        if arguments.name is None:
            _list(client)
        else:
            _deploy(client, arguments.name)
    return 0


def _deploy(client: Client, name: str) -> None:
    try:
        reply = client.admin.deploy(name)
    except ServerError as error:
        if error.code is not grpc.StatusCode.DEADLINE_EXCEEDED:
            raise
        text = f"{error}; the server goes on with it: `oneword deploy` tells when it is done"
        raise ServerError(error.code, text) from error
    state = "in service" if reply.changed else "in service already"
    model = printable(reply.deployment.model_name)
    print(f"{printable(reply.deployment.bundle_name or name)} ({model}) is {state}")


def _list(client: Client) -> None:
    deployment = client.admin.deployment()
    print(_in_service(deployment))
    for bundle in client.admin.bundles():
        print(_line(bundle, deployment))


def _in_service(deployment: Deployment) -> str:
    since = deployment.start_time.ToDatetime(UTC).astimezone().isoformat(" ", "seconds")
    name = deployment.bundle_name or "a bundle outside of its --bundle-dir"
    rest = "; the one before finishes its requests" if deployment.retiring else ""
    return f"in service: {printable(name)} ({printable(deployment.model_name)}) since {since}{rest}"


def _line(bundle: Bundle, deployment: Deployment) -> str:
    mark = "*" if bundle.in_service else " "
    if bundle.bundle_name == deployment.loading_bundle_name:
        mark = ">"  # on its way
    words = [
        f"{printable(bundle.bundle_name):<24}",
        f"{printable(bundle.model_name) or '-':<20}",
        printable(bundle.embedding_fingerprint[:12]) or "-",
        printable(bundle.problem),
    ]
    return f"{mark} {' '.join(words)}".rstrip()
