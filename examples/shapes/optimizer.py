"""Muon for the matrices, AdamW for everything else.

So small a model learns in jumps with long plateaus between them, and Muon (https://kellerjordan.github.io/posts/muon/), which
takes steps of equal size in all directions of a matrix, is sooner over each. `torch.optim.Muon` computes in bfloat16, which
is slow on processors without bfloat16 arithmetic; this one computes in float32, all matrices of one shape at once.
"""

import torch
from torch import nn

NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)  # coefficients of Muon's iteration
NUM_ITERATIONS = 5
MOMENTUM = 0.95


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose groups marked `is_muon` take Muon's steps, scaled to the size of AdamW's; no weight decay.

    Args:
        params: parameters.
        lr: learning rate of both.
        betas: of AdamW.
        muon: the parameters that Muon takes: matrices, and kernels of convolutions as matrices of one row an output channel.
    """

    def __init__(self, params, lr: float, betas: tuple[float, float] = (0.9, 0.98), muon=()):
        chosen, params = {id(parameter) for parameter in muon}, list(params)
        groups = [
            {"params": own, "is_muon": is_muon}
            for is_muon in (True, False)
            if (own := [parameter for parameter in params if (id(parameter) in chosen) == is_muon])
        ]
        super().__init__(groups, lr=lr, betas=betas, weight_decay=0.0)

    @torch.no_grad()
    def step(self, closure=None):
        """As of any optimizer."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["is_muon"]]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["is_muon"]:
                self._step_of_muon(group)
        return loss

    def _step_of_muon(self, group: dict) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape.setdefault(parameter.shape, []).append(parameter)
        for shape, parameters in by_shape.items():
            updates = []
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                    state["step"] = torch.zeros(())  # AdamW looks for it in every state that is loaded
                state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
                updates.append(parameter.grad.lerp(state["momentum"], MOMENTUM))
            updates = torch.stack(updates).flatten(2)
            for parameter, step in zip(parameters, orthogonalise(updates)):
                parameter.sub_(step.view(shape), alpha=0.2 * max(step.shape) ** 0.5 * group["lr"])


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """(number, rows, columns) -> the same with all singular values near 1, by Newton-Schulz iterations."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    states = matrices.mT if is_tall else matrices
    states = states / (states.norm(dim=(1, 2), keepdim=True) + 1e-7)
    first, second, third = NEWTON_SCHULZ
    for _ in range(NUM_ITERATIONS):
        squares = states @ states.mT
        states = first * states + (second * squares + third * squares @ squares) @ states
    return states.mT if is_tall else states


def make_optimizer(model: nn.Module, lr: float) -> MuonAdamW:
    """The optimizer of a model's trainable parameters; Muon takes linear layers and `Conv2d`, but not the output layer."""
    head = model.get_output_embeddings()
    matrices = [
        module.weight
        for module in model.modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and (head is None or module.weight is not head.weight)
    ]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return MuonAdamW(trained, lr, muon=[weight for weight in matrices if weight.requires_grad])


def optimizer_factory():
    """As `optimizer_cls_and_kwargs` of transformers' Trainer takes optimizers that need the model."""
    return make_optimizer
