"""The Python environment, played through the episode loop in real sandboxes."""

import asyncio
import contextlib
import json
import os
import random
import re
import time
from collections import Counter
from dataclasses import replace

import psutil
import pytest

from rl.config_env import PythonConfig
from rl.env import Action, Demonstrator, ToolCall, World
from rl.envs import reasoning
from rl.envs.python import Python, final_answer, own_answer, right, said, shortened
from rl.envs.python_solutions import SOLUTIONS
from rl.envs.python_styles import Fenced, Tags, ToolCalls, boxed
from rl.episode import Identity, Limits, StopReason, run_episode
from rl.policy import Completion, Sampling, ScriptedPolicy
from rl.sandbox import Result
from rl.task import Task

SUM = {"dataset": "chain_sum", "settings": {"min_terms": 2, "max_terms": 3}}
GCD = {"dataset": "gcd", "weight": 3.0}
TASK = Task("sum:1", {"prompt": [{"role": "user", "content": "What is 17 + 4?"}]}, "21")


def config(**settings) -> PythonConfig:
    return PythonConfig(name="python", **{"datasets": [SUM, GCD], **settings})


def say(text: str):
    return {"role": "assistant", "content": text}


def call(code: str):
    function = {"name": "python", "arguments": {"code": code}}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def fence(code: str) -> str:
    return f"```python\n{code}\n```"


@pytest.fixture
def play(codec):
    async def play(turns, settings: PythonConfig, task: Task = TASK, turns_most: int | None = None):
        limits = Limits(turns_most or settings.max_turns, 4000)
        policy = turns if hasattr(turns, "act") else ScriptedPolicy(codec, iter(turns))
        return await run_episode(
            Python(settings), task, policy, codec, sampling=Sampling(max_tokens=400), limits=limits,
            identity=Identity(0, 0, task.id),
        )  # fmt: skip

    return play


def seen(episode, turn: int) -> str:
    return str(episode.turns[turn].observation[0]["content"])


# -- what a turn says -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code", "answer", "rest"),
    [
        ("So.\n```python\nprint(1)\n```", "print(1)\n", None, ""),
        ("```\nx\n``` and ```python\ny\n```", "x\n", None, " and ```python\ny\n```"),
        ("```py\nx\n```\nThe output is 5, so \\boxed{5}", "x\n", None, "\nThe output is 5, so \\boxed{5}"),
        ("It is \\boxed{\\frac{1}{2}}. ```python\nx\n```", None, "\\frac{1}{2}", ". ```python\nx\n```"),
        ("<<< 12 >>> done", None, "12", " done"),
        ("```python\nnever closed", None, None, None),
        ("\\boxed{never closed", None, None, None),
        ("no idea", None, None, None),
    ],
)
def test_a_fenced_turn_is_its_first_code_or_answer(text, code, answer, rest):
    move = Fenced().move(Action(text))
    assert (move.code, move.answer) == (code, answer)
    assert (text[move.end :] if move.end is not None else None) == rest


def test_a_tagged_turn_is_its_first_tag_and_others_are_invalid():
    move = Tags().move(Action("<thought>t</thought><execute>\nx = 1\n</execute><solution>3</solution>"))
    assert (move.code, move.answer, move.end) == ("x = 1", None, 46)
    assert Tags().move(Action("<solution> 3 </solution>")).answer == "3"
    for text in ("3", "<execute>x</solution>", "<solution>3"):
        assert Tags().move(Action(text)).error == Tags.invalid


@pytest.mark.parametrize(
    ("action", "error"),
    [
        (Action("", error="malformed call: not JSON"), "error: malformed call: not JSON"),
        (Action("", tool_calls=(ToolCall("python", {"code": "1"}),) * 2), "error: one call a turn"),
        (Action("", tool_calls=(ToolCall("bash", {"code": "1"}),)), "error: no tool bash"),
        (Action("", tool_calls=(ToolCall("python", {"code": 1}),)), "error: a call takes code, a text"),
        (Action("", tool_calls=(ToolCall("python", {"code": "1", "x": 1}),)), "error: a call takes code, a text"),
    ],
)
def test_a_call_that_cannot_be_made_is_named(action, error):
    assert ToolCalls().move(action).error == error


