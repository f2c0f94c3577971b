"""Which parameters train, and how fast: decided here and nowhere else."""

from dataclasses import dataclass

from torch import nn

from .distillation import HEAD_NAME

# In the order in which they are printed; a parameter that belongs to none of the first three is the language model's.
PARTS = ("stab", "projector", HEAD_NAME, "language_model")


@dataclass(frozen=True)
class PartPlan:
    """One row of the table that is printed when training starts.

    Attributes:
        part: one of `PARTS`.
        num_parameters: scalars in it.
        num_trainable: of these, how many train.
        learning_rate: peak learning rate; None where nothing trains.
    """

    part: str
    num_parameters: int
    num_trainable: int
    learning_rate: float | None


def part_of(name: str) -> str:
    """The part that a parameter belongs to, by its name in the trained model (PEFT's prefixes and suffixes included)."""
    steps = name.split(".")
    return next((part for part in PARTS if part in steps), "language_model")


def choose_trainable(model: nn.Module, trains: dict[str, bool], learning_rates: dict[str, float]) -> list[PartPlan]:
    """Set `requires_grad` of every parameter, and say what trains.

    Args:
        model: the trained model with its alignment head, perhaps wrapped by PEFT: what PEFT froze stays frozen.
        trains: part -> whether it trains.
        learning_rates: part -> its peak learning rate.

    Returns:
        One row a part that is there.

    Raises:
        ValueError: nothing would train.
    """
    from_peft = hasattr(model, "peft_config")
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        # Quantized weights are integers; they cannot train.
        may_train = parameter.is_floating_point() and (not from_peft or parameter.requires_grad or part == HEAD_NAME)
        parameter.requires_grad_(trains[part] and may_train)
        count = counts.setdefault(part, [0, 0])
        count[0] += parameter.numel()
        count[1] += parameter.numel() * parameter.requires_grad
    if not any(trainable for _, trainable in counts.values()):
        raise ValueError(f"No parameter trains: {', '.join(f'train_{part}={trains[part]}' for part in counts)}")
    return [
        PartPlan(part, *counts[part], learning_rates[part] if counts[part][1] else None)
        for part in PARTS
        if part in counts
    ]


def format_plan(plan: list[PartPlan]) -> str:
    """The table: part, parameters, trainable, learning rate."""
    rows = [f"{'part':<16}{'parameters':>16}{'trainable':>16}{'learning rate':>16}"]
    for row in plan:
        rate = "frozen" if row.learning_rate is None else f"{row.learning_rate:g}"
        rows.append(f"{row.part:<16}{row.num_parameters:>16,}{row.num_trainable:>16,}{rate:>16}")
    total, trainable = sum(row.num_parameters for row in plan), sum(row.num_trainable for row in plan)
    return "\n".join([*rows, f"{'total':<16}{total:>16,}{trainable:>16,}"])


def optimizer_groups(
    model: nn.Module, decayed: set[str], weight_decay: float, learning_rates: dict[str, float]
) -> list[dict]:
    """Parameter groups for any torch optimizer: one for each part, decayed and not.

    Args:
        model: after `choose_trainable`; frozen parameters are in no group, so that they have no optimizer state.
        decayed: names of the parameters that weight decay applies to.
        weight_decay: of these.
        learning_rates: part -> its peak learning rate.

    Returns:
        Groups with `params`, `lr` and `weight_decay`, the language model's first: the Trainer logs the rate of the first.
    """
    groups: dict[tuple[str, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, is_decayed = part_of(name), name in decayed
        group = {"params": [], "lr": learning_rates[part], "weight_decay": weight_decay if is_decayed else 0.0}
        groups.setdefault((part, is_decayed), group)["params"].append(parameter)
    order = {part: place for place, part in enumerate(("language_model", *PARTS[:3]))}
    return [groups[key] for key in sorted(groups, key=lambda key: (order[key[0]], not key[1]))]
