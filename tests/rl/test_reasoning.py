"""Tasks from reasoning_gym: which split they belong to, how they are scored, and what a mistyped setting says."""

import contextlib
import inspect
import json
import random
import re
import time
from typing import Any

import pytest
from reasoning_gym import create_dataset
from reasoning_gym.factory import DATASETS

from rl.config_env import ReasoningGymConfig
from rl.demonstration import demonstrate
from rl.env import Demonstrator, World
from rl.envs.reasoning import expression_of, own_scorer, score
from rl.envs.reasoning_answers import BY_EVAL, BY_SYMPY, disarmed
from rl.episode import Episode, Identity, Limits, StopReason, Turn, run_episode
from rl.policy import Sampling, ScriptedPolicy
from rl.reward import Score
from rl.task import Task

SMALL = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
LIMITS = Limits(max_turns=6, max_length=4096)


def gym(dataset: str = "chain_sum", settings: dict[str, Any] | None = None, seed: int = 0, **more: Any) -> World:
    return World(ReasoningGymConfig(name="reasoning_gym", dataset=dataset, settings=settings or {}, **more), seed)


def said(task: Task, text: str, stop: StopReason = StopReason.DONE) -> Episode:
    """A finished episode whose last message is `text`."""
    return Episode(Identity(0, 0, task.id), task, [], [], 0, [Turn([], [], [], False, text)], stop)


async def play(world: World, codec: Any, task: Task, messages: list[dict[str, Any]]) -> Episode:
    return await run_episode(
        world.env(),
        task,
        ScriptedPolicy(codec, iter(messages)),
        codec,
        sampling=Sampling(),
        limits=LIMITS,
        identity=Identity(0, 0, task.id),
    )


@pytest.fixture(scope="module")
def sums() -> World:
    return gym(settings=SMALL)


def question(task: Task) -> str:
    return task.prompt["prompt"][-1]["content"]


@pytest.mark.parametrize(
    ("dataset", "settings"),
    [("chain_sum", {"max_terms": 2, "max_digits": 1}), ("letter_counting", {}), ("simple_equations", {})],
)
def test_the_splits_share_no_question(dataset, settings):
    source = gym(dataset, settings).source
    train = {question(source.task("train", i)) for i in range(300)}
    held = {question(source.task("held_out", i)) for i in range(60)}
    assert len(train) > 30
    assert len(held) > 3
    assert not train & held


def test_a_task_is_a_function_of_seed_split_and_index(sums):
    forwards = [sums.source.task("train", i) for i in range(150)]
    again = gym(settings=SMALL).source
    assert [again.task("train", i) for i in reversed(range(150))] == forwards[::-1]
    other = gym(settings=SMALL, seed=1).source
    assert [other.task("train", i).id for i in range(20)] != [t.id for t in forwards[:20]]


def test_the_same_question_has_the_same_id_and_another_one_another(sums):
    tasks = [sums.source.task("train", i) for i in range(500)]
    assert len({question(t) for t in tasks}) == len({t.id for t in tasks}) > 300


def test_a_task_survives_json(sums):
    task = sums.source.task("held_out", 3)
    restored = Task(task.id, json.loads(json.dumps(dict(task.prompt))), task.answer)
    assert own_scorer(restored, said(restored, task.answer)) == 1.0


def test_generators_without_enough_questions_are_refused(sums, monkeypatch):
    monkeypatch.setattr("rl.envs.reasoning.held_out", lambda content: False)
    with pytest.raises(ValueError, match=r"chain_sum.*held_out split.*more variety"):
        sums.source.task("held_out", 0)


def test_few_questions_are_still_split():
    source = gym(settings={"min_terms": 1, "max_terms": 1, "max_digits": 1}).source
    held = {question(source.task("held_out", i)) for i in range(20)}
    train = {question(source.task("train", i)) for i in range(200)}
    assert len(train) + len(held) == 10
    assert len(held) == 1


@pytest.mark.parametrize("terms", [2, 3])
async def test_demonstrations_earn_the_reward(codec, terms):
    world = gym(settings={"min_terms": terms, "max_terms": terms})
    assert isinstance(world.source, Demonstrator)
    for index in range(10):
        task = world.source.task("train", index)
        messages = list(world.source.demonstrate(task, random.Random(0), guess=False))
        episode = await play(world, codec, task, messages)
        assert episode.stop_reason == StopReason.DONE
        assert len(episode.turns) == terms  # a call for each operation, and the answer
        assert Score.of(own_scorer, episode).total == 1.0


