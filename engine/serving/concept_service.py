"""The servicer of the stored concepts."""

from engine.concepts import Concept, check_fits, concept_from_bytes, concept_to_bytes
from engine.errors import ConceptUnreadable, InvalidRequest
from engine.security.callers import current_caller
from engine.serving import wire
from engine.serving.paging import checked_page_size, key_of, page_token
from engine.serving.runtime import Runtime
from engine.serving.service import Context, guarded
from engine.store.concept_store import StoredConcept
from protos.oneword.v1 import concepts_pb2, concepts_pb2_grpc

KeyedRequest = concepts_pb2.GetConceptRequest | concepts_pb2.ExportConceptRequest


class ConceptService(concepts_pb2_grpc.ConceptServiceServicer):
    """Import, describe, list, delete and export concepts; disk access is in the pool."""

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
            tenant = current_caller().tenant
            delete = self._runtime.store.delete
            await self._runtime.in_pool(delete, request.placeholder_token, tenant=tenant)
            return concepts_pb2.DeleteConceptResponse()

    async def ExportConcept(
        self, request: concepts_pb2.ExportConceptRequest, context: Context
    ) -> concepts_pb2.ExportConceptResponse:
        async with guarded(context):
            return await self._runtime.in_pool(self._export, request, current_caller().tenant)

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
            concept, overwrite=request.overwrite, tenant=tenant
        )
        return concepts_pb2.ImportConceptResponse(
            concept=wire.concept_to_proto(stored), changed=changed
        )

    def _get(
        self, request: concepts_pb2.GetConceptRequest, tenant: str
    ) -> concepts_pb2.GetConceptResponse:
        stored, concept = self._load(request, tenant)
        return concepts_pb2.GetConceptResponse(concept=wire.concept_to_proto(stored, concept))

    def _list(
        self, request: concepts_pb2.ListConceptsRequest, tenant: str
    ) -> concepts_pb2.ListConceptsResponse:
        page_size = checked_page_size(request.page_size)
        found = self._runtime.store.list(
            limit=page_size + 1, after=key_of(request.page_token), tenant=tenant
        )
        page = found[:page_size]
        return concepts_pb2.ListConceptsResponse(
            concepts=[wire.concept_to_proto(stored) for stored in page],
            next_page_token=page_token(page[-1].placeholder_token)
            if len(found) > page_size
            else "",
        )

    def _export(
        self, request: concepts_pb2.ExportConceptRequest, tenant: str
    ) -> concepts_pb2.ExportConceptResponse:
        file_format = wire.concept_format_from_proto(request.format)
        _, concept = self._load(request, tenant)
        return concepts_pb2.ExportConceptResponse(
            content=concept_to_bytes(concept, file_format),
            placeholder_token=concept.placeholder_token,
        )

    def _load(self, request: KeyedRequest, tenant: str) -> tuple[StoredConcept, Concept]:
        key = request.WhichOneof("key")
        if key is None:
            raise InvalidRequest(
                "no concept is named; give placeholder_token or concept_id",
                field="placeholder_token",
            )
        return self._runtime.store.load(key, getattr(request, key), tenant=tenant)
