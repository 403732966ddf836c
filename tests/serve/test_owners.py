"""Whose a session is: the real application with two keys, and what each of them sees of the other's."""

import httpx
import pytest

from serve.app import build
from serve.keys import KeyRing
from serve.keys_command import create_key, revoke_key


@pytest.fixture(scope="module")
def guarded(server, tmp_path_factory):
    """The application over the same engine, for who has one of two keys."""
    folder = tmp_path_factory.mktemp("keys")
    keys = {name: create_key(folder, name) for name in ("alice", "bob", "carol")}
    revoke_key(folder, "carol")
    open_to_all, server.service.keys = server.service.keys, KeyRing(folder / "keys.json")
    app = build(server.service)
    server.service.keys = open_to_all

    def ask(name: str | None, method: str, path: str, **more) -> httpx.Response:
        async def asked():
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                headers = {"Authorization": f"Bearer {keys.get(name, name)}"} if name else {}
                return await client.request(method, path, headers=headers, **more)

        return server.run(asked())

    return ask


ROUTES = [
    ("GET", ""),
    ("POST", "/turns"),
    ("GET", "/events?stream=false"),
    ("GET", "/events"),
    ("POST", "/stop"),
    ("POST", "/feedback"),
    ("DELETE", ""),
]
BODIES = {"/turns": {"content": "hello", "stream": False}, "/feedback": {"turn": 0, "rating": "up"}}


@pytest.mark.parametrize(("method", "route"), ROUTES)
def test_without_a_valid_key_nobody_gets_in_and_with_anothers_there_is_nothing(guarded, method, route):
    made = guarded("alice", "POST", "/v1/sessions", json={"max_tokens": 4, "collect": True})
    assert made.status_code == 201
    path, body = f"/v1/sessions/{made.json()['id']}{route}", BODIES.get(route)
    more = {"json": body} if body else {}
    for name, expected in ((None, 401), ("rep_0_nobody", 401), ("carol", 401), ("bob", 404)):
        answer = guarded(name, method, path, **more)
        assert answer.status_code == expected, (name, answer.text)
        assert made.json()["id"] not in answer.text or expected == 404
    assert guarded("alice", "GET", f"/v1/sessions/{made.json()['id']}").status_code == 200
    mine = [s["id"] for s in guarded("alice", "GET", "/v1/sessions").json()["data"]]
    assert made.json()["id"] in mine
    assert guarded("bob", "GET", "/v1/sessions").json()["data"] == []


def test_what_is_of_nobody_needs_a_key_too(guarded):
    for path in ("/v1/models", "/v1/envs", "/v1/releases", "/openapi.json", "/v1/sessions"):
        assert guarded(None, "GET", path).status_code == 401
        assert guarded("bob", "GET", path).status_code == 200
    for path in ("/health/live", "/health/ready", "/"):
        assert guarded(None, "GET", path).status_code == 200
