"""Bundles in service from a script, the part of both clients for operators: list, deploy, look."""

from collections.abc import AsyncIterator, Iterator

from engine.client.calls import PAGE_SIZE, Call, Page
from engine.client.link import AsyncLink, Link
from protos.oneword.v1 import admin_pb2
from protos.oneword.v1.admin_pb2 import Bundle, DeployBundleResponse, Deployment


def list_bundles(page_token: str) -> Call[Page[Bundle]]:
    request = admin_pb2.ListBundlesRequest(page_size=PAGE_SIZE, page_token=page_token)
    return Call(
        method=lambda stubs: stubs.admin.ListBundles,
        request=lambda: request,
        read=lambda reply: Page(reply.bundles, reply.next_page_token),
    )


def deploy_bundle(bundle_name: str) -> Call[DeployBundleResponse]:
    """Made again, it waits for the deployment that the first attempt has begun."""
    request = admin_pb2.DeployBundleRequest(bundle_name=bundle_name)
    return Call(
        method=lambda stubs: stubs.admin.DeployBundle,
        request=lambda: request,
        read=lambda reply: reply,
    )


def get_deployment() -> Call[Deployment]:
    return Call(
        method=lambda stubs: stubs.admin.GetDeployment,
        request=admin_pb2.GetDeploymentRequest,
        read=lambda reply: reply.deployment,
    )


class AdminClient:
    """What one server has in service, as `Client.admin`. Every method raises `ServerError`."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def bundles(self) -> Iterator[Bundle]:
        """What can be put in service, in the order of its names, fetched page by page."""
        return self._link.pages(list_bundles)

    def deploy(self, bundle_name: str, *, timeout_s: float | None = None) -> DeployBundleResponse:
        """Put a bundle in service; returns when new requests go to it.

        A deadline that passes does not stop the server: `deployment` tells how it goes on.
        """
        return self._link.call(deploy_bundle(bundle_name), self._link.within(timeout_s))

    def deployment(self) -> Deployment:
        """What is in service, and what is being loaded."""
        return self._link.call(get_deployment())


class AsyncAdminClient:
    """The same under asyncio, as `AsyncClient.admin`."""

    def __init__(self, link: AsyncLink) -> None:
        self._link = link

    def bundles(self) -> AsyncIterator[Bundle]:
        return self._link.pages(list_bundles)

    async def deploy(
        self, bundle_name: str, *, timeout_s: float | None = None
    ) -> DeployBundleResponse:
        return await self._link.call(deploy_bundle(bundle_name), self._link.within(timeout_s))

    async def deployment(self) -> Deployment:
        return await self._link.call(get_deployment())