@pytest.mark.parametrize(
    "unit",
    ["<<<", ">>>", "<<<>>", "\\boxed{", "```python\n", "```py ", "```", "<execute>", "<solution>", "</execute>", "`"],
)
def test_a_text_is_read_once(unit):
    """Time grows with the length of a text: what never closes is not looked for again from each opening."""
    text = unit * (60_000 // len(unit))
    started = time.process_time()
    for style in (Fenced(), Tags()):
        assert style.move(Action(text + "\n")).code in (None, "")
    assert time.process_time() - started < 1


def test_openings_are_read_as_regular_expressions_read_them():
    """The plain, quadratic ones that say what is meant."""
    fence = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
    tags = re.compile(r"<(execute|solution)>(.*?)</\1>", re.DOTALL)
    angles = re.compile(r"\\boxed\{|<<<(.*?)>>>", re.DOTALL)
    parts = ["<<<", ">>>", "<", ">", "\\boxed{", "{", "}", "```", "`", "python", " ", "\n", "x", "```py\n", "```\n"]
    parts += ["<execute>", "</execute>", "<solution>", "</solution>"]
    rng, closed = random.Random(0), 0
    for _ in range(20_000):
        text = "".join(rng.choices(parts, k=rng.randrange(14)))
        found, move = tags.search(text), Tags().move(Action(text))
        assert move.end == (found.end() if found else None)
        assert (move.code if found and found[1] == "execute" else move.answer) == (
            None if not found else found[2].strip("\n") if found[1] == "execute" else found[2].strip()
        )
        found = angles.search(text)
        if found is None or found[1] is not None:
            assert boxed(text) == (None if found is None else (found[1].strip(), found.end()))
        else:
            assert (boxed(text) or ("", len(text) + 1))[1] > found.end()
        found, move = fence.search(text), Fenced().move(Action(text))
        if move.code is not None:
            closed += 1
            assert found is not None and (move.code, move.end) == (found[1], found.end())
        elif found is not None:
            assert (boxed(text) or ("", 0))[1] <= found.start()
    assert closed > 1000


def test_the_first_closed_box_is_the_answer():
    assert boxed("a \\boxed{1{2}3} \\boxed{4}") == ("1{2}3", 15)
    assert boxed("a") is None


# -- episodes ---------------------------------------------------------------------------------------------------------


async def test_code_is_run_its_output_shown_and_the_answer_scored(play):
    episode = await play([say(f"Let me see.\n{fence('print(17 + 4)')}"), say("\\boxed{21}")], config())
    assert seen(episode, 0) == "Code execution result: 21"
    assert episode.turns[0].observation[0]["role"] == "user"
    assert episode.stop_reason == StopReason.DONE and final_answer(episode) == "21"
    assert own_answer(TASK, episode) == 1
    wrong = await play([say("\\boxed{22}")], config())
    assert own_answer(TASK, wrong) == 0
    never = await play([say(fence("print(21)"))] * 2, config(max_turns=2))
    assert never.stop_reason == StopReason.MAX_TURNS and own_answer(TASK, never) == 0


async def test_by_tool_calls(play):
    episode = await play([call("x = 17 + 4\nprint(x)"), call("print(x)"), call("1/0"), say("21")], config(style="tool"))
    assert [seen(episode, i) for i in range(3)] == ["21", "21", "ZeroDivisionError: division by zero"]
    assert [t.flags for t in episode.turns] == [(), (), ("tool_error",), ()]
    assert episode.turns[0].observation[0]["role"] == "tool" and own_answer(TASK, episode) == 1


async def test_by_tags_steps_and_chances_are_stated_and_a_wrong_solution_is_said_to_be(play):
    turns = ["<execute>17 + 4</execute>", "hm", "<solution>20</solution>", "<solution>21</solution>"]
    episode = await play(map(say, turns), config(style="tags", max_turns=5, max_solutions=3))
    left = "\nYou have {} steps left and {} chances to propose a solution left."
    assert seen(episode, 0) == "Observation:\n21" + left.format(4, 3), "the last expression's value, as at a prompt"
    assert seen(episode, 1) == f"Observation:\n{Tags.invalid}" + left.format(3, 3)
    assert seen(episode, 2) == "Observation:\nYour answer is wrong." + left.format(2, 2)
    assert (episode.stop_reason, episode.turns[1].flags, own_answer(TASK, episode)) == (StopReason.DONE, ("void",), 1)
    opening = await Python(config(style="tags", max_turns=5, max_solutions=3)).reset(TASK)
    assert opening.messages[-1] == {"role": "user", "content": "What is 17 + 4?" + left.format(5, 3)}
    assert TASK.prompt["prompt"][-1]["content"] == "What is 17 + 4?"
    assert (await Python(config()).reset(TASK)).messages[-1]["content"] == "What is 17 + 4?"
    last = await play(map(say, turns[2:]), config(style="tags", max_solutions=1))
    assert len(last.turns) == 1 and own_answer(TASK, last) == 0


async def test_a_proposal_longer_than_a_scorer_is_given_is_wrong(play, monkeypatch):
    judged = []
    monkeypatch.setattr("rl.envs.python.right", lambda task, answer: judged.append(answer) or 1.0)
    settings = config(style="tags", max_turns=3, max_solutions=3)
    texts = [f"<solution>{'9' * 2001}</solution>", f"<solution>{'9' * 2000}</solution>"]
    env = Python(settings)
    await env.reset(TASK)
    steps = [await env.step(Action(text)) for text in texts]
    assert [step.done for step in steps] == [False, True] and judged == ["9" * 2000]
    assert "Your answer is wrong." in steps[0].observation.messages[0]["content"]


@pytest.mark.parametrize(
    ("style", "text", "taken"),
    [
        ("tool", "The answer is 4. Check it with\n```python\nprint(4)\n```", None),
        ("tool", "Not <solution>3</solution>, \\boxed{5}", None),
        ("fenced", "Not <solution>3</solution> but \\boxed{4}", "4"),
        ("fenced", "I would not <execute>print(1)</execute>. \\boxed{5}", "5"),
        ("tags", "\\boxed{5}, or\n```python\nprint(1)\n```\n<solution>4</solution>", "4"),
    ],
)
async def test_what_the_environment_took_is_graded(play, style, text, taken):
    settings = config(style=style, max_solutions=1)
    task = World(settings, 0).source.task("train", 0)
    assert json.loads(json.dumps(dict(task.prompt)))["python_style"] == style, "of an episode in a file too"
    episode = await play([say(text)], settings, task)
    assert episode.stop_reason == StopReason.DONE and len(episode.turns) == 1
    assert final_answer(episode) == (text.strip() if taken is None else taken)


@pytest.mark.parametrize("style", ["fenced", "tags", "tool"])
async def test_what_code_printed_is_graded_in_every_style(play, style):
    settings = config(style=style, answer_in_output=True)
    task = replace(TASK, prompt={**TASK.prompt, "python_style": style})
    code = "print('\\\\boxed{21}')"
    turn = {"fenced": say(fence(code)), "tags": say(f"<execute>{code}</execute>"), "tool": call(code)}[style]
    episode = await play([turn], settings, task)
    assert (episode.stop_reason, final_answer(episode)) == (StopReason.DONE, "21")


def test_rows_say_the_style_they_are_played_in(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"Half of {i}?", "answer": i, "kept": 7}) for i in range(40)))
    task = World(config(datasets=(), prompts=str(path), style="tool"), 0).source.task("train", 0)
    assert (task.prompt["python_style"], task.prompt["kept"]) == ("tool", 7)


