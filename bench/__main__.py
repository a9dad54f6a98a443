"""`python -m bench`: our speed and memory beside the peers', by turns, on the machine at hand."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench import serve, speed, table
from bench.context import Bench, words
from bench.processes import MeasurementError
from bench.shapes import SHAPES
from errors import UserError
from terminal import write_json

WHAT = (*speed.WHAT, *serve.WHAT)


class Report:
    """One run of everything that was asked for."""

    def __init__(self, options: argparse.Namespace, folder: str) -> None:
        self.bench = Bench(options, folder)
        self.speed, self.serving = speed.Speed(self.bench), serve.Serving(self.bench)

    def run(self) -> None:
        """All measurements; the files are written after each."""
        for job in (*self.speed.jobs(), *self.serving.jobs()):
            job()
            self.write()

    @property
    def found(self) -> dict[str, Any]:
        """Everything so far."""
        machine = table.describe(self.bench.limits, self.bench.versions)
        return {"machine": machine, **self.speed.report, "compared": self.serving.rows, "notes": self.bench.notes}

    def write(self) -> None:
        """Writes the files that were asked for."""
        options = self.bench.options
        if options.json:
            write_json(options.json, {**self.found, "compared": [row.record for row in self.serving.rows]})
        if options.markdown:
            Path(options.markdown).write_text(table.page(self.found), encoding="utf-8")
        if options.html:
            from bench.plots import save_plots

            save_plots(options.html, self.found)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("--shape", help=f"of {', '.join(SHAPES)}; default T,S, with --quick T")
    parser.add_argument("--what", default=",".join(WHAT), help=f"of {', '.join(WHAT)}; default all")
    parser.add_argument("--quick", action="store_true", help="for a look: shape T, one round, two repeats")
    parser.add_argument("--rounds", type=int, help="turns of ours and each peer (default 3, with --quick 1)")
    parser.add_argument("--repeats", type=int, help="timed calls in a round, at least (default 3, with --quick 2)")
    parser.add_argument("--devices", default="1", help="1, 2 or 1,2: emulated devices that decoding is spread over")
    parser.add_argument(
        "--peer-python",
        default=os.environ.get("QMAX_PEER_PYTHON", ""),
        help="interpreter with torch and transformers (default: QMAX_PEER_PYTHON; without one, no peer)",
    )
    parser.add_argument("--maxtext-python", default="", help="interpreter with MaxText")
    parser.add_argument("--llama-bin", default="", metavar="DIR", help="where llama.cpp's programs are (default: PATH)")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured")
    parser.add_argument("--markdown", metavar="FILE", help="write the report")
    parser.add_argument("--html", metavar="FILE", help="write a page of plots")
    options = parser.parse_args(argv)
    quick = options.quick
    options.shape = words(options.shape or ("T" if quick else "T,S"), tuple(SHAPES), "--shape")
    options.what = words(options.what, WHAT, "--what")
    options.devices = [int(word) for word in words(options.devices, ("1", "2", "4"), "--devices")]
    options.rounds = (1 if quick else 3) if options.rounds is None else options.rounds
    options.repeats = (2 if quick else 3) if options.repeats is None else options.repeats
    if options.rounds < 1 or options.repeats < 1:
        raise UserError("--rounds and --repeats must be at least 1")
    return options


def main(argv: list[str] | None = None) -> int:
    """Measures, prints the report, and returns the exit code."""
    try:
        options = parse(argv)
        with TemporaryDirectory(prefix="qmax-bench-") as folder:
            report = Report(options, folder)
            report.run()
            print(table.page(report.found))
        return 0
    except UserError as exc:
        print(f"bench: {exc}", file=sys.stderr)
        return 2
    except MeasurementError as exc:
        print(f"bench: our own measurement failed: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
