"""`repertory eval --endpoint` against a server that speaks over HTTP: figures, faults, kills, secrets, mistakes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from conftest import ROOT, repertory, started
from endpoint_server import PROMPT_TOKENS, SEEN_TOKENS, TURN_TOKENS, Server, broken_off, demonstrated, serving
from scipy.stats import binomtest
from starlette.responses import JSONResponse

from actors.cli import main
from rl.trajectory import read_parquet

QUICK = "configs/quickstart.yaml"


def evaluate(server: Server, root: Path, *more: str, monkeypatch, capsys) -> tuple[int, str, str]:
    """The command in this process."""
    asked = ["eval", QUICK, "--endpoint", server.url, "--model", "scripted", f"run.root={root}", *more]
    monkeypatch.setattr(sys, "argv", ["repertory", *asked])
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(ROOT)
    try:
        main()
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    return code, *capsys.readouterr()


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    def run(server: Server, *more: str) -> tuple[int, str, str]:
        return evaluate(server, tmp_path, *more, monkeypatch=monkeypatch, capsys=capsys)

    return run


def line_of(folder: Path) -> dict:
    (line,) = (folder / "eval.jsonl").read_text().splitlines()
    return json.loads(line)


def wrong_sometimes(question: str, turn: int, body: dict):
    """Right where the seed of the first turn allows it: a different sample, a different outcome."""
    return {"content": "0"} if turn == 0 and body["seed"] % 3 == 0 else demonstrated(question, turn)


def test_the_figures_are_those_of_what_was_played(tmp_path, run):
    with serving(Server(says=wrong_sometimes)) as server:
        more = ("stages.0.n=24", "stages.0.samples=4", "rollout.max_turn_tokens=33", "--parallel=5")
        code, out, err = run(server, *more)
    assert code == 0, out + err
    folder = tmp_path / "quickstart-eval-scripted-1"
    line, rows = line_of(folder), read_parquet(folder / "trajectories" / "eval-00-sampled.parquet")
    assert len(rows) == 24 * 4 and 1 < server.most <= 5
    by_task: dict[str, list[bool]] = {}
    for row in rows:
        messages = json.loads(row["messages"])
        by_task.setdefault(row["task"], []).append(messages[-1]["content"] == row["answer"])
        assert row["success"] == (messages[-1]["content"] == row["answer"])
        turns = len(row["turn_rewards"])
        assert sum(row["loss_mask"]) == turns * TURN_TOKENS
        assert len(row["tokens"]) == PROMPT_TOKENS + turns * TURN_TOKENS + (turns - 1) * SEEN_TOKENS
        assert set(row["tokens"]) == {-1}, "ids that nobody knows"
    rates = [fmean(s) for s in by_task.values()]
    assert 0.3 < fmean(rates) < 0.9
    assert line["success"] == pytest.approx(fmean(rates))
    half = 1.959964 * np.std(rates, ddof=1) / np.sqrt(24)
    assert line["success_high"] - line["success"] == pytest.approx(half, rel=1e-4)
    turns = [len(row["turn_rewards"]) for row in rows]
    for k in range(1, 9):
        within = [row["success"] and t <= k for row, t in zip(rows, turns, strict=True)]
        assert line["success_by_turn_budget"][str(k)] == pytest.approx(fmean(within))
    budgets = [line["success_by_turn_budget"][str(k)] for k in range(1, 9)]
    assert line["turn_slope"] == pytest.approx(np.polyfit(range(1, 9), budgets, 1)[0])
    chosen = [fmean(any(pick) for pick in combinations(s, 2)) for s in by_task.values()]
    assert line["pass_at"]["2"] == pytest.approx(fmean(chosen))
    assert line["mean_turns"] == pytest.approx(fmean(turns))
    assert line["mean_tokens"] == pytest.approx(fmean(turns) * TURN_TOKENS)
    assert line["requests"] == server.requests and line["wall_s"] > 0
    told = json.loads((folder / "report.json").read_text())
    assert told["success"] == line["success"]
    for word in ("SR_8", "pass@4", "a turn more", "seconds in all", f"{line['success']:.3f}"):
        assert word in out
    sampled = [b for b in server.bodies if b["temperature"] == 1.0]
    assert {b["max_tokens"] for b in server.bodies} == {33}
    assert sampled[0]["tools"][0]["function"]["name"] == "calculator"
    assert len({b["seed"] for b in sampled}) == sum(turns), "a seed of its own for every turn"


def test_one_episode_a_task_has_wilsons_interval(tmp_path, run):
    with serving(Server(says=wrong_sometimes)) as server:
        code, out, err = run(server, "stages.0.n=30", "stages.0.greedy=false")
    assert code == 0, out + err
    line = line_of(tmp_path / "quickstart-eval-scripted-1")
    known = binomtest(round(line["success"] * 30), 30).proportion_ci(method="wilson")
    assert (line["success_low"], line["success_high"]) == pytest.approx((known.low, known.high), abs=1e-6)


def fails_often(number: int):
    if number % 10 == 1:
        return JSONResponse({"error": {"message": "slow down"}}, 429, headers={"retry-after": "0"})
    return JSONResponse({"error": "oh"}, 500) if number % 10 == 4 else broken_off() if number % 10 == 7 else None


def test_a_server_that_fails_often_costs_time_and_no_success(tmp_path, run):
    with serving(Server(fault=fails_often)) as server:
        code, out, err = run(server, "stages.0.n=10", "stages.0.greedy=false")
    assert code == 0, out + err
    line = line_of(tmp_path / "quickstart-eval-scripted-1")
    assert line["success"] == 1.0 and line["retries"] == server.faults > 5
    assert set(server.played.values()) == {1}, "no turn is paid for twice"


def test_a_lasting_failure_ends_it_and_nothing_is_lost(tmp_path, run):
    gone = JSONResponse({"error": {"message": "down for maintenance"}}, 503)
    with serving(Server(fault=lambda number: gone if number > 40 else None)) as server:
        code, out, err = run(server, "stages.0.n=30", "faults.patience_s=1", "--parallel=4")
        assert code == 2 and "down for maintenance" in err and "--resume" in err and "Traceback" not in out + err
        folder = tmp_path / "quickstart-eval-scripted-1"
        assert not (folder / "eval.jsonl").exists()
        done = {tuple(r["key"]): r["task"] for r in records(folder) if "score" in r}
        assert done
        server.fault, before = lambda number: None, server.requests
        server.played.clear()
        code, out, err = run(server, "stages.0.n=30", "--resume")
    assert code == 0, out + err
    assert server.requests > before
    again = {(q, t > 0) for _, q, _, t, _ in server.played}
    assert not again & {(task.removeprefix("calc:"), mode == "sampled") for (mode, _, _), task in done.items()}
    assert line_of(folder)["success"] == 1.0 and not (tmp_path / "quickstart-eval-scripted-2").exists()


def records(folder: Path) -> list[dict]:
    text = (folder / "episodes.jsonl").read_text() if (folder / "episodes.jsonl").exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def test_a_killed_evaluation_goes_on_and_counts_nothing_twice(tmp_path):
    folder = tmp_path / "quickstart-eval-scripted-1"
    with serving(Server(delay_s=0.05)) as server:
        asked = ["eval", QUICK, "--endpoint", server.url, "--model", "scripted", f"run.root={tmp_path}", "--parallel=3"]
        asked += ["stages.0.n=20"]
        process = started(*asked)
        deadline = time.monotonic() + 60
        while sum("score" in r for r in records(folder)) < 9:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        done = {tuple(r["key"]) for r in records(folder) if "score" in r}
        with (folder / "episodes.jsonl").open("a") as file:
            file.write('{"key": ["sampled", 1')  # a line that was being written
        server.delay_s = 0.0
        finished = repertory(*asked, "--resume")
        assert finished.returncode == 0, finished.stdout + finished.stderr
        again = repertory(*asked, "--resume")
    assert "is there already" in again.stdout
    files = [folder / "trajectories" / f"eval-00-{mode}.parquet" for mode in ("sampled", "greedy")]
    rows = [row for file in files for row in read_parquet(file)]
    assert len(rows) == 40 and all(row["success"] for row in rows) and line_of(folder)["n"] == 20
    # Only what was under way at the kill was asked for twice: three episodes.
    twice = {(question, temperature) for (_, question, _, temperature, _), n in server.played.items() if n > 1}
    assert len(done) >= 9 and len(twice) <= 3
    keys = [tuple(r["key"]) for r in records(folder) if "score" in r]
    assert len(keys) == len(set(keys)) == 40


SECRET = "sk-very-secret-4711"


def test_the_key_is_sent_and_written_nowhere(tmp_path, run, monkeypatch):
    monkeypatch.setenv("MY_KEY", SECRET)
    with serving(Server(key=SECRET)) as server:
        more = ("--api-key-env", "MY_KEY", "stages.0.n=3", "stages.0.greedy=false")
        code, out, err = run(server, *more, "reward.function=grading.sees_the_key")
        assert code == 0, out + err
        assert {h["authorization"] for h in server.headers} == {f"Bearer {SECRET}"}
        server.key = "another"
        code, refused, told = run(server, *more)
    assert code == 2 and "does not take the key in MY_KEY" in told and "Incorrect API key" in told
    assert SECRET not in out + err + refused + told
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    assert line_of(tmp_path / "quickstart-eval-scripted-1")["success"] == 0.0, "nor does a reward function see it"


def test_mistakes_are_one_message_and_leave_nothing(tmp_path, run, monkeypatch):
    with serving(Server(key="k")) as server:
        closed = Server(url="http://127.0.0.1:9/v1")
        for asked, more, says in (
            (server, (), "it wants a key: name its variable by --api-key-env"),
            (server, ("--api-key-env", "NO_SUCH"), "NO_SUCH: this environment variable is not set"),
            (Server(url="http://me:pw@127.0.0.1/v1"), (), "leave user, password"),
            (Server(url="localhost:8000"), (), "give a URL like"),
            (closed, ("faults.patience_s=1",), "ConnectError"),
            (server, ("reward.model=/tmp", "stages.0.n=1"), "reward.model"),
            (server, ("--feedback",), "--feedback compares an environment's feedback with none"),
        ):
            code, out, err = run(asked, *more)
            assert code == 2 and says in err and err.startswith("error:") and "Traceback" not in out + err, err
        monkeypatch.setenv("KEY", "k")
        server.models = ("other",)
        code, out, err = run(server, "--api-key-env", "KEY")
        assert code == 2 and "The model `scripted` does not exist" in err
        server.url = server.url.removesuffix("/v1") + "/v2"
        code, out, err = run(server, "--api-key-env", "KEY")
        assert code == 2 and "HTTP 404" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["raises", "dies", "hangs"])
def test_what_cannot_be_graded_is_no_failure(tmp_path, run, how, monkeypatch):
    """Every third task's grader fails, and then works: what was played is graded, and not played again."""
    mark = tmp_path / "mended"
    monkeypatch.setenv("GRADING_MENDED", str(mark))
    more = ["stages.0.n=12", "stages.0.greedy=false", f"reward.function=grading.{how}", "faults.grading_s=2"]
    with serving(Server()) as server:
        code, out, err = run(server, *more)
        assert code == 0, out + err
        line = line_of(tmp_path / "quickstart-eval-scripted-1")
        assert 0 < line["not_graded"] < 12 and line["n"] == 12 - line["not_graded"] and line["success"] == 1.0
        assert "episodes not graded" in out
        mark.touch()
        code, out, err = run(server, *more, "--resume")
    assert code == 0, out + err
    line = line_of(tmp_path / "quickstart-eval-scripted-1")
    assert line["not_graded"] == 0 and line["n"] == 12 and line["success"] == 1.0
    assert set(server.played.values()) == {1}