class Sampled:
    """Says texts that the tokenizer encodes, with falling log-probs and a version a turn."""

    def __init__(self, codec, texts, end: bool):
        self.codec, self.texts, self.end, self.ids = codec, iter(texts), end, []

    async def act(self, token_ids, sampling, session):
        ids = self.codec._encode(next(self.texts)) + ([self.codec.end_of_turn] if self.end else [])
        self.ids.append(ids)
        return Completion(ids, [-0.1 * i for i in range(len(ids))], [7] * len(ids), "stop" if self.end else "length")


@pytest.mark.parametrize("end", [True, False])
async def test_what_a_turn_says_past_its_code_is_dropped_from_its_tokens(play, codec, end):
    kept = f"So:\n{fence('print(17 + 4)')}"
    policy = Sampled(codec, [f"{kept}\nCode execution result: 99\nThus \\boxed{{99}}", "\\boxed{21}"], end)
    episode = await play(policy, config())
    turn, sampled = episode.turns[0], policy.ids[0]
    assert list(turn.token_ids) == sampled[: len(turn.token_ids)] and len(turn.token_ids) < len(sampled)
    assert codec.text(turn.token_ids).startswith(kept) and "99" not in codec.text(turn.token_ids)
    assert turn.text == codec.text(turn.token_ids)
    assert list(turn.logprobs) == [-0.1 * i for i in range(len(turn.token_ids))]
    assert len(turn.versions) == len(turn.token_ids)
    assert turn.supplied_end and "truncated" not in turn.flags
    assert seen(episode, 0) == "Code execution result: 21"
    assert "99" not in codec.text(episode.context_ids)


