"""Feedback around an environment: by rules in a real sandbox, by a scripted teacher, never where nobody reads it."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from rl.config_env import CalculatorConfig, FeedbackConfig, PythonConfig
from rl.config_file import ConfigError
from rl.demonstration import demonstrate
from rl.env import InfraError, World
from rl.envs.python_hints import Played, hint
from rl.episode import Identity, Limits, StopReason, run_episode
from rl.feedback import HIDDEN, VERDICTS, hidden, played, spoken, verdict
from rl.metrics import rollout_metrics
from rl.policy import Sampling, ScriptedPolicy
from rl.reward import Score
from rl.sandbox import Result
from rl.task import Task
from rl.trajectory import summarise, to_row, to_trajectory

SUM = {"dataset": "chain_sum", "settings": {"min_terms": 2, "max_terms": 3}}
MODEL = {"source": "checkpoint", "model": "some/model"}


class Teacher:
    """Says what it is given, in order, and remembers what it was asked."""

    def __init__(self, *says: str):
        self.says, self.asked = list(says), []

    async def answer(self, prompt, session, seed):
        self.asked.append((prompt, session, seed))
        said = self.says[min(len(self.asked), len(self.says)) - 1]
        if said == "fail":
            raise InfraError("nobody is there")
        return said


def config(feedback: dict | None = None, **settings) -> PythonConfig:
    return PythonConfig(name="python", datasets=[SUM], feedback=feedback or {}, **settings)


def say(text: str):
    return {"role": "assistant", "content": text}


def code(text: str):
    return say(f"```python\n{text}\n```")


def execute(text: str):
    return say(f"<execute>{text}</execute>")


def tool(text: str):
    function = {"name": "python", "arguments": {"code": text}}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


@pytest.fixture
def play(codec):
    async def play(turns, settings, teacher=None, max_turns=None):
        world = World(settings, 0)
        task = replace(world.source.task("train", 0), id="sum")
        turns = [t(task.answer) if callable(t) else t for t in turns]
        most = max_turns or settings.max_turns
        identity = Identity(0, 0, task.id, 3)
        return await run_episode(
            played(world, teacher, identity=identity, max_turns=most, seed=5), task, ScriptedPolicy(codec, iter(turns)),
            codec, sampling=Sampling(max_tokens=400), limits=Limits(most, 4000), identity=identity,
        )  # fmt: skip

    return play


def heard(episode) -> list[str]:
    """What was said after each turn; empty for nothing."""
    texts = [str(t.observation[-1]["content"]) if t.observation else "" for t in episode.turns]
    return [t.partition("Expert feedback: ")[2] for t in texts]


# -- by rules ---------------------------------------------------------------------------------------------------------


async def test_with_the_truth_rules_say_whether_the_output_is_right_and_which_error_the_code_had(play):
    turns = [
        code("print(1/0)"), code("print(-123456)"), code("x = 1"),
        lambda answer: code(f"print('so it is', {answer})"), lambda answer: say(f"\\boxed{{{answer}}}"),
    ]  # fmt: skip
    episode = await play(turns, config({"setting": "GT"}))
    error, wrong, silent, right, done = heard(episode)
    assert error == "The code failed with ZeroDivisionError: division by zero: correct that and run it again."
    assert "not the right answer" in wrong and "printed nothing" in silent and "is right" in right
    assert done == "" and episode.stop_reason == StopReason.DONE and episode.turns[-1].flags == ()
    assert [t.flags for t in episode.turns[:2]] == [("tool_error", "feedback"), ("feedback",)]
    assert not any(episode.task.answer in text for text in heard(episode)), "said to be right, and not said"
    binary = await play(turns, config({"setting": "GT", "type": "binary"}))
    assert heard(binary) == ["This is BAD.", "This is BAD.", "This is BAD.", "This is GOOD.", ""]


async def test_without_the_truth_rules_judge_from_the_turn_alone(play):
    turns = [code("print(-123456)"), code("print(-123456)"), code("while True: pass"), say("Let me see."), say("x")]
    settings = config({"setting": "no_GT"}, void_turn="ask", sandbox={"wall_s": 3})
    first, again, stuck, void, _ = heard(await play(turns, settings, max_turns=5))
    assert "check it against the question" in first and "same code as before" in again
    assert stuck == "The code was stopped: it took too long. Find a way that needs less." and "neither code" in void
    said = heard(await play(turns, config({"setting": "no_GT", "type": "binary"}, void_turn="ask"), max_turns=3))
    assert said == [VERDICTS[True], VERDICTS[False], ""]


async def test_the_same_code_with_another_result_is_no_repetition(play):
    turns = [code("x = 1"), code("x += 1; print(x)"), code("x += 1; print(x)"), code("print(0)")]
    assert "same code" not in heard(await play(turns, config({"setting": "no_GT"}), max_turns=4))[2]


async def test_every_style_hears_it_and_no_feedback_is_no_change(play):
    answers = [lambda a: say("<solution>-99999</solution>"), lambda a: execute(f"print({a})"), execute("1")]
    tags = await play(answers, config({"setting": "GT"}, style="tags"), max_turns=3)
    assert "The answer is not right" in heard(tags)[0] and "is right" in heard(tags)[1] and heard(tags)[2] == ""
    called = await play([tool("print(1)"), say("1")], config({"setting": "no_GT"}, style="tool"))
    assert called.turns[0].observation[0]["role"] == "tool" and "check it" in heard(called)[0]
    limited = await play([tool("print(1)"), tool("1"), say("1")], config({"setting": "GT"}, style="tool", max_calls=1))
    assert heard(limited)[1].startswith("The code was not run")
    plain = await play(answers, config(style="tags"), max_turns=3)
    without = [[m["content"].partition("\nExpert feedback: ")[0] for m in t.observation] for t in tags.turns]
    assert [[m["content"] for m in t.observation] for t in plain.turns] == without
    assert [t.flags for t in plain.turns] == [()] * 3


def test_what_rules_say_of_a_turn_that_no_test_plays():
    assert "did not say why" in hint(Played(code="x", result=Result("", "", None, None)), None).text
    assert hint(Played(answer=""), False).text == "The answer is empty: write it out."
    assert not hint(Played(answer="1"), None).good and hint(Played(answer="1"), True).good
    long = hint(Played(code="x", result=Result("", "a" * 5000, 1, None)), None).text
    assert len(long) < 400 and "characters left out" in long


# -- by a model -------------------------------------------------------------------------------------------------------


async def test_a_model_sees_the_episode_and_the_turns_observation_and_the_truth_only_where_it_is_to(play):
    turns = [code("print(-123456)"), code("print(2)"), say("\\boxed{0}")]
    for setting in ("no_GT", "GT"):
        teacher = Teacher("Try a sum.")
        episode = await play(turns, config({"setting": setting, **MODEL}), teacher)
        assert heard(episode) == ["Try a sum.", "Try a sum.", ""] and len(teacher.asked) == 2
        (first, session, seed), (second, _, other_seed) = teacher.asked
        question = episode.prompt[-1]["content"]
        assert question in first and "print(-123456)" in first and "Code execution result: -123456" in first
        assert "Expert feedback: Try a sum." not in first and "Expert feedback: Try a sum." in second
        assert "Code execution result: 2" in second and "please DO NOT disclose" in first
        truth = first.partition("to the assistant): ")[2].split("\n")[0]
        assert truth == (episode.task.answer if setting == "GT" else "NOT GIVEN")
        assert session == "0/0/sum/3" and seed != other_seed


async def test_binary_feedback_is_one_of_two_sentences_or_none(play):
    turns = [code("print(1)"), code("print(2)"), code("print(3)"), say("\\boxed{0}")]
    teacher = Teacher("This is GOOD. Go on like that.", "bad", "It may be good or bad.")
    episode = await play(turns, config({"setting": "GT", "type": "binary", **MODEL}), teacher)
    assert heard(episode) == ["This is GOOD.", "This is BAD.", "", ""]
    assert [t.flags for t in episode.turns] == [("feedback",), ("feedback",), ("feedback_unclear",), ()]
    assert "Say exactly one of: This is GOOD. This is BAD." in teacher.asked[0][0]


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("This is GOOD.", True), ("**This is BAD**", False), ("this is bad: 1 + 1 is 2", False), (" GOOD!\n", True),
        ("This is GOOD, but slow. This is BAD style.", True), ("This is not GOOD.", None), ("Good attempt.", None),
        ("This is good progress", None), ("I think this is GOOD.", None), ("", None), ("GOOD or BAD", None),
        ("This is GOODISH", None),
    ],
)  # fmt: skip
def test_which_sentence_a_text_means(said, meant):
    assert verdict(said) == ("" if meant is None else VERDICTS[meant])


async def test_a_truth_that_a_model_gives_away_is_hidden_and_flagged(play):
    turns = [code("print(1)"), code("print(2)"), say("\\boxed{0}")]

    class Traitor(Teacher):
        async def answer(self, prompt, session, seed):
            truth = prompt.partition("to the assistant): ")[2].split("\n")[0]
            return f"The answer is {truth}." if not self.asked.append(prompt) and len(self.asked) == 1 else "Add again."

    episode = await play(turns, config({"setting": "GT", **MODEL}), Traitor())
    assert heard(episode) == [f"The answer is {HIDDEN}.", "Add again.", ""]
    assert [t.flags for t in episode.turns] == [("feedback", "feedback_leak"), ("feedback",), ()]


@pytest.mark.parametrize(
    ("said", "truth", "expected"),
    [
        ("It is 21.", "21", "It is [hidden]."), ("21, not 215 or 3.21 or 21.5 or 1,21", "21", None),
        ("say  Abc\nDEF!", "abc def", "say  [hidden]!"), ("-5, (x)", "(x)", "-5, [hidden]"),
        ("nothing", " ", "nothing"), ("x21", "21", "x21"), ("the 2 cats", "2", "the [hidden] cats"),
        (r"is \frac{1}{2}", r"\frac{1}{2}", "is [hidden]"),
    ],
)  # fmt: skip
def test_what_counts_as_naming_the_truth(said, truth, expected):
    assert hidden(said, truth) == (expected or said.replace("21,", HIDDEN + ",", 1))


def test_what_a_reasoning_model_thinks_is_not_said():
    assert spoken("<think>It is 21.</think>\nAdd.") == "Add." == spoken("hm</think> Add.") == spoken("Add.")
    assert spoken("<think>It is 21, or") == ""


async def test_an_empty_word_is_no_feedback_and_a_failure_ends_the_episode_as_ours(play):
    turns = [code("print(1)"), say("\\boxed{0}")]
    quiet = await play(turns, config({"setting": "no_GT", **MODEL}), Teacher("<think>so"))
    assert quiet.turns[0].flags == ("feedback_unclear",) and heard(quiet) == ["", ""]
    with pytest.raises(InfraError, match="nobody is there"):
        await play(turns, config({"setting": "no_GT", **MODEL}), Teacher("fail"))


async def test_nobody_is_asked_after_the_last_turn_or_an_end(play):
    teacher = Teacher("Go on.")
    short = await play([code("print(1)")] * 3, config({"setting": "no_GT", **MODEL}), teacher, max_turns=2)
    assert len(teacher.asked) == 1 and [t.flags for t in short.turns] == [("feedback",), ()]
    void = await play([say("Hm.")], config({"setting": "no_GT", **MODEL}), teacher)
    assert len(teacher.asked) == 1 and void.stop_reason == StopReason.DONE


# -- tokens, metrics, demonstrations ----------------------------------------------------------------------------------


async def test_feedback_is_in_the_context_and_not_trained_on_and_shows_in_metrics_and_rows(play, codec):
    settings = config({"setting": "no_GT", **MODEL})
    episode = await play([code("print(1)"), code("print(2)"), say("\\boxed{0}")], settings, Teacher("Zebra."))
    t = to_trajectory(episode)
    assert t.tokens.tolist() == episode.context_ids
    assert codec.text(t.tokens).count("Zebra.") == 2 and "Zebra." not in codec.text(t.tokens[t.loss_mask])
    for k in (0, 1):
        after = (t.turn == k) & ~t.loss_mask
        assert "Expert feedback: Zebra." in codec.text(t.tokens[after]) and np.all(t.logprobs[after] == 0)
    summary, score = summarise(episode, t), Score(0.0, {}, False)
    metrics = rollout_metrics([([summary], [score])])
    assert metrics["num_feedback/mean"] == 2 and metrics["flags/feedback"] == 1
    assert to_row(episode, t, score, 0.0)["turn_flags"] == [["feedback"], ["feedback"], []]
    assert json.loads(to_row(episode, t, score, 0.0)["messages"])[3]["content"].endswith("Expert feedback: Zebra.")


async def test_a_demonstration_hears_what_rules_say_and_no_model(codec):
    for feedback, expected in (({"setting": "GT"}, True), ({"setting": "GT", **MODEL}, False)):
        world = World(config(feedback), 0)
        task = world.source.task("train", 0)
        t = await demonstrate(world, task, codec, guess_fraction=0.0, limits=Limits(5, 4000), seed=0)
        assert ("Expert feedback: What the code printed is right" in codec.text(t.tokens)) == expected


# -- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "checkpoint"}, "needs `model`"), ({"source": "endpoint", "model": "m"}, "needs `url`"),
        ({"url": "http://x"}, "only for source endpoint"), ({"max_length": 512}, "at least 640"),
        ({"source": "endpoint", "model": "m", "url": "https://user:secret@x"}, "without user, password or query"),
        ({"source": "endpoint", "model": "m", "url": "ftp://x"}, "a URL such as"),
        ({"source": "endpoint", "model": "m", "url": "http://x", "key_variable": "sk-secret"}, "never the key itself"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        FeedbackConfig(setting="GT", **settings)


def test_a_key_in_the_wrong_place_is_not_shown(quickstart_config):
    with pytest.raises(ConfigError) as refused:
        quickstart_config("env.feedback={source: endpoint, model: m, url: 'http://x', key_variable: sk-secret}")
    assert "env.feedback.key_variable: the name of an" in str(refused.value) and "sk-secret" not in str(refused.value)


def test_an_override_turns_it_on_and_off(quickstart_config):
    assert not quickstart_config().env.feedback.on
    on = quickstart_config("env.feedback.setting=GT", "env.feedback.source=checkpoint", "env.feedback.model=a/b")
    assert on.needs_feedback_model and on.of_feedback.model.path == "a/b" and on.of_feedback.model.max_length == 4096
    off = ["env.feedback.setting=none", "env.feedback.source=checkpoint", "env.feedback.model=a/b"]
    assert not quickstart_config(*off).needs_feedback_model


def test_rules_are_an_environments_own_and_have_no_clock_for_mathematics():
    with pytest.raises(ValueError, match=r"env\.feedback\.source: rules are an environment's own, and calculator has"):
        World(CalculatorConfig(name="calculator", feedback={"setting": "GT"}), 0)
    World(CalculatorConfig(name="calculator", feedback={"setting": "GT", **MODEL}), 0)
    rows = {"name": "python", "prompts": "a.jsonl"}
    with pytest.raises(ValidationError, match="math-verify cannot bound its time"):
        PythonConfig(**rows, feedback={"setting": "GT"})
    for feedback in ({"setting": "no_GT"}, {"setting": "GT", **MODEL}):
        assert PythonConfig(**rows, feedback=feedback).feedback.on


async def test_any_environment_can_have_it(codec):
    world, teacher = World(CalculatorConfig(name="calculator", feedback={"setting": "GT", **MODEL}), 0), Teacher("So.")
    task: Task = world.source.task("train", 0)
    turns = world.source.demonstrate(task, random.Random(0), False)
    identity = Identity(0, 0, task.id)
    env = played(world, teacher, identity=identity, max_turns=8, seed=0)
    episode = await run_episode(
        env, task, ScriptedPolicy(codec, turns), codec, sampling=Sampling(), limits=Limits(8, 2000), identity=identity
    )
    assert heard(episode) == ["So."] * (len(episode.turns) - 1) + [""]
