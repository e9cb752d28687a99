"""`oneword jobs`: requests that a server carries out although nobody waits for them.

A job outlives the command that made it, and the server: what is watched here goes on without being
watched.
"""

import argparse
import sys
from contextlib import closing
from datetime import UTC
from pathlib import Path
from typing import Any

import grpc
from tqdm import tqdm

from engine.client import Client, ServerError
from engine.client.jobs import ENDED
from engine.errors import InvalidRequest, OneWordError
from engine.printing import printable
from oneword.connection import add_server_action, connect
from oneword.generate import (
    add_request_arguments,
    build_request,
    check_output,
    image_format_of,
    write_images,
)
from oneword.training_display import INTERRUPTED, command_line
from protos.oneword.v1 import generation_pb2
from protos.oneword.v1.generation_pb2 import ImageResult, Job

_PREFIX = "JOB_STATE_"
_NUM_PROMPT_CHARACTERS = 60


class JobEndedBadly(OneWordError):
    """A job has failed, or was cancelled."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand for each thing that can be done with a job."""
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    submit = actions.add_parser("submit", help="queue a request; its number is printed")
    add_request_arguments(submit)
    submit.add_argument("--priority", type=int, default=0, metavar="0-9", help="higher goes first")
    submit.add_argument("--request-id", default="", metavar="ID", help="a repeated call with the "
                        "same id gives the same job")  # fmt: skip
    submit.add_argument(
        "--output", type=Path, help="wait for it, and write its images: .png or .webp"
    )
    add_server_action(submit, _submit)
    add_server_action(actions.add_parser("list", help="list the jobs of a server"), _list)
    watch = actions.add_parser("watch", help="follow a job to its end")
    _add_id(watch)
    watch.add_argument("--output", type=Path, help="write its images")
    add_server_action(watch, _watch)
    get = actions.add_parser("get", help="write the images of a job as far as they are done")
    _add_id(get)
    get.add_argument("--output", type=Path, required=True)
    add_server_action(get, _get)
    for name, summary, action in (
        ("cancel", "stop a job; images that are done stay", _cancel),
        ("delete", "forget a job that has ended, and its images", _delete),
    ):
        subparser = actions.add_parser(name, help=summary)
        _add_id(subparser)
        add_server_action(subparser, action)


def run(arguments: argparse.Namespace) -> int:
    return arguments.action(arguments)


def _add_id(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job_id", metavar="ID")


def _submit(arguments: argparse.Namespace) -> int:
    output: Path | None = arguments.output
    if output is not None:
        check_output(output)
    request = build_request(arguments, image_format_of(output or Path("x.png")))
    for name in ("priority", "request_id"):
        if (value := getattr(arguments, name)) not in (0, ""):
            _set(request, name, value)
    with connect(arguments) as client:
        job = client.jobs.submit(request)
        print(f"job {printable(job.job_id)}", flush=True)
        if output is None:
            print(command_line("watch", arguments.server, job.job_id, command="jobs"))
            return 0
        return _follow(client, arguments.server, job.job_id, output)


def _set(request: generation_pb2.GenerateRequest, name: str, value: Any) -> None:
    try:
        setattr(request, name, value)
    except ValueError as error:  # out of the range of its type
        raise InvalidRequest(f"{name}: {error}") from error


def _watch(arguments: argparse.Namespace) -> int:
    if arguments.output is not None:
        check_output(arguments.output)
    with connect(arguments) as client:
        return _follow(client, arguments.server, arguments.job_id, arguments.output)


def _follow(client: Client, server: str, job_id: str, output: Path | None) -> int:
    """Show a job until it has ended; returns the exit code. Raises `JobEndedBadly`."""
    try:
        job, images = _show(client, job_id, with_images=output is not None)
    except KeyboardInterrupt:
        print(f"job {printable(job_id)} {_goes_on(server, job_id)}", file=sys.stderr)
        return INTERRUPTED
    except ServerError as error:
        if error.code is not grpc.StatusCode.UNAVAILABLE:
            raise
        raise ServerError(error.code, f"{error}; the job {_goes_on(server, job_id)}") from error
    if output is not None:
        write_images(output, images)
    if job.state != generation_pb2.JOB_STATE_SUCCEEDED:
        reason = f": {job.failure.message}" if job.HasField("failure") else ""
        raise JobEndedBadly(f"job {job_id} is {_state_name(job.state)}{reason}")
    return 0


def _goes_on(server: str, job_id: str) -> str:
    watch = command_line("watch", server, job_id, command="jobs")
    cancel = command_line("cancel", server, job_id, command="jobs")
    return f"goes on; watch it: {watch}; cancel it: {cancel}"


def _show(client: Client, job_id: str, *, with_images: bool) -> tuple[Job, list[bytes]]:
    """The job when it has ended, and its images."""
    job, images = Job(job_id=job_id), dict[int, bytes]()
    bar: tqdm[Any] = tqdm(unit="step", leave=False, disable=not sys.stderr.isatty())
    with bar, closing(client.jobs.watch(job_id, with_images=with_images)) as events:
        for event in events:
            if isinstance(event, ImageResult):
                images[event.image_index] = event.image
                continue
            job = event
            bar.set_description_str(_state_name(job.state), refresh=False)
            bar.total, bar.n = job.num_steps or None, job.steps_done
            bar.refresh()
    return job, [images[index] for index in sorted(images)]


def _get(arguments: argparse.Namespace) -> int:
    check_output(arguments.output)
    with connect(arguments) as client:
        job = client.jobs.get(arguments.job_id).job
        if job.state in ENDED:  # one by one: together they may not fit into a message
            job, images = _show(client, arguments.job_id, with_images=True)
        else:
            response = client.jobs.get(arguments.job_id, with_images=True)
            images = [image.image for image in response.images]
    if not images:
        raise InvalidRequest(f"job {arguments.job_id} is {_state_name(job.state)}, without images")
    write_images(arguments.output, images)
    return 0


def _list(arguments: argparse.Namespace) -> int:
    with connect(arguments) as client:
        for job in client.jobs.list():
            print(_line(job))
    return 0


def _line(job: Job) -> str:
    created = job.create_time.ToDatetime(UTC).astimezone().isoformat(" ", "seconds")
    images = f"{job.num_images_done}/{job.request.num_images or 1}"
    prompt = job.request.prompt[:_NUM_PROMPT_CHARACTERS]
    return (
        f"{printable(job.job_id)} {_state_name(job.state):<10} {images:>5} {created} "
        f"{printable(prompt)}"
    )


def _state_name(state: int) -> str:
    """A state as a word; one that a later version has added as its number."""
    names = {int(value): name for name, value in generation_pb2.JobState.items()}
    return names.get(state, str(state)).removeprefix(_PREFIX).lower()


def _cancel(arguments: argparse.Namespace) -> int:
    with connect(arguments) as client:
        job = client.jobs.cancel(arguments.job_id)
    print(f"{printable(job.job_id)} {_state_name(job.state)}")
    return 0


def _delete(arguments: argparse.Namespace) -> int:
    with connect(arguments) as client:
        client.jobs.delete(arguments.job_id)
    print(f"{printable(arguments.job_id)} deleted")
    return 0
