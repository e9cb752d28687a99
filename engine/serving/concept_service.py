"""The servicer of the stored concepts."""

from collections.abc import Sequence

from engine.concepts import Concept, check_fits, concept_from_bytes, concept_to_bytes
from engine.errors import ConceptUnreadable, InvalidRequest
from engine.security.callers import current_caller
from engine.serving import wire
from engine.serving.paging import checked_page_size, key_of, not_of_this_list, page_token
from engine.serving.runtime import Runtime
from engine.serving.service import Context, guarded
from engine.store.concept_store import StoredConcept
from engine.store.rows import LARGEST_INTEGER
from protos.oneword.v1 import concepts_pb2, concepts_pb2_grpc

KeyedRequest = concepts_pb2.GetConceptRequest | concepts_pb2.ExportConceptRequest


class ConceptService(concepts_pb2_grpc.ConceptServiceServicer):
    """Stored concepts, their versions and aliases; disk access is in the pool."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    async def ImportConcept(
        self, request: concepts_pb2.ImportConceptRequest, context: Context
    ) -> concepts_pb2.ImportConceptResponse:
        async with guarded(context):
            return await self._runtime.in_pool(self._import, request, current_caller().tenant)

    async def GetConcept(
        self, request: concepts_pb2.GetConceptRequest, context: Context
    ) -> concepts_pb2.GetConceptResponse:
        async with guarded(context):
            return await self._runtime.in_pool(self._get, request, current_caller().tenant)

    async def ListConcepts(
        self, request: concepts_pb2.ListConceptsRequest, context: Context
    ) -> concepts_pb2.ListConceptsResponse:
        async with guarded(context):
            return await self._runtime.in_pool(self._list, request, current_caller().tenant)

    async def DeleteConcept(
        self, request: concepts_pb2.DeleteConceptRequest, context: Context
    ) -> concepts_pb2.DeleteConceptResponse:
        async with guarded(context):
            await self._runtime.in_pool(
                self._runtime.store.delete,
                request.placeholder_token,
                etag=request.etag or None,
                tenant=current_caller().tenant,
            )
            return concepts_pb2.DeleteConceptResponse()

    async def UndeleteConcept(
        self, request: concepts_pb2.UndeleteConceptRequest, context: Context
    ) -> concepts_pb2.UndeleteConceptResponse:
        async with guarded(context):
            return await self._runtime.in_pool(self._undelete, request, current_caller().tenant)

    async def ExportConcept(
        self, request: concepts_pb2.ExportConceptRequest, context: Context
    ) -> concepts_pb2.ExportConceptResponse:
        async with guarded(context):
            return await self._runtime.in_pool(self._export, request, current_caller().tenant)

    async def ListConceptVersions(
        self, request: concepts_pb2.ListConceptVersionsRequest, context: Context
    ) -> concepts_pb2.ListConceptVersionsResponse:
        async with guarded(context):
            return await self._runtime.in_pool(
                self._list_versions, request, current_caller().tenant
            )

    async def SetConceptAlias(
        self, request: concepts_pb2.SetConceptAliasRequest, context: Context
    ) -> concepts_pb2.SetConceptAliasResponse:
        async with guarded(context):
            return await self._runtime.in_pool(self._set_alias, request, current_caller().tenant)

    async def DeleteConceptAlias(
        self, request: concepts_pb2.DeleteConceptAliasRequest, context: Context
    ) -> concepts_pb2.DeleteConceptAliasResponse:
        async with guarded(context):
            await self._runtime.in_pool(
                self._runtime.store.delete_alias,
                request.placeholder_token,
                request.alias,
                etag=request.etag or None,
                tenant=current_caller().tenant,
            )
            return concepts_pb2.DeleteConceptAliasResponse()

    def _import(
        self, request: concepts_pb2.ImportConceptRequest, tenant: str
    ) -> concepts_pb2.ImportConceptResponse:
        try:
            concept = concept_from_bytes(
                request.content,
                source="the concept file",
                placeholder_token=request.placeholder_token or None,
            )
        except ConceptUnreadable as error:
            error.field = error.field or "content"
            raise
        manifest = self._runtime.pipeline.bundle.manifest
        check_fits(concept, manifest.text, text_2=manifest.text_2, model_name=manifest.model_name)
        stored, changed = self._runtime.store.import_concept(
            concept, overwrite=request.overwrite, etag=request.etag or None, tenant=tenant
        )
        return concepts_pb2.ImportConceptResponse(
            concept=self._describe(stored, tenant), changed=changed
        )

    def _get(
        self, request: concepts_pb2.GetConceptRequest, tenant: str
    ) -> concepts_pb2.GetConceptResponse:
        stored, concept = self._load(request, tenant)
        return concepts_pb2.GetConceptResponse(concept=self._describe(stored, tenant, concept))

    def _list(
        self, request: concepts_pb2.ListConceptsRequest, tenant: str
    ) -> concepts_pb2.ListConceptsResponse:
        page_size = checked_page_size(request.page_size)
        found = self._runtime.store.list(
            limit=page_size + 1, after=key_of(request.page_token), tenant=tenant
        )
        page = found[:page_size]
        return concepts_pb2.ListConceptsResponse(
            concepts=self._describe_all(page, tenant),
            next_page_token=page_token(page[-1].placeholder_token)
            if len(found) > page_size
            else "",
        )

    def _export(
        self, request: concepts_pb2.ExportConceptRequest, tenant: str
    ) -> concepts_pb2.ExportConceptResponse:
        file_format = wire.concept_format_from_proto(request.format)
        stored, concept = self._load(request, tenant)
        return concepts_pb2.ExportConceptResponse(
            content=concept_to_bytes(concept, file_format),
            placeholder_token=concept.placeholder_token,
            concept=self._describe(stored, tenant),
        )

    def _undelete(
        self, request: concepts_pb2.UndeleteConceptRequest, tenant: str
    ) -> concepts_pb2.UndeleteConceptResponse:
        stored = self._runtime.store.undelete(request.placeholder_token, tenant=tenant)
        return concepts_pb2.UndeleteConceptResponse(concept=self._describe(stored, tenant))

    def _list_versions(
        self, request: concepts_pb2.ListConceptVersionsRequest, tenant: str
    ) -> concepts_pb2.ListConceptVersionsResponse:
        page_size, name = checked_page_size(request.page_size), request.placeholder_token
        below = _last_version(key_of(request.page_token), name)
        found = self._runtime.store.versions(name, below=below, limit=page_size + 1, tenant=tenant)
        page = found[:page_size]
        return concepts_pb2.ListConceptVersionsResponse(
            versions=self._describe_all(page, tenant),
            next_page_token=page_token(f"{page[-1].version} {name}")
            if len(found) > page_size
            else "",
        )

    def _set_alias(
        self, request: concepts_pb2.SetConceptAliasRequest, tenant: str
    ) -> concepts_pb2.SetConceptAliasResponse:
        stored = self._runtime.store.set_alias(
            request.placeholder_token,
            request.alias,
            version=request.version if request.HasField("version") else None,
            etag=request.etag or None,
            tenant=tenant,
        )
        return concepts_pb2.SetConceptAliasResponse(concept=self._describe(stored, tenant))

    def _describe_all(
        self, found: Sequence[StoredConcept], tenant: str
    ) -> list[concepts_pb2.Concept]:
        aliases = self._runtime.store.aliases_of(found, tenant=tenant)
        return [wire.concept_to_proto(*pair) for pair in zip(found, aliases, strict=True)]

    def _describe(
        self, stored: StoredConcept, tenant: str, concept: Concept | None = None
    ) -> concepts_pb2.Concept:
        (aliases,) = self._runtime.store.aliases_of([stored], tenant=tenant)
        return wire.concept_to_proto(stored, aliases, concept)

    def _load(self, request: KeyedRequest, tenant: str) -> tuple[StoredConcept, Concept]:
        key = request.WhichOneof("key")
        if key is None:
            raise InvalidRequest(
                "no concept is named; give placeholder_token or concept_id",
                field="placeholder_token",
            )
        return self._runtime.store.load(key, getattr(request, key), tenant=tenant)


def _last_version(key: str, name: str) -> int:
    """Where the versions of a name go on, by the key in a page token."""
    if not key:
        return LARGEST_INTEGER
    version, _, of = key.partition(" ")
    if of != name or not (version.isascii() and version.isdigit() and len(version) < 19):
        raise not_of_this_list()
    return int(version)