async def test_negative_terms_are_demonstrated(codec):
    world = gym(settings={"allow_negation": True, "min_terms": 3, "max_terms": 4})
    for index in range(20):
        task = world.source.task("train", index)
        episode = await play(world, codec, task, list(world.source.demonstrate(task, random.Random(0), guess=False)))
        assert own_scorer(task, episode) == 1.0


async def test_a_guess_is_one_turn_and_mostly_wrong(sums, codec):
    scores = []
    for index in range(50):
        task = sums.source.task("train", index)
        messages = list(sums.source.demonstrate(task, random.Random(index), guess=True))
        episode = await play(sums, codec, task, messages)
        assert len(episode.turns) == 1
        scores.append(own_scorer(task, episode))
    assert sum(s == 1.0 for s in scores) < 15


async def test_without_a_tool_the_first_turn_is_the_answer(codec):
    world = gym(settings=SMALL, tool="none", max_turns=1)
    task = world.source.task("train", 0)
    opening = await world.env().reset(task)
    assert not opening.tools
    assert "calculator" not in opening.messages[0]["content"]
    episode = await play(world, codec, task, list(world.source.demonstrate(task, random.Random(0), guess=False)))
    assert (len(episode.turns), episode.stop_reason) == (1, StopReason.DONE)
    assert own_scorer(task, episode) == 1.0


async def test_a_bad_call_is_answered_and_flagged(sums, codec):
    task = sums.source.task("train", 0)
    call = {"name": "calculator", "arguments": {"a": 1, "op": "/", "b": 2}}
    wrong = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    episode = await play(sums, codec, task, [wrong, {"role": "assistant", "content": task.answer}])
    assert episode.turns[0].flags == ("tool_error",)
    assert episode.turns[0].observation[0]["content"] == "error: op is one of + - *"
    assert own_scorer(task, episode) == 1.0


@pytest.mark.parametrize(
    ("answer", "text", "score"),
    [
        ("-4", "-4", 1.0),
        ("-4", "5 - 9 = -4.", 1.0),
        ("-4", "It is \N{MINUS SIGN}4", 1.0),
        ("4", "12-8", 0.0),
        ("8", "12-8", 1.0),
        ("1234", "That makes 1,234", 1.0),
        ("4", "4, or 5", 0.0),
        ("4", "four", 0.0),
        ("4", "", 0.0),
        ("4", "14", 0.5),  # the scorer's own part for an answer that holds the right one
    ],
)
def test_the_last_number_is_the_answer(sums, answer, text, score):
    task = sums.source.task("train", 0)
    task = Task(task.id, {**task.prompt, "entry": {**task.prompt["entry"], "answer": answer}}, answer)
    assert own_scorer(task, said(task, text)) == score


@pytest.mark.parametrize("stop", [StopReason.MAX_TURNS, StopReason.MAX_TOKENS])
def test_no_answer_no_reward(sums, stop):
    task = sums.source.task("train", 0)
    assert own_scorer(task, said(task, task.answer, stop)) == 0.0


def test_text_answers_are_scored_whole():
    source = gym("word_sequence_reversal", tool="none", max_turns=1).source
    task = source.task("train", 0)
    assert not isinstance(source, Demonstrator)
    assert own_scorer(task, said(task, f"  {task.answer}\n")) == 1.0
    assert own_scorer(task, said(task, "something else")) < 1.0


async def test_what_cannot_be_demonstrated_says_where_demonstrations_come_from(codec):
    world = gym("word_sequence_reversal", tool="none", max_turns=1)
    with pytest.raises(ValueError, match=r"demonstrations\.path"):
        await demonstrate(world, world.source.task("train", 0), codec, guess_fraction=0, limits=LIMITS, seed=0)


@pytest.mark.parametrize(
    ("text", "answer", "steps"),
    [
        ("5 - 9 =", "-4", [(5, "-", 9)]),
        ("2 + 3 * 4", "14", [(3, "*", 4), (2, "+", 12)]),
        ("-7 - -3 + 1 =", "-3", [(-7, "-", -3), (-4, "+", 1)]),
        ("What is 12?", "12", []),
        ("(2 + 3) * 4 =", "20", None),
        ("3 dogs and 4 cats", "28", None),
        ("2.5 + 1", "3.5", None),
        ("8 / 2", "4", None),
        (f"{10**50} + 1", str(10**50 + 1), None),
    ],
)
def test_the_expression_of_a_question(text, answer, steps):
    found = expression_of({"question": text, "answer": answer})
    assert (found.steps() if found else None) == steps


