"""What a person sees while a run trains: stage, step, reward, success, tokens a second, time left, who is busy."""

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from actors.status import Status

_LINE_EVERY_S = 15.0


class Display:
    """A live panel on a terminal; elsewhere a line every quarter of a minute and at every new stage."""

    def __init__(self, console: Console):
        self._console = console
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._last_line, self._last_stage = 0.0, ""
        self._said: set[str] = set()

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._live:
            self._live.stop()

    def update(self, status: Status) -> None:
        for message in status.messages:
            if message not in self._said:
                self._console.print(f"[yellow]![/] {escape(message)}", highlight=False, soft_wrap=True)
                self._said.add(message)
        if self._live:
            self._live.update(self._panel(status))
            return
        stage = f"{status.stage} {status.phase}"
        if stage != self._last_stage or time.monotonic() - self._last_line > _LINE_EVERY_S:
            self._console.print(self.line(status), highlight=False, soft_wrap=True)
            self._last_line, self._last_stage = time.monotonic(), stage

    def line(self, s: Status) -> str:
        return " · ".join([self._head(s), *self._facts(s)])

    def _head(self, s: Status) -> str:
        if s.phase == "starting":
            return f"[{_clock(s.elapsed_s)}] starting the actors"
        name = f"[{_clock(s.elapsed_s)}] stage {s.stage + 1}/{s.stages} {s.kind}"
        return name if s.kind == "eval" else f"{name} step {s.stage_step}/{s.stage_steps}"

    def _facts(self, s: Status) -> list[str]:
        names = {
            "reward/mean": "reward {:.2f}",
            "reward/success": "success {:.0%}",
            "success": "held-out success {:.1%}",
            "success_greedy": "greedy {:.1%}",
            "sft/loss": "loss {:.3f}",
            "perf/tokens_per_second": "{:.0f} tokens/s",
        }
        facts = [form.format(s.latest[k]) for k, form in names.items() if k in s.latest]
        if s.left_s is not None:
            facts.append(f"{_clock(s.left_s)} left in this stage")
        if s.busy:
            facts.append(f"busy: {', '.join(s.busy)}")
        return facts

    def _panel(self, s: Status) -> Group:
        table = Table.grid(padding=(0, 1))
        done = s.stage_step / s.stage_steps if s.kind != "eval" else s.done
        table.add_row(Text(self._head(s), style="bold"), ProgressBar(total=1.0, completed=done, width=32))
        return Group(table, Text("  " + " · ".join(self._facts(s)), style="dim"))


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
