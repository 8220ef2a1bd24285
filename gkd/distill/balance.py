from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gkd.errors import UserError

# Gradients are measured on losses scaled by this, and the measured norm is divided by it: a mean over a batch leaves gradients that
# float16 would flush to 0.
MEASURING_SCALE = 1024.0


class GradientBalance(nn.Module):
    r"""Turns weights into shares of the task's gradient, so that nobody needs a table of weights for every pair of networks.

    Let :math:`\ell_k` be a loss before weighting and :math:`z_k` the *anchor* where it pulls at the student: the tapped maps that it
    looks at (before any adapter), or the logits. With :math:`a_k = \lVert \partial \ell_{task} / \partial z_k \rVert_2` and
    :math:`b_k = \lVert \partial \ell_k / \partial z_k \rVert_2`, taken over the whole batch and all maps of the anchor, the factor is

    .. math:: f_k = \bar a_k / \bar b_k,

    where the bars are running means of what is measured every ``interval`` steps. A weight :math:`s_k` then gives the loss
    :math:`s_k f_k \ell_k`, whose gradient at :math:`z_k` has, in the running mean, :math:`s_k` times the norm of the task's. The task
    enters by its plain loss: its own weight stays an ordinary number. With ``cap``, the shares of all active losses are scaled down
    together where they add up to more, so that whatever the number of terms and stages, all of them pull at most ``cap`` times as
    strongly as the task.

    With a compiled student the steps that measure run uncompiled. A loss that has not been measured keeps the factor 1; one without
    gradient at its anchor gets the factor 0. A measurement that is not finite is skipped. A loss that becomes active between two
    measurements is measured at once.

    The running means are buffers, and the number of steps is a part of ``state_dict()``: a resumed training goes on as if it had not
    been stopped. In a distributed training the measured norms are averaged, so that all ranks weigh alike.

    Args:
        interval: Steps from one measurement to the next. A measurement costs about one backward pass of the student.
        momentum: What a running mean keeps of its old value at a measurement, in [0, 1).
        cap: Largest sum of the shares; None for no bound.

    Raises:
        ValueError: If ``interval`` is below 1, ``momentum`` outside [0, 1) or ``cap`` not positive.

    References:
        Chen, Badrinarayanan, Lee, Rabinovich: GradNorm, ICML 2018, balances gradients too, but learns the weights by a loss of their own.
    """

    norms: Tensor

    def __init__(self, interval: int = 20, momentum: float = 0.9, cap: float | None = None) -> None:
        super().__init__()
        if interval < 1:
            raise ValueError(f"Expected 'interval' to be at least 1 (got {interval})")
        if not 0 <= momentum < 1:
            raise ValueError(f"Expected 'momentum' in [0, 1) (got {momentum})")
        if cap is not None and not cap > 0:
            raise ValueError(f"Expected 'cap' above 0, or None for no bound (got {cap})")
        self.interval = interval
        self.momentum = momentum
        self.cap = cap
        self.build([])

    def build(self, names: Sequence[str]) -> None:
        """Takes the names of the losses to balance; forgets what was measured."""
        self.names = list(names)
        self._step = 0
        self._measured: set[str] = set()
        self.register_buffer("norms", torch.zeros(len(self.names), 2))  # running means: of the task, of the loss

    def bounded(self, shares: Mapping[str, float]) -> dict[str, float]:
        """Scales shares, those of losses that are not active being 0, down to a sum of at most ``cap``."""
        total = sum(shares.values())
        scale = 1.0 if self.cap is None or total <= self.cap else self.cap / total
        return {name: share * scale for name, share in shares.items()}

    @torch.compiler.disable
    def tick(self, active: Iterable[str]) -> bool:
        """Counts a training step and says whether to measure in it: the interval is over, or an active loss has never been measured."""
        if not (self.training and torch.is_grad_enabled()):
            return False
        due = self._step % self.interval == 0 or not self._measured.issuperset(active)
        self._step += 1
        return due

    def factors(self) -> dict[str, Tensor]:
        """Returns the factor of every loss that has been measured, without bringing a value to the host."""
        task, loss = self.norms.unbind(dim=1)
        pulls = loss > 0
        ratio = torch.where(pulls, task / loss.where(pulls, torch.ones_like(loss)), torch.zeros_like(task))
        return {name: factor for name, factor in zip(self.names, ratio.unbind(), strict=True) if name in self._measured}

    def measure(self, task: Tensor, losses: Mapping[str, Tensor], anchors: Mapping[str, Sequence[Tensor]]) -> None:
        """Measures how the task and the losses pull, and moves the running means.

        Args:
            task: The task's loss before weighting.
            losses: The active losses before weighting, by name.
            anchors: Where each of them pulls at the student, by name.

        Raises:
            ValueError: If the task does not depend on an anchor.
        """
        edges = {id(anchor): _upstream(anchor) for name in losses for anchor in anchors[name] if anchor.requires_grad}
        every = [edge for chain in edges.values() for edge in chain]
        of_task = dict(zip(every, _gradients(task, every), strict=True))
        now = {}
        for name, loss in losses.items():
            pulled = []
            for anchor in anchors[name]:
                chain = edges.get(id(anchor), [])
                edge = next((edge for edge in chain if of_task[edge] is not None), None)
                if chain and edge is None:
                    raise ValueError(f"Expected the task's loss to depend on what '{name}' looks at (got no gradient there)")
                if edge is not None:
                    pulled.append(edge)
            now[name] = torch.stack([self._norm([of_task[edge] for edge in pulled]), self._norm(_gradients(loss, pulled))])
        not_measured = torch.full_like(self.norms[:1], torch.nan).squeeze(0)
        norms = torch.stack([now.get(name, not_measured) for name in self.names])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(norms)
            norms = norms / torch.distributed.get_world_size()
        # Both means start at 0 and take the same steps, so that their ratio needs no correction of that start.
        mixed = self.momentum * self.norms + (1 - self.momentum) * norms
        self.norms.copy_(mixed.where(norms.isfinite().all(dim=1, keepdim=True), self.norms))
        self._measured.update(losses)

    def _norm(self, gradients: Sequence[Tensor | None]) -> Tensor:
        square = self.norms.new_zeros(())
        for gradient in gradients:
            if gradient is not None:
                square = square + (gradient.to(square.dtype) / MEASURING_SCALE).square().sum()
        return square.sqrt()

    def get_extra_state(self) -> Tensor:
        """Returns what the host must know: the number of steps, and which losses have been measured."""
        return torch.tensor([self._step, *(name in self._measured for name in self.names)], dtype=torch.long)

    def set_extra_state(self, state: Tensor) -> None:
        """Restores what :meth:`get_extra_state` returned."""
        step, *measured = state.tolist()
        if len(measured) != len(self.names):
            raise ValueError(f"Expected the state of {len(self.names)} balanced losses (got one of {len(measured)})")
        self._step = step
        self._measured = {name for name, flag in zip(self.names, measured, strict=True) if flag}

    def extra_repr(self) -> str:
        """Returns what the printed module shows."""
        return f"interval={self.interval}, momentum={self.momentum}, cap={self.cap}"


def as_balance(balance: GradientBalance | str | None) -> GradientBalance | None:
    """Makes a balance of its name.

    Raises:
        UserError: If there is none of this name.
    """
    if balance is None or isinstance(balance, GradientBalance):
        return balance
    if balance != "gradient":
        raise UserError(f"Expected 'balance' to be 'gradient', a GradientBalance or None (got '{balance}')")
    return GradientBalance()


def _gradients(loss: Tensor, edges: Sequence[GradientEdge]) -> Sequence[Tensor | None]:
    if not loss.requires_grad or not edges:
        return [None] * len(edges)
    return torch.autograd.grad(loss.float() * MEASURING_SCALE, list(edges), retain_graph=True, allow_unused=True)


def _upstream(anchor: Tensor) -> list[GradientEdge]:
    """Returns where gradients that arrive at the anchor flow on to: through it and, as long as there is one way only, before it.

    What a tap returns may be a copy or a view of the map, beside the way from the map to the task; the task's gradient is found one step
    before."""
    edge = get_gradient_edge(anchor)
    chain = [edge]
    while True:
        before = [(node, output) for node, output in edge.node.next_functions if node is not None]
        if len(before) != 1:
            return chain
        edge = GradientEdge(*before[0])
        chain.append(edge)
