"""The servicer for operators: which bundle is in service, and another in its place.

A deployment belongs to the server, not to the call that began it: a caller that goes away leaves it
running, and one that asks for the same bundle meanwhile waits for it too.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from engine.bundle import Bundle, Manifest
from engine.errors import (
    BundleError,
    DeploymentFailed,
    DeploymentUnderWay,
    EngineError,
    InvalidRequest,
    PermissionDenied,
    ShuttingDown,
    UnknownBundle,
)
from engine.security.callers import current_caller
from engine.serving.bundle_folder import BundleFolder
from engine.serving.paging import checked_page_size, key_of, page_token
from engine.serving.runtime import Runtime
from engine.serving.service import Context, guarded
from engine.serving.wire import timestamp_to_proto
from protos.oneword.v1 import admin_pb2, admin_pb2_grpc

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loading:
    """A bundle on its way into service."""

    path: Path
    since: float  # seconds since the epoch, UTC
    task: asyncio.Task[None]


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """List the bundles, put one in service, say which is."""

    def __init__(
        self,
        runtime: Runtime,
        bundles: BundleFolder,
        *,
        deploy: Callable[[Path], Awaitable[None]],
        check: Callable[[Manifest], None],
        exposed: bool,
    ) -> None:
        """`check` raises `DeploymentFailed` for a sound bundle that this server has no use for.

        `exposed`: others than this machine reach the server, and nobody asks who they are.
        """
        self._runtime = runtime
        self._bundles = bundles
        self._deploy = deploy
        self._check = check
        self._exposed = exposed
        self._loading: _Loading | None = None

    def stop(self) -> None:
        """Tell those who wait for a bundle that the server stops."""
        if self._loading is not None:
            self._loading.task.cancel()

    async def ListBundles(
        self, request: admin_pb2.ListBundlesRequest, context: Context
    ) -> admin_pb2.ListBundlesResponse:
        async with guarded(context):
            self._check_caller()
            return await self._runtime.in_pool(self._list, request)

    async def DeployBundle(
        self, request: admin_pb2.DeployBundleRequest, context: Context
    ) -> admin_pb2.DeployBundleResponse:
        async with guarded(context):
            self._check_caller()
            path, same = await self._runtime.in_pool(self._look_up, request.bundle_name)
            changed = self._loading is not None or self._runtime.pipeline.bundle is not same
            if changed:
                await _ended(self._begin(path))
            return admin_pb2.DeployBundleResponse(
                deployment=await self._runtime.in_pool(self._deployment), changed=changed
            )

    async def GetDeployment(
        self, request: admin_pb2.GetDeploymentRequest, context: Context
    ) -> admin_pb2.GetDeploymentResponse:
        async with guarded(context):
            self._check_caller()
            deployment = await self._runtime.in_pool(self._deployment)
            return admin_pb2.GetDeploymentResponse(deployment=deployment)

    def _check_caller(self) -> None:
        """Where callers are known, the scope of the method was checked before."""
        if self._exposed:
            raise PermissionDenied(
                "this server listens beyond its own machine and does not ask who calls, so it does "
                "not let anybody administer it; start it with --credentials (docs/security.md)"
            )

    def _begin(self, path: Path) -> asyncio.Task[None]:
        """The task that puts a bundle in service, under way already if it is the same."""
        loading = self._loading
        if loading is not None and loading.path != path:
            raise DeploymentUnderWay(
                f"{loading.path.name!r} is being put in service; wait until it is, and look at "
                "GetDeployment before another one takes its place"
            )
        if loading is None:
            task = asyncio.create_task(self._put_in_service(path), name="deploying")
            task.add_done_callback(lambda task: task.cancelled() or task.exception())
            loading = self._loading = _Loading(path=path, since=time.time(), task=task)
        return loading.task

    async def _put_in_service(self, path: Path) -> None:
        name, before, caller = path.name, self._runtime.pipeline.bundle.path.name, current_caller()
        who = f"{caller.name!r} of tenant {caller.tenant!r}"
        logger.info("deploying bundle %r in place of %r, told by %s", name, before, who)
        began = time.monotonic()
        try:
            await self._deploy(path)
        except Exception as error:
            logger.warning("deploying bundle %r, told by %s, has failed: %s", name, who, error)
            if not isinstance(error, EngineError):
                raise
            kind = type(error) if isinstance(error, DeploymentFailed) else DeploymentFailed
            # Callers name bundles; where they lie is the operator's business.
            raise kind(str(error).replace(str(path), name)) from error
        finally:
            self._loading = None
        seconds = time.monotonic() - began
        logger.info("deployed bundle %r in place of %r, told by %s, in %.1f s",
                    name, before, who, seconds)  # fmt: skip

    def _look_up(self, name: str) -> tuple[Path, Bundle | None]:
        """Where a bundle is; and the one in service, if it is just this one."""
        path, served = self._bundles.path_of(name), self._runtime.pipeline.bundle
        try:
            same = _is_same(served, path, self._bundles.manifest_of(path))
        except (BundleError, OSError):  # what is wrong with it is told when it is loaded
            same = False
        return path, served if same else None

    def _list(self, request: admin_pb2.ListBundlesRequest) -> admin_pb2.ListBundlesResponse:
        page_size, after = checked_page_size(request.page_size), key_of(request.page_token)
        names = [name for name in self._bundles.names() if name > after]
        page = names[:page_size]
        return admin_pb2.ListBundlesResponse(
            bundles=[self._describe(name) for name in page],
            next_page_token=page_token(page[-1]) if len(names) > page_size else "",
        )

    def _describe(self, name: str) -> admin_pb2.Bundle:
        try:
            path = self._bundles.path_of(name)
        except (InvalidRequest, UnknownBundle) as error:
            return admin_pb2.Bundle(bundle_name=name, problem=str(error))
        try:
            manifest = self._bundles.manifest_of(path)
        except (BundleError, OSError) as error:
            problem = " ".join(str(error).replace(str(path), name).split())
            return admin_pb2.Bundle(bundle_name=name, problem=problem)
        return admin_pb2.Bundle(
            bundle_name=name,
            model_name=manifest.model_name,
            embedding_fingerprint=manifest.text.embedding_fingerprint,
            build_key=manifest.build_key,
            in_service=_is_same(self._runtime.pipeline.bundle, path, manifest),
            problem=self._problem(manifest),
        )

    def _problem(self, manifest: Manifest) -> str:
        try:
            self._check(manifest)
        except DeploymentFailed as error:
            return str(error)
        return ""

    def _deployment(self) -> admin_pb2.Deployment:
        deployment, loading = self._runtime.deployment, self._loading
        served = deployment.current
        bundle = served.planner.bundle
        return admin_pb2.Deployment(
            bundle_name=self._bundles.name_of(bundle.path.resolve()),
            model_name=bundle.manifest.model_name,
            embedding_fingerprint=bundle.manifest.text.embedding_fingerprint,
            build_key=bundle.manifest.build_key,
            start_time=timestamp_to_proto(served.since),
            loading_bundle_name=loading.path.name if loading else "",
            loading_start_time=timestamp_to_proto(loading.since) if loading else None,
            retiring=deployment.retiring,
        )


def _is_same(served: Bundle, path: Path, manifest: Manifest) -> bool:
    """Whether a bundle is in service just as it lies there now."""
    return served.manifest == manifest and served.path.resolve() == path


async def _ended(task: asyncio.Task[None]) -> None:
    """Wait for a deployment without ending it; raises what it has failed with."""
    await asyncio.wait({task})
    if task.cancelled():
        raise ShuttingDown("the server is shutting down; deploy the bundle again when it is back")
    task.result()
