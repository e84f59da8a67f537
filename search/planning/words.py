"""A plan for people: three lines at a launch, a table for who asks."""

from rich import box
from rich.console import Console
from rich.table import Table

from search.planning.duration import in_words
from search.planning.plan import Plan
from search.space import Choice, Domain, Int
from search.sweep import Sweep


def lines_of(plan: Plan) -> list[str]:
    """Return a plan in three lines."""
    search, training = plan.sweep.search, plan.sweep.training
    possible = search.num_trials * training.max_epochs
    fastest = min(plan.costs, key=lambda kind: plan.epoch_s(kind)[1])
    slowest = max(plan.costs, key=lambda kind: plan.epoch_s(kind)[0])
    disk = ", ".join(
        f"{name} {_size(size)}" for name, size in plan.disk_bytes.items() if size >= 2**20
    )
    peak_bytes = max(cost.peak_bytes for cost in plan.costs.values())
    memory = f"; memory up to {_size(peak_bytes)} a trial" if peak_bytes else ""
    measured = f"; measured {in_words(plan.measured_ago_s)} ago" if plan.measured_ago_s else ""
    compiling = (
        "; compiling comes on top"
        if training.compile and any(depth for _, depth in plan.costs)
        else ""
    )
    return [
        f"plan    {search.num_trials} trials, {plan.num_slots} at a time; epochs "
        f"{plan.epochs.as_counts()} of {possible} possible",
        f"        {plan.duration_s.as_times()}{_price(plan)}{compiling}; an epoch takes "
        f"{in_words(plan.epoch_s(fastest)[1])} ({_kind(fastest)}) to "
        f"{in_words(plan.epoch_s(slowest)[0])} ({_kind(slowest)}){measured}",
        f"        disk up to {_size(sum(plan.disk_bytes.values()))} ({disk}){memory}",
    ]


def print_plan(console: Console, plan: Plan) -> None:
    """Print a plan with its space, and what each kind of trial takes."""
    sweep = plan.sweep
    console.print(f"space   {describe_space(sweep)}", soft_wrap=True)
    for line in lines_of(plan):
        console.print(line, soft_wrap=True)
    if plan.price is None and sweep.resources.price_per_gpu_hour is None and plan.num_gpus:
        console.print("        resources.price_per_gpu_hour adds what it costs")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("backbone", "depth", "epoch", "features stored", "checkpoint", "peak memory"):
        table.add_column(header, justify="left" if header == "backbone" else "right")
    for kind in sorted(plan.costs):
        cost, (whole_s, stored_s) = plan.costs[kind], plan.epoch_s(kind)
        table.add_row(
            kind[0],
            str(kind[1]),
            in_words(whole_s),
            in_words(stored_s) if cost.is_shared else "-",
            _size(cost.best_bytes),
            _size(cost.peak_bytes) if cost.peak_bytes else "-",
        )
    console.print(table)
    console.print(
        "epoch: everything computed; features stored: what an earlier trial computed is read. "
        "Intervals hold nine in ten of the simulated sweeps.",
        soft_wrap=True,
    )


def describe_space(sweep: Sweep) -> str:
    """Return what is searched, in words."""
    return "; ".join(f"{name} {_domain(domain)}" for name, domain in sweep.space.items())


def _domain(domain: Domain) -> str:
    if isinstance(domain, Choice):
        return "one of " + ", ".join(map(str, domain.choices))
    if isinstance(domain, Int):
        return f"{domain.low} to {domain.high}"
    return f"{domain.low:g} to {domain.high:g}" + (", by factors" if domain.log else "")


def _kind(kind: tuple[str, int]) -> str:
    return f"{kind[0]}, depth {kind[1]}"


def _price(plan: Plan) -> str:
    if plan.price is None:
        return ""
    if not plan.num_gpus:
        return ", no GPU to pay for"
    rate = plan.sweep.resources.price_per_gpu_hour
    return f", {plan.price:.2f} for {plan.num_gpus:g} GPUs at {rate:g} an hour"


def _size(num_bytes: float) -> str:
    if num_bytes < 2**30:
        return (
            f"{num_bytes / 2**20:.0f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.0f} KiB"
        )
    return f"{num_bytes / 2**30:.1f} GiB"