async def test_a_turn_that_ends_by_itself_keeps_its_end(play, codec):
    policy = Sampled(codec, [f"{fence('print(1)')}\n", "\\boxed{21}"], True)
    episode = await play(policy, config())
    assert list(episode.turns[0].token_ids) == policy.ids[0] and not episode.turns[0].supplied_end


async def test_void_turns_end_the_episode_or_are_asked_for_more(play):
    stopped = await play([say("I do not know.")], config())
    assert (stopped.stop_reason, stopped.turns[0].flags) == (StopReason.DONE, ("void",))
    assert own_answer(TASK, stopped) == 0 and final_answer(stopped) is None
    asked = await play([say("21?"), say("\\boxed{21}")], config(void_turn="ask"))
    assert asked.turns[0].flags == ("void",) and "boxed" in seen(asked, 0) and own_answer(TASK, asked) == 1


async def test_an_answer_that_code_prints_counts_where_it_is_to(play):
    code = say(fence("print('\\\\boxed{%d}' % (17 + 4))"))
    episode = await play([code], config(answer_in_output=True))
    assert (episode.stop_reason, final_answer(episode), own_answer(TASK, episode)) == (StopReason.DONE, "21", 1)
    other = await play([code, say("\\boxed{3}")], config())
    assert len(other.turns) == 2 and own_answer(TASK, other) == 0


async def test_calls_are_counted_and_state_is_kept_or_not(play):
    turns = [say(fence("x = 5")), say(fence("print(x)")), say(fence("print(x)")), say("\\boxed{21}")]
    kept = await play(turns, config(max_calls=2))
    assert [seen(kept, i).removeprefix("Code execution result: ") for i in range(3)] == [
        "[Executed Successfully with No Output]", "5", "not run: the 2 calls are used up. Answer now.",
    ]  # fmt: skip
    assert kept.turns[2].flags == ("tool_error",)
    forgotten = await play(turns, config(stateful=False))
    assert "NameError" in seen(forgotten, 1)


