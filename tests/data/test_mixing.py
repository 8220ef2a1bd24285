from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from gkd.data import Mix, RandomImages
from gkd.distill import Distiller
from gkd.losses import DKDLoss, KDLoss


def data() -> RandomImages:
    return RandomImages(num_classes=4, input_size=(3, 8, 8), num_train=24, num_test=4)


def mixed(batch_size: int = 8, start: int = 0, epoch: int = 1, **options):
    batches = data().batches("train", batch_size, epoch=epoch, seed=3, start=start)
    return list(Mix(**options).batches(batches, 4, seed=3, epoch=epoch, start=start))


def test_mixup_blends_images_and_classes_alike():
    for (images, shares, index), (plain, targets, same) in zip(mixed(mixup=1.0), data().batches("train", 8, epoch=1, seed=3), strict=True):
        assert torch.equal(index, same)
        one_hot, neighbour = F.one_hot(targets, 4).float(), F.one_hot(targets.roll(1), 4).float()
        differing = (targets != targets.roll(1)).nonzero().flatten()
        place = int(differing[0])
        share = float(shares[place, targets[place]])
        torch.testing.assert_close(shares, share * one_hot + (1 - share) * neighbour)
        torch.testing.assert_close(images, share * plain + (1 - share) * plain.roll(1, 0))


def test_cutmix_shares_are_areas():
    changed = 0
    for (images, shares, _), (plain, targets, _) in zip(mixed(cutmix=1.0), data().batches("train", 8, epoch=1, seed=3), strict=True):
        taken = (images != plain).any(dim=1)
        for place in range(8):
            if targets[place] != targets[place - 1]:
                assert float(shares[place, targets[place - 1]]) == pytest.approx(float(taken[place].float().mean()), abs=1e-6)
                changed += int(taken[place].any())
        assert torch.equal(images[:, :, ~taken[0]], plain[:, :, ~taken[0]])
    assert changed > 3


def test_follows_from_seed_epoch_and_step():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    whole = mixed(mixup=0.4, cutmix=1.0)
    assert torch.equal(torch.get_rng_state(), state)
    rest = mixed(mixup=0.4, cutmix=1.0, start=1)
    assert len(whole) == 3
    for first, second in zip(whole[1:], rest, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len({share for _, shares, _ in whole for share in shares.flatten().tolist()}) > 5
    assert not torch.equal(mixed(mixup=0.4, epoch=2)[0][0], mixed(mixup=0.4)[0][0])


def test_nonsense_is_refused():
    for options in ({}, {"mixup": -0.1, "cutmix": 1.0}, {"mixup": float("nan")}):
        with pytest.raises(ValueError, match="mixup and cutmix of at least 0, and not both 0"):
            Mix(**options)


def test_distillation_sees_the_mixture():
    model = {name: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4)) for name in ("student", "teacher")}
    terms = {"kd": KDLoss(), "dkd": DKDLoss()}
    distiller = Distiller(**model, terms=terms, weights=dict.fromkeys(terms, 1.0), input_size=(3, 8, 8))
    images, shares, index = mixed(mixup=1.0)[0]
    losses = distiller(images, shares, index)
    logits = {name: network(images) for name, network in model.items()}
    torch.testing.assert_close(losses["task"], -(shares * logits["student"].log_softmax(1)).sum(1).mean())
    torch.testing.assert_close(losses["kd"], KDLoss()(logits["student"], logits["teacher"]))
    torch.testing.assert_close(losses["dkd"], DKDLoss()(logits["student"], logits["teacher"], shares.argmax(1)))
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model["student"].parameters())
