"""How tests speak to a server: sessions over HTTP, and the events that come back."""

import json

import httpx


def events_of(response: httpx.Response) -> list[dict]:
    """The events of a whole SSE body; one that the proxy tells has no seq."""
    found = []
    for block in response.text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if line)
        if lines:
            found.append({"seq": int(lines.get("id", -1)), "type": lines["event"], **json.loads(lines["data"])})
    return found


def types(events: list[dict]) -> list[str]:
    return [e["type"] for e in events]


def made(client: httpx.Client, **asked) -> str:
    answer = client.post("/v1/sessions", json=asked)
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def said(client: httpx.Client, session: str, content: str | None = None, **more) -> list[dict]:
    answer = client.post(f"/v1/sessions/{session}/turns", json={"content": content, **more})
    assert answer.status_code == 200, answer.text
    return events_of(answer) if more.get("stream", True) else answer.json()["events"]


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]
