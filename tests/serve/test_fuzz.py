"""Whatever is sent to a route: an answer that is meant, and never a 5xx. By schemathesis over the OpenAPI schema."""

from collections import Counter
from contextlib import suppress

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

EXAMPLES = 25
DEFINED = {200, 201, 204, 304, 400, 401, 403, 404, 405, 408, 409, 413, 422, 429}


@pytest.fixture(scope="module")
def schema(server):
    made = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    made.config.update(base_url=server.url)
    return made


@pytest.fixture(scope="module")
def session(server) -> str:
    """One that is there: a random id would only ever be unknown."""
    with server.client() as client:
        return client.post("/v1/sessions", json={"max_tokens": 4, "collect": True}).json()["id"]


def test_the_schema_has_every_route(schema):
    paths = {result.ok().path for result in schema.get_all_operations()}
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/sessions", "/v1/envs", "/health"} <= paths
    assert "/v1/sessions/{session_id}/turns" in paths
    assert len(paths) >= 14


def test_every_route_says_how_it_refuses_and_not_as_the_framework_would(server):
    with server.client() as client:
        paths = client.get("/openapi.json").json()["paths"]
    told = [operation["responses"] for path, o in paths.items() if path.startswith("/v1") for operation in o.values()]
    assert len(told) > 10 and all("4XX" in responses and "422" not in responses for responses in told)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["as_declared", "otherwise"])
def test_no_input_is_a_failure_of_the_server(schema, session, mode):
    operations = [result.ok() for result in schema.get_all_operations()]
    answered: Counter[int] = Counter()
    for operation in operations:
        if operation.method.upper() != "DELETE":  # what is deleted here, other examples need
            _fuzz(operation, mode, session, answered)
    assert answered.total() > 8 * EXAMPLES
    assert answered.keys() & {400, 404, 409}


def _fuzz(operation, mode: GenerationMode, session: str, answered: Counter[int]) -> None:
    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def check(case):
        if "session_id" in (case.path_parameters or {}) and answered.total() % 2:
            case.path_parameters["session_id"] = session
        answer = case.call(timeout=60)
        answered[answer.status_code] += 1
        assert answer.status_code in DEFINED, (operation.label, answer.status_code, answer.text[:300], case.body)
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    with suppress(Unsatisfiable):  # of an operation that takes nothing, nothing is wrong
        check()


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"content": "\\ud800"}', b'{"content": NaN}',
        b'{"content": "a\\u0000b"}', b"[" * 5000, b'{"content": ' + b"9" * 5000 + b"}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/sessions/{session}/turns", "/v1/chat/completions", "/v1/sessions"])
def test_bodies_that_are_no_json_or_hold_what_no_text_can(server, session, path, body):
    with server.client() as client:
        answer = client.post(path.format(session=session), content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 201, 400, 409), answer.text
    if answer.status_code == 400:
        assert answer.json()["error"]["code"] in ("invalid_request", "context_length_exceeded")
