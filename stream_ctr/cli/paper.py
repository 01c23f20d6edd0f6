"""The command `paper`: repeat the DeepFM paper's tables and figures on a log."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stream_ctr.cli import voice
from stream_ctr.cli.options import GivenPath, LogFormat, load_config, log_options, print_notes
from stream_ctr.errors import DataError

if TYPE_CHECKING:
    from stream_ctr.config import Config
    from stream_ctr.logs.log import Log
    from stream_ctr.paper.plan import Options, Plan


@click.command()
@click.option("--data", "log_path", type=GivenPath(), help="A log of impressions and clicks.")
@click.option(
    "--simulate",
    "simulated",
    type=click.IntRange(1),
    metavar="N",
    help="Instead of a log, N impressions of a simulated app store.",
)
@log_options
@click.option(
    "--out",
    type=GivenPath(file_okay=False),
    required=True,
    help="Directory for the report and everything that is kept.",
)
@click.option(
    "--quick",
    is_flag=True,
    help="A sample: 20,000 impressions, two seeds, three epochs, fewer points; a minute or two.",
)
@click.option(
    "--seeds",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Runs of each system of Table 2.",
)
@click.option(
    "--study-seeds",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Runs of each point of Figures 7 to 11.",
)
@click.option(
    "--study-rows",
    type=click.IntRange(1),
    default=1_000_000,
    show_default=True,
    help="Random training rows for Figures 7 to 11.",
)
@click.option(
    "--split",
    type=click.Choice(["random", "time"]),
    default="random",
    show_default=True,
    help="How a tenth becomes the test part.",
)
@click.option(
    "--dropout",
    type=click.FloatRange(0, 1, max_open=True),
    help="Share of activations dropped, except in the streaming table.  [default: 0.5]",
)
@click.option(
    "--epochs",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="Most epochs; one that is no better ends a run.",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME",
    help="One of `stream-ctr models`; may be given again.  [default: all nine]",
)
@click.option(
    "--only", metavar="PART,...", help="Do only these: table2, figure6 to figure11, streaming."
)
@click.option("--restart", is_flag=True, help="Delete what an earlier command has left in --out.")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
)
@click.option(
    "--config",
    "config_path",
    type=GivenPath(),
    help="A TOML file; keys that it does not set are the paper's.",
)
@click.option(
    "-X",
    "extra",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any key of the configuration such as model.table_bits.",
)
def paper(
    *,
    log_path: Path | None,
    simulated: int | None,
    log_format: LogFormat,
    out: Path,
    models: tuple[str, ...],
    only: str | None,
    restart: bool,
    config_path: Path | None,
    extra: tuple[str, ...],
    **wishes: Any,
) -> None:
    """Repeat the DeepFM paper's tables and figures on a log.

    The report is report.html, report.md and report.json in --out. It covers nine systems, several
    seeds and the paper's settings. Finished runs are kept: the same command goes on where it was
    ended, and one with --only or --model adds to what is there. Figures need matplotlib:
    pip install 'stream-ctr[paper]'.

    \b
    stream-ctr paper --data train.txt --format criteo --out report --quick
    stream-ctr paper --data train.txt --format criteo --out report -X model.table_bits=24
    stream-ctr paper --simulate 1000000 --out report
    """
    from stream_ctr.learn.thread_pool import set_up_process
    from stream_ctr.models import MODELS
    from stream_ctr.paper import plan

    if (log_path is None) == (simulated is None):
        raise click.UsageError("give --data LOG or --simulate N")
    options = plan.Options.create(
        **wishes,
        models=_chosen("--model", models, MODELS),
        only=frozenset(_chosen("--only", (only or "").split(","), plan.PARTS)),
    )
    config, properties = load_config(config_path, extra)
    if properties:
        raise click.BadParameter(f"no key of the configuration: {', '.join(properties)}")
    set_up_process()
    log = _open(log_path, simulated, log_format)
    _repeat(log, config, options, out, restart=restart)


def _chosen(option: str, names: Sequence[str], known: Collection[str]) -> tuple[str, ...]:
    """Return the known names that are given, or all if none is."""
    named = {name.strip() for name in names} - {""}
    if odd := sorted(named - set(known)):
        raise click.BadParameter(f"{option}: {odd[0]!r} is none of {', '.join(known)}")
    return tuple(name for name in known if not named or name in named)


def _open(path: Path | None, simulated: int | None, log_format: LogFormat) -> Log:
    from stream_ctr.logs.simulate import Simulation
    from stream_ctr.paper.reading import CLICK_DELAY_SECONDS

    if path is None:
        assert simulated is not None
        return Simulation(simulated, seed=log_format.seed)
    return log_format.open(path, click_delay_seconds=CLICK_DELAY_SECONDS)


def _repeat(log: Log, config: Config, options: Options, out: Path, *, restart: bool) -> None:
    """Read the log, do the runs that are not done yet, and write the report."""
    from rich.console import Console

    from stream_ctr.connectors.memory import BatchSource

    # All of these before any work: without matplotlib, the import of `report` fails.
    from stream_ctr.paper import facts, plan, reading, report, work

    def write_report(made: Plan) -> None:
        if runs := work.results(made, out):
            typed = shlex.join(["stream-ctr", *sys.argv[1:]])
            run_facts = facts.run_facts(made, typed, runs)
            report.write(out, runs, data=facts.data_facts(log, made), made=run_facts)
            click.echo(f"{out / 'report.html'}")

    console = Console(stderr=True)
    planned: list[Plan] = []
    with _interruptible(out, planned), work.locked(out):
        if restart:
            work.remove(out)
        limit = plan.QUICK_IMPRESSIONS if options.quick else None
        rows = reading.expected_rows(log, limit)
        size = reading.expected_bytes(log, config, rows)
        voice.say(work.requirements(config, options, rows, size))
        source = BatchSource(lambda: (batch.value for batch in log.batches()), name=log.identity)
        data = reading.read(log, source, config, out / "data", limit=limit, console=console)
        print_notes(data.metadata["notes"])
        made = plan.make_plan(data, config, options)
        planned.append(made)
        for line in work.estimate(made, out):
            voice.say(line)
        try:
            work.run(made, out, console=console)
        finally:  # what is done is reported if the command is interrupted too
            write_report(made)


@contextmanager
def _interruptible(out: Path, planned: Sequence[Plan]) -> Iterator[None]:
    """End with a message on Ctrl-C, and with an error that names the file on a full disk."""
    try:
        yield
    except KeyboardInterrupt:
        kept = "nothing was done yet"
        if planned:
            kept = f"what is done is kept in {out}, and the same command goes on from there"
        voice.say(f"\nstopped; {kept}")
        raise SystemExit(130) from None
    except OSError as error:
        raise DataError(f"{error.filename or out}: {error.strerror}") from None