@pytest.mark.parametrize(
    ("dataset", "settings", "more", "said"),
    [
        ("chain_sums", {}, {}, r"'chain_sums' is not a dataset.*Did you mean chain_sum"),
        ("qqqq", {}, {}, r"'qqqq' is not a dataset.*Known: ab, acre"),
        ("chain_sum", {"min_term": 2}, {}, r"env\.settings\.min_term is not a setting.*env\.settings\.min_terms"),
        ("chain_sum", {"min_terms": "two"}, {}, r"env\.settings\.min_terms is 'two': chain_sum expects int"),
        ("chain_sum", {"min_terms": 4, "max_terms": 2}, {}, r"max_terms must be >= min_terms.*'max_terms': 2"),
        ("chain_sum", {"size": 10}, {}, r"env\.settings\.size is not yours to set"),
        ("chain_sum", {}, {"max_turns": 1}, r"env\.max_turns is 1.*2 or more"),
    ],
)
def test_mistakes_are_named(dataset, settings, more, said):
    with pytest.raises(ValueError, match=said):
        gym(dataset, settings, **more)


def test_every_scorer_that_runs_its_answer_is_known():
    def runs_text(cls) -> bool:
        return re.search(r"(?<![\w.])eval\(|parse_expr\(|sympify\(", inspect.getsource(cls.score_answer)) is not None

    own = {name for name, (cls, _) in DATASETS.items() if "score_answer" in vars(cls) and runs_text(cls)}
    assert own == BY_EVAL | BY_SYMPY | {"number_sorting"}, "number_sorting runs its own truth, not the answer"


@pytest.mark.parametrize("dataset", ["spiral_matrix", "puzzle24", "simple_integration", "countdown"])
def test_an_answer_that_is_a_program_is_not_run(dataset, tmp_path):
    world = World(ReasoningGymConfig(name="reasoning_gym", dataset=dataset, tool="none", max_turns=1), 0)
    task, mark = world.source.task("train", 0), tmp_path / "ran"
    attack = f"[open({str(mark)!r}, 'w'), 24][1]"
    with contextlib.suppress(Exception):
        create_dataset(dataset, seed=0, size=1).score_answer(attack, task.prompt["entry"])
    assert mark.exists(), "the attack works where nothing is in its way"
    mark.unlink()
    assert score(task, attack) < 0.1 and not mark.exists()


@pytest.mark.parametrize(
    ("dataset", "answer", "given"),
    [
        ("spiral_matrix", "1 2 3", True),
        ("spiral_matrix", "[1, 2, 3]", True),
        ("spiral_matrix", "[n for n in (1, 2)]", False),
        ("n_queens", "_ Q\nQ _", True),
        ("n_queens", "[['Q', '_'], ['_', 'Q']]", True),
        ("string_insertion", "ABCAADE", True),
        ("string_insertion", "exit()", False),
        ("countdown", "(3 + 5) * 7 - 36/9", True),
        ("countdown", "9**9**9", False),
        ("countdown", "9**99999", False),
        ("countdown", "(2**64)**64", False),
        ("simple_integration", "3*x**2/2 - sin(x) + C", True),
        ("simple_integration", "exp(-x)*sqrt(x) + log(x)", True),
        ("simple_integration", "sqrt('__import__(\"os\")')", False),
        ("simple_integration", "().__class__", False),
        ("simple_integration", "x.subs(x, 1)", False),
        ("simple_integration", "lambdify(x, x)", False),
        ("simple_integration", "10!", False),
        ("polynomial_multiplication", "x**2*y + 3*x - 1", True),
        ("chain_sum", "__import__('os')", True),
    ],
)
def test_what_a_scorer_is_given(dataset, answer, given):
    assert disarmed(dataset, answer) == (answer if given else "")


def entry_task(dataset: str, entry: dict[str, Any]) -> Task:
    return Task("x", {"dataset": dataset, "settings": {}, "entry": entry}, str(entry["answer"]))


def items(dataset: str, count: int, seed: int = 11) -> list[Task]:
    made = create_dataset(dataset, seed=seed, size=count)
    return [entry_task(dataset, made[i]) for i in range(count)]


CONSTANTS = ("", "0", "1", "nan", "inf", "wrong", "True", "['nan', 'nan']", "a", "[]", "{}")
SLOW_TO_BUILD = {"composite", "futoshiki", "knight_swap", "sokoban"}


@pytest.mark.parametrize("dataset", sorted(set(DATASETS) - SLOW_TO_BUILD))
def test_no_constant_answer_is_right(dataset):
    """Yes-or-no questions with a majority class lie at 10 of 12, so the bound is above that."""
    tasks = items(dataset, 12)
    for answer in CONSTANTS:
        assert sum(score(task, answer) for task in tasks) / len(tasks) < 0.9, answer


