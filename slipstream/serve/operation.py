"""What operators ask a server: whether it is well, and for a profile of it."""

from dataclasses import asdict
from typing import Any, Literal

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import Response
from typing_extensions import TypedDict

from slipstream.schema.request import EngineStats
from slipstream.schema.sampling import SamplingParams
from slipstream.serve.document import errors_as
from slipstream.serve.frontend import Ask, Frontend
from slipstream.serve.openai.routes import ErrorBody
from slipstream.serve.replies import json_response

GENERATE_SECONDS = 30.0  # for one token, waiting included


class EngineHealth(TypedDict):
    status: Literal["ok", "unhealthy"]
    engine: dict[str, Any]  # EngineStats


class Health(EngineHealth):
    """Of all engines together, whose counts are sums; one that is well will do."""

    replicas: list[EngineHealth]


class HealthGenerate(TypedDict):
    status: Literal["ok"]
    token_ids: list[int]


class Profile(TypedDict):
    status: Literal["profiling", "written"]
    paths: list[str]  # of the traces, one an engine, on the server's machine


def operation_router(frontend: Frontend, *, may_profile: bool) -> APIRouter:
    router = APIRouter(responses=errors_as(ErrorBody))

    @router.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health() -> Response:
        """200 while an engine makes progress; their numbers with it."""
        is_healthy = frontend.is_healthy
        engines = [frontend.engines[index] for index in frontend.expected]
        together = EngineStats.together([engine.stats for engine in engines])
        replicas = [_health(engine.is_healthy, engine.stats) for engine in engines]
        body: Health = {**_health(is_healthy, together), "replicas": replicas}
        return json_response(body, 200 if is_healthy else 503)

    @router.get("/health_generate", response_model=HealthGenerate)
    async def health_generate() -> Response:
        """200 once a token has been generated, within 30 seconds."""
        ask = Ask((0,), SamplingParams(max_tokens=1, temperature=0), timeout=GENERATE_SECONDS)
        async for _, handle in frontend.generate([ask]):
            output = handle.output()
        body: HealthGenerate = {"status": "ok", "token_ids": output.outputs[0].token_ids}
        return json_response(body)

    async def profile(start: bool) -> Response:
        if not may_profile:
            raise HTTPException(404, "Profiles are taken where the server is started with --profile_dir.")
        paths = await frontend.profile(start)
        body: Profile = {"status": "profiling" if start else "written", "paths": paths}
        return json_response(body)

    @router.post("/start_profile", response_model=Profile)
    async def start_profile() -> Response:
        """Profile the engines' steps from now on, with torch.profiler."""
        return await profile(True)

    @router.post("/stop_profile", response_model=Profile)
    async def stop_profile() -> Response:
        """Write the traces, for Perfetto or chrome://tracing, where `paths` say."""
        return await profile(False)

    return router


def _health(is_healthy: bool, stats: EngineStats) -> EngineHealth:
    return {"status": "ok" if is_healthy else "unhealthy", "engine": asdict(stats)}
