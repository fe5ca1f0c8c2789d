"""Weights that are swapped, sharded and saved, and an iteration's rows divided among processes."""

import contextlib
import dataclasses
import faulthandler
import itertools
import math
import threading

import pytest
import torch
import torch.distributed as dist
from test_every_agent import TIMING, settings
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from agents.algorithms import AGENTS
from agents.grpo import GRPO, GRPOConfig
from agents.policy import DenoisingPolicy
from agents.ranks import Ranks
from agents.training import checkpoints, loop
from agents.training.config import TrainConfig
from agents.training.experiment import build, restore
from agents.training.tables import read_table
from denoise_env.models import model_options
from denoise_env.weights import copies, fill, parts, swapped

TRAINING = sorted(set(AGENTS) - {"base", "best-of-n", "zero-lr"})


def bits(tensors):
    return {name: t.detach().clone() for name, t in tensors.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def deviation(a, b):
    """The largest absolute difference between tensors of the same names."""
    assert a.keys() == b.keys()
    return max((float((a[name].double() - b[name].double()).abs().max()) for name in a), default=0.0)


# --- Swapping ---


def test_a_swap_is_used_and_undone_to_the_bit_even_by_an_error(points):
    network, x = nn.Linear(3, 2), torch.ones(1, 3)
    weights = dict(network.named_parameters())
    before, other = bits(weights), {name: torch.randn_like(p) for name, p in weights.items()}
    kept = bits(other)
    with swapped(network, weights, other):
        assert torch.equal(network(x), nn.functional.linear(x, other["weight"], other["bias"]))
        inner = copies(weights)
        with swapped(network, weights, before):
            assert same(bits(weights), before)
        assert same(bits(weights), inner)
    assert same(bits(weights), before)
    with pytest.raises(KeyError), swapped(network, weights, other):
        raise KeyError
    assert same(bits(weights), before)
    with pytest.raises(RuntimeError), swapped(network, weights, {**other, "weight": torch.zeros(7, 7)}):
        pass
    assert same(bits(weights), before)
    assert same(other, kept)


def test_a_swap_between_a_pass_and_its_backward_pass_is_an_error():
    network = nn.Sequential(nn.Linear(3, 3), nn.SiLU(), nn.Linear(3, 1))
    weights = dict(network.named_parameters())
    loss = network(torch.ones(1, 3)).sum()
    fill(network, weights, bits(weights))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- Rows divided among ranks ---


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_part_of_an_update_holds_the_same_rows_whatever_the_ranks(size, parts):
    rows = list(range(24))
    shares = [Ranks(rank, size).mine(rows, parts) for rank in range(size)]
    assert sorted(itertools.chain(*shares)) == rows
    length = 24 // parts
    for part in range(parts):
        held = [share[part * length // size : (part + 1) * length // size] for share in shares]
        assert list(itertools.chain(*held)) == rows[part * length : (part + 1) * length]


def test_numbers_that_ranks_do_not_divide_are_refused(points):
    config = GRPOConfig(group_size=4, updates_per_rollout=2)
    agent = GRPO(DenoisingPolicy(points), config, ranks=Ranks(0, 3))
    with pytest.raises(
        ValueError, match=r"32 episodes .*=2 parts of whole groups of 4, each in equal shares for 3 proc"
    ):
        agent.check_rows(32)
    agent.check_rows(48)
    agent.microbatch = 6
    with pytest.raises(ValueError, match=r"the 8 episodes of one process in one update .* microbatches of 6"):
        agent.check_rows(48)


class Together:
    """What simulated ranks, a thread each, say to each other."""

    def __init__(self, size):
        self.size = size
        self.said = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def exchange(self, rank, tensor):
        self.said[rank] = tensor.clone()
        self.barrier.wait()
        found = torch.stack(self.said)
        self.barrier.wait()
        return found


@dataclasses.dataclass(frozen=True)
class Simulated(Ranks):
    together: Together | None = None

    def each(self, tensor):
        return self.together.exchange(self.rank, tensor)

    def average(self, tensors):
        for tensor in tensors:
            tensor.copy_(self.each(tensor).mean(0))


def points_run(name, changes=None, **options):
    """Rows that 4 ranks can divide, two optimizer steps where the agent takes several, every draw in use."""
    small = {"group_size": 2, "lr": 1e-3, "ema_decay": 0.5, "window_size": 2, "window_every": 1, "kl_coef": 0.01}
    small |= {"kl_reward": 0.01, "critic_width": 8, "tracker_size": 6, "tracker_min_count": 6, "draws_per_sample": 3}
    small |= {"updates_per_rollout": 1 if AGENTS[name].on_policy else 2, "reference_coef": 0.1, "old_decay_slope": 0.2}
    if name == "tempflow":  # two steps to branch from, and two samples at each
        small["group_size"] = 4
    base = TrainConfig(
        model="points",
        agent=name,
        agent_options=settings(name, **{**small, **(changes or {})}),
        prompts_per_iteration=8,
        microbatch=2,
        eval_images_per_prompt=2,
        num_steps=5,
        device="cpu",
    )
    return dataclasses.replace(base, **options)


def observe(experiment):
    """Two iterations: what was rolled out, what was trained, the figures, and the state afterwards."""
    agent, seen = experiment.agent, []
    update = agent.update

    def watching(rollout, iteration):
        examples = agent.examples
        found = {"latents": rollout.steps["action"].clone()}

        def recording(*arguments):
            chosen = examples(*arguments)
            found.update({key: chosen[key].clone() for key in ("step", "noise", "caption") if key in chosen})
            return chosen

        agent.examples = recording
        figures = update(rollout, iteration)
        agent.examples = examples
        seen.append(found)
        return figures

    agent.update = watching
    rows = [loop._iterate(experiment, iteration) for iteration in (1, 2)]
    figures = [{n: v for n, v in row.items() if n not in TIMING} for row in rows]
    return seen, figures, bits(agent.state())


def side_by_side(config, size):
    together = Together(size)
    experiments = [build(config, ranks=Simulated(rank, size, together)) for rank in range(size)]
    results, errors = [None] * size, []

    def work(rank):
        try:
            results[rank] = observe(experiments[rank])
        except Exception as error:
            errors.append(error)
            together.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return experiments, results


def assert_same_figures(found, expected):
    for got, wanted in zip(found, expected, strict=True):
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            assert got[name] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), name


VARIANTS = [(name, {}) for name in TRAINING] + [
    ("grpo", {"advantage_std": "batch", "timestep_selection": "per_group"}),
    ("ddpo-is", {"normalisation": "batch"}),
    ("nft", {"advantage_std": "group"}),
    ("crd", {"centring": "group"}),
    ("dgpo", {"shared_draws": False, "shared_steps": False, "rollout_solver": "dpm_solver"}),
    ("grpo", {"shared_noise": "rollout", "share_prefix": True, "timestep_rounding": "int"}),
    ("flow-grpo", {"ema_warmup": True, "ema_every": 2}),
]


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_rows_split_over_ranks_roll_out_and_train_alike(name, changes):
    """The network is called with two rows at a time everywhere, so that even its rounding is the same."""
    config = points_run(name, changes)
    alone = build(config)
    expected, figures, state = observe(alone)
    for size in (2, 4):
        experiments, results = side_by_side(config, size)
        for iteration in range(2):
            for key, wanted in expected[iteration].items():
                parts = [seen[iteration][key] for seen, _, _ in results]
                shares = [experiment.agent.mine(range(len(wanted))) for experiment in experiments]
                for part, share in zip(parts, shares, strict=True):
                    if iteration == 0 or key != "latents":
                        assert torch.equal(part, wanted[share]), key
                    else:  # of weights that are the same but for rounding
                        torch.testing.assert_close(part, wanted[share], rtol=0, atol=1e-5)
        for _, found, other in results:
            assert_same_figures(found, figures)
            assert deviation(other, state) < 1e-5
            assert same(other, results[0][2])


def test_a_run_of_two_ranks_writes_what_a_run_of_one_writes(tmp_path):
    config = points_run("grpo", iterations=2, checkpoint_every=1, keep_checkpoints=5, eval_every=1, eval_kl=True)
    together = Together(2)
    loop.train(build(config), tmp_path / "one", report=False)
    for resume, iterations in ((False, 1), (True, 2)):
        part = dataclasses.replace(config, iterations=iterations)
        built = [build(part, ranks=Simulated(rank, 2, together)) for rank in range(2)]

        def work(rank, built=built, resume=resume):
            loop.train(built[rank], tmp_path / "two", report=False, resume=resume)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    one, two = ({p.relative_to(d) for p in d.rglob("*")} for d in (tmp_path / "one", tmp_path / "two"))
    assert one == two
    for name in ("metrics", "eval"):
        tables = [read_table(tmp_path / run / f"{name}.csv") for run in ("two", "one")]
        kept = [[{n: v for n, v in row.items() if n not in TIMING} for row in table] for table in tables]
        assert len(kept[0]) == len(kept[1]) > 0
        assert_same_figures(*kept)
    states = [checkpoints.load(tmp_path / run / "checkpoints" / "000002")[0] for run in ("one", "two")]
    assert deviation(*states) < 1e-5


def test_a_gradient_that_is_not_finite_is_raised_on_every_rank():
    together, raised = Together(2), []
    config = points_run("rloo", {"max_skipped_updates": 0})
    experiments = [build(config, ranks=Simulated(rank, 2, together)) for rank in range(2)]
    experiments[1].agent.advantages = lambda rollout: {"advantage": torch.full((len(rollout),), torch.nan)}

    def work(experiment):
        try:
            loop._iterate(experiment, 1)
        except FloatingPointError as error:
            raised.append(str(error))

    threads = [threading.Thread(target=work, args=(experiment,)) for experiment in experiments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(raised) == 2


# --- Two processes ---


def shapes_run(name, changes=None, **options):
    """A run of the shipped Stable Diffusion that two processes can divide."""
    small = {"group_size": 2, "lr": 1e-4, "ema_decay": 0.5, "kl_coef": 0.01, "draws_per_sample": 2}
    small |= {"reference_coef": 0.1, "old_decay_slope": 0.2}
    base = TrainConfig(
        model="shapes",
        agent=name,
        agent_options=settings(name, **{**small, **(changes or {})}),
        prompts_per_iteration=4,
        microbatch=2,
        eval_images_per_prompt=1,
        num_steps=3,
        device="cpu",
    )
    return dataclasses.replace(base, **options)


def shard_twice(model):
    """A block of its own, and then the root."""
    fully_shard(model.network.mid_block, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    shard(model)


def shard(model):
    model.wrap(lambda network: fully_shard(network, mesh=init_device_mesh("cpu", (dist.get_world_size(),))))


def shard_half(model):
    """Only the last layer: plain and sharded weights in one optimizer."""
    fully_shard(model.network.residual[-1], mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def copy_to_all(model):
    model.wrap(DistributedDataParallel)


CASES = {
    "grpo, no wrapper": (points_run("grpo"), None),
    "grpo, DDP": (points_run("grpo"), copy_to_all),
    "grpo, FSDP": (points_run("grpo"), shard),
    "grpo, FSDP of one layer": (points_run("grpo"), shard_half),
    "ppo, no wrapper": (points_run("ppo"), None),
    "ppo, FSDP": (points_run("ppo"), shard),
    "nft, DDP": (points_run("nft"), copy_to_all),
    "nft, FSDP": (points_run("nft"), shard),
    "dgpo, FSDP": (points_run("dgpo", {"old_rolls_out_after": 2}), shard),
    "crd, FSDP": (points_run("crd"), shard),
    "dcpo, FSDP": (points_run("dcpo", {"beta": 5.0, "reference_every": 0}), shard),
    "nft on Stable Diffusion, FSDP": (shapes_run("nft", {"draws_per_sample": 1}, num_steps=2), shard_twice),
    "grpo on Stable Diffusion, LoRA, FSDP": (
        shapes_run("grpo", model_options=model_options("shapes", lora_rank=2)),
        shard_twice,
    ),
}


def outputs(experiment):
    """What the network says with its weights, the average's, the reference's and those that roll out, and again."""
    mdp, agent = experiment.mdp, experiment.agent
    x = torch.linspace(-1, 1, 2 * math.prod(mdp.model.latent_shape)).view(2, *mdp.model.latent_shape)
    conditioning = mdp.conditioning.rows(torch.arange(2))
    found = []
    own = contextlib.nullcontext
    for weights in (own, agent.evaluation_weights, mdp.model.reference, own, agent.rollout_weights, own):
        with torch.no_grad(), weights():
            found.append(mdp.model.predict(x, mdp.schedule.timesteps[1], conditioning))
    return torch.stack(found)


def life(config, directory, wrap=None, ranks=None):
    """Two iterations, and a checkpoint of them."""
    first = build(config, wrap, ranks)
    _, figures, state = observe(first)
    own = copies(first.agent.trained)
    with pytest.raises(KeyError), first.mdp.model.reference():
        raise KeyError
    assert all(map(torch.equal, parts(own.values()), parts(first.agent.parameters)))
    if not first.agent.ranks.rank:
        about = {"network_calls": 0, "model": first.mdp.model.architecture(), "config": {}}
        checkpoints.save(directory, 2, state, about)
    return {"figures": figures, "state": state, "outputs": outputs(first)}


def continued(config, path, wrap=None, ranks=None):
    """The third iteration, from a checkpoint."""
    second = build(config, wrap, ranks)
    restore(second, path)
    loaded = bits(second.agent.state())
    loop._iterate(second, 3)
    return {"loaded": loaded, "state": second.agent.state()}


def process(rank, size, directory):
    faulthandler.enable()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{directory}/meeting", rank=rank, world_size=size)
    ranks = Ranks.present()
    assert (ranks.rank, ranks.size) == (rank, size)
    for name, (config, wrap) in CASES.items():
        found = life(config, directory / name, wrap, ranks)
        after = continued(config, directory / f"{name}, 1" / "000002", wrap, ranks)  # from what one process saved
        if rank == 0:
            torch.save((found, after), directory / f"{name}.pt")
    dist.barrier()  # nobody leaves while another still speaks
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Where the results of two processes lie, and what one process found."""
    directory, alone = tmp_path_factory.mktemp("ranks"), {}
    for name, (config, _) in CASES.items():
        found = life(config, directory / f"{name}, 1")
        alone[name] = found, continued(config, directory / f"{name}, 1" / "000002")
    torch.multiprocessing.spawn(process, (2, directory), nprocs=2)
    return directory, alone


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(two_processes, name):
    directory, alone = two_processes
    (config, _), (expected, later) = CASES[name], alone[name]
    found, after = torch.load(directory / f"{name}.pt", weights_only=False)
    assert_same_figures(found["figures"], expected["figures"])
    torch.testing.assert_close(found["outputs"], expected["outputs"], rtol=0, atol=1e-5)
    assert deviation(found["state"], expected["state"]) < 1e-5
    back = continued(config, directory / name / "000002")  # from what two processes saved
    assert same(back["loaded"], found["state"])
    assert same(after["loaded"], expected["state"])
    for whose in (after, back):
        assert deviation(whose["state"], later["state"]) < 1e-5
