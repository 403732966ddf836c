"""Every objective's gradient, however the batch is cut, against its formula written out on the raw model, one episode
at a time and without rl/."""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from gradients import KeepsGradients, flat_gradient, gradient
from torch import Tensor

from rl.algo.loss import token_weights
from rl.batch import Sample, alike, collate, spread_weights, trained_positions, turn_lengths
from rl.config_algo import Aggregation, AlgoConfig, AlgoName
from rl.config_stage import AuxiliaryLoss, OneTokenRollout, PreferenceStage, RewardModelStage, SftStage
from rl.gradient import ask
from rl.model import TokenScorer, ValueScorer
from rl.objective import PolicyGradient, ValueRegression, WithAuxiliary, example_objective
from rl.trajectory import Trajectory

TEMPERATURE = 0.7
FIXED = 30
CUTS = [(10_000, 0), (50, 2), (1, 0)]
"""Token budgets of a micro-batch, and fillers after the last one."""

Batch = Callable[..., list[Sample]]


@dataclass(frozen=True)
class Plain:
    """One episode on the raw model, at its N trained tokens. logits: those before each, over the temperature."""

    logp: Tensor
    entropy: Tensor
    logits: Tensor
    targets: Tensor
    turn: Tensor
    old: Tensor
    column: dict[str, Tensor]


def plain(lm, sample: Sample, temperature: float) -> Plain:
    t = sample.trajectory
    at = torch.tensor([i for i in range(1, len(t)) if t.loss_mask[i]], dtype=torch.int64)
    read = torch.tensor(t.tokens if sample.inputs is None else sample.inputs, dtype=torch.int64)
    targets = torch.tensor(t.tokens, dtype=torch.int64)[at]
    logits = lm(read[None]).logits[0, at - 1] / temperature
    p = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    return Plain(
        torch.log(p[torch.arange(len(at)), targets]),
        -(p * torch.log(p)).sum(-1),
        logits,
        targets,
        torch.tensor(t.turn)[at],
        torch.tensor(t.logprobs)[at],
        {name: torch.tensor(values)[at] for name, values in sample.columns.items()},
    )


def plain_values(lm, head: Tensor, sample: Sample, shift: int) -> Tensor:
    """[N]: the head's product with the raw model's states `shift` tokens from each trained one."""
    t = sample.trajectory
    at = torch.tensor([i for i in range(1, len(t)) if t.loss_mask[i]], dtype=torch.int64)
    return lm.model(torch.tensor(t.tokens, dtype=torch.int64)[None]).last_hidden_state[0, at + shift] @ head


def combine(losses: Sequence[Tensor], turns: Sequence[Tensor], aggregation: str) -> Tensor:
    """Per-token losses of each episode -> the batch's. Who says nothing does not count."""
    spoken = [(loss, turn) for loss, turn in zip(losses, turns, strict=True) if len(loss)]
    flat = [loss for loss, _ in spoken]
    by_turn = [torch.stack([loss[turn == k].mean() for k in turn.unique()]).mean() for loss, turn in spoken]
    return {
        "token": lambda: torch.cat(flat).mean(),
        "sequence": lambda: torch.stack([loss.mean() for loss in flat]).mean(),
        "fixed_length": lambda: torch.cat(flat).sum() / (len(flat) * FIXED),
        "sum": lambda: torch.cat(flat).sum() / len(flat),
        "turn": lambda: torch.stack(by_turn).mean(),
        "turn_sum": lambda: torch.stack(by_turn).sum(),
    }[aggregation]()


def assert_same(found: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    """Against the largest number: every gradient sums many, and float32 keeps seven digits of each."""
    scale = expected.abs().max().item()
    assert scale > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=relative * scale)


def each_cut(scorer, samples: Sequence[Sample], objective) -> list[tuple[KeepsGradients, dict[str, float]]]:
    return [gradient(scorer, samples, objective, budget, extra_fillers=n)[:2] for budget, n in CUTS]


