"""A plan as text: a paragraph that says what will happen, then one row per norm and convolution."""

from __future__ import annotations

from typing import TYPE_CHECKING

from knport.surgery.widths_text import width_summary, width_table

if TYPE_CHECKING:
    from knport.surgery.plan import Plan

HEADINGS = ("module", "layer", "verdict", "why")
COLOURS = {
    "absorbed": "green",
    "KNConv": "green",
    "KNLinear": "green",
    "KernelNorm": "cyan",
    "kept": "yellow",
    "already": "dim",
}


LEGEND = {
    "absorbed": "norm removed; the layers next to it do its work",
    "KNConv": "the same convolution, normalizing what lies under its kernel",
    "KNLinear": "the same linear layer, normalizing the tokens that it reads",
    "KernelNorm": "a norm of each pixel over its channels, within one image",
    "kept": "stays as it is",
    "already": "a layer of knport",
}


def summary(plan: Plan) -> list[str]:
    """The sentences above the table."""
    norms, convs, linears = plan.count("norm"), plan.count("conv"), plan.count("linear")
    before, after = plan.parameters
    enlarged = sum(1 for v in plan.verdicts if v.enlarge)
    lines = [
        f"Plan for {plan.model}: nothing has been changed yet; plan.apply(model) does what follows to a copy.",
        "Kernel normalization: each convolution normalizes the block under its kernel by that block's own mean and",
        "variance, image by image, so the norms around it can go.",
        "",
        f"  norms         {_counts(norms)}",
        f"  convolutions  {_counts(convs)}",
    ]
    if linears:
        lines.append(f"  linear layers {_counts(linears)}")
    if enlarged:
        why = "one pixel has no neighbourhood to take statistics of"
        lines.append(f"  1x1 kernels   {enlarged} enlarged to {plan.config.enlarge}: {why}")
    lines.append(f"  parameters    {before:,} -> {after:,}" + (f" (x{after / before:.2f})" if before else ""))
    lines += width_summary(plan.resizing)
    lines += [
        f"  added         KernelNorm (dropout {f.dropout:g}) in front of {f.path}, {f.before}" for f in plan.final_norms
    ]
    if plan.inplace_off:
        lines.append(f"  in place      switched off in {len(plan.inplace_off)} activations whose norm goes")
    lines += [f"  note          {note}" for note in plan.notes]
    used = [word for word in LEGEND if norms[word] or convs[word] or linears[word]]
    return [*lines, "", *(f"  {word:<13} {LEGEND[word]}" for word in used)]


def _counts(counts) -> str:
    parts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in COLOURS if counts[verdict])
    return f"{sum(counts.values())}: {parts}" if parts else "none"


def rows(plan: Plan) -> list[tuple[str, str, str, str]]:
    """(path, layer, verdict, reason) per norm and convolution."""
    return [(_named(v.path, v.aliases), v.layer, v.verdict, v.reason) for v in plan.verdicts]


def _named(path: str, aliases: tuple[str, ...]) -> str:
    return path + (f" (= {', '.join(aliases)})" if aliases else "")


def plain(plan: Plan) -> str:
    """For ``print``: aligned columns, no colours."""
    lines = [HEADINGS, *rows(plan)]
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    table = ["  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[3]]) for line in lines]
    return "\n".join([*summary(plan), "", *table, *width_table(plan.resizing)])


def rich(plan: Plan):
    """For ``rich.print``: the same as a coloured table."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(*HEADINGS)
    for path, layer, verdict, reason in rows(plan):
        table.add_row(Text(path), Text(layer), Text(verdict, style=COLOURS[verdict]), Text(reason))
    return Group(Text("\n".join(summary(plan))), table, Text("\n".join(width_table(plan.resizing))))
