"""The negotiation's rules, worked by hand, and that RLlib takes it for one of its environments."""

import random

import pytest
from ray.rllib.utils.pre_checks.env import check_multiagent_environments

from actors.negotiation import ITEMS, SPEAKERS, Negotiation, wanted


@pytest.fixture
def game():
    """book 4 hat 3 pen 2 cup 1 for the first speaker, the other way round for the second; four turns."""
    game = Negotiation({"turns": 4})
    game.reset(seed=0)
    game.worths = {"first": dict(zip(ITEMS, (4, 3, 2, 1), strict=True)),
                   "second": dict(zip(ITEMS, (1, 2, 3, 4), strict=True))}  # fmt: skip
    return game


def test_rllib_accepts_it():
    check_multiagent_environments(Negotiation({}))
    check_multiagent_environments(Negotiation())


def test_an_agreement_by_hand(game):
    seen, rewards, terminated, truncated, _ = game.step({"first": "want book hat pen"})
    assert seen == {"second": "Worth to you: book 1 hat 2 pen 3 cup 4. They want book hat pen."}
    assert (terminated, truncated) == ({"__all__": False}, {"__all__": False}) and not any(rewards.values())
    seen, *_ = game.step({"second": "want cup pen"})
    assert seen == {"first": "They want pen cup."}, "what an item is worth is said once"
    seen, rewards, terminated, truncated, _ = game.step({"first": "accept"})
    assert seen == {"first": "Agreed: you get book hat.", "second": "Agreed: you get pen cup."}
    assert rewards == {"first": 0.7, "second": 0.7}
    assert terminated["__all__"] and not truncated["__all__"]


def test_what_is_said_last_is_what_can_be_accepted(game):
    game.step({"first": "want book"})
    seen, *_ = game.step({"second": "no"})
    assert seen == {"first": "They say nothing clear."}
    seen, rewards, terminated, *_ = game.step({"first": "accept"})
    assert not terminated["__all__"] and not any(rewards.values()), "the second asked for nothing"
    seen, rewards, terminated, truncated, _ = game.step({"second": "accept"})
    assert seen["first"] == "No agreement." and rewards == {"first": 0.0, "second": 0.0}
    assert truncated["__all__"] and not terminated["__all__"], "four turns are over"


def test_an_agreement_in_the_last_turn_counts(game):
    for speaker, text in zip(SPEAKERS * 2, ("want book", "want hat pen cup", "want nothing"), strict=False):
        game.step({speaker: text})
    *_, rewards, terminated, truncated, _ = game.step({"second": "accept"})
    assert rewards == {"first": 0.0, "second": 1.0} and terminated["__all__"] and not truncated["__all__"]


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("want cup book", {"cup", "book"}),
        ("want nothing", set()),
        ("want", None),
        ("want book book", None),
        ("want books", None),
        ("i want book", None),
        ("want book nothing", None),
        ("accept", None),
        ("", None),
    ],
)
def test_what_is_asked_for(text, items):
    assert wanted(text) == items


def test_a_speaker_out_of_turn_is_an_error(game):
    with pytest.raises(AssertionError, match="not second's turn"):
        game.step({"second": "accept"})


def drawn(seed: int, split: str | None = None) -> dict:
    game = Negotiation()
    game.reset(seed=seed, options={"split": split})
    return game.worths


def test_valuations_add_up_and_are_the_seeds():
    games = [drawn(seed) for seed in range(200)]
    assert all(sum(w.values()) == 10 and set(w) == set(ITEMS) for g in games for w in g.values())
    assert games == [drawn(seed) for seed in range(200)]
    assert len({str(g) for g in games}) > 190
    # Of three bars among thirteen places the first gap is 10 in one of 286 ways and 0 in 66.
    worths = [w[i] for g in games for w in g.values() for i in ITEMS]
    assert abs(worths.count(0) / len(worths) - 66 / 286) < 0.04 and max(worths) > 7


def test_no_valuations_are_in_both_splits():
    train, held_out = ({str(drawn(s, split)) for s in range(300)} for split in ("train", "held_out"))
    assert len(train) > 280 and not train & held_out


def play(guess: bool, seed: int) -> tuple[list[str], dict[str, float]]:
    game, rng, said = Negotiation({"turns": 6}), random.Random(seed), []
    seen, _ = game.reset(seed=seed)
    while True:
        (speaker,) = seen
        said.append(game.demonstrate(speaker, rng, guess))
        assert game.action_spaces[speaker].contains(said[-1]), said[-1]
        assert said[-1] == "accept" or wanted(said[-1]) is not None
        seen, rewards, terminated, truncated, _ = game.step({speaker: said[-1]})
        assert all(game.observation_spaces[s].contains(text) for s, text in seen.items())
        if terminated["__all__"] or truncated["__all__"]:
            return said, rewards


def test_scripted_speakers():
    """The patient ones accept half or nothing, so whoever agrees has half; careless ones get less."""
    patient = [play(False, seed)[1] for seed in range(200)]
    assert all(r["first"] >= 0.5 and r["second"] >= 0.5 for r in patient if any(r.values()))
    assert sum(any(r.values()) for r in patient) > 160
    careless = [play(True, seed)[1] for seed in range(200)]
    assert sum(sum(r.values()) for r in patient) > 1.3 * sum(sum(r.values()) for r in careless)
