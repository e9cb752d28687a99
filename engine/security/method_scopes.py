"""What each method asks of its caller. One that is not here is refused: deny by default."""

from engine.security.callers import Scope

HEALTH = frozenset(("/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"))
REFLECTION = frozenset(("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",))

# None: any caller with credentials.
SCOPE: dict[str, Scope | None] = {
    "/oneword.v1.ImageGenerationService/Generate": Scope.GENERATE,
    "/oneword.v1.ImageGenerationService/GenerateImages": Scope.GENERATE,
    "/oneword.v1.ImageGenerationService/GenerateBatch": Scope.GENERATE,
    "/oneword.v1.ImageJobService/SubmitJob": Scope.GENERATE,
    "/oneword.v1.ImageJobService/GetJob": Scope.GENERATE,
    "/oneword.v1.ImageJobService/WatchJob": Scope.GENERATE,
    "/oneword.v1.ImageJobService/CancelJob": Scope.GENERATE,
    "/oneword.v1.ImageJobService/ListJobs": Scope.GENERATE,
    "/oneword.v1.ImageJobService/DeleteJob": Scope.GENERATE,
    "/oneword.v1.ConceptService/ImportConcept": Scope.CONCEPTS,
    "/oneword.v1.ConceptService/GetConcept": Scope.CONCEPTS,
    "/oneword.v1.ConceptService/ListConcepts": Scope.CONCEPTS,
    "/oneword.v1.ConceptService/DeleteConcept": Scope.CONCEPTS,
    "/oneword.v1.ConceptService/UndeleteConcept": Scope.CONCEPTS,
    "/oneword.v1.ConceptService/ExportConcept": Scope.CONCEPTS,
    "/oneword.v1.ConceptService/ListConceptVersions": Scope.CONCEPTS,
    "/oneword.v1.ConceptService/SetConceptAlias": Scope.CONCEPTS,
    "/oneword.v1.ConceptService/DeleteConceptAlias": Scope.CONCEPTS,
    "/oneword.v1.TrainingService/CreateTraining": Scope.TRAIN,
    "/oneword.v1.TrainingService/GetTraining": Scope.TRAIN,
    "/oneword.v1.TrainingService/WatchTraining": Scope.TRAIN,
    "/oneword.v1.TrainingService/CancelTraining": Scope.TRAIN,
    "/oneword.v1.TrainingService/ListTrainings": Scope.TRAIN,
    "/oneword.v1.TrainingService/DeleteTraining": Scope.TRAIN,
    "/oneword.v1.AdminService/ListBundles": Scope.ADMIN,
    "/oneword.v1.AdminService/DeployBundle": Scope.ADMIN,
    "/oneword.v1.AdminService/GetDeployment": Scope.ADMIN,
    "/oneword.v1.ServerInfoService/GetServerInfo": None,
    **dict.fromkeys(HEALTH | REFLECTION),
}
