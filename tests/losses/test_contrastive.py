from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gkd.losses.contrastive import CRDLoss, HKDLoss, crd_loss, info_nce_loss, sample_negatives


def test_negatives_are_distinct_and_of_other_classes():
    targets = torch.arange(60) % 5
    index = torch.tensor([0, 1, 7])
    negatives, counts = sample_negatives(60, 40, index, targets)
    assert negatives.shape == (40,)
    assert negatives.unique().numel() == 40
    for row, i in zip(counts, index, strict=True):
        assert (targets[negatives[row]] != targets[i]).all()
        assert (targets[negatives[~row]] == targets[i]).all()
    negatives, counts = sample_negatives(60, 60, index)  # without classes: all but itself
    assert counts.sum(1).tolist() == [59, 59, 59]
    assert not counts[negatives == index[:, None]].any()
    negatives, _ = sample_negatives(5, 200, index % 5)  # more than there are: with repetition
    assert negatives.unique().numel() == 5


def test_negatives_are_uniform_over_the_other_classes():
    torch.manual_seed(0)
    targets = torch.tensor([0] * 2 + [1] * 10 + [2] * 8)
    found = torch.zeros(20)
    for _ in range(4000):
        negatives, counts = sample_negatives(20, 6, torch.tensor([5]), targets)
        found[negatives[counts[0]]] += 1
    assert (found[2:12] == 0).all()
    expected = 4000 * 6 / 20
    others = found[torch.tensor([0, 1, *range(12, 20)])]
    assert ((others - expected).abs() < 5 * math.sqrt(expected * 0.7)).all()  # 5 standard deviations


def test_crd_agrees_with_loops():
    generator = torch.Generator().manual_seed(0)
    positive, negative = torch.randn(3, generator=generator).double(), torch.randn(3, 4, generator=generator).double()
    counts = torch.ones(3, 4, dtype=torch.bool)
    noise = 4 / 50
    expected = 0.0
    for p, row in zip(positive.exp().tolist(), negative.exp().tolist(), strict=True):
        expected -= math.log(p / (p + noise)) + sum(math.log(noise / (n + noise)) for n in row)
    assert crd_loss(positive, negative, counts, 50).item() == pytest.approx(expected / 3, rel=1e-9)
    # what does not count changes nothing, whatever it holds
    wider = torch.cat([negative, torch.full((3, 4), 1e6, dtype=torch.float64)], 1)
    counts = torch.cat([counts, ~counts], 1)
    doubled = crd_loss(positive, torch.cat([negative, negative], 1), torch.ones_like(counts), 50)
    torch.testing.assert_close(crd_loss(positive, wider, counts, 50), doubled)


def make_crd(**options):
    torch.manual_seed(0)
    loss = CRDLoss(embedding_dim=8, num_negatives=10, **options)
    loss.build(torch.Size((4, 3, 2, 2)), torch.Size((4, 5, 2, 2)))
    return loss


def test_crd_module_agrees_with_a_slow_version():
    loss = make_crd(num_samples=30)
    student, teacher, index = torch.randn(4, 3, 2, 2), torch.randn(4, 5, 2, 2), torch.tensor([3, 11, 20, 29])
    memories = loss.student_memory.clone().numpy(), loss.teacher_memory.clone().numpy()

    def embed(layer, x):
        e = x.mean((2, 3)).numpy() @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        return e / np.linalg.norm(e, axis=1, keepdims=True)

    anchors = embed(loss.student_embedding, student), embed(loss.teacher_embedding, teacher)
    torch.manual_seed(1)
    value = loss(student, teacher, index)
    torch.manual_seed(1)
    negatives, counts = sample_negatives(30, 10, index)
    expected = 0.0
    for anchor, memory in zip(anchors, (memories[1], memories[0]), strict=True):
        positive = np.exp((anchor * memory[index]).sum(1) / 0.07)
        negative = np.exp(anchor @ memory[negatives].T / 0.07)
        mean = [row[keep].tolist() for row, keep in zip(negative, counts.numpy(), strict=True)]
        norm = 30 * (positive.mean() + 10 * np.mean(np.concatenate(mean))) / 11
        noise = 10 / 30
        expected += -np.log(positive / norm / (positive / norm + noise)).mean()
        expected += 10 * np.mean([-math.log(noise / (n / norm + noise)) for row in mean for n in row])
    assert value.item() == pytest.approx(expected, rel=1e-4)

    for memory, before, anchor in zip((loss.student_memory, loss.teacher_memory), memories, anchors, strict=True):
        after = before.copy()
        mixed = 0.5 * before[index] + 0.5 * anchor
        after[index] = mixed / np.linalg.norm(mixed, axis=1, keepdims=True)
        np.testing.assert_allclose(memory.numpy(), after, atol=1e-6)


