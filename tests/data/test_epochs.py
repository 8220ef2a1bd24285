from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from gkd.data.epochs import generator, mix, num_steps, plan_epoch, stratified_order


def test_mix_is_the_published_splitmix64():
    # First outputs of splitmix64 from state 0, as printed beside its reference implementation: e220a8397b1dcdaf, 6e789e6aa1b965f4.
    # mix adds its argument to the state and then steps once, so mix(0) is the first output, shifted to 63 bits.
    assert mix(0) == 0xE220A8397B1DCDAF >> 1
    # The state goes on from the output: by hand, mix(0, v) steps from the first output + v.
    state = (0xE220A8397B1DCDAF + 7 + 0x9E3779B97F4A7C15) % 2**64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
    assert mix(0, 7) == (state ^ (state >> 31)) >> 1


def test_mix_separates_neighbours_orders_and_lengths():
    seeds = [mix(seed, epoch) for seed in range(-5, 60) for epoch in range(60)]
    low = {seed % 2**32 for seed in seeds}  # The CPU generator reads the low 32 bits.
    assert len(low) == len(seeds)
    assert len({mix(1), mix(1, 0), mix(0, 1), mix(1, 0, 0)}) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generator_leaves_the_global_one():
    before = torch.get_rng_state()
    draws = [torch.rand(3, generator=generator(0, epoch)) for epoch in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("counts", [[5, 5], [1, 9, 30], [7], [100, 3, 0, 41]])
def test_every_prefix_is_stratified(counts):
    targets = torch.cat([torch.full((count,), number) for number, count in enumerate(counts)])
    targets = targets[torch.randperm(len(targets))]
    order = stratified_order(targets, seed=3)
    assert torch.equal(order.sort().values, torch.arange(len(targets)))
    shares = torch.tensor(counts) / len(targets)
    for length in range(1, len(targets) + 1):
        found = torch.bincount(targets[order[:length]], minlength=len(counts))
        # With r of c samples within a share x of the way, |r - c x| <= 1/2; the length itself is within as much of n x for each class.
        assert (found - shares * length).abs().max() <= 0.5 + 0.5 * len(counts)


def test_stratified_order_takes_ties_at_random():
    targets = torch.arange(10).repeat(20)
    first = {int(targets[stratified_order(targets, seed)[0]]) for seed in range(40)}
    assert len(first) > 5
    assert torch.equal(stratified_order(targets, 1), stratified_order(targets, 1))
    assert not torch.equal(stratified_order(targets, 1), stratified_order(targets, 2))


def test_stratified_order_of_nothing():
    assert stratified_order(torch.empty(0, dtype=torch.long), 0).shape == (0,)


def test_plan_by_hand():
    order = torch.tensor([6, 5, 4, 3, 2, 1, 0])
    whole = plan_epoch(order, 3, drop_last=False)
    assert whole.sizes == [3, 3, 1]
    assert torch.equal(whole.samples, order)
    assert plan_epoch(order, 3, drop_last=True).sizes == [3, 3]
    late = plan_epoch(order, 3, drop_last=True, start=1)
    assert late.samples.tolist() == [3, 2, 1]
    assert late.place.tolist() == [3, 4, 5]
    nothing = plan_epoch(order, 3, drop_last=True, start=2)
    assert nothing.sizes == []
    assert nothing.samples.dtype == torch.long


@pytest.mark.parametrize("num_samples", [1, 5, 12, 13, 24])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_together_are_one_process(num_samples, world_size, drop_last):
    order = torch.randperm(num_samples)
    batch_size = 2
    single = plan_epoch(order, batch_size * world_size, drop_last=drop_last)
    ranks = [plan_epoch(order, batch_size, drop_last=drop_last, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len(single.sizes) == num_steps(num_samples, batch_size, world_size, drop_last)
    if drop_last:
        assert all(plan.sizes == [batch_size] * len(single.sizes) for plan in ranks)
    parts = [list(plan.samples.split(plan.sizes)) if plan.sizes else [] for plan in ranks]
    for step, expected in enumerate(single.samples.split(single.sizes) if single.sizes else ()):
        shares = [part[step] for part in parts if step < len(part)]
        assert torch.equal(torch.cat(shares), expected)
        sizes = [len(share) for share in shares] + [0] * (world_size - len(shares))
        assert max(sizes) - min(sizes) <= 1


def test_python_and_numpy_generators_do_not_matter():
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    first = stratified_order(torch.arange(20) % 3, 0)
    random.seed(2)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(2)
    assert torch.equal(stratified_order(torch.arange(20) % 3, 0), first)
