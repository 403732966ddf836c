"""The calculator environment: tasks that cannot leak into the held-out split, answers that are right."""

import json
import random

import pytest

from rl.chat import parse_calls
from rl.config_env import CalculatorConfig
from rl.env import Action, World
from rl.envs.calculator import Calculator, CalculatorError, Expression, calculate, last_integer
from rl.episode import Identity, Limits, StopReason, run_episode
from rl.policy import Sampling, ScriptedPolicy
from rl.reward import Score, final_answer
from rl.task import Task, TaskStream

LIMITS = Limits(max_turns=8, max_length=10_000)


def world_of(seed: int = 0, **settings) -> World:
    return World(CalculatorConfig(name="calculator", **settings), seed)


def text_action(text: str) -> Action:
    calls, error = parse_calls(text)
    return Action(text, tool_calls=calls, error=error)


@pytest.mark.parametrize(
    "settings", [{}, {"max_digits": 1, "max_operations": 2}, {"max_digits": 2}, {"max_digits": 6, "operators": "+-*"}]
)
def test_the_splits_share_no_task(settings):
    source = world_of(**settings).source
    train = {t.id for t in TaskStream(source, "train").next(3000)}
    held_out = {t.id for t in TaskStream(source, "held_out").next(3000)}
    assert len(train) > 300
    assert len(held_out) > 30
    assert not train & held_out


def test_the_splits_share_no_task_across_settings_and_seeds():
    """An evaluation with other digits or another seed than the training's is still held out."""
    held_out = {t.id for t in TaskStream(world_of(1, max_digits=2).source, "held_out").next(3000)}
    train = {t.id for t in TaskStream(world_of(2, max_digits=3, max_operations=3).source, "train").next(3000)}
    assert not train & held_out


@pytest.mark.parametrize("operators", ["+-", "*", "+-*"])
def test_answers_and_steps_are_pythons_own_arithmetic(operators):
    source = world_of(operators=operators, max_operations=5, max_digits=3).source
    for task in TaskStream(source, "train").next(400):
        expression = task.prompt["expression"]
        assert task.answer == str(eval(str(expression)))
        steps = expression.steps()
        a, op, b = steps[-1]
        assert calculate({"a": a, "op": op, "b": b}) == eval(str(expression))
        assert sorted(op for _, op, _ in steps) == sorted(expression.operators)


@pytest.mark.parametrize(
    ("text", "numbers", "operators", "steps"),
    [
        ("17+4-9", (17, 4, 9), "+-", [(17, "+", 4), (21, "-", 9)]),
        ("2+3*4", (2, 3, 4), "+*", [(3, "*", 4), (2, "+", 12)]),
        ("9-2*3-4*5", (9, 2, 3, 4, 5), "-*-*", [(2, "*", 3), (4, "*", 5), (9, "-", 6), (3, "-", 20)]),
        ("2*3*4", (2, 3, 4), "**", [(2, "*", 3), (6, "*", 4)]),
        ("5-7", (5, 7), "-", [(5, "-", 7)]),
    ],
)
def test_steps_by_hand(text, numbers, operators, steps):
    expression = Expression(numbers, tuple(operators))
    assert str(expression) == text
    assert expression.steps() == steps


def test_tasks_keep_to_their_settings():
    source = world_of(min_operations=2, max_operations=3, max_digits=2, operators="-*").source
    for task in TaskStream(source, "train").next(300):
        expression = task.prompt["expression"]
        assert len(expression.operators) in (2, 3)
        assert set(expression.operators) <= set("-*")
        assert all(0 <= n <= 99 for n in expression.numbers)


MALFORMED = [
    '<tool_call>{"name": "calculator", "arguments": {"a": 1, "op": "+"}}</tool_call>',
    '<tool_call>{"name": "calculator", "arguments": {"a": 1, "op": "+", "b": 2, "c": 3}}</tool_call>',
    '<tool_call>{"name": "calculator", "arguments": {"a": "1", "op": "+", "b": 2}}</tool_call>',
    '<tool_call>{"name": "calculator", "arguments": {"a": 1.5, "op": "+", "b": 2}}</tool_call>',
    '<tool_call>{"name": "calculator", "arguments": {"a": true, "op": "+", "b": 2}}</tool_call>',
    '<tool_call>{"name": "calculator", "arguments": {"a": NaN, "op": "+", "b": 2}}</tool_call>',
    '<tool_call>{"name": "calculator", "arguments": {"a": 1, "op": "/", "b": 2}}</tool_call>',
    '<tool_call>{"name": "calculator", "arguments": {"a": 1, "op": ["+"], "b": 2}}</tool_call>',
    '<tool_call>{"name": "calculator", "arguments": {"a": 1, "op": {}, "b": 2}}</tool_call>',
    '<tool_call>{"name": "calculator", "arguments": {"a": ' + "9" * 41 + ', "op": "*", "b": 2}}</tool_call>',
    '<tool_call>{"name": "calculator", "arguments": {"a": ' + "9" * 9999 + ', "op": "*", "b": 2}}</tool_call>',
    '<tool_call>{"name": "calculator", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "abacus", "arguments": {"a": 1, "op": "+", "b": 2}}</tool_call>',
    '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "calculator", "arguments": {"a": 1, "op": "+", "b": 2}}</tool_call>' * 2,
    "<tool_call>1+2</tool_call>",
    "<tool_call>",
    "</tool_call>",
    "<tool_call>" + "[" * 100_000 + "</tool_call>",
]