def test_a_result_is_shown_in_short():
    long = Result("a" * 600 + "b" * 600, "Traceback\n  line\nValueError: no", 1, None)
    assert said(long, config(output_chars=100)) == f"{'a' * 50}\n[1100 characters left out]\n{'b' * 50}\nValueError: no"
    assert said(long, config(errors="traceback")).endswith("Traceback\n  line\nValueError: no")
    assert said(Result("", "", None, "wall"), config()) == "The code was stopped: it took too long."
    assert said(Result("\n", "", 0, None), config()) == "[Executed Successfully with No Output]"
    assert said(Result("", "", 3, None), config()) == "The code ended with status 3."
    assert said(Result("", "", None, None), config()) == "The code was killed."
    assert shortened("abcdef", 6) == "abcdef" and shortened("abcdefg", 5) == "abc\n[2 characters left out]\nfg"


async def test_a_stuck_call_ends_and_the_episode_goes_on(play):
    turns = [say(fence("x = 1")), say(fence("while True: pass")), say(fence("print(x)")), say("\\boxed{21}")]
    episode = await play(turns, config(sandbox={"wall_s": 3}))
    assert seen(episode, 1).endswith("The code was stopped: it took too long.")
    assert "NameError" in seen(episode, 2) and own_answer(TASK, episode) == 1


CHEATS = {
    "equal to everything": "class Any(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
    "    def __repr__(self): return '\\\\boxed{' + '7' + '}'\nprint(Any(7))",
    "success by its status": "import os, sys\nprint('\\\\boxed{7}')\nsys.stdout.flush()\nos._exit(0)",
    "a patched scorer": "import builtins, sys\nbuiltins.float = lambda x: 21.0\n"
    "for m in list(sys.modules.values()): m.__dict__.setdefault('score', lambda *a: 1.0)\nprint('\\\\boxed{7}')",
    "a made-up result": "import os\nfor d in range(1, 20):\n    try: os.write(d, b'0 -\\n\\\\boxed{7}\\n')\n"
    "    except OSError: pass",
}


@pytest.mark.parametrize("name", CHEATS)
async def test_code_does_not_grade_itself(play, name):
    """What counts is the text of an answer, read outside of the sandbox: 7 is not 21."""
    settings = config(answer_in_output=True)
    episode = await play([say(fence(CHEATS[name])), say("\\boxed{7}")], settings)
    assert "7" in str(final_answer(episode)) and own_answer(TASK, episode) == 0
    honest = await play([say(fence("print('\\\\boxed{21}')")), say("\\boxed{7}")], settings)
    assert own_answer(TASK, honest) == 1 and len(honest.turns) == 1


@pytest.mark.parametrize("backend", ["bubblewrap", "unsafe_local"])
async def test_no_answer_lies_where_code_can_read_it(play, backend, tmp_path):
    """In a file of ours, on a command line, in an environment."""
    secret = "918273645546372819"
    (tmp_path / "answers.txt").write_text(secret)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    code = (
        "import glob, os\nfound = []\n"
        f"for place in ({str(tmp_path)!r} + '/*', '/proc/*/environ', '/proc/*/cmdline'):\n"
        "    for path in glob.glob(place):\n"
        "        try: found += [path] * (b'918273' + b'645546372819' in open(path, 'rb').read())\n"
        "        except OSError: pass\n"
        "print('found' if found else 'nothing')"
    )
    task = Task("rows:1", TASK.prompt, secret)
    episode = await play([say(fence(code)), say("\\boxed{1}")], config(sandbox={"backend": backend}), task)
    shows = {"bubblewrap": "nothing", "unsafe_local": "found"}
    assert seen(episode, 0) == f"Code execution result: {shows[backend]}"


# -- tasks ------------------------------------------------------------------------------------------------------------


def solution(task: Task) -> str:
    """Code that finds the answer to a question of the two generators."""
    numbers = re.findall(r"\d+", task.prompt["entry"]["question"])
    if task.prompt["dataset"] == "gcd":
        return f"import math\nprint(math.gcd({', '.join(numbers)}))"
    return "print(" + re.search(r"-?\d+(?: [-+] -?\d+)+", task.prompt["entry"]["question"])[0] + ")"


