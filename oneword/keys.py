"""`oneword keys`: keys that sign bundles, and the signatures."""

import argparse
from pathlib import Path

from engine.printing import printable
from engine.security.bundle_signatures import check_bundle, sign_bundle
from engine.security.signing import create_keys, key_id, read_private_key


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand for each thing that can be done with a key."""
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    create = actions.add_parser("create", help="make a private key, and its public one beside it")
    create.add_argument("--output", type=Path, required=True, help="private key; FILE.pub goes out")
    create.set_defaults(action=_create)
    sign = actions.add_parser("sign", help="sign a bundle that is there, with its compiled plans")
    sign.add_argument("bundle", type=Path)
    sign.add_argument("--key", type=Path, required=True, help="private key")
    sign.set_defaults(action=_sign)
    verify = actions.add_parser("verify", help="check a bundle as a server with these keys would")
    verify.add_argument("bundle", type=Path)
    verify.add_argument(
        "--trusted-key", type=Path, action="append", required=True, help="public key; repeatable"
    )
    verify.set_defaults(action=_verify)


def run(arguments: argparse.Namespace) -> int:
    arguments.action(arguments)
    return 0


def _create(arguments: argparse.Namespace) -> None:
    made = create_keys(arguments.output)
    print(f"key {made}: {printable(arguments.output)} (private), {printable(arguments.output)}.pub")


def _sign(arguments: argparse.Namespace) -> None:
    key = read_private_key(arguments.key)
    for path in sign_bundle(arguments.bundle, key):
        print(f"{printable(path)} by key {key_id(key.public_key())}")


def _verify(arguments: argparse.Namespace) -> None:
    # Opened as well: the hashes of its files are checked there.
    from engine.bundle import Bundle

    check_bundle(arguments.bundle, arguments.trusted_key)
    Bundle.open(arguments.bundle)
    print(f"{printable(arguments.bundle)}: signatures and files are sound")
