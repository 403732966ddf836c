"""What the README has people type, typed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent.parent / "README.md").read_text()
SERVING = README[README.index("## Serving the agent") :]
SNIPPETS = re.findall(r"^```(bash|python)\n(.*?)^```", SERVING[: SERVING.index("\n## ", 10)], re.DOTALL | re.MULTILINE)


def test_the_section_has_snippets_of_both_kinds():
    assert {kind for kind, _ in SNIPPETS} == {"bash", "python"}
    assert len(SNIPPETS) >= 3


@pytest.mark.parametrize("kind, text", SNIPPETS, ids=[text.split("\n")[0][:30] for _, text in SNIPPETS])
def test_a_snippet_of_the_readme_runs(server, kind, text):
    """As it stands, but for where the server is and what its agent is called here."""
    text = text.replace("http://localhost:8000", server.url).replace('"quickstart"', '"agent"')
    command = ["bash", "-euo", "pipefail", "-c", text] if kind == "bash" else [sys.executable, "-c", text]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    if "chat/completions" in text:
        assert '"finish_reason"' in done.stdout
    elif kind == "python":
        assert re.search(r"by version \d", done.stdout)
    else:
        assert "event: done" in done.stdout
        assert '"type":"turn"' in done.stdout.replace('"type": "turn"', '"type":"turn"')