def test_crd_state_resumes_exactly():
    loss, other = make_crd(num_samples=30), make_crd(num_samples=30)
    targets = torch.arange(30) % 3
    loss.set_targets(targets)
    other.set_targets(targets)
    batches = [(torch.randn(4, 3, 2, 2), torch.randn(4, 5, 2, 2), torch.randperm(30)[:4]) for _ in range(2)]
    torch.manual_seed(5)
    loss(*batches[0])
    state = {name: x.clone() for name, x in loss.state_dict().items()}
    rng = torch.get_rng_state()
    expected = loss(*batches[1])
    other.load_state_dict(state)
    torch.set_rng_state(rng)
    assert torch.equal(other(*batches[1]), expected)
    other.eval()
    before = {name: x.clone() for name, x in other.state_dict().items()}
    other(*batches[0])
    assert all(torch.equal(x, before[name]) for name, x in other.state_dict().items())


def test_crd_targets_set_the_size_before_or_after_build():
    loss = make_crd()
    features = torch.randn(4, 3, 2, 2), torch.randn(4, 5, 2, 2), torch.arange(4)
    with pytest.raises(RuntimeError, match="Expected the size of the training set"):
        loss(*features)
    loss.set_targets(torch.arange(12) % 4)
    assert loss.student_memory.shape == (12, 8)
    loss(*features)
    first = CRDLoss()
    first.set_targets(torch.arange(12) % 4)
    first.build(torch.Size((4, 3, 2, 2)), torch.Size((4, 5, 2, 2)))
    assert first.teacher_memory.shape == (12, 128)


@pytest.mark.parametrize("make", [lambda: make_crd(num_samples=30), lambda: HKDLoss(k=2, embedding_dim=8)], ids=["crd", "hkd"])
def test_gradients_reach_student_and_layers_only(make):
    loss = make()
    student, teacher = torch.randn(4, 3, 2, 2, requires_grad=True), torch.randn(4, 5, 2, 2, requires_grad=True)
    loss.build(student.shape, teacher.shape)
    options = {"index": torch.arange(4)} if getattr(loss, "needs_index", False) else {}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, teacher, **options)
    assert value.dtype == torch.float32
    value.backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert list(loss.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in loss.parameters())
    for x in (torch.zeros(4, 3, 2, 2), torch.ones(4, 3, 2, 2)):
        x.requires_grad_()
        result = loss(x, torch.zeros(4, 5, 2, 2), **options)
        (gradient,) = torch.autograd.grad(result, x)
        assert result.isfinite()
        assert gradient.isfinite().all()


def test_info_nce_agrees_with_loops():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    s, t = ((x / x.norm(dim=1, keepdim=True)).numpy() for x in (student, teacher))
    expected = 0.0
    for b in range(4):
        match = math.exp(s[b] @ t[b] / 0.5)
        expected -= math.log(match / sum(math.exp(s[b] @ t[k] / 0.5) for k in range(4)))
        expected -= math.log(match / sum(math.exp(s[k] @ t[b] / 0.5) for k in range(4)))
    assert info_nce_loss(student, teacher, 0.5).item() == pytest.approx(expected / 4, rel=1e-9)
    assert torch.autograd.gradcheck(lambda x: info_nce_loss(x, teacher), student.requires_grad_())