def test_a_full_context_ends_the_episode_and_a_refused_task_is_told(tmp_path, run):
    full = JSONResponse({"error": {"message": "This model's maximum context length is 100 tokens."}}, 400)
    odd = JSONResponse({"error": {"message": "flagged by the content filter"}}, 400)

    def says(question, turn, body):
        if turn == 3 and len(question) % 2:
            return full
        return odd if turn == 0 and len(question) % 5 == 0 and server.requests > 5 else demonstrated(question, turn)

    with serving(Server(says=says)) as server:
        code, out, err = run(server, "stages.0.n=25", "stages.0.greedy=false", "--parallel=1")
    assert code == 0, out + err
    folder = tmp_path / "quickstart-eval-scripted-1"
    line, rows = line_of(folder), read_parquet(folder / "trajectories" / "eval-00-sampled.parquet")
    cut = [row for row in rows if row["stop_reason"] == "max_tokens"]
    assert cut and all(not row["success"] and row["turn_flags"][-1] == ["truncated"] for row in cut)
    assert line["truncated"] == pytest.approx(len(cut) / len(rows))
    assert line["not_played"] == 25 - len(rows) > 0 and "episodes not played" in out
    assert "flagged by the content filter" in (folder / "logs" / "run.log").read_text()


def test_a_server_without_usage_leaves_tokens_unsaid(tmp_path, run):
    with serving(Server(usage=False)) as server:
        code, out, err = run(server, "stages.0.n=2", "stages.0.greedy=false")
    assert code == 0, out + err
    assert line_of(tmp_path / "quickstart-eval-scripted-1")["mean_tokens"] is None