@pytest.mark.parametrize(
    ("dataset", "truth", "answer", "expected"),
    [
        ("coin_flip", "0.3125", "0.3125", 1.0),
        ("coin_flip", "0.3125", "It is 0.31251", 1.0),
        ("coin_flip", "0.3125", "0", 0.0),
        ("coin_flip", "0.3125", "0.31", 0.0),
        ("coin_flip", "0.3125", "0.35", 0.75),
        ("coin_flip", "3.051757812e-05", "1e-9999999999", 0.0),
        ("coin_flip", "3.051757812e-05", "1e9999999999", 0.0),
        ("coin_flip", "3.051757812e-05", "3.0517578e-5", 1.0),
        ("game_of_life_halting", True, "true", 1.0),
        ("game_of_life_halting", "False", "false", 1.0),
        ("game_of_life_halting", "False", "True", 0.0),
        ("game_of_life_halting", "True", "wrong", 0.0),
    ],
)
def test_full_marks_are_for_the_truth(dataset, truth, answer, expected):
    entry = {"question": "?", "answer": truth, "metadata": {}}
    assert score(entry_task(dataset, entry), answer) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("truth", "answer", "right"),
    [
        ("4", "NaN", 0),
        ("4", "-inf", 0),
        ("4", "nan+nanj", 0),
        ("4", "Infinity", 0),
        ("inf", "inf", 1),
        ("4", "info", 1),
    ],
)
def test_what_is_no_number_is_right_only_where_the_truth_is_none(truth, answer, right, monkeypatch):
    """By a scorer that takes everything."""
    monkeypatch.setattr("rl.envs.reasoning._is_number", lambda answer: False)
    monkeypatch.setattr("rl.envs.reasoning._dataset", lambda *a: Scorer(lambda answer: 1.0))
    assert score(entry_task("any", {"question": "?", "answer": truth}), answer) == right


class Scorer:
    def __init__(self, of):
        self.of = of

    def score_answer(self, answer, entry):
        return self.of(answer)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_none(value, monkeypatch):
    monkeypatch.setattr("rl.envs.reasoning._dataset", lambda *a: Scorer(lambda answer: value))
    assert score(entry_task("any", {"question": "?", "answer": "a"}), "b") == 0


@pytest.mark.parametrize("error", [MemoryError, OSError, TimeoutError])
def test_a_failure_of_the_machine_is_not_a_wrong_answer(error, monkeypatch):
    def fails(answer):
        if answer != "truth":
            raise error("on this answer")
        return 1.0

    monkeypatch.setattr("rl.envs.reasoning._dataset", lambda *a: Scorer(fails))
    with pytest.raises(error, match="on this answer"):
        score(entry_task("any", {"question": "?", "answer": "truth"}), "answer")


@pytest.mark.parametrize("answer", ["-" * 100_000 + "1", "1**" * 5000 + "1"])
def test_python_s_own_memory_error_at_deep_nesting_is_a_wrong_answer(answer):
    with pytest.raises(MemoryError):
        eval(answer)
    assert score(items("spiral_matrix", 1)[0], answer) < 0.1


@pytest.mark.parametrize("dataset", sorted(BY_SYMPY))
def test_the_true_answers_pass_what_bounds_the_others(dataset):
    """But for integrals that the generator itself has not solved: those repeat the question."""
    for task in items(dataset, 50, seed=5):
        if "Integral(" not in task.answer:
            assert score(task, task.answer) == 1.0, task.answer


@pytest.mark.parametrize(
    "answer",
    [
        "(x+2)**64*(x+3)**64*(x+5)**64*(x+7)**64",
        "(x+2)**12*(x+3)**12",
        "*".join(f"(x+{i})" for i in range(1, 40)),
        "*".join(f"sin({i}*x)*cos({i}*x)" for i in range(1, 20)),
        "+".join(f"1/(x+{i})" for i in range(1, 30)),
        "+".join(f"sqrt(x+{i})" for i in range(1, 30)),
        "+".join(f"x**{60 + i}/(x**{50 + i}+{i})" for i in range(4)),
        "(sin(x)+cos(x)+tan(x))**12",
        "(x+y+z)**12*(a+b+c)**12",
        "exp(exp(exp(exp(9))))*x",
        "((2**12)**12)**12",
        "x**(1/0)",
        "+".join(["x"] * 3000),
    ],
)
@pytest.mark.parametrize("dataset", sorted(BY_SYMPY))
def test_no_answer_takes_long_to_score(dataset, answer):
    """One of them took 10 s and more of the event loop."""
    task = items(dataset, 1, seed=5)[0]
    answer = re.sub(r"\bx\b", task.prompt["entry"]["metadata"].get("variable", "x"), answer)
    started = time.process_time()
    assert score(task, answer) < 0.1
    assert time.process_time() - started < 1
