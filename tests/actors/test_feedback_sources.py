"""Feedback from a real engine and from a real HTTP server: what is asked, what fails, and what never shows."""

import asyncio
import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from conftest import started, wait_until

from actors.doctor import Room, Size, check_gpu_memory
from actors.doctor import check_model as doctor_check_model
from actors.endpoint import EndpointTeacher
from actors.faults import is_infra
from actors.feedback import FeedbackGenerator, make_teacher
from actors.placement import demands
from actors.preflight import check_model, check_world, choose_device
from actors.role import bound_threads, remote_class
from rl.chat import ChatCodec
from rl.config_env import FeedbackConfig
from rl.config_file import ConfigError, dump_config
from rl.env import InfraError, World
from rl.episode import Identity, Limits, run_episode
from rl.feedback import asked, played
from rl.metrics import read_lines
from rl.policy import Sampling, ScriptedPolicy
from rl.pretrained import load_tokenizer, prepare_model
from rl.trajectory import read_parquet, to_trajectory

KEY = "sk-very-secret-4711"
SMALL = ("model.scratch.layers=2", "model.scratch.hidden=64", "model.scratch.heads=2", "model.max_length=900")
ENV = "env={{name: python, datasets: [{{dataset: gcd}}], style: tags, max_turns: 3, feedback: {}}}"
TURNS = [{"role": "assistant", "content": f"<execute>print({i})</execute>"} for i in range(3)]


# -- an endpoint ------------------------------------------------------------------------------------------------------