def test_two_models_are_set_side_by_side(tmp_path, run):
    def says(question, turn, body):
        return {"content": "0"} if body["model"] == "worse" and body["seed"] % 2 else demonstrated(question, turn)

    with serving(Server(says=says, models=("scripted", "worse"))) as server:
        code, out, err = run(server, "--model=worse", "stages.0.n=30", "stages.0.greedy=false")
        assert code == 0, out + err
        code, _, err = run(server, "--model=scripted", "stages.0.n=30")
        assert code == 2 and "named twice" in err
        code, _, err = run(server, "--model=worse", "run.name=mine")
        assert code == 2 and "run.name names one evaluation" in err
    told = json.loads((tmp_path / "quickstart-eval-worse-1" / "report.json").read_text())
    found = told["against_first"]
    assert found["n"] == 30 and found["mean"] == pytest.approx(told["success"] - 1) and found["high"] < 0
    row = next(line for line in out.splitlines() if "worse-1: worse" in line and f"{found['mean']:+.3f}" in line)
    assert f"{found['low']:+.3f} to {found['high']:+.3f}" in row


def test_it_needs_neither_ray_nor_engines(tmp_path):
    code = (
        "import sys; from actors.eval_command import Asked, run_evaluations; from rich.console import Console;"
        "from pathlib import Path;"
        f"run_evaluations(Asked([Path({QUICK!r})], ['stages.0.n=2', 'run.root={tmp_path}'], sys.argv[1], ['scripted']),"
        "Console()); print('has', sorted({'ray', 'torch', 'vllm', 'transformers', 'deepspeed'} & set(sys.modules)))"
    )
    with serving(Server()) as server:
        done = subprocess.run([sys.executable, "-c", code, server.url], capture_output=True, text=True, cwd=ROOT)
    assert "has []" in done.stdout, done.stdout + done.stderr


