"""From what the user asks for to a comparison that can begin: everything is checked here, and nothing measured."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from polyvisor import __version__
from polyvisor.compare.environment import described, environment_of
from polyvisor.compare.machine import Guest, Machine, Native
from polyvisor.compare.place import Place, refused
from polyvisor.compare.plan import Plan, check_plan
from polyvisor.compare.results import Results
from polyvisor.compare.target import Kind, Target, spec_of
from polyvisor.compare.workload import Workload, all_workloads, choose_workloads
from polyvisor.errors import Unavailable, WrongState
from polyvisor.operation import Progress
from polyvisor.remote.transfer import copy_image
from polyvisor.spec.vm import Nic

LABEL = "polyvisor.compare"


async def new_results(plan: Plan, places: Mapping[str | None, Place]) -> Results:
    """A comparison in which nothing was measured yet; raises InvalidInput."""
    workloads = {each.name: each for each in choose_workloads(plan.workloads, quick=False)}
    check_plan(plan, workloads)
    return Results(
        id=secrets.token_hex(3),
        created_at=time.time(),
        version=__version__,
        plan=plan,
        metrics={name: workloads[name].metrics for name in plan.workloads},
        environments=await environments(plan.targets, places),
    )


async def environments(targets: Sequence[Target], places: Mapping[str | None, Place]) -> dict[str, dict[str, str]]:
    """What each target's host says of itself, by target."""
    found = {host: await environment_of(places[host].status, places[host].shell) for host in {t.host for t in targets}}
    return {target.label: found[target.host] for target in targets}


async def have_image(
    name: str, targets: Sequence[Target], places: Mapping[str | None, Place], progress: Progress
) -> str:
    """See to it that every host of `targets` has the very same image `name`; returns its id.

    It is built or fetched where the first of them, this machine if it is one, lacks it, and copied to the others.
    """
    hosts = list(dict.fromkeys(target.host for target in targets if target.kind is not Kind.NATIVE))
    if not hosts:
        return ""
    # This machine first, which builds quickest.
    order = sorted(hosts, key=lambda host: not places[host].is_here)
    source = places[order[0]]
    image = await source.api.image_pull(name, progress)
    for host in order[1:]:
        await copy_image(source.api, image.name, places[host].api, progress)
    return image.id


def machines_of(results: Results, places: Mapping[str | None, Place]) -> dict[str, Machine]:
    """The machine of each target; raises Unavailable, with the reason, for one that can't be had (any more)."""
    found: dict[str, Machine] = {}
    for target in results.plan.targets:
        place = places[target.host]
        if reason := refused(target, place):
            raise Unavailable(f"target '{target.label}' is not available: {place}: {reason}")
        name = f"compare-{results.id}-{target.label}"[:63].rstrip("-")
        if target.kind is Kind.NATIVE:
            found[target.label] = Native(target, place.shell, name)
        else:
            spec = spec_of(target, name, results.plan.image, {LABEL: results.id})
            if any(all_workloads()[each].peer for each in results.plan.workloads):
                spec = replace(spec, nics=(*spec.nics, Nic(network=f"private:compare-{results.id}")))
            found[target.label] = Guest(target, place.api, place.shell, spec)
    return found


def workloads_of(results: Results) -> dict[str, Workload]:
    """The workloads of a comparison, to be carried on; raises InvalidInput for one that is gone, or measures otherwise now."""
    known = all_workloads()
    found = {each.name: each for each in choose_workloads(results.plan.workloads, quick=False)}
    for name in found:
        if known[name].metrics != results.metrics.get(name):
            raise WrongState(
                f"workload '{name}' measures something else now than when this comparison was begun",
                hint="begin anew; a report of what there is: polyvisor compare report FILE",
            )
    return found


def check_same_machines(results: Results, places: Mapping[str | None, Place]) -> None:
    """Raise WrongState where a target's host is another machine, or runs another kernel, than when `results` was begun."""
    for target in results.plan.targets:
        before, now = results.environments.get(target.label, {}), described(places[target.host].status)
        for key in now:
            if key in before and before[key] != now[key]:
                raise WrongState(
                    f"the host of target '{target.label}' is not as it was: {key} was {before[key]}, and is {now[key]}",
                    hint="begin anew, and see what has changed: polyvisor compare diff OLD NEW",
                )


def resumed(results: Results) -> Results:
    """`results` without failures, which are tried again, and without notes, which were of how it ended."""
    kept = tuple(each for each in results.measurements if each.error is None)
    return replace(results, measurements=kept, notes=())
