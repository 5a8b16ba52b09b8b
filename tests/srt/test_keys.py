"""Who may move the limit: SGLang's own routes behind its own keys, as ``http_server`` puts them together."""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from sglang.srt.entrypoints import http_server
from sglang.srt.utils.auth import add_api_key_middleware
from starlette.testclient import TestClient

from sgl_vtensor.srt.memory import LimitHandler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

BODY = {"server_args": {LimitHandler.KEY: 1 << 30}}


@pytest.mark.parametrize("method", ["POST", "PUT"])
@pytest.mark.parametrize(
    ("api_key", "admin_api_key", "refused", "accepted"),
    [
        ("users", None, [None, "other"], "users"),
        (None, "admins", [None, "other"], "admins"),
        ("users", "admins", [None, "other", "users"], "admins"),
    ],
)
def test_a_limit_without_the_right_key_never_reaches_the_server(
    method: str,
    api_key: str | None,
    admin_api_key: str | None,
    refused: list[str | None],
    accepted: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[dict[str, float]] = []

    class Manager:
        async def set_internal_state(self, request: http_server.SetInternalStateReq) -> list[bool]:
            asked.append(request.server_args)
            return [True]

    state = type("State", (), {"tokenizer_manager": Manager()})
    monkeypatch.setattr(http_server, "_global_state", state)
    app = FastAPI()
    app.router.routes.extend(http_server.app.routes)
    add_api_key_middleware(app, api_key=api_key, admin_api_key=admin_api_key)
    with TestClient(app) as client:

        def status(key: str | None) -> int:
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            return client.request(method, "/set_internal_state", json=BODY, headers=headers).status_code

        assert [status(key) for key in refused] == [401] * len(refused) and not asked
        assert status(accepted) == 200 and asked == [BODY["server_args"]]