def test_view_and_compare_read_its_folder(tmp_path, run):
    with serving(Server(says=wrong_sometimes)) as server:
        for _ in range(2):
            assert run(server, "stages.0.n=9", "stages.0.greedy=false")[0] == 0
    folders = [str(tmp_path / f"quickstart-eval-scripted-{i}") for i in (1, 2)]
    shown = repertory("view", folders[0], "--success", "--episodes=1")
    assert shown.returncode == 0 and "7 tokens" in shown.stdout and "log-prob" not in shown.stdout
    compared = repertory("compare", *folders)
    assert compared.returncode == 0 and "+0.000" in compared.stdout, "the same seeds, the same episodes"


def test_what_feedback_is_worth_to_a_model_that_needs_it(tmp_path, run):
    """It runs code, and then answers right if an expert has spoken."""

    def says(question, turn, body):
        if turn == 0:
            return {"content": "```python\nprint(1)\n```"}
        right = eval(re.findall(r"[\d +*-]+(?= =)", question)[-1])
        return {"content": f"\\boxed{{{right if 'Expert feedback' in str(body['messages'][-1]) else 'none'}}}"}

    env = "env={name: python, datasets: [{dataset: chain_sum}], feedback: {setting: GT}}"
    more = (env, "stages.0.n=6", "stages.0.greedy=false", "--feedback")
    with serving(Server(says=says)) as server:
        code, out, err = run(server, *more)
        assert code == 0, out + err
        played = server.requests
        assert run(server, *more, "--resume")[0] == 0 and server.requests == played
    assert "+1.000" in next(line for line in out.splitlines() if "scripted-1: scripted" in line and "+" in line)
    told = json.loads((tmp_path / "quickstart-eval-scripted-1" / "report.json").read_text())["delta_feedback"]
    assert told["mean"] == 1.0 and told["n"] == 6