@pytest.mark.parametrize("text", MALFORMED, ids=range(len(MALFORMED)))
async def test_a_malformed_call_is_answered_and_not_raised(text, codec):
    """The answer says error, flags the turn, ends nothing, and can be encoded: the model shall see it."""
    step = await Calculator(CalculatorConfig(name="calculator")).step(text_action(text))
    (message,) = step.observation.messages
    assert message["role"] == "tool"
    assert message["content"].startswith("error: ")
    assert (step.done, step.reward, step.info["flags"]) == (False, 0.0, ["tool_error"])
    assert len(codec.observation([message])) < 200
    json.dumps(message, ensure_ascii=False).encode()  # as the trajectory's row holds it


async def test_a_right_call_is_answered_by_its_result():
    text = '<tool_call>{"name": "calculator", "arguments": {"a": -3, "op": "*", "b": 4}}</tool_call>'
    step = await Calculator(CalculatorConfig(name="calculator")).step(text_action("I call it. " + text))
    assert (step.observation.messages[0]["content"], step.done, step.info["flags"]) == ("-12", False, [])


def test_results_may_be_longer_than_what_may_be_asked():
    assert calculate({"a": 10**39, "op": "*", "b": 10**39}) == 10**78
    with pytest.raises(CalculatorError, match="too long"):
        calculate({"a": 10**40, "op": "+", "b": 1})


async def play(world, codec, task, messages):
    policy = ScriptedPolicy(codec, iter(messages))
    return await run_episode(
        world.env(), task, policy, codec, sampling=Sampling(), limits=LIMITS, identity=Identity(0, 0, task.id)
    )


@pytest.mark.parametrize("operators", ["+-", "+-*"])
async def test_demonstrations_reach_the_reward(codec, operators):
    world = world_of(operators=operators)
    for task in TaskStream(world.source, "train").next(25):
        messages = list(world.source.demonstrate(task, random.Random(0), guess=False))
        episode = await play(world, codec, task, messages)
        assert Score.of(final_answer, episode).total == 1.0
        assert len(episode.turns) == len(task.prompt["expression"].operators) + 1
        assert not [f for t in episode.turns for f in t.flags]


async def test_guesses_are_one_turn_without_a_tool_and_mostly_wrong(codec):
    world = world_of()
    right = 0.0
    for i, task in enumerate(TaskStream(world.source, "train").next(40)):
        episode = await play(world, codec, task, world.source.demonstrate(task, random.Random(i), guess=True))
        assert (len(episode.turns), episode.stop_reason) == (1, StopReason.DONE)
        assert int(episode.final_text) is not None
        right += Score.of(final_answer, episode).total
    assert right < 4


@pytest.mark.parametrize(
    ("answer", "reward"),
    [("12", 1.0), (" 12\n", 1.0), ("12.", 0.0), ("+12", 0.0), ("012", 0.0), ("13", 0.0), ("", 0.0)],
)
async def test_the_reward_is_exact(codec, world, answer, reward):
    task = TaskStream(world.source, "train").next(1)[0]
    task = type(task)("calc:3+9", {"expression": Expression((3, 9), ("+",))}, "12")
    episode = await play(world, codec, task, [{"role": "assistant", "content": answer}])
    assert final_answer(task, episode) == reward


async def test_the_right_number_in_a_call_is_no_answer(codec, world):
    """Only an episode that ended with an answer is paid, not one whose last turn still was a call."""
    task = TaskStream(world.source, "train").next(1)[0]
    calls = list(world.source.demonstrate(task, random.Random(0), guess=False))[:-1]
    policy = ScriptedPolicy(codec, iter(calls))
    episode = await run_episode(
        world.env(),
        task,
        policy,
        codec,
        sampling=Sampling(),
        limits=Limits(len(calls), 1000),
        identity=Identity(0, 0, task.id),
    )
    assert episode.stop_reason == StopReason.MAX_TURNS
    assert final_answer(task, episode) == 0.0


def test_a_stream_resumes_where_its_cursor_stood():
    source = world_of().source
    whole = TaskStream(source, "train").next(50)
    first = TaskStream(source, "train")
    first.next(17)
    resumed = TaskStream(world_of().source, "train", cursor=first.cursor)  # another process: nothing shared
    assert first.cursor == 17
    assert resumed.next(33) == whole[17:]
    assert TaskStream(world_of(seed=1).source, "train").next(50) != whole


@pytest.mark.parametrize(
    ("text", "found"),
    [("no number", None), ("it is 1,234 or -5", "-5"), ("= 1,234,567.", "1234567"), ("007", "7"), ("", None)],
)
def test_last_integer(text, found):
    assert last_integer(text) == found


@pytest.mark.parametrize(
    ("messages", "rewards"),
    [
        (["1+2", "3+4", "7"], [0.1, 0.1, 0.1]),  # 1+2+4: both steps, and the answer
        (["1+2", "1+2", "3+4", "7"], [0.1, 0.0, 0.1, 0.1]),  # a step is done once
        (["2+4", "1+2", "8"], [0.0, 0.1, 0.0]),  # not the next one; a wrong answer
    ],
)
async def test_progress_is_given_for_each_next_right_step(codec, messages, rewards):
    env = Calculator(CalculatorConfig(name="calculator", progress_reward=0.1))
    await env.reset(Task("t", {"expression": Expression((1, 2, 4), ("+", "+"))}, "7"))
    found = []
    for said in messages:
        a, plus, b = said.partition("+")
        call = f'<tool_call>{{"name": "calculator", "arguments": {{"a": {a}, "op": "+", "b": {b}}}}}</tool_call>'
        found.append((await env.step(text_action(call if plus else said))).reward)
    assert found == pytest.approx(rewards)


@pytest.mark.parametrize(("text", "flags"), [("12", []), ("I think -4", []), ("", ["void"]), ("well", ["void"])])
async def test_an_answer_without_a_number_is_void(text, flags):
    step = await Calculator(CalculatorConfig(name="calculator")).step(text_action(text))
    assert step.done and step.info["flags"] == flags
