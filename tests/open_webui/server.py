"""The parts of Open WebUI that ratings go through, served as they are: no test of ours is in here.

    python server.py FOLDER PORT

The interpreter is that of the environment that ``requirements.txt`` describes. Its routers of
ratings and of functions, its database, its events and its loader of functions run. Left out are
its page, and retrieval, for which it wants several gigabytes of packages: two of its modules are
empty here. Whoever asks is an admin.
"""

from __future__ import annotations

import asyncio
import os
import sys
import types
from pathlib import Path

FOLDER, PORT = Path(sys.argv[1]), int(sys.argv[2])
(FOLDER / "front" / "static").mkdir(parents=True)
os.environ |= {
    "DATA_DIR": str(FOLDER),
    "STATIC_DIR": str(FOLDER / "static"),
    "FRONTEND_BUILD_DIR": str(FOLDER / "front"),
    "ENABLE_DB_MIGRATIONS": "False",
    "WEBUI_SECRET_KEY": "of a test that is over soon",
    "VECTOR_DB": "none",
}
for name, used in {
    "open_webui.retrieval.utils": ["cosine_similarity"],
    "open_webui.retrieval.web.utils": ["validate_url", "get_ssrf_safe_session"],
}.items():
    sys.modules[name] = types.ModuleType(name)
    for each in used:
        setattr(sys.modules[name], each, None)

import uvicorn  # noqa: E402
from fastapi import FastAPI  # noqa: E402
from open_webui.internal.db import Base, async_engine  # noqa: E402
from open_webui.models.users import Users  # noqa: E402
from open_webui.routers import evaluations, functions  # noqa: E402
from open_webui.utils.auth import get_admin_user, get_verified_user  # noqa: E402

app = FastAPI()
app.include_router(evaluations.router, prefix="/api/v1/evaluations")
app.include_router(functions.router, prefix="/api/v1/functions")


async def main() -> None:
    """Make the tables and an admin, and serve until the end."""
    async with async_engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    admin = await Users.insert_new_user("admin-1", "Ana", "ana@example.org", role="admin")
    for whoever in (get_admin_user, get_verified_user):
        app.dependency_overrides[whoever] = lambda: admin
    await uvicorn.Server(uvicorn.Config(app, port=PORT, log_level="warning")).serve()


asyncio.run(main())
