"""`oneword tokens`: who may call a server, in its credentials file."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from engine.printing import printable
from engine.security.callers import Scope
from engine.security.credential_edits import create_token, list_tokens, revoke_token


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand for each thing that can be done with a token."""
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    create = actions.add_parser("create", help="make a token; it is printed once and kept nowhere")
    create.add_argument("--tenant", required=True, help="whose concepts and trainings it may use")
    create.add_argument("--name", required=True, help="what logs call it")
    create.add_argument(
        "--scopes",
        required=True,
        metavar="SCOPE[,SCOPE...]",
        help=f"what it may do: {', '.join(Scope)}",
    )
    create.add_argument("--expires-in-days", type=float, metavar="DAYS", help="default: never")
    _add(create, _create)
    _add(actions.add_parser("list", help="list tokens and certificates, without secrets"), _list)
    revoke = actions.add_parser("revoke", help="have a token count no more, from now on")
    revoke.add_argument("token_id", metavar="ID", help="as `list` prints it")
    _add(revoke, _revoke)


def run(arguments: argparse.Namespace) -> int:
    arguments.action(arguments)
    return 0


def _add(parser: argparse.ArgumentParser, action: Callable[[argparse.Namespace], None]) -> None:
    parser.add_argument(
        "--file", type=Path, required=True, help="the server's --credentials; made if missing"
    )
    parser.set_defaults(action=action)


def _create(arguments: argparse.Namespace) -> None:
    new = create_token(
        arguments.file,
        tenant=arguments.tenant,
        name=arguments.name,
        scopes=[scope.strip() for scope in arguments.scopes.split(",")],
        expires_in_days=arguments.expires_in_days,
    )
    until = f"until {new.expires.isoformat(' ')}" if new.expires else "until it is revoked"
    print(f"token {new.token_id}, {until}; it will not be shown again:", file=sys.stderr)
    print(new.token)


def _list(arguments: argparse.Namespace) -> None:
    for credential in list_tokens(arguments.file):
        caller = credential.caller
        until = credential.expires.isoformat(" ") if credential.expires else "no end"
        scopes = ",".join(scope for scope in Scope if scope in caller.scopes)
        print(
            f"{printable(credential.key.removeprefix('token ')):<24} {caller.tenant:<16} "
            f"{caller.name:<16} {scopes:<32} {until}"
        )


def _revoke(arguments: argparse.Namespace) -> None:
    revoke_token(arguments.file, arguments.token_id)
    print(f"{arguments.token_id} revoked; servers notice within a second or so")