def test_hkd_agrees_with_dense_graph_convolution():
    torch.manual_seed(0)
    loss = HKDLoss(k=2, embedding_dim=4)
    features = torch.rand(6, 3, 2, 2), torch.rand(6, 5, 2, 2)
    loss.build(features[0].shape, features[1].shape)
    found = []
    for network, x in zip(loss.networks, features, strict=True):
        x = x.mean((2, 3))
        unit = x / x.norm(dim=1, keepdim=True)
        cosine = unit @ unit.mT
        near = (cosine - 2 * torch.eye(6)).topk(2).indices
        chosen = torch.zeros(6, 6).scatter_(1, near, 1.0)
        adjacency = cosine * torch.maximum(chosen, chosen.mT)
        scale = adjacency.sum(1).rsqrt()
        adjacency = scale[:, None] * adjacency * scale
        e = network["embedding"](x)
        e = e / e.norm(dim=1, keepdim=True)
        conv = network["conv"]
        found.append((e, conv.lins[0](e) + conv.lins[1](adjacency @ e) + conv.bias))
    (a, b), (c, d) = found
    torch.testing.assert_close(loss(*features), info_nce_loss(a, c) + info_nce_loss(b, d), rtol=1e-4, atol=1e-5)


def test_errors():
    features = torch.randn(4, 3, 2, 2), torch.randn(4, 5, 2, 2)
    with pytest.raises(RuntimeError, match=r"Expected build\("):
        CRDLoss(num_samples=5)(*features, torch.arange(4))
    with pytest.raises(RuntimeError, match=r"Expected build\("):
        HKDLoss()(*features)
    loss = make_crd(num_samples=30)
    with pytest.raises(ValueError, match=r"Expected index in \[0, 30\) \(got 0 to 30\)"):
        loss(*features, torch.tensor([0, 30, 1, 2]))
    with pytest.raises(ValueError, match=r"Expected index \[4\]"):
        loss(*features, torch.arange(3))
    with pytest.raises(ValueError, match="Expected classes"):
        loss.set_targets(torch.rand(30))
    with pytest.raises(ValueError, match="momentum"):
        CRDLoss(momentum=1.0)
    with pytest.raises(ValueError, match="at least 1"):
        sample_negatives(0, 3, torch.arange(1))
    hkd = HKDLoss(k=4)
    hkd.build(features[0].shape, features[1].shape)
    with pytest.raises(ValueError, match="Expected a batch of at least 5"):
        hkd(*features)


def test_crd_keeps_the_normalisation_of_the_first_batch_of_the_training():
    loss = make_crd(num_samples=30)
    student, teacher = torch.randn(4, 3, 2, 2), torch.randn(4, 5, 2, 2)
    loss.eval()(student, teacher, torch.arange(4))
    assert loss.log_norm.isnan().all()
    loss.train()(student, teacher, torch.arange(4))
    first = loss.log_norm.clone()
    assert first.isfinite().all()
    loss(5 * student, teacher.flip(0), torch.arange(4, 8))
    assert torch.equal(loss.log_norm, first)


def test_hkd_takes_its_edges_without_gradient():
    loss = HKDLoss(k=2, embedding_dim=4)
    loss.build(torch.Size((6, 3, 2, 2)), torch.Size((6, 5, 2, 2)))
    seen = []
    loss.nodes.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].requires_grad))
    loss(torch.randn(6, 3, 2, 2, requires_grad=True), torch.randn(6, 5, 2, 2)).backward()
    assert seen == [False, False]


def test_hkd_on_diverged_features_is_nan():
    loss = HKDLoss(k=2, embedding_dim=4)
    loss.build(torch.Size((6, 3, 2, 2)), torch.Size((6, 5, 2, 2)))
    assert loss(torch.full((6, 3, 2, 2), float("nan")), torch.randn(6, 5, 2, 2)).isnan()