def in_turns(trajectory: Trajectory, turns: int, silent: Sequence[int] = ()) -> Trajectory:
    """A prompt of a third, then turns of equal length that each but the last end in an observation of one token."""
    start = max(1, len(trajectory) // 3)
    bounds = np.linspace(start, len(trajectory), turns + 1).astype(int)
    turn, mask = np.full(len(trajectory), -1, np.int16), np.zeros(len(trajectory), bool)
    for k, (begin, end) in enumerate(itertools.pairwise(bounds)):
        turn[begin:end] = k
        mask[begin : end - (k < turns - 1)] = k not in silent
    return replace(trajectory, turn=turn, loss_mask=mask)


def off_mask(trajectory: Trajectory, values: Any, junk: float) -> np.ndarray:
    return np.where(trajectory.loss_mask, values, junk).astype(np.float32)


# -- policy gradients -------------------------------------------------------------------------------------------------

Formula = Callable[[Plain], tuple[Tensor, Tensor]]
"""Per-token losses, and where a bound was active."""


def clip(low: float, high: float, old: str = "", dual: float | None = None) -> Formula:
    def formula(e: Plain) -> tuple[Tensor, Tensor]:
        ratio, a = torch.exp(e.logp - (e.column[old] if old else e.old)), e.column["advantages"]
        loss = -torch.min(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
        clipped = (ratio > 1 + high) & (a > 0) | (ratio < 1 - low) & (a < 0)
        if dual is None:
            return loss, clipped
        capped = (a < 0) & (ratio > dual)
        return torch.where(capped, -dual * a, loss), clipped | capped

    return formula


def gspo(old: str = "") -> Formula:
    def formula(e: Plain) -> tuple[Tensor, Tensor]:
        a = e.column["advantages"]
        s = torch.exp((e.logp - (e.column[old] if old else e.old)).mean())
        loss = -torch.min(s * a, s.clamp(1 - 3e-4, 1 + 4e-4) * a)
        return loss, (s > 1 + 4e-4) & (a > 0) | (s < 1 - 3e-4) & (a < 0)

    return formula


def cispo(old: str = "") -> Formula:
    def formula(e: Plain) -> tuple[Tensor, Tensor]:
        ratio = torch.exp(e.logp - (e.column[old] if old else e.old)).detach()
        return -ratio.clamp(max=6.0) * e.column["advantages"] * e.logp, ratio > 6.0

    return formula


def reinforce(e: Plain) -> tuple[Tensor, Tensor]:
    return -e.column["advantages"] * e.logp, torch.zeros_like(e.logp, dtype=torch.bool)


def bounded(kind: str, low: float, high: float) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def weigh(w: Tensor) -> tuple[Tensor, Tensor]:
        if kind == "truncated":
            return torch.minimum(w, torch.tensor(high)).detach(), w > high
        inside = (w >= low) & (w <= high)
        return torch.where(inside, w, torch.tensor(0.0)).detach(), ~inside

    return weigh


def by_token(kind: str, low: float, high: float) -> Formula:
    return lambda e: bounded(kind, low, high)(torch.exp(e.column["proximal"] - e.old))


def by_sequence(kind: str, low: float, high: float) -> Formula:
    return lambda e: bounded(kind, low, high)(torch.exp((e.column["proximal"] - e.old).sum()).expand(len(e.old)))


def from_behaviour(high: float) -> Formula:
    return lambda e: bounded("truncated", 0.0, high)(torch.exp(e.logp - e.old))


@dataclass(frozen=True)
class Policy:
    """Settings, and what they are to mean. kl: where it stands and by which estimator."""

    settings: dict[str, Any]
    surrogate: Formula
    kl: tuple[str, str]
    aggregation: str
    weight: Formula | None = None
    entropy: float = 0.0


IN_LOSS, IN_REWARD = ("loss", "k3"), ("reward", "k1")
AGAIN = {"proximal": "recompute"}
TOKEN = {"kind": "truncated", "level": "token", "high": 1.05}
MASKED = {"kind": "masked", "level": "token", "low": 0.95, "high": 1.1}
SEQUENCE = {"kind": "truncated", "level": "sequence", "high": 1.1}
MASKED_SEQUENCE = {"kind": "masked", "level": "sequence", "low": 0.8, "high": 1.2}
POLICIES = {
    # as the papers have them
    "grpo": Policy({}, clip(0.2, 0.2), IN_LOSS, "sequence"),
    "dr_grpo": Policy({}, clip(0.2, 0.2), IN_LOSS, "fixed_length"),
    "dapo": Policy({}, clip(0.2, 0.28), IN_LOSS, "token"),
    "gspo": Policy({}, gspo(), IN_LOSS, "sequence"),
    "cispo": Policy({}, cispo(), IN_LOSS, "token"),
    "rloo": Policy({}, reinforce, IN_REWARD, "sum"),
    "reinforce_pp": Policy({}, clip(0.2, 0.2), IN_REWARD, "token"),
    "reinforce_pp_baseline": Policy({}, clip(0.2, 0.2), ("loss", "k2"), "token"),
    "remax": Policy({}, reinforce, IN_REWARD, "sum"),
    "ppo": Policy({}, clip(0.2, 0.2), IN_REWARD, "token"),
    "epo": Policy({}, reinforce, IN_LOSS, "turn"),
    # with other choices
    "epo's code": Policy({"name": "epo", "aggregation": "turn_sum"}, reinforce, IN_LOSS, "turn_sum"),
    "k1": Policy({"kl": {"estimator": "k1"}}, clip(0.2, 0.2), ("loss", "k1"), "sequence"),
    "dual clip": Policy({"dual_clip": 1.5}, clip(0.2, 0.2, dual=1.5), IN_LOSS, "sequence"),
    "entropy": Policy({"entropy_coefficient": 0.2}, clip(0.2, 0.2), IN_LOSS, "sequence", entropy=0.2),
    "less entropy": Policy(
        {"name": "epo", "entropy_coefficient": -0.2}, reinforce, IN_LOSS, "turn", entropy=-0.2
    ),
    # against recomputed log-probs, and weighted from them to the behaviour's
    "recomputed": Policy(AGAIN, clip(0.2, 0.2, "proximal"), IN_LOSS, "sequence"),
    "recomputed gspo": Policy({"name": "gspo", **AGAIN}, gspo("proximal"), IN_LOSS, "sequence"),
    "decoupled": Policy(
        {"name": "dapo", **AGAIN, "importance": TOKEN},
        clip(0.2, 0.28, "proximal"), IN_LOSS, "token", by_token("truncated", 0, 1.05),
    ),
    "masked": Policy(
        {**AGAIN, "importance": MASKED},
        clip(0.2, 0.2, "proximal"), IN_LOSS, "sequence", by_token("masked", 0.95, 1.1),
    ),
    "sequence": Policy(
        {"name": "gspo", **AGAIN, "importance": SEQUENCE},
        gspo("proximal"), IN_LOSS, "sequence", by_sequence("truncated", 0, 1.1),
    ),
    "masked sequence": Policy(
        {"name": "cispo", **AGAIN, "importance": MASKED_SEQUENCE},
        cispo("proximal"), IN_LOSS, "token", by_sequence("masked", 0.8, 1.2),
    ),
    "weighted reinforce": Policy(
        {"name": "rloo", "importance": {"high": 1.5}}, reinforce, IN_REWARD, "sum", from_behaviour(1.5)
    ),
}  # fmt: skip


def policy_algo(name: str) -> AlgoConfig:
    settings = POLICIES[name].settings
    given = {"name": name} if name in get_args(AlgoName) else {}
    kl = {**settings.get("kl", {}), "coefficient": 0.1}
    return AlgoConfig.model_validate({**given, **settings, "kl": kl})


@pytest.fixture
def episodes(make_trajectory) -> Batch:
    """Seven of one to three turns, one of them silent, and one that says nothing at all. All begin alike, two of them
    for 20 tokens. Recorded by a policy near the learner's; advantages differ from token to token."""

    def make(algo: AlgoConfig, junk: float = 0.0) -> list[Sample]:
        shapes = [(6, 1, ()), (40, 3, ()), (9, 2, ()), (25, 1, ()), (12, 2, ()), (33, 3, (1,)), (8, 1, (0,))]
        trajectories = [in_turns(make_trajectory(n), turns, silent) for n, turns, silent in shapes]
        for t in trajectories:
            t.tokens[:4] = trajectories[0].tokens[:4]
        trajectories[3].tokens[:20] = trajectories[1].tokens[:20]
        weights = token_weights(
            [turn_lengths(t) for t in trajectories], aggregation=algo.aggregation, fixed_length=FIXED
        )
        made = []
        for i, (t, w) in enumerate(zip(trajectories, weights, strict=True)):
            rng = np.random.default_rng(i)
            behaviour = rng.normal(-3.5, 0.7, len(t))
            columns = {
                "advantages": [1.0, -0.5, 2.0, -1.5, 0.0, 0.7, 1.0][i] + 0.3 * rng.normal(size=len(t)),
                "reference": behaviour + 0.3 * rng.normal(size=len(t)),
                "proximal": behaviour + 0.1 * rng.normal(size=len(t)),
            }
            if algo.proximal == "behaviour":
                del columns["proximal"]
            kept = {name: off_mask(t, column, junk) for name, column in columns.items()}
            recorded = replace(t, logprobs=off_mask(t, behaviour, junk))
            made.append(Sample(recorded, off_mask(t, spread_weights(t, w), junk), kept))
        return made

    return make


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_gradient_is_that_of_its_formula(tiny_lm, plain_lm, episodes, name):
    policy, algo = POLICIES[name], policy_algo(name)
    samples = episodes(algo)
    losses, turns, sums = [], [], {}
    (place, estimator), counted = policy.kl, 0
    for e in (plain(plain_lm, s, TEMPERATURE) for s in samples):
        surrogate, clipped = policy.surrogate(e)
        log_r = e.column["reference"] - e.logp
        kl = {"k1": -log_r, "k2": log_r**2 / 2, "k3": torch.exp(log_r) - log_r - 1}[estimator]
        weight, cut = policy.weight(e) if policy.weight else (torch.ones_like(e.logp), torch.zeros_like(e.logp))
        losses.append(weight * surrogate + (0.1 * kl if place == "loss" else 0) - policy.entropy * e.entropy)
        turns.append(e.turn)
        counted += len(e.logp)
        of_episode = {
            "actor/pg_loss": surrogate, "actor/clip_fraction": clipped, "actor/kl": kl, "actor/entropy": e.entropy,
            **({"importance/weight": weight, "importance/cut": cut} if policy.weight else {}),
        }  # fmt: skip
        for metric, values in of_episode.items():
            sums[metric] = sums.get(metric, 0.0) + values.sum().item()
    combine(losses, turns, policy.aggregation).backward()
    expected = flat_gradient(plain_lm.parameters())

    wanted = {metric: pytest.approx(total / counted, rel=1e-4, abs=1e-5) for metric, total in sums.items()}
    cuts = each_cut(TokenScorer(tiny_lm), samples, PolicyGradient.of(algo, TEMPERATURE))
    for ours, metrics in cuts:
        assert_same(ours.gradient, expected)
        assert {metric: metrics.get(metric) for metric in wanted} == wanted
        assert ("importance/weight" in metrics) == (policy.weight is not None)
    assert len(cuts[-1][0].forwards) == len(samples)
    if policy.surrogate is not reinforce:
        assert 0 < sums["actor/clip_fraction"] < counted, "a bound that is never active, or always, proves nothing"
    if policy.weight:
        assert 0 < sums["importance/cut"] < counted


def test_every_name_and_every_aggregation_has_a_formula_here():
    assert set(get_args(AlgoName)) <= set(POLICIES)
    assert {p.aggregation for p in POLICIES.values()} == set(get_args(Aggregation))


def test_the_kl_coefficient_of_a_step_is_the_one_that_counts(tiny_lm, episodes):
    """It moves over a stage: what the settings begin with is not what the loss takes."""
    algo = policy_algo("grpo")
    without = algo.model_copy(update={"kl": algo.kl.model_copy(update={"coefficient": 0.0})})
    found = [
        gradient(TokenScorer(tiny_lm), episodes(algo), objective)[0].gradient
        for objective in (
            PolicyGradient.of(without, TEMPERATURE, 0.1),
            PolicyGradient.of(algo, TEMPERATURE),
            PolicyGradient.of(algo, TEMPERATURE, 0.0),
        )
    ]
    assert torch.equal(found[0], found[1])
    assert (found[0] - found[2]).abs().max() > 1e-3


# -- the critic -------------------------------------------------------------------------------------------------------


@pytest.fixture
def value_scorer(tiny_lm) -> ValueScorer:
    scorer = ValueScorer(copy.deepcopy(tiny_lm))
    torch.nn.init.normal_(scorer.score.weight, std=0.3)
    return scorer


def plain_head(scorer: ValueScorer) -> Tensor:
    return scorer.score.weight[0].detach().clone().requires_grad_()


@pytest.fixture
def valued(episodes) -> Batch:
    """The same episodes with the critic's values and returns. by_turn: only a turn's first token has a value."""

    def make(by_turn: bool = False, junk: float = 0.0) -> list[Sample]:
        made, starts = [], []
        for i, s in enumerate(episodes(policy_algo("ppo"), junk)):
            t, rng = s.trajectory, np.random.default_rng([i, 1])
            columns = {name: off_mask(t, 3 * rng.normal(size=len(t)), junk) for name in ("values", "returns")}
            first = [p for p in trained_positions(t) if not by_turn or t.turn[p - 1] != t.turn[p]]
            starts.append(first)
            made.append(replace(s, columns=columns))
        count = sum(map(len, starts))
        for i, (s, first) in enumerate(zip(made, starts, strict=True)):
            weights = np.zeros(len(s.trajectory))
            weights[first] = 1 / count
            made[i] = replace(s, weights=off_mask(s.trajectory, weights, junk))
        return made

    return make


@pytest.mark.parametrize("by_turn", [False, True])
@pytest.mark.parametrize("bound", [None, 0.5])
def test_a_critics_gradient_is_that_of_the_clipped_value_loss(plain_lm, value_scorer, valued, by_turn, bound):
    """On the value before each token, or before each turn's first one."""
    samples, head = valued(by_turn), plain_head(value_scorer)
    losses, clipped, values = [], 0, []
    for s in samples:
        v = plain_values(plain_lm, head, s, -1)
        at = trained_positions(s.trajectory)
        old, wanted = (torch.tensor(s.columns[name])[at] for name in ("values", "returns"))
        loss = (v - wanted) ** 2 / 2
        if bound is not None:
            held = (old + (v - old).clamp(-bound, bound) - wanted) ** 2 / 2
            loss, clipped = torch.max(loss, held), clipped + int(((held > loss) & (s.weights[at] > 0)).sum())
        used = torch.tensor(s.weights[at] > 0)
        losses.append(loss[used])
        values.append(v[used])
    loss = torch.cat(losses).mean()
    loss.backward()
    expected = flat_gradient([*plain_lm.model.parameters(), head])
    for ours, metrics in each_cut(value_scorer, samples, ValueRegression(bound)):
        assert_same(ours.gradient, expected)
        assert metrics["critic/loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert metrics["critic/value"] == pytest.approx(torch.cat(values).mean().item(), rel=1e-4)
        assert metrics["critic/clip_fraction"] == pytest.approx(clipped / len(torch.cat(values)))
    assert (clipped > 0) == (bound is not None)
    assert len(torch.cat(values)) == (11 if by_turn else 72)


# -- demonstrations ---------------------------------------------------------------------------------------------------


@pytest.fixture
def demonstrations(episodes) -> Batch:
    """corrupted: a third of the tokens is another where the model reads them."""

    def make(corrupted: bool = False, junk: float = 0.0) -> list[Sample]:
        samples = [replace(s, columns={}) for s in episodes(policy_algo("dapo"), junk)]
        if not corrupted:
            return samples
        out = []
        for s in samples:
            read = s.trajectory.tokens.copy()
            read[2::3] = (read[2::3] + 7) % 50
            out.append(replace(s, inputs=read))
        return out

    return make


def sft(**settings: Any) -> SftStage:
    return SftStage.model_validate({"kind": "sft", "steps": 1, **settings})


@pytest.mark.parametrize("corrupted", [False, True], ids=["plain", "masked thought"])
def test_supervised_learning_is_the_likelihood_of_the_tokens_given_what_was_read(
    tiny_lm, plain_lm, demonstrations, corrupted
):
    """transformers' own loss: the corrupted tokens are its inputs, the clean ones its labels."""
    samples, total = demonstrations(corrupted), torch.zeros(())
    count = sum(int(s.trajectory.loss_mask.sum()) for s in samples)
    for s in samples[:-1]:  # the last says nothing
        ids = torch.tensor(s.trajectory.tokens, dtype=torch.int64)[None]
        read = ids if s.inputs is None else torch.tensor(s.inputs, dtype=torch.int64)[None]
        mask = torch.tensor(s.trajectory.loss_mask)[None]
        total = total + plain_lm(input_ids=read, labels=ids.masked_fill(~mask, -100)).loss * (mask.sum() / count)
    total.backward()
    expected = flat_gradient(plain_lm.parameters())
    cuts = each_cut(TokenScorer(tiny_lm), samples, example_objective(sft(), 50))
    for ours, metrics in cuts:
        assert_same(ours.gradient, expected)
        assert metrics["sft/loss"] == pytest.approx(total.item(), rel=1e-4)


VOCABULARY = 40
"""What the tokenizer has, of the embedding's 50 rows."""


def rollouts(samples: int):
    return example_objective(sft(one_token_rollout=OneTokenRollout(samples=samples, wrong_reward=-0.3)), VOCABULARY)


@pytest.fixture
def known_words(demonstrations) -> Batch:
    """Of the tokenizer's tokens alone, and in the order in which a micro-batch holds them."""

    def make(junk: float = 0.0) -> list[Sample]:
        samples = demonstrations(junk=junk)
        for s in samples:
            s.trajectory.tokens[:] %= VOCABULARY
        return [samples[i] for i in alike([s.trajectory.tokens for s in samples])]

    return make


@pytest.mark.parametrize("whole", [True, False])
def test_one_token_rollouts_against_a_draw_with_the_same_seed(tiny_lm, plain_lm, known_words, monkeypatch, whole):
    """The draws are the head's, and the same when it runs once more in the backward pass."""
    if not whole:
        monkeypatch.setattr("rl.model._LOGITS_HELD", {True: 350})  # the head at 7 positions at a time
    samples = known_words()
    found = [plain(plain_lm, s, 1.0) for s in samples]
    logits, targets = torch.cat([e.logits for e in found])[:, :VOCABULARY], torch.cat([e.targets for e in found])
    torch.manual_seed(3)
    drawn = torch.multinomial((logits / 1.3).softmax(-1), 32, replacement=True)
    rewards = torch.where(drawn == targets[:, None], 1.0, -0.3)
    loss = -(rewards * logits.log_softmax(-1).gather(-1, drawn)).mean()
    loss.backward()
    torch.manual_seed(3)
    ours, metrics, _ = gradient(TokenScorer(tiny_lm), samples, rollouts(32), extra_fillers=1)
    assert_same(ours.gradient, flat_gradient(plain_lm.parameters()))
    assert metrics["sft/otr_loss"] == pytest.approx(loss.item(), rel=1e-4)
    nll = torch.nn.functional.cross_entropy(logits, targets)
    assert metrics["sft/loss"] == pytest.approx(nll.item(), rel=1e-4)
    assert 0 < (drawn == targets[:, None]).float().mean() < 1


@pytest.mark.parametrize("budget", [10_000, 1])
def test_one_token_rollouts_in_expectation(tiny_lm, plain_lm, known_words, budget):
    """However it is cut. 50,000 draws a position: the sampled gradient is within a twentieth of its expectation."""
    samples = known_words()
    found = [plain(plain_lm, s, 1.0) for s in samples]
    logits, targets = torch.cat([e.logits for e in found])[:, :VOCABULARY], torch.cat([e.targets for e in found])
    q = (logits.detach() / 1.3).softmax(-1)
    rewards = 1.3 * torch.nn.functional.one_hot(targets, VOCABULARY) - 0.3
    (-(q * rewards * logits.log_softmax(-1)).sum(-1).mean()).backward()
    torch.manual_seed(0)
    ours, _, _ = gradient(TokenScorer(tiny_lm), samples, rollouts(50_000), budget)
    assert_same(ours.gradient, flat_gradient(plain_lm.parameters()), relative=0.05)


# -- pairs ------------------------------------------------------------------------------------------------------------

BETA = 2.0
PREFERENCES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "smoothed": {"loss": "sigmoid", "label_smoothing": 0.2},
    "hinge": {},
    "ipo": {},
    "simpo": {"simpo_gamma": 0.3},
    "kto": {"desirable_weight": 1.5, "undesirable_weight": 0.7},
    "sigmoid, nll": {"loss": "sigmoid", "nll_coefficient": 0.4},
    "kto, nll": {"loss": "kto", "nll_coefficient": 0.4},
}
KL = 0.4


def preference(name: str, **settings: Any) -> PreferenceStage:
    given = {"loss": name, **PREFERENCES[name], **settings}
    base = {"kind": "preference", "steps": 1, "beta": BETA, "pairs": {"path": "given"}}
    return PreferenceStage.model_validate({**base, **given})


def reward_model(loss: str, **settings: Any) -> RewardModelStage:
    base = {"kind": "reward_model", "steps": 1, "loss": loss, "pairs": {"path": "given"}}
    return RewardModelStage.model_validate({**base, **settings})


@pytest.fixture
def pairs(make_trajectory, plain_lm) -> Batch:
    """Four pairs of two prompts, sides of different lengths and turns; in the second both say the same for a while.
    References near the policy. Neither units nor sides come in order."""
    shapes = [((14, 2), (20, 3)), ((17, 1), (11, 1)), ((9, 1), (30, 3)), ((24, 2), (24, 3))]

    def make(junk: float = 0.0) -> list[Sample]:
        made = []
        for k, sides in enumerate(shapes):
            both = [in_turns(make_trajectory(n, seed=10 * k + i), turns) for i, (n, turns) in enumerate(sides)]
            for t in both:
                t.tokens[:3] = 7 * (k % 2) + np.arange(3)
            if k == 1:
                # prompts of 5 and 3 tokens: three trained ones alike, the fourth differs
                both = [replace(t, loss_mask=np.arange(len(t)) >= 3, turn=(np.arange(len(t)) >= 3) - 1) for t in both]
                both[1].tokens[:6], both[1].tokens[6] = both[0].tokens[:6], (both[0].tokens[6] + 1) % 50
            for t, label in zip(both, ((1.0, -1.0), (-1.0, 1.0))[k % 2], strict=True):
                clean = Sample(replace(t, turn=t.turn.astype(np.int16)), np.full(len(t), 1 / len(shapes), np.float32))
                with torch.no_grad():
                    now = plain(plain_lm, clean, 1.0).logp.numpy()
                reference = np.full(len(t), junk, np.float32)
                noise = np.random.default_rng([k, int(label > 0)]).normal(size=len(now))
                reference[trained_positions(t)] = now + 0.4 * noise
                recorded = replace(clean.trajectory, logprobs=off_mask(t, t.logprobs, junk))
                weights = off_mask(t, 1 / len(shapes), junk)
                made.append(Sample(recorded, weights, {"reference": reference}, unit=5 - k, label=label))
        return [made[i] for i in (3, 0, 4, 7, 6, 1, 5, 2)]

    return make


def by_pair(samples: Sequence[Sample]) -> list[tuple[Sample, Sample]]:
    sides = {(s.unit, s.label): s for s in samples}
    return [(sides[unit, 1.0], sides[unit, -1.0]) for unit in sorted({s.unit for s in samples if s.unit is not None})]


def pair_loss(stage: PreferenceStage, chosen: Plain, rejected: Plain) -> tuple[Tensor, Tensor]:
    """One pair's loss, without the likelihood of the chosen one, and its implicit margin."""
    beta = stage.beta
    if stage.loss == "simpo":
        margin = beta * (chosen.logp.mean() - rejected.logp.mean())
        return -torch.log(torch.sigmoid(margin - stage.simpo_gamma)), margin
    up, down = ((e.logp - e.column["reference"]).sum() for e in (chosen, rejected))
    h = up - down
    if stage.loss == "kto":
        one = stage.desirable_weight * (1 - torch.sigmoid(beta * (up - KL)))
        other = stage.undesirable_weight * (1 - torch.sigmoid(beta * (KL - down)))
        return (one + other) / 2, beta * h
    eps = stage.label_smoothing
    return {
        "sigmoid": -(1 - eps) * torch.log(torch.sigmoid(beta * h)) - eps * torch.log(torch.sigmoid(-beta * h)),
        "hinge": (1 - beta * h).clamp(min=0),
        "ipo": (h - 1 / (2 * beta)) ** 2,
    }[stage.loss], beta * h


@pytest.mark.parametrize("name", PREFERENCES)
def test_a_preferences_gradient_is_that_of_its_formula(tiny_lm, plain_lm, pairs, name):
    stage, samples = preference(name), pairs()
    losses, margins, extra = [], [], []
    for both in by_pair(samples):
        chosen, rejected = (plain(plain_lm, s, 1.0) for s in both)
        loss, margin = pair_loss(stage, chosen, rejected)
        losses.append(loss)
        margins.append(margin.item())
        extra.append(-stage.nll_coefficient * chosen.logp.mean())
    (torch.stack(losses).mean() + torch.stack(extra).mean()).backward()
    expected = flat_gradient(plain_lm.parameters())
    cuts = each_cut(TokenScorer(tiny_lm), samples, example_objective(stage, 50, KL))
    for ours, metrics in cuts:
        assert_same(ours.gradient, expected)
        assert metrics["preference/loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
        assert metrics["preference/margin"] == pytest.approx(np.mean(margins), rel=1e-3, abs=1e-5)
        assert metrics["preference/accuracy"] == pytest.approx(np.mean(np.array(margins) > 0))
    assert len(cuts[-1][0].forwards) == 4, "a budget of one token does not split a pair"
    assert name != "hinge" or min(margins) < 1 < max(margins), "on both sides of it"


def test_without_a_reference_simpo_asks_for_none(tiny_lm, pairs):
    bare = [replace(s, columns={}) for s in pairs()]
    objective = example_objective(preference("simpo"), 50)
    with_one, without = (gradient(TokenScorer(tiny_lm), s, objective)[0].gradient for s in (pairs(), bare))
    assert torch.equal(with_one, without)


@pytest.mark.parametrize("loss", ["last_token", "from_divergence"])
def test_a_reward_models_gradient_is_that_of_its_formula(plain_lm, value_scorer, pairs, loss):
    """On the values after each trained token: of both ends, or from the first token that differs, where the shorter
    one's end holds."""
    samples, head = pairs(), plain_head(value_scorer)
    losses, margins, firsts = [], [], []
    for both in by_pair(samples):
        chosen, rejected = (plain_values(plain_lm, head, s, 0) for s in both)
        words = [s.trajectory.tokens[trained_positions(s.trajectory)].tolist() for s in both]
        first = next(i for i, (a, b) in enumerate(zip(*words, strict=False)) if a != b)
        places = range(first, max(len(chosen), len(rejected))) if loss == "from_divergence" else [10_000]
        at = [(min(t, len(chosen) - 1), min(t, len(rejected) - 1)) for t in places]
        losses.append(torch.stack([-torch.log(torch.sigmoid(chosen[c] - rejected[r])) for c, r in at]).mean())
        margins.append((chosen[-1] - rejected[-1]).item())
        firsts.append(first)
    torch.stack(losses).mean().backward()
    expected = flat_gradient([*plain_lm.model.parameters(), head])
    cuts = each_cut(value_scorer, samples, example_objective(reward_model(loss), 50))
    for ours, metrics in cuts:
        assert_same(ours.gradient, expected)
        assert metrics["reward_model/loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
        assert metrics["reward_model/margin"] == pytest.approx(np.mean(margins), rel=1e-3)
        assert metrics["reward_model/accuracy"] == pytest.approx(np.mean(np.array(margins) > 0))
    assert len(cuts[-1][0].forwards) == 4
    assert sorted(firsts) == [0, 0, 0, 3]
    assert 0 < np.mean(np.array(margins) > 0) < 1


def test_a_pair_that_says_the_same_twice_teaches_a_reward_model_nothing(value_scorer, pairs):
    """There is no token that differs: log 2 and no gradient, and not the mean of nothing, which is NaN."""
    same = [replace(by_pair(pairs())[0][0], label=label) for label in (1.0, -1.0)]
    ours, metrics, _ = gradient(value_scorer, same, example_objective(reward_model("from_divergence"), 50))
    assert metrics["reward_model/loss"] == pytest.approx(np.log(2))
    assert ours.gradient.abs().max() < 1e-6


PAIRED = [*PREFERENCES, "last_token", "from_divergence"]


@pytest.mark.parametrize("name", PAIRED)
def test_a_pairs_loss_is_its_own_whoever_is_beside_it(tiny_lm, value_scorer, pairs, name):
    """With the weight of the whole batch's 1 / pairs: what the parts give adds up to what the whole gives."""
    of_policy = name in PREFERENCES
    objective = example_objective(preference(name) if of_policy else reward_model(name), 50, KL)
    scorer = TokenScorer(tiny_lm) if of_policy else value_scorer

    def loss(samples: Sequence[Sample]) -> float:
        micro = collate(samples)
        with torch.no_grad():
            return objective(*ask(scorer, micro, objective), micro)[0].item()

    batch = pairs()
    alone = {both[0].unit: loss(both) for both in by_pair(batch)}
    assert len({round(value, 4) for value in alone.values()}) > 1
    for unit, wanted in alone.items():
        others = [s for s in batch if s.unit != unit]
        assert loss(batch) - loss(others) == pytest.approx(wanted, abs=2e-5)


# -- what holds for all of them ---------------------------------------------------------------------------------------


@pytest.fixture
def case(tiny_lm, value_scorer, episodes, valued, demonstrations, known_words, pairs):
    """A scorer, an objective, and how to make its samples with junk off the mask, by name."""

    def make(name: str) -> tuple[Any, Any, Callable[[float], list[Sample]]]:
        policy = TokenScorer(tiny_lm)
        if name in POLICIES:
            algo = policy_algo(name)
            return policy, PolicyGradient.of(algo, TEMPERATURE), lambda junk: episodes(algo, junk)
        if name in PREFERENCES:
            return policy, example_objective(preference(name), 50, KL), pairs
        if name in ("last_token", "from_divergence"):
            return value_scorer, example_objective(reward_model(name), 50), pairs
        return {
            "values": (value_scorer, ValueRegression(0.5), lambda junk: valued(junk=junk)),
            "values by turn": (value_scorer, ValueRegression(None), lambda junk: valued(True, junk)),
            "sft": (policy, example_objective(sft(), 50), lambda junk: demonstrations(junk=junk)),
            "masked thought": (policy, example_objective(sft(), 50), lambda junk: demonstrations(True, junk)),
            "one-token rollouts": (policy, rollouts(8), known_words),
        }[name]

    return make


OTHERS = ["values", "values by turn", "sft", "masked thought", "one-token rollouts"]


@pytest.mark.parametrize("name", [*POLICIES, *PAIRED, *OTHERS])
def test_neither_nan_off_the_mask_nor_a_filler_changes_a_bit(case, name):
    """NaN in the recorded log-probs, every column and the weights leaks neither forward nor backward; a rank that has
    fewer micro-batches than the others adds zeros."""
    scorer, objective, make = case(name)
    junk = make(float("nan"))
    assert all(np.isnan(s.weights[~s.trajectory.loss_mask]).all() for s in junk)
    assert all(np.isnan(c[~s.trajectory.loss_mask]).all() for s in junk for c in s.columns.values())
    found = []
    for samples, fillers in ((make(0.0), 0), (junk, 3)):
        torch.manual_seed(5)
        found.append(gradient(scorer, samples, objective, budget=50, extra_fillers=fillers))
    (clean, metrics, _), (other, other_metrics, _) = found
    assert len(other.forwards) == len(clean.forwards) + 3
    assert torch.isfinite(clean.gradient).all() and clean.gradient.abs().max() > 1e-3
    assert torch.equal(other.gradient, clean.gradient)
    assert other_metrics == metrics


# -- a loss of one's own ----------------------------------------------------------------------------------------------


def own_loss(logprobs_N: Tensor, entropy_N: Tensor, micro) -> Tensor:
    """A function of everything that it is handed, the entropy's gradient included."""
    return logprobs_N.square() + 0.3 * entropy_N + logprobs_N * (micro.turn_N == 1)


def test_a_loss_of_ones_own_is_added_with_its_coefficient(tiny_lm, plain_lm, demonstrations):
    samples = demonstrations()
    stage = sft(aux_loss=AuxiliaryLoss(function=f"{__name__}.own_loss", coefficient=-0.25))
    found = [plain(plain_lm, s, 1.0) for s in samples]
    own = torch.cat([e.logp**2 + 0.3 * e.entropy + torch.where(e.turn == 1, e.logp, 0) for e in found]).mean()
    (-torch.cat([e.logp for e in found]).mean() - 0.25 * own).backward()
    cuts = each_cut(TokenScorer(tiny_lm), samples, example_objective(stage, 50))
    for ours, metrics in cuts:
        assert_same(ours.gradient, flat_gradient(plain_lm.parameters()))
        assert metrics["aux/loss"] == pytest.approx(own.item(), rel=1e-4)


def test_it_is_weighted_as_the_policys_loss_is(tiny_lm, plain_lm, episodes):
    """Beside EPO: a mean over episodes of means over turns, at the rollout's temperature."""
    algo = policy_algo("epo")
    samples = episodes(algo)
    inner = PolicyGradient.of(algo, TEMPERATURE)
    auxiliary = AuxiliaryLoss(function=f"{__name__}.own_loss", coefficient=0.5)
    found = [plain(plain_lm, s, TEMPERATURE) for s in samples]
    own = [e.logp**2 + 0.3 * e.entropy + torch.where(e.turn == 1, e.logp, 0) for e in found]
    (0.5 * combine(own, [e.turn for e in found], "turn")).backward()
    alone = gradient(TokenScorer(tiny_lm), samples, inner)[0].gradient
    ours = gradient(TokenScorer(tiny_lm), samples, WithAuxiliary(inner, auxiliary), budget=50)[0].gradient
    assert_same(ours - alone, flat_gradient(plain_lm.parameters()))


def test_it_sees_a_reward_models_values_after_each_token(plain_lm, value_scorer, pairs):
    """Every token of a pair's two sides weighs 1 / pairs."""
    stage = reward_model("last_token", aux_loss=AuxiliaryLoss(function=f"{__name__}.own_loss", coefficient=0.1))
    samples, head = pairs(), plain_head(value_scorer)
    total = torch.zeros(())
    for s in samples:
        v = plain_values(plain_lm, head, s, 0)
        second = torch.tensor(s.trajectory.turn[trained_positions(s.trajectory)] == 1)
        total = total + (v**2 + torch.where(second, v, 0)).sum() / 4
    (0.1 * total).backward()
    alone = gradient(value_scorer, samples, example_objective(reward_model("last_token"), 50))[0].gradient
    ours = gradient(value_scorer, samples, example_objective(stage, 50), budget=1)[0].gradient
    assert_same(ours - alone, flat_gradient([*plain_lm.model.parameters(), head]))


def test_a_function_that_does_not_exist_is_named(tiny_lm, demonstrations):
    stage = sft(aux_loss=AuxiliaryLoss(function=f"{__name__}.nothing_of_the_kind"))
    with pytest.raises(ValueError, match=r"has no 'nothing_of_the_kind'"):
        gradient(TokenScorer(tiny_lm), demonstrations(), example_objective(stage, 50))