class Oracle:
    """Writes the code, and answers with what it reads in the context."""

    def __init__(self, codec, task):
        self.codec, self.task, self.turn = codec, task, 0

    async def act(self, token_ids, sampling, session):
        text = fence(solution(self.task))
        if self.turn:
            output = self.codec.text(token_ids).rsplit("Code execution result:", 1)[1].split()[0]
            text = f"\\boxed{{{output}}}"
        self.turn += 1
        ids = self.codec.reply(say(text))
        return Completion(ids, [0.0] * len(ids), [0] * len(ids), "stop")


async def test_an_oracle_scores_full_marks_and_guesses_next_to_none_and_nothing_is_left(play, codec):
    settings = config()
    source = World(settings, 0).source
    tasks = [source.task("held_out", i) for i in range(40)]
    before = len(os.listdir("/proc/self/fd"))
    episodes = await asyncio.gather(*(play(Oracle(codec, t), settings, t) for t in tasks))
    assert [own_answer(t, e) for t, e in zip(tasks, episodes, strict=True)] == [1.0] * 40
    rng = random.Random(0)
    guesses = [await play([say(f"\\boxed{{{rng.randrange(100, 2000)}}}")], settings, t) for t in tasks]
    assert sum(own_answer(t, e) >= 1 for t, e in zip(tasks, guesses, strict=True)) <= 2
    assert len(os.listdir("/proc/self/fd")) == before
    again = await asyncio.gather(*(play(Oracle(codec, t), settings, t) for t in tasks[:5]))
    assert [e.context_ids for e in again] == [e.context_ids for e in episodes[:5]]


@pytest.mark.parametrize("style", ["fenced", "tags", "tool"])
async def test_a_demonstration_earns_full_marks_by_what_its_code_prints(play, style):
    """Of every generator that can be shown: the code's output is the answer that is stated after it."""
    settings = config(datasets=[{"dataset": name} for name in SOLUTIONS], style=style)
    source = World(settings, 0).source
    tasks = [source.task("train", i) for i in range(48)]
    assert {t.prompt["dataset"] for t in tasks} == set(SOLUTIONS)
    rng = random.Random(0)
    for task in tasks:
        episode = await play(source.demonstrate(task, rng, False), settings, task)
        assert own_answer(task, episode) == 1, task
        printed = seen(episode, 0).removeprefix("Code execution result: ").removeprefix("Observation:\n")
        assert right(task, printed.split("\nYou have")[0]) == 1
        assert episode.turns[0].flags == ()
    guesses = [await play(source.demonstrate(t, rng, True), settings, t) for t in tasks]
    assert sum(own_answer(t, e) for t, e in zip(tasks, guesses, strict=True)) < 10


def test_a_generator_without_a_solution_cannot_be_demonstrated():
    assert not isinstance(World(config(datasets=[GCD, {"dataset": "sudoku"}]), 0).source, Demonstrator)
    assert isinstance(World(config(datasets=[GCD]), 0).source, Demonstrator)


def test_the_mix_follows_weights_and_seed_and_its_splits_share_nothing():
    one, same, other = (World(config(), seed).source for seed in (0, 0, 1))
    train = [one.task("train", i) for i in range(400)]
    assert train == [same.task("train", i) for i in range(400)]
    assert train != [other.task("train", i) for i in range(400)]
    counts = Counter(t.prompt["dataset"] for t in train)
    assert 260 < counts["gcd"] < 340, "three of four"
    held_out = {one.task("held_out", i).prompt["entry"]["question"] for i in range(200)}
    assert not held_out & {t.prompt["entry"]["question"] for t in train}


def test_rows_are_scored_as_mathematics_and_a_bad_one_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Half of {i}?", "answer": f"\\frac{{{i}}}{{2}}"} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    source = World(config(datasets=(), prompts=str(path)), 0).source
    assert source.size("train") + source.size("held_out") == 40
    path.write_text("\n".join(map(json.dumps, [*rows, {"prompt": "x"}])))
    with pytest.raises(ValueError, match=r"rows\.jsonl: row 41: `answer` is missing"):
        World(config(datasets=(), prompts=str(path)), 0)


