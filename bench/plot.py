"""A report as a picture."""

from __future__ import annotations

from pathlib import Path

from .report import Report
from .subject import Family
from .workloads import Workload

_TITLES: dict[Family, str] = {"null": "nothing or memory behind the device", "file": "a file on tmpfs behind it"}
_COLOURS = ("#2f6f9f", "#e0903a")
_SHOWN = 2
_INCHES_PER_BAR = 0.2


def draw(report: Report, path: Path, ours: set[str]) -> None:
    """Bars of IOPS under the report's first two workloads into the PNG at `path`; `ours` stand out."""
    from matplotlib.figure import Figure  # slow to load, and only needed here

    shown = report.workloads[:_SHOWN]
    families = {family: _ranked(report, family, shown[0]) for family in _TITLES}
    families = {family: names for family, names in families.items() if names}
    bars = [len(names) * len(shown) + 1 for names in families.values()]
    figure = Figure(figsize=(9, 1.6 + _INCHES_PER_BAR * sum(bars)), layout="constrained")
    panels = figure.subplots(len(families), 1, sharex=True, squeeze=False, height_ratios=bars)[:, 0]
    for panel, (family, names) in zip(panels, families.items(), strict=True):
        for number, (workload, colour) in enumerate(zip(shown, _COLOURS, strict=False)):
            heights = [(report.iops(name, workload.name) or 0) / 1000 for name in names]
            thickness = 0.8 / len(shown)
            places = [place + (number - (len(shown) - 1) / 2) * thickness for place in range(len(names))]
            drawn = panel.barh(places, heights, thickness * 0.92, color=colour, label=_label(workload))
            panel.bar_label(drawn, fmt="%.1f", padding=3, fontsize=7)
        panel.set_yticks(range(len(names)), [f"ublkpy {n}" if n in ours else n for n in names], fontsize=9)
        for name, label in zip(names, panel.get_yticklabels(), strict=True):
            label.set_fontweight("bold" if name in ours else "normal")
        panel.invert_yaxis()
        panel.set_title(_TITLES[family], loc="left", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.08)
    panels[-1].set_xlabel("thousand requests in 10⁹ instructions of the whole machine (more is better)", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=_SHOWN, frameon=False)
    figure.suptitle(f"IOPS on the instruction clock, Linux {report.about['kernel'].partition('+')[0]}", fontsize=11)
    figure.savefig(path, dpi=130)


def _ranked(report: Report, family: Family, workload: Workload) -> list[str]:
    """The subjects of `family` that were measured, the fastest first."""
    rates = {result.subject: report.iops(result.subject, workload.name) for result in report.results}
    found = {name: rate for name, rate in rates.items() if rate and report.families[name] == family}
    return sorted(found, key=lambda name: -found[name])


def _label(workload: Workload) -> str:
    return f"{workload.block_bytes // 1024}k {workload.rw}, {workload.depth} in flight"
