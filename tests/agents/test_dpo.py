"""Who is compared with whom, under which caption."""

import dataclasses

import pytest
import torch

from agents.dpo import DCPO, DPO, DCPOConfig, DPOConfig
from agents.policy import DenoisingPolicy
from agents.rollout import collect
from denoise_env.mdp import Scores, row_generators
from denoise_env.seeding import row_seeds

NAN = float("nan")


def scored(agent, total):
    mdp, total = agent.policy.mdp, torch.tensor(total)
    prompts = [p.text for p in mdp.prompts][: len(total) // agent.group_size]
    rollout = collect(mdp, agent.policy, row_generators(range(len(total))), prompts, group_size=agent.group_size)
    return dataclasses.replace(rollout, scored=lambda: Scores({"points": total}, total, total.isfinite(), {}))


def pairs(agent, total):
    found = agent.targets(scored(agent, total))
    rows = zip(found["episode"].tolist(), found["loser"].tolist(), found["counts"].tolist(), strict=True)
    return [(winner, loser) for winner, loser, counts in rows if counts]


@pytest.mark.parametrize(
    ("total", "ranked", "best_worst"),
    [
        ([0.3, 0.9, 0.1, 0.5], [(1, 2), (3, 0)], [(1, 2)]),
        ([0.3, 0.9, 0.1, 0.5, 4.0, 3.0, 2.0, 1.0], [(1, 2), (3, 0), (4, 7), (5, 6)], [(1, 2), (4, 7)]),
        ([0.5, 0.5, 0.5, 0.5], [], []),
        ([0.5, 0.9, 0.5, 0.1], [(1, 3)], [(1, 3)]),  # the middle two are equal
        ([0.3, NAN, 0.1, 0.5], [(3, 2)], [(3, 2)]),  # the best and the worst of those with a score
        ([NAN, NAN, 0.1, 0.5], [(3, 2)], [(3, 2)]),
        ([NAN, 0.2, NAN, NAN], [], []),
        ([NAN, NAN, NAN, NAN], [], []),
    ],
)
def test_pairs(points, total, ranked, best_worst):
    policy = DenoisingPolicy(points)
    assert pairs(DPO(policy, DPOConfig(group_size=4, pairing="ranked")), total) == ranked
    assert pairs(DPO(policy, DPOConfig(group_size=4, pairing="best_worst")), total) == best_worst


def test_an_odd_group_leaves_its_middle_out(points):
    agent = DPO(DenoisingPolicy(points), DPOConfig(group_size=5, pairing="ranked"))
    assert pairs(agent, [0.3, 0.9, 0.1, 0.5, 0.4]) == [(1, 2), (3, 0)]


def test_pairs_without_a_winner_leave_no_trace(points):
    agent = DPO(DenoisingPolicy(points), DPOConfig(group_size=4, pairing="ranked", weight_decay=0.0))
    before = [p.detach().clone() for p in agent.parameters]
    agent.update(scored(agent, [0.5, 0.5, 0.5, 0.5, NAN, NAN, NAN, 1.0]), 1)
    assert all(torch.equal(a, b) for a, b in zip(before, agent.parameters, strict=True))


def test_both_sides_of_a_pair_share_timestep_and_noise(points):
    agent = DPO(DenoisingPolicy(points), DPOConfig(group_size=4, pairing="ranked"))
    rollout = scored(agent, [0.3, 0.9, 0.1, 0.5])
    examples = agent.examples(rollout, 1)
    seen, noised = [], agent.noised

    def recording(x0, step, noise):
        seen.append((x0, step, noise))
        return noised(x0, step, noise)

    agent.noised = recording
    conditioning = agent.conditioning(rollout, examples)
    completed = agent.complete(rollout, examples, conditioning)
    agent.example_loss(rollout, completed[:, 0], conditioning)
    assert len(seen) == examples.shape[1] + 1  # the reference at every draw, and the trained weights at the first
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[-1], strict=True))
    for x0, step, noise in seen:
        assert torch.equal(x0, rollout.final_latents[[1, 3, 2, 0]])
        for both in (step, noise):
            assert torch.equal(*both.chunk(2))


def test_the_losers_caption_is_another_prompt(points):
    """On Points, where no two prompts share a word, any other."""
    agent = DCPO(DenoisingPolicy(points), DCPOConfig(group_size=4))
    seen = set()
    for iteration in range(20):
        rollout = scored(agent, list(range(24)))
        rollout = dataclasses.replace(rollout, seeds=row_seeds(0, "rollout", iteration, 24))
        examples = agent.examples(rollout, 1)
        right = rollout.prompt_index[examples["loser"][:, 0]]
        wrong = examples["caption"][:, 0]
        assert (wrong != right).all()
        seen |= set(zip(right.tolist(), wrong.tolist(), strict=True))
        conditioning = agent.conditioning(rollout, examples)["prompt_id"]
        assert torch.equal(conditioning, torch.cat([rollout.prompt_index[examples["episode"][:, 0]], wrong]))
    assert len(seen) == 30
    same = DPO(DenoisingPolicy(points), DPOConfig(group_size=4, pairing="ranked"))
    conditioning = same.conditioning(rollout, same.examples(rollout, 1))["prompt_id"]
    assert torch.equal(*conditioning.chunk(2))


def test_the_losers_caption_shares_most_words(make_shapes):
    mdp = make_shapes()
    agent = DCPO(DenoisingPolicy(mdp), DCPOConfig(group_size=2))
    texts = [p.text for p in mdp.prompts]
    for i in range(0, len(texts), 7):
        words = set(texts[i].split())
        wrong = agent._perturb(i, 7 * i)
        most = max(len(words & set(t.split())) for j, t in enumerate(texts) if j != i)
        assert wrong != i
        assert len(words & set(texts[wrong].split())) == most


@pytest.mark.parametrize(("every", "due"), [(0, []), (1, [1, 2, 3, 4, 5]), (4, [2, 4]), (5, [3, 5])])
def test_the_reference_is_renewed_every_so_many_steps(points, every, due):
    """Two optimizer steps per rollout."""
    config = DPOConfig(group_size=4, lr=1e-2, draws_per_sample=2, reference_every=every, updates_per_rollout=2)
    agent = DPO(DenoisingPolicy(points), config)
    expected = [p.detach().clone() for p in agent.parameters]
    for iteration in range(1, 6):
        agent.update(scored(agent, [0.3, 0.9, 0.1, 0.5, 0.2, 0.8, 0.9, 0.0]), iteration)
        if iteration in due:
            expected = [p.detach().clone() for p in agent.parameters]
        with agent.others()["reference"]():
            assert all(torch.equal(a, b) for a, b in zip(expected, agent.parameters, strict=True))