async def test_half_is_a_half_however_it_is_written(play):
    task = Task("rows:1", TASK.prompt, "\\frac{1}{2}")
    assert own_answer(task, await play([say("\\boxed{0.5}")], config(), task)) == 1


def test_what_cannot_be_played_is_refused_at_the_start():
    with pytest.raises(ValueError, match=r"env\.datasets\[1\]\.dataset: 'chain_sums'.*Did you mean chain_sum"):
        World(config(datasets=[SUM, {"dataset": "chain_sums"}]), 0)
    for given, told in (
        (
            {"max_term": 3},
            r"env\.datasets\[1\]\.settings\.max_term is not.*Did you mean env\.datasets\[1\]\.settings\.max_",
        ),
        ({"max_terms": "x"}, r"env\.datasets\[1\]\.settings\.max_terms is 'x'"),
        ({"size": 3}, r"env\.datasets\[1\]\.settings\.size is not yours"),
        ({"min_terms": 9, "max_terms": 2}, r"env\.datasets\[1\]\.settings of chain_sum"),
    ):
        with pytest.raises(ValueError, match=told):
            World(config(datasets=[GCD, {"dataset": "chain_sum", "settings": given}]), 0)
    with pytest.raises(ValueError, match=r"env\.sandbox: sandbox\.python: there is no /no/python"):
        World(config(sandbox={"python": "/no/python"}), 0)
    with pytest.raises(ValueError, match="math-verify cannot bound its time"):
        config(datasets=(), prompts="a.jsonl", style="tags")
    for settings in ({"datasets": ()}, {"prompts": "a.jsonl"}, {"held_out": "a.jsonl"}):
        with pytest.raises(ValueError):
            config(**settings)


async def test_a_scorer_that_fails_is_no_reward(play, monkeypatch):
    """An answer that it cannot read is worth nothing; one that cannot read the truth either is broken, and says so."""
    task = World(config(), 0).source.task("train", 0)
    episode = await play([say("\\boxed{what}")], config(), task)

    class Scorer:
        def __init__(self, broken):
            self.broken = broken

        def score_answer(self, answer, entry):
            if self.broken or answer != entry["answer"]:
                raise RuntimeError("no parser")
            return 1.0

    monkeypatch.setattr(reasoning, "_is_number", lambda answer: False)
    monkeypatch.setattr(reasoning, "_dataset", lambda *a: Scorer(broken=False))
    assert own_answer(task, episode) == 0
    monkeypatch.setattr(reasoning, "_dataset", lambda *a: Scorer(broken=True))
    with pytest.raises(RuntimeError, match="no parser"):
        own_answer(task, episode)


async def test_two_hundred_episodes_at_once_stay_small_and_the_slowest_delays_no_other(play):
    """Each with a process of its own that remembers; one of them sleeps through."""
    settings = config(sandbox={"wall_s": 60})
    done, peak = [], 0

    def resident() -> int:
        """Of all our sandboxes; what they share is counted once."""
        total = 0
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if any("What runs inside a sandbox" in part for part in process.cmdline()):
                    total += process.memory_full_info().pss
        return total

    async def one(number: int):
        first = "import time; time.sleep(20)" if number == 0 else f"x = {number}"
        episode = await play([say(fence(first)), say(fence("print(x)")), say("\\boxed{21}")], settings)
        done.append(number)
        return episode

    started = time.monotonic()
    calls = [asyncio.ensure_future(one(i)) for i in range(200)]
    while len(done) < 199 and time.monotonic() - started < 60:
        await asyncio.sleep(0.5)
        peak = max(peak, resident())
    assert len(done) == 199 and 0 not in done, "the sleeper is the last"
    calls[0].cancel()
    for number, episode in enumerate(await asyncio.gather(*calls[1:]), 1):
        assert seen(episode, 1) == f"Code execution result: {number}"
    await asyncio.gather(calls[0], return_exceptions=True)
    assert 200 * 2**20 < peak < 2 * 2**30, "measured, and small"
    assert resident() == 0
