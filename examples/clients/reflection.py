"""Asks a server what it can do, and calls it, without knowing its API: as grpcurl does.

    python examples/clients/reflection.py
    python examples/clients/reflection.py oneword.v1.ImageGenerationService/Generate \
        '{"prompt": "a photo of a fox", "seed": 7}'

Needs grpcio, grpcio-reflection and protobuf alone, nothing of OneWord. The server is that of
ONEWORD_SERVER; the same variables as in docs/clients.md name the token and the authority.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pool, json_format
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

MAX_MESSAGE_BYTES = 16 << 20
LONGEST_SHOWN = 60  # of the characters of an image


def connect() -> grpc.Channel:
    address = os.environ.get("ONEWORD_SERVER", "127.0.0.1:50051")
    options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
    if authority := os.environ.get("ONEWORD_CA"):
        credentials = grpc.ssl_channel_credentials(Path(authority).read_bytes())
        if token := os.environ.get("ONEWORD_TOKEN"):  # goes over TLS alone
            credentials = grpc.composite_channel_credentials(
                credentials, grpc.access_token_call_credentials(token)
            )
        return grpc.secure_channel(address, credentials, options)
    return grpc.insecure_channel(address, options)


def list_services(channel: grpc.Channel) -> None:
    database = ProtoReflectionDescriptorDatabase(channel)
    pool = descriptor_pool.DescriptorPool(database)
    for name in sorted(database.get_services()):
        print(name)
        for method in pool.FindServiceByName(name).methods:
            stream = "stream " if method.server_streaming else ""
            print(f"  {method.name}({method.input_type.name}) -> {stream}{method.output_type.name}")


def call(channel: grpc.Channel, name: str, request: str) -> None:
    """Call a method with a request in JSON, and print every answer as JSON."""
    service_name, _, method_name = name.partition("/")
    pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
    method = pool.FindServiceByName(service_name).FindMethodByName(method_name)
    message = json_format.Parse(request, GetMessageClass(method.input_type)())
    # On the wire a call with one message each way is a stream of one.
    stream = channel.unary_stream(
        f"/{name}",
        request_serializer=type(message).SerializeToString,
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    for response in stream(message, timeout=120):
        answer = json_format.MessageToDict(response, preserving_proto_field_name=True)
        print(json.dumps(shortened(answer), ensure_ascii=False))


def shortened(value: Any) -> Any:
    match value:
        case dict():
            return {key: shortened(item) for key, item in value.items()}
        case list():
            return [shortened(item) for item in value]
        case str() if len(value) > LONGEST_SHOWN:
            return f"{value[:LONGEST_SHOWN]}... {len(value)} characters"
        case _:
            return value


def main() -> int:
    with connect() as channel:
        try:
            if len(sys.argv) > 1:
                call(channel, sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "{}")
            else:
                list_services(channel)
        except grpc.RpcError as error:
            failed: Any = error  # every error of a call has these; the type stubs do not say so
            print(f"{failed.code().name}: {failed.details()}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
