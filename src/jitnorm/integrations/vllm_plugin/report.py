"""What the plugin did to a model: the modules that it replaced, and those that it left, with the reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from jitnorm.jit.log import logger


@dataclass
class Report:
    """What the plugin replaced in a model, and what it left.

    Attributes:
        model: The name of the model's class.
        replaced: What computes each replaced module, by the module's name.
        left: Why each other module was left, by the module's name.
        notes: What concerns the whole model.
    """

    model: str
    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.model}: replaced {len(self.replaced)} modules, left {len(self.left)}"]
        lines += [f"  {count} x {what}" for what, count in Counter(self.replaced.values()).items()]
        lines += [f"  left {count} x {why}" for why, count in Counter(self.left.values()).items()]
        return "\n".join(lines + [f"  {note}" for note in self.notes])


REPORTS: list[Report] = []


def publish(report: Report) -> None:
    """Keep a report for `explain`, and log it."""
    REPORTS.append(report)
    logger.info("jitnorm's plugin in vLLM, %s", report)