@dataclass
class Server:
    """Answers with what it is told, in order; the last again and again. A status, or a text to say."""

    url: str = ""
    answers: list[int | str | bytes] = field(default_factory=list)
    bodies: list[dict] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    told = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            told.keys.append(self.headers["Authorization"])
            told.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            answer = told.answers[min(len(told.bodies), len(told.answers)) - 1]
            completion = {"choices": [{"message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}]}
            if isinstance(answer, int):
                reply = json.dumps({"error": {"message": f"no, {self.headers['Authorization']}"}}).encode()
            else:
                reply = answer if isinstance(answer, bytes) else json.dumps(completion).encode()
            self.send_response(answer if isinstance(answer, int) else 200)
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *arguments):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    told.url = f"http://127.0.0.1:{http.server_port}/v1"
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield told
    http.shutdown()
    http.server_close()


@pytest.fixture
def endpoint(server, monkeypatch):
    monkeypatch.setenv("FEEDBACK_KEY", KEY)

    def make(patience_s: float = 60.0, **settings) -> EndpointTeacher:
        given = {"setting": "GT", "source": "endpoint", "model": "teacher", "url": server.url}
        return EndpointTeacher(FeedbackConfig(**{**given, "key_variable": "FEEDBACK_KEY", **settings}), patience_s)

    return make


def test_it_asks_as_openais_chat_completions_are_asked_and_again_after_a_failure(server, endpoint):
    server.answers = [500, 429, "Add again."]
    assert asyncio.run(endpoint().answer("How was it?", "s", 7)) == "Add again."
    assert len(server.bodies) == 3 and server.keys == [f"Bearer {KEY}"] * 3
    assert server.bodies[0] == server.bodies[2] == {
        "model": "teacher", "messages": [{"role": "user", "content": "How was it?"}],
        "temperature": 0, "max_tokens": 512,
    }  # fmt: skip
    asyncio.run(endpoint(temperature=0.5, max_length=700, max_tokens=500).answer("x" * 1000, "s", 7))
    assert server.bodies[-1]["seed"] == 7
    assert len(server.bodies[-1]["messages"][0]["content"]) < 700, "three characters for each of 200 tokens"
    asyncio.run(endpoint(key_variable=None).answer("x", "s", 7))
    assert server.keys[-1] is None


@pytest.mark.parametrize(
    ("answer", "again"), [(503, True), (429, True), (b"<html>", True), (b"{}", True), (401, False), (404, False)]
)
def test_a_lasting_failure_is_ours_and_never_tells_the_key(server, endpoint, answer, again, caplog):
    server.answers = [answer]
    with caplog.at_level(logging.DEBUG), pytest.raises(InfraError) as failed:
        asyncio.run(endpoint(patience_s=1.0).answer("x", "s", 0))
    assert (len(server.bodies) > 1) == again and is_infra(failed.value)
    assert server.keys[0] == f"Bearer {KEY}", "it was sent"
    assert KEY not in str(failed.value) and KEY not in caplog.text
    assert failed.value.__cause__ is None


def test_nobody_there_is_a_lasting_failure_and_a_refused_prompt_is_the_tasks(server, endpoint):
    with pytest.raises(InfraError, match="has failed for 0 s: ConnectError"):
        asyncio.run(endpoint(patience_s=0.1, url="http://127.0.0.1:9/v1").answer("x", "s", 0))
    server.answers = ["Good.", 400]

    async def twice() -> None:
        teacher = endpoint()
        await teacher.answer("x", "s", 0)
        await teacher.answer("x", "s", 0)

    with pytest.raises(ValueError, match="refused a prompt: HTTP 400") as refused:
        asyncio.run(twice())
    assert not is_infra(refused.value) and len(server.bodies) == 2


def test_a_slow_answer_is_asked_for_again(server, endpoint):
    """The server's queue takes the connection and nobody answers."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(InfraError, match="ReadTimeout"):
            asyncio.run(endpoint(patience_s=0.3, url=url, timeout_s=0.2).answer("x", "s", 0))


def test_the_key_shows_nowhere(endpoint, quickstart_config):
    teacher = endpoint()
    assert KEY not in repr(teacher) and KEY not in repr(vars(teacher))
    config = quickstart_config(f"env.feedback={teacher._config.model_dump_json()}")
    assert KEY not in dump_config(config) and KEY not in repr(config)
    assert "FEEDBACK_KEY" in dump_config(config)


def test_a_key_that_is_not_there_is_one_clear_message(quickstart_config, monkeypatch):
    settings = "{setting: GT, source: endpoint, model: m, url: 'http://x', key_variable: NO_SUCH_KEY}"
    config = quickstart_config(f"env.feedback={settings}")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="the environment variable NO_SUCH_KEY is not set"):
        check_world(config)
    with pytest.raises(ValueError, match="NO_SUCH_KEY"):
        make_teacher(config, [])
    check_world(quickstart_config(f"env.feedback={settings}", "env.feedback.setting=none"))


def play(config, teacher):
    """An episode of three turns, and its codec."""
    codec = ChatCodec(load_tokenizer(config.model.path))
    world, identity = World(config.env, 0), Identity(0, 0, "t")
    env = played(world, teacher, identity=identity, max_turns=3, seed=0)

    async def run():
        return await run_episode(
            env, world.source.task("train", 0), ScriptedPolicy(codec, iter(TURNS)), codec,
            sampling=Sampling(max_tokens=100), limits=Limits(3, 4000), identity=identity,
        )  # fmt: skip

    return run, codec


# -- a checkpoint -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(quickstart_config, tmp_path_factory) -> str:
    config = quickstart_config(*SMALL, ENV.format("{}"))
    return str(prepare_model(config.model, World(config.env, 0), 0, tmp_path_factory.mktemp("m") / "m"))


@pytest.fixture(scope="module")
def config(quickstart_config, folder):
    feedback = f"{{setting: GT, source: checkpoint, model: {folder}, max_tokens: 12, max_length: 900}}"
    return quickstart_config(ENV.format(feedback), f"model={{path: {folder}, max_length: 900}}")


def test_an_endpoint_that_stays_away_ends_the_episode_and_is_no_reward(server, endpoint, config):
    server.answers = ["Again.", 503]
    settings = config.env.model_copy(update={"feedback": endpoint()._config})
    run, _ = play(config.model_copy(update={"env": settings}), endpoint(patience_s=0.1))
    with pytest.raises(InfraError, match="HTTP 503"):
        asyncio.run(run())
    assert "Again." in server.bodies[1]["messages"][0]["content"]


@pytest.fixture(scope="module")
def actor(ray_cluster, config, folder):
    options = {"num_cpus": 0, "max_concurrency": 64, "max_restarts": -1}
    made = remote_class(FeedbackGenerator).options(**options, runtime_env={"env_vars": bound_threads(1)})
    actor = made.remote(config, "cpu")
    ray.get(actor.open.remote(folder))
    yield actor
    ray.kill(actor)


def test_a_served_model_gives_feedback_as_it_would_speak_itself(actor, config, folder):
    """Against plain transformers, and again by the actor that takes its place after its death."""
    from transformers import AutoModelForCausalLM

    async def twice():
        teacher = make_teacher(config, [actor])
        run, codec = play(config, teacher)
        first = await run()
        status = await actor.status.remote()
        os.kill(status["pid"], signal.SIGKILL)
        again = asyncio.ensure_future(play(config, teacher)[0]())
        while True:
            try:
                await actor.open.remote(folder)
                break
            except ray.exceptions.RayActorError:
                await asyncio.sleep(0.2)
        return first, await again, status, codec

    episode, again, status, codec = asyncio.run(twice())
    assert status["role"] == "feedback" and status["calls"]["submit"] == 2
    model = AutoModelForCausalLM.from_pretrained(folder)
    for k in (0, 1):
        turns = [[{"role": "assistant", "content": t.text}, *t.observation] for t in episode.turns[: k + 1]]
        said = [*episode.prompt, *(m for turn in turns for m in turn)]
        shown, _, heard = said[-1]["content"].partition("\nExpert feedback: ")
        said[-1] = {**said[-1], "content": shown}
        ids = codec.prompt([{"role": "user", "content": asked(said, config.env.feedback, episode.task.answer)}])
        assert len(ids) <= 888, "or it would be cut"
        greedy = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
        assert heard == codec.text(greedy).strip() and heard
        assert "feedback" in episode.turns[k].flags
    t = to_trajectory(episode)
    said = codec.text(t.tokens[(t.turn == 0) & ~t.loss_mask])
    assert said.count("Expert feedback: ") == 1 and "Expert" not in codec.text(t.tokens[t.loss_mask])
    assert again.context_ids == episode.context_ids
    assert episode.turns[2].flags == () and "Expert" not in str(episode.turns[2].observation)


def test_an_episode_longer_than_the_model_takes_is_cut_in_its_middle(actor, config, folder):
    teacher = make_teacher(config, [actor])
    ids = teacher._encoded("begin " + "word " * 4000 + " end")
    assert len(ids) <= 888
    text = teacher._codec.text(ids)
    assert "begin" in text and "end" in text and "characters left out" in text
    assert asyncio.run(teacher.answer("x " * 5000, "s", 0)) is not None


# -- a run ------------------------------------------------------------------------------------------------------------


def test_the_role_is_asked_for_where_a_model_gives_feedback_and_only_there(config, tmp_path):
    two = config.feedback_actor.model_copy(update={"count": 2, "gpus": 0.5, "tensor_parallel": 2, "cpus": 0.2})
    config = config.model_copy(update={"feedback_actor": two})
    assert [str(d) for d in demands(config) if d.role == "feedback"] == ["feedback: 2 x 0.2 CPU + 1 GPU"]
    off = config.env.model_copy(update={"feedback": FeedbackConfig()})
    assert not [d for d in demands(config.model_copy(update={"env": off})) if d.role == "feedback"]
    check_model(config)
    gone = config.env.model_copy(update={"feedback": config.env.feedback.model_copy(update={"model": "./gone"})})
    with pytest.raises(ConfigError, match=r"\./gone"):
        check_model(config.model_copy(update={"env": gone}))
    cuda = {"device": "cuda", "learner": config.learner.model_copy(update={"gpus": 1})}
    with pytest.raises(ConfigError, match=r"feedback_actor\.gpus is 0"):
        choose_device(config.model_copy(update={**cuda, "feedback_actor": two.model_copy(update={"gpus": 0})}))
    assert choose_device(config.model_copy(update=cuda)) == "cuda"
    qwen = config.env.model_copy(update={"feedback": config.env.feedback.model_copy(update={"model": "a/Qwen-7B"})})
    large = config.model_copy(update={"env": qwen})
    found = {c.name: c for c in check_gpu_memory(large, Size(1e6, 1000, ""), Room("here", 1, 1, 4 << 30, 0))}
    assert found["generator memory"].ok and not found["feedback memory"].ok, "7e9 parameters do not go into 4 GiB"
    assert "env.feedback.max_length" in found["feedback memory"].remedy
    assert "a/Qwen-7B" in [c.found.split()[0] for c in doctor_check_model(large)]


def test_a_run_with_feedback_outlives_who_gives_it_and_trains_on_none_of_it(config, folder, tmp_path):
    settings = {
        "run": {"name": "feedback", "root": str(tmp_path)},
        "model": {"path": folder, "max_length": 900},
        "env": config.env.model_dump(mode="json"),
        "rollout": {"max_turn_tokens": 12},
        "stages": [
            {"kind": "rl", "steps": 8, "tasks_per_step": 2, "algo": {"group_size": 2}},
            {"kind": "eval", "n": 2, "greedy": False},
        ],
    }  # fmt: skip
    path, run = tmp_path / "feedback.yaml", tmp_path / "feedback"
    path.write_text(json.dumps(settings))
    process = started("train", str(path))
    wait_until(run, process, lambda s: s.stage_step >= 1)
    roles = {line["role"]: line["pid"] for line in read_lines(run / "logs" / "actors.jsonl")}
    os.kill(roles["feedback"], signal.SIGKILL)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    lines = read_lines(run / "metrics.jsonl")
    assert len(lines) == 8 and sum(line.get("faults/restarts_feedback", 0) for line in lines) == 1
    assert all(line["num_feedback/mean"] > 0 for line in lines) and any("idle/feedback" in line for line in lines)
    codec = ChatCodec(load_tokenizer(folder))
    files = sorted(Path(run / "trajectories").glob("*.parquet"))
    assert len(files) == 9
    for row in [row for file in files for row in read_parquet(file)]:
        tokens, mask, turn = (np.asarray(row[name]) for name in ("tokens", "loss_mask", "turn"))
        assert row["turn_flags"] and "feedback" not in row["turn_flags"][-1]
        for k, flags in enumerate(row["turn_flags"][:-1]):
            told = "Expert feedback: " in codec.text(tokens[(turn == k) & ~mask].tolist())
            assert told == ("feedback" in flags)
